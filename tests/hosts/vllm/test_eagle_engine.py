"""The head in EAGLE-3's form as vLLM's own drafter.

The engines: `eagle_engine.py`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rl_accel.speculator import export
from rl_accel.speculator.eagle import EagleHead, EagleShape, first_weights
from rl_accel.speculator.flat import normalized
from rl_accel.speculator.learner import Learner
from rl_accel.speculator.replay import Replay
from rl_accel.speculator.traces import RowLayout

from .speculator_engine import MAX_TOKENS, prompt
from .tiny_qwen import VOCAB_SIZE, build_model

ENGINE = Path(__file__).with_name("eagle_engine.py")
FIRST, EXTRA = 200, 30
"""Tokens that the exported head can draft: the first ones, and the most frequent ones of the others."""
SERVED = EagleShape(VOCAB_SIZE, 64, (1, 2), 64, 128, 2, 2, 32, 10000.0, 512)
"""What settings that say nothing else make for it."""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("eagle") / "model"
    build_model(folder)
    return folder


def traces_of(model: Path) -> tuple[RowLayout, dict[str, np.ndarray]]:
    """What an engine would leave of greedy texts, by transformers."""
    from transformers import AutoModelForCausalLM

    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    before_norm: list[torch.Tensor] = []
    policy.model.layers[-1].register_forward_hook(
        lambda module, args, output: before_norm.append(output[0] if isinstance(output, tuple) else output)
    )
    layout = RowLayout(2 * 64, 1, VOCAB_SIZE)
    found: dict[str, list] = {name: [] for name in layout.fields()}
    for request in range(64):
        start = torch.tensor([prompt(request % 12)]) if request < 12 else torch.randint(5, 45, (1, 20 + request % 12))
        with torch.inference_mode():
            text = policy.generate(start, max_new_tokens=MAX_TOKENS, min_new_tokens=MAX_TOKENS, do_sample=False)
            before_norm.clear()
            out = policy(text, output_hidden_states=True)
        aux = normalized(torch.cat([out.hidden_states[1][0], before_norm[0].reshape(-1, 64)], -1), 2)
        positions = np.arange(start.shape[1] - 1, text.shape[1] - 1)
        values = {
            "request": (request + 1) * 0x9E3779B97F4A7C15 % (1 << 62), "position": positions, "policy": 0, "draft": 1,
            "drafted": -1, "accepted": -1, "temperature": 0.05, "tokens": text[0, positions + 1][:, None].numpy(),
            "aux": aux[positions].numpy(), "target": out.logits[0, positions].numpy(),
        }  # fmt: skip
        for name, (dtype, _) in layout.fields().items():
            value = values[name]
            found[name].append(value if isinstance(value, np.ndarray) else np.full(len(positions), value, dtype))
    return layout, {name: np.concatenate(found[name]).astype(dtype) for name, (dtype, _) in layout.fields().items()}


@pytest.fixture(scope="module")
def trained(model) -> tuple[EagleShape, torch.Tensor]:
    """A head that has learned the policy's greedy texts, narrower than the policy and with a reduced vocabulary."""
    torch.manual_seed(0)
    layout, rows = traces_of(model)
    replay = Replay(layout, 8192, seed=1)
    replay.add(rows)
    frequent = np.bincount(rows["tokens"][:, 0], minlength=VOCAB_SIZE)[FIRST:].argsort()[-EXTRA:] + FIRST
    extra = tuple(sorted(frequent.tolist()))
    shape = EagleShape(VOCAB_SIZE, 64, (1, 2), 48, 96, 2, 2, 32, 10000.0, 512, FIRST + EXTRA, extra)
    learner = Learner(shape, first_weights(shape, 0), 8e-3, 4)
    for _ in range(120):
        learner.step(replay.sample(512))
    return shape, learner.flat.clone()


@pytest.fixture(scope="module")
def stock(model, trained, run_ranks, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("exported") / "draft"
    export.write(folder, *trained)
    (result,) = run_ranks(ENGINE, 1, "stock", str(model), str(folder), timeout=200)
    return result


def test_stock_vllm_drafts_what_the_head_says(stock, trained) -> None:
    """Every draft token of every step, against `EagleHead` over the same states and tokens from the text's begin."""
    shape, flat = trained
    head = EagleHead(shape)
    with torch.no_grad():
        head.flat.copy_(flat)
    aux: dict[str, dict[int, torch.Tensor]] = {}
    tokens: dict[str, dict[int, int]] = {}
    num_checked, num_equal = 0, 0
    for call in stock["calls"]:
        for i, request in enumerate(call["requests"]):
            start, end = int(call["starts"][i]), int(call["ends"][i])
            states, text = aux.setdefault(request, {}), tokens.setdefault(request, {})
            following = [*call["tokens"][start + 1 : end].tolist(), int(call["next_tokens"][i])]
            for row, token in zip(range(start, end), following, strict=True):
                states[int(call["positions"][row])], text[int(call["positions"][row])] = call["aux"][row], token
            last, drafts = int(call["positions"][end - 1]), call["drafts"][i].tolist()
            rows = normalized(torch.stack([states[t] for t in range(last + 1)]), 2)
            rows = torch.cat([rows, torch.zeros(len(drafts), rows.shape[1])])  # of drafted positions there are none
            seen = torch.tensor([[text[t] for t in range(last + 1)] + drafts])
            with torch.no_grad():
                chains = head.chain(rows[None], seen[..., None], len(drafts))
            for j, token in enumerate(drafts):
                logits = torch.full((VOCAB_SIZE,), -torch.inf)
                logits[head.draft_ids] = chains[j][0, last]
                num_equal += int(logits.argmax()) == token
                assert float(logits[token]) > float(logits.max()) - 1e-3, "another token is better"
                num_checked += 1
    drafted = torch.cat([call["drafts"].flatten() for call in stock["calls"]])
    assert (drafted >= FIRST + EXTRA).sum() > 10, "some ids are not their rows of the LM head"
    assert num_checked > 500 and num_equal > 0.999 * num_checked


def test_what_is_trained_here_is_accepted_there(stock) -> None:
    counts = stock["counts"]
    drafts, accepted = counts["vllm:spec_decode_num_drafts"], counts["vllm:spec_decode_num_accepted_tokens"]
    assert accepted > 0.5 * drafts > 50


@pytest.fixture(scope="module")
def engines(model, run_ranks):
    """MODE -> result, each engine started once."""
    results: dict[str, dict] = {}

    def run(mode: str, *args: str) -> dict:
        if mode not in results:
            (results[mode],) = run_ranks(ENGINE, 1, mode, str(model), *args, timeout=240)
        return results[mode]

    return run


def test_tokens_do_not_depend_on_what_is_served(engines) -> None:
    """Versions swapped in flight, random ones and poison, prompts prefilled in parts, two temperatures; while it
    learns, and while a version is taken back."""
    learned = engines("learns")
    plain = engines("plain", "0", "1", *map(str, learned["steps"]))["tokens"]
    assert learned["tokens"] == plain and engines("swaps")["tokens"] == plain[:2]


def test_a_swap_puts_the_published_weights_in_place_bit_for_bit(engines) -> None:
    """Also into what vLLM multiplies with, on a CPU otherwise packed copies; of a head that can draft 220 tokens."""
    swaps, shape = engines("swaps"), replace(SERVED, draft_vocab_size=220)
    for found in (swaps["first"], *swaps["served"]):
        assert torch.equal(found["served"], found["published"])
        w = shape.split(found["published"])
        torch.testing.assert_close(found["logits"][:, :220], found["x"] @ w["lm_head"].T)
        assert (found["logits"][:, 220:] == -torch.inf).all()
        torch.testing.assert_close(found["product"], torch.cat([found["x"]] * 2, -1) @ w["down"].T)
    assert len({found["version"] for found in swaps["served"]}) > 3


def test_poison_is_never_served(engines) -> None:
    swaps = engines("swaps")
    good = {version for kind, version in swaps["published"] if kind == "random"}
    assert {found["version"] for found in swaps["served"]} <= good | {1}
    assert all(torch.isfinite(found["served"]).all() for found in swaps["served"])
    metrics = swaps["state"]["metrics"]
    assert metrics["weights_refused"] >= sum(kind != "random" for kind, _ in swaps["published"]) - 1 > 3
    assert metrics["heads_off"] == metrics["train_steps"] == 0.0


def test_it_learns_while_the_engine_generates(engines) -> None:
    """To 0.6 accepted tokens a draft of three, on problems that do not repeat; random heads have next to none."""
    learned = engines("learns")
    last, random = learned["states"][-1], engines("swaps")["state"]["counts"]
    assert last["counts"]["num_accepted_tokens"] > 0.6 * last["counts"]["num_drafts"] > 100
    assert random["num_accepted_tokens"] < 0.1 * random["num_drafts"]
    metrics = last["metrics"]
    assert metrics["version"] > 2 and metrics["served_accept"] > 0.5 and metrics["heads_off"] == 0.0
    assert last["live"]["features"]["draft"] == "head" and last["live"]["features"]["speculator"] == "learning"
    assert 2 * last["counts"]["num_drafts"] < last["counts"]["num_draft_tokens"] <= 3 * last["counts"]["num_drafts"]


def test_the_policy_moves_without_the_draft_and_the_draft_without_the_policy(engines) -> None:
    """And the draft began with the policy's embeddings, in tensors of its own."""
    learned = engines("learns")
    first, before, after = learned["policy"]
    assert torch.equal(first, before), "learning and swaps leave the policy as it was"
    torch.testing.assert_close(after, 1.5 * before)
    drafts = learned["draft"]
    assert torch.equal(drafts[0]["served"], drafts[1]["served"]) and drafts[0]["version"] == drafts[1]["version"]
    pair = torch.stack([first[:VOCAB_SIZE].flatten(), learned["first"].flatten()])
    assert float(torch.corrcoef(pair)[0, 1]) > 0.999


def test_head_and_version_survive_a_checkpoint_that_can_be_exported(engines, tmp_path) -> None:
    learned = engines("learns")
    assert learned["open"]["num_steps"] == learned["save"]["num_steps"] > 0
    assert learned["open"]["version"] == learned["save"]["version"] == learned["opened"]["version"]
    shape, flat = export.read(Path(learned["path"]))
    assert shape == SERVED and torch.equal(flat, learned["opened"]["served"])


def test_a_version_that_does_worse_is_taken_back(engines) -> None:
    """Random weights after a version that was accepted: after 256 drafts the draft has the former ones, bit for bit."""
    learned = engines("learns")
    # A young draft may have been taken back before, while it learned.
    assert learned["after"]["metrics"]["rolled_back"] == learned["before"]["metrics"]["rolled_back"] + 1.0
    assert learned["back"]["version"] == learned["kept"]["version"]
    assert torch.equal(learned["back"]["served"], learned["kept"]["served"])
    accepted, drafts = [
        sum(learned[when]["counts"][what] for when in ("before", "after"))
        for what in ("num_accepted_tokens", "num_drafts")
    ]
    assert accepted > 0.3 * drafts
