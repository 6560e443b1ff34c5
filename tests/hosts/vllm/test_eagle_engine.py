"""The head in EAGLE-3's form as vLLM's own drafter.

The engines: `eagle_engine.py`.
"""

from __future__ import annotations

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
SHAPE = EagleShape(VOCAB_SIZE, 64, (1, 2), 48, 96, 2, 2, 32, 10000.0, 512)
"""Narrower than the policy, of two heads of 32 as it is."""


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
def trained(model) -> torch.Tensor:
    """A head that has learned the policy's greedy texts."""
    torch.manual_seed(0)
    layout, rows = traces_of(model)
    replay = Replay(layout, 8192, seed=1)
    replay.add(rows)
    learner = Learner(SHAPE, first_weights(SHAPE, 0), 8e-3, 4)
    for _ in range(120):
        learner.step(replay.sample(512))
    return learner.flat.clone()


@pytest.fixture(scope="module")
def stock(model, trained, run_ranks, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("exported") / "draft"
    export.write(folder, SHAPE, trained)
    (result,) = run_ranks(ENGINE, 1, "stock", str(model), str(folder), timeout=200)
    return result


def test_stock_vllm_drafts_what_the_head_says(stock, trained) -> None:
    """Every draft token of every step, against `EagleHead` over the same states and tokens from the text's begin."""
    head = EagleHead(SHAPE)
    with torch.no_grad():
        head.flat.copy_(trained)
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
                logits = chains[j][0, last]
                num_equal += int(logits.argmax()) == token
                assert float(logits[token]) > float(logits.max()) - 1e-3, "another token is better"
                num_checked += 1
    assert num_checked > 500 and num_equal > 0.999 * num_checked


def test_what_is_trained_here_is_accepted_there(stock) -> None:
    counts = stock["counts"]
    drafts, accepted = counts["vllm:spec_decode_num_drafts"], counts["vllm:spec_decode_num_accepted_tokens"]
    assert accepted > 0.5 * drafts > 50
