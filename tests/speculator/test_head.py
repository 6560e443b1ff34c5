"""The head as it is trained against one position after the other, and as it is served against both."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from rl_accel.speculator import head as heads
from rl_accel.speculator.flat import EPS, normalized
from rl_accel.speculator.head import DraftHead, HeadShape, first_weights
from rl_accel.speculator.served import ServedHead, fold, folded_sizes, num_folded

from .world import SHAPE


def head_of(shape: HeadShape, seed: int = 3) -> DraftHead:
    head = DraftHead(shape)
    with torch.no_grad():
        head.flat.copy_(first_weights(shape, seed))
        head.flat.add_(0.1 * torch.randn(shape.num_weights, generator=torch.Generator().manual_seed(seed)))
    return head


def naive_logits(head: DraftHead, aux_A: torch.Tensor, tokens: list[torch.Tensor]) -> list[torch.Tensor]:
    """The formulas of head.py, one vector at a time; `tokens`: what the head sees at each depth."""
    w, shape = head.weights(), head.shape
    rms = lambda x: x / (x.square().mean() + EPS).sqrt()  # noqa: E731
    layers = aux_A.view(shape.num_aux, shape.hidden_size) * w["aux_norm"]
    h, out = w["fc"] @ layers.flatten(), []
    for seen in tokens:
        parts = [rms(w["embed"][token]) * w["embed_norm"] for token in seen]
        h = h + w["mix"] @ torch.cat([*parts, rms(h) * w["state_norm"]])
        gate, up = (w["gate_up"] @ (rms(h) * w["mlp_norm"])).chunk(2)
        h = h + w["down"] @ (F.silu(gate) * up)
        out.append(w["lm_head"] @ (rms(h) * w["final_norm"]))
    return out


@pytest.mark.parametrize("vocab_size", [24, heads.MAX_TABLE + 5])
@pytest.mark.parametrize("history", [0, 2])
def test_chains_equal_one_position_after_the_other(vocab_size: int, history: int) -> None:
    shape = replace(SHAPE, vocab_size=vocab_size, history=history)
    head, generator = head_of(shape), torch.Generator().manual_seed(0)
    aux = normalized(torch.randn(2, 7, shape.num_aux * shape.hidden_size, generator=generator), shape.num_aux)
    tokens = torch.randint(0, vocab_size, (2, 7, history + 1), generator=generator)
    chains = head.chain(aux, tokens, 4)
    assert [tuple(logits.shape) for logits in chains] == [(2, 6 - j, vocab_size) for j in range(4)]
    for b in range(2):
        for t in range(3):
            naive = naive_logits(head, aux[b, t], [tokens[b, t + j] for j in range(4)])
            for j in range(4):
                torch.testing.assert_close(chains[j][b, t], naive[j], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("vocab_size", [24, heads.MAX_TABLE + 5])
def test_what_is_served_is_what_was_trained(vocab_size: int) -> None:
    """Greedy drafts and path probabilities of the folded head, against the formulas."""
    shape = replace(SHAPE, vocab_size=vocab_size)
    head = head_of(shape)
    folded = fold(shape, head.flat)
    assert len(folded) == num_folded(shape) == sum(torch.Size(s).numel() for s in folded_sizes(shape).values())
    served = ServedHead(shape, torch.zeros_like(folded))
    storage = served._flat.data_ptr()
    served.load(folded)
    assert served._flat.data_ptr() == storage and served.memory_bytes() == 4 * len(folded)
    aux = normalized(torch.randn(3, shape.num_aux * shape.hidden_size), shape.num_aux)
    tokens = torch.randint(0, vocab_size, (3, shape.history + 1))
    drafts, paths = served.draft(aux, tokens, 5, torch.full((3,), 1e-6))
    for r in range(3):
        seen, path = tokens[r], 1.0
        states = [seen]
        for j in range(drafts.shape[1]):
            logits = naive_logits(head, aux[r], states)[-1]
            assert int(drafts[r, j]) == int(logits.argmax())
            path *= float(logits.detach().softmax(-1).max())
            assert float(paths[r, j]) == pytest.approx(path, rel=1e-3)
            seen = torch.cat([drafts[r, j : j + 1], seen[:-1]])
            states.append(seen)


def test_chains_end_where_a_token_is_not_worth_it() -> None:
    served = ServedHead(SHAPE, fold(SHAPE, head_of(SHAPE).flat))
    aux = normalized(torch.randn(4, SHAPE.num_aux * SHAPE.hidden_size), SHAPE.num_aux)
    tokens = torch.randint(0, SHAPE.vocab_size, (4, SHAPE.history + 1))
    assert served.draft(aux, tokens, 6, torch.full((4,), 1e-6))[0].shape == (4, 6)
    assert served.draft(aux, tokens, 6, torch.full((4,), 2.0))[0].shape == (4, 1)
    assert served.draft(aux, tokens, 6, torch.full((4,), 1e-6), min_step_gain=1e12)[0].shape == (4, 1)
    drafts, sure = served.draft(aux, tokens, 3, torch.full((4,), 1e-6))
    same, unsure = served.draft(aux, tokens, 3, torch.full((4,), 1e-6), temperatures=(2.0, 1.0, 4.0))
    assert torch.equal(drafts, same) and (unsure < sure).all(), "temperatures change probabilities, never drafts"
    torch.testing.assert_close(unsure[:, 1] / unsure[:, 0], sure[:, 1] / sure[:, 0])


def test_first_weights_take_over_what_fits() -> None:
    embed = torch.randn(SHAPE.vocab_size, SHAPE.width)
    w = SHAPE.split(first_weights(SHAPE, 0, embed))
    assert float(torch.corrcoef(torch.stack([w["embed"].flatten(), embed.flatten()]))[0, 1]) > 0.999
    assert torch.equal(first_weights(SHAPE, 5), first_weights(SHAPE, 5))
    other = torch.randn(SHAPE.vocab_size, SHAPE.width + 1)
    assert torch.equal(first_weights(SHAPE, 0, other), first_weights(SHAPE, 0))


def test_shapes_are_told_apart() -> None:
    others = [
        replace(SHAPE, **{name: getattr(SHAPE, name) + 1}) for name in ("vocab_size", "width", "inner", "history")
    ]
    assert len({SHAPE.fingerprint(), *(shape.fingerprint() for shape in others)}) == 5
