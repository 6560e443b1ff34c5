"""Drafting ahead: what the engine keeps of drafts that cross with what the policy writes, and the real process."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from rl_accel.draft.ahead.client import AheadClient, Draft
from rl_accel.draft.ahead.messages import Kind, Packet, Sampling
from rl_accel.draft.ahead.writer import Text, Writer
from rl_accel.draft.config import DraftConfig
from rl_accel.errors import ConfigError
from rl_accel.kernels.gumbel_argmax.api import gumbel_argmax

from ..hosts.vllm.tiny_qwen import VOCAB_SIZE, build_model


@pytest.mark.parametrize("seed", range(40))
def test_a_draft_follows_the_text_that_it_was_written_behind(seed: int) -> None:
    """Packets of both sides cross at random; whatever the engine holds was drafted behind exactly its text."""
    rng = random.Random(seed)
    text, draft = Text(Qwen2Config(), [1, 2], Sampling(), limit=10**6), Draft(1, [1, 2])
    to_process: list[Packet] = []
    to_engine: list[Packet] = []
    written_behind: dict[tuple[int, ...], set[int]] = {}
    num_held = num_accepted = num_left = 0
    for _ in range(2000):
        act = rng.random()
        if act < 0.5:  # the process writes; few words, so that it is right now and then
            token, position = rng.randrange(2), len(text.ids)
            written_behind.setdefault(tuple(text.ids), set()).add(token)
            text.ids.append(token)
            to_engine.append(Packet(Kind.TOKENS, 1, text.num_read, position, tokens=[token]))
        elif act < 0.65 and to_process:
            packet = to_process.pop(0)
            text.verify(packet.position, packet.tokens)
            text.num_read = packet.count
        elif act < 0.9 and to_engine:
            for _ in range(rng.randint(1, len(to_engine))):
                packet = to_engine.pop(0)
                draft.receive(packet.position, packet.count, packet.tokens)
        elif act >= 0.9:  # an engine step
            accepted = draft.ahead[: rng.randrange(4)]
            num_accepted += len(accepted)
            num_left += len(draft.ahead) > len(accepted)
            tokens, position = [*accepted, rng.randrange(2)], len(draft.ids)
            draft.verify(tokens)
            to_process.append(Packet(Kind.VERIFIED, 1, draft.num_sent, position, tokens=tokens))
        for i, token in enumerate(draft.ahead):
            assert token in written_behind[tuple(draft.ids + draft.ahead[:i])]
        num_held += len(draft.ahead)
    for packet in to_process:
        text.verify(packet.position, packet.tokens)
        text.num_read = packet.count
    for packet in to_engine:
        draft.receive(packet.position, packet.count, packet.tokens)
    assert draft.ids + draft.ahead == text.ids, "both have heard everything, and nothing is lost"
    assert num_held > 100 and num_accepted > 5 and num_left > 5


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ahead") / "model"
    build_model(folder)
    return folder


def by_hand(model, ids: list[int], count: int, key: int, temperature: float) -> list[int]:
    """What the model writes with the noise of a key, without a cache."""
    found = list(ids)
    for _ in range(count):
        logits = model(torch.tensor([found])).logits[:, -1].double()
        if temperature:
            position = torch.tensor([len(found)])
            token = gumbel_argmax(logits / temperature, torch.tensor([key]), position)
        else:
            token = logits.argmax(-1)
        found.append(int(token))
    return found[len(ids) :]


@torch.inference_mode()
def test_a_text_is_written_on_behind_what_the_policy_wrote(model) -> None:
    """With the policy's noise, whatever was taken back on the way."""
    lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    writer = Writer(lm, [0], max_ahead=8)
    writer.begin(3, [5, 6, 7], Sampling(77, 1.0), limit=40)
    writer.begin(4, [5, 6, 7], Sampling(), limit=5)
    turns = [writer.next() for _ in range(6) if writer.write(writer.next()) or True]
    assert writer.texts[4].ids[3:] == by_hand(lm, [5, 6, 7], 2, 0, 0.0) and set(turns) == {3, 4}
    text = writer.texts[3]
    while writer.next() == 3:
        writer.write(3)
    assert text.num_ahead == 8 and text.ids[3:] == by_hand(lm, [5, 6, 7], 8, 77, 1.0)
    other = (text.ids[5] + 1) % VOCAB_SIZE
    text.verify(3, [*text.ids[3:5], other])
    assert text.num_ahead == 0 and writer.next() == 3
    verified = list(text.ids)
    for _ in range(3):
        writer.write(3)
    assert text.ids[6:] == by_hand(lm, verified, 3, 77, 1.0)
    text.verify(6, text.ids[6:9])  # all right, and it is still ahead of nothing
    assert text.num_ahead == 0
    writer.end(3)
    writer.end(4)
    assert writer.next() is None


@torch.inference_mode()
def test_the_process_drafts_ends_and_is_missed(model) -> None:
    lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    client = AheadClient(str(model), [0], max_ahead=6)
    try:
        assert client.wait_ready(120) and client.vocab_size == VOCAB_SIZE
        draft = client.begin([5, 6, 7], Sampling(9, 1.0), limit=64)
        expected = by_hand(lm, [5, 6, 7], 12, 9, 1.0)
        assert _read_until(client, lambda: len(draft.ahead) == 6) and draft.ahead == expected[:6]
        client.verify(draft, expected[:4])
        assert draft.ahead == expected[4:6]
        assert _read_until(client, lambda: len(draft.ahead) == 6) and draft.ahead == expected[4:10]
        client.verify(draft, [(expected[4] + 1) % VOCAB_SIZE])
        assert draft.ahead == []
        wanted = by_hand(lm, draft.ids, 6, 9, 1.0)
        assert _read_until(client, lambda: len(draft.ahead) == 6) and draft.ahead == wanted
        assert 0.0 < client.seconds < 1.0
        client.end(draft)
        os.kill(client.pid, signal.SIGKILL)
        assert _read_until(client, lambda: not client.alive) and not client.ready
        client.verify(draft, [1])  # a process that is gone harms nobody
    finally:
        client.close()


def test_the_process_ends_with_the_engine(model) -> None:
    script = (
        "import sys, time\nfrom rl_accel.draft.ahead.client import AheadClient\n"
        f"client = AheadClient({str(model)!r}, [0], 6)\nprint(client.pid, flush=True)\ntime.sleep(600)\n"
    )
    engine = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    pid = int(engine.stdout.readline())
    engine.kill()
    engine.wait()
    deadline = time.monotonic() + 30
    while os.path.exists(f"/proc/{pid}") and time.monotonic() < deadline:
        if Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    assert not os.path.exists(f"/proc/{pid}")


def test_a_model_that_is_not_there_is_noticed(tmp_path) -> None:
    client = AheadClient(str(tmp_path / "none"), [0], 6)
    assert not client.wait_ready(120) and not client.alive
    client.close()


def test_the_method_needs_a_model() -> None:
    with pytest.raises(ConfigError, match="set both or neither"):
        DraftConfig(method="ahead")
    assert DraftConfig(method="ahead", model="x").max_draft == 24


def _read_until(client: AheadClient, done) -> bool:
    deadline = time.monotonic() + 60
    while not done() and time.monotonic() < deadline:
        client.read(0.05)
    return done()
