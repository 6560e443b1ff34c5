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
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from rl_accel.draft.ahead.client import AheadClient, Draft
from rl_accel.draft.ahead.lean import LeanModel, StockCache, StockModel, model_of
from rl_accel.draft.ahead.messages import Kind, Packet, Sampling
from rl_accel.draft.ahead.predict import predicted_seconds
from rl_accel.draft.ahead.writer import Text, Writer
from rl_accel.draft.config import DraftConfig
from rl_accel.errors import ConfigError
from rl_accel.kernels.gumbel_argmax.api import gumbel_argmax

from ..hosts.vllm.tiny_qwen import VOCAB_SIZE, build_model


@pytest.mark.parametrize("seed", range(40))
def test_a_draft_follows_the_text_that_it_was_written_behind(seed: int) -> None:
    """Packets of both sides cross at random; whatever the engine holds was drafted behind exactly its text."""
    rng = random.Random(seed)
    text, draft = Text(StockCache(Qwen2Config()), [1, 2], Sampling(), limit=10**6), Draft(1, [1, 2])
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


SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 97,
    "num_key_value_heads": 2, "max_position_embeddings": 600, "initializer_range": 0.2,
}  # fmt: skip
SHAPES = {
    "qwen2": Qwen2Config(**SMALL),
    "llama": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "llama3": LlamaConfig(
        **SMALL,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "qwen3": Qwen3Config(**SMALL, head_dim=32),
    "mistral": MistralConfig(**SMALL, sliding_window=None),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_the_lean_form_gives_the_logits_of_transformers(name: str) -> None:
    """Token by token, several at a time, behind a cut, and beyond the room that a cache has at first."""
    torch.manual_seed(1)
    lm = AutoModelForCausalLM.from_config(SHAPES[name]).eval()
    with torch.no_grad():
        for parameter_name, parameter in lm.named_parameters():
            if parameter_name.endswith(("bias", "norm.weight")):
                parameter.add_(0.3 * torch.randn_like(parameter))
    lean = model_of(lm)
    assert isinstance(lean, LeanModel)
    ids = torch.randint(97, (400,), generator=torch.Generator().manual_seed(2)).tolist()
    with torch.inference_mode():
        expected = lm(torch.tensor([ids])).logits[0]
        cache, position = lean.new_cache(), 0
        for count in (7, 1, 1, 5, 230, 1, 120, 1):
            found = lean.logits(ids[position : position + count], cache)
            position += count
            torch.testing.assert_close(found, expected[position - 1], rtol=2e-4, atol=2e-4)
        cache.cut(250)
        torch.testing.assert_close(lean.logits(ids[250:300], cache), expected[299], rtol=2e-4, atol=2e-4)


def test_a_model_of_another_shape_is_computed_by_transformers() -> None:
    """GPT-2, a window, and one that only looks like Llama."""
    gpt2 = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=97, n_positions=64)
    window = MistralConfig(**SMALL, sliding_window=8)
    for config in (gpt2, window):
        assert isinstance(model_of(AutoModelForCausalLM.from_config(config).eval()), StockModel)
    other = AutoModelForCausalLM.from_config(SHAPES["llama"]).eval()
    other.model.layers[0].mlp.act_fn = torch.nn.ReLU()
    assert isinstance(model_of(other), StockModel)


def test_a_window_that_has_let_go_is_read_anew() -> None:
    torch.manual_seed(1)
    lm = AutoModelForCausalLM.from_config(MistralConfig(**SMALL, sliding_window=8)).eval()
    model, ids = StockModel(lm), torch.randint(97, (30,), generator=torch.Generator().manual_seed(2)).tolist()
    cache = model.new_cache()
    model.logits(ids, cache)
    cache.cut(20)
    with torch.inference_mode():
        expected = lm(torch.tensor([ids[:25]])).logits[0, -1]
    torch.testing.assert_close(model.logits(ids[cache.length : 25], cache), expected, rtol=2e-4, atol=2e-4)


def test_what_to_expect_of_it() -> None:
    """A draft that is always right: as many steps as drafts fill, or as fast as it writes; one that never is: plain."""
    assert predicted_seconds([True] * 100, 1e-6, 1.0, 24) == pytest.approx(4, rel=1e-3)
    assert predicted_seconds([True] * 1000, 0.5, 1.0, 24) == pytest.approx(500, rel=0.02)
    assert predicted_seconds([False] * 100, 0.1, 1.0, 24) == pytest.approx(100, rel=1e-3)
    # Right 9 of 10 times, in order: a run of ten is drafted while the wrong token before it is verified, or waited for.
    assert 10 < predicted_seconds(([True] * 9 + [False]) * 10, 0.01, 1.0, 24) < 22
    slow = predicted_seconds(([True] * 9 + [False]) * 10, 2.0, 1.0, 24)
    assert 90 < slow <= 100.001, "a draft slower than the policy is never waited for"


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
    writer = Writer(model_of(lm), [0], max_ahead=8)
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
    few = Writer(model_of(lm), [], max_ahead=30, vocab_size=3)
    few.begin(1, [5, 6, 7], Sampling(77, 1.0), limit=400)
    assert {few.write(1) for _ in range(30)} == {0, 1, 2}, "the policy knows no others"


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
    deadline = time.monotonic() + 120  # it may still be importing torch
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
    assert DraftConfig(method="ahead", model="x").max_draft == 32


def _read_until(client: AheadClient, done) -> bool:
    deadline = time.monotonic() + 60
    while not done() and time.monotonic() < deadline:
        client.read(0.05)
    return done()
