"""The head in EAGLE-3's form: against one vector after the other, learned, kept by a trainer, and written for others.

What stock vLLM makes of the folder: `tests/hosts/vllm/test_eagle_export.py`.
"""

from __future__ import annotations

import cmath
import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from rl_accel.speculator import export
from rl_accel.speculator.eagle import EagleHead, EagleShape, first_weights
from rl_accel.speculator.flat import normalized
from rl_accel.speculator.gate import SwapGate
from rl_accel.speculator.kinds import new_head, shape_of, shape_values
from rl_accel.speculator.learner import GAMMA, Learner, chain_loss, expected_accept

from .test_learning import replay_of, split
from .test_state import trainer_of
from .world import EAGLE, LAYOUT, SHAPE, rows_of


def head_of(shape: EagleShape, seed: int = 3) -> EagleHead:
    head = EagleHead(shape)
    with torch.no_grad():
        head.flat.copy_(first_weights(shape, seed))
        head.flat.add_(0.1 * torch.randn(shape.num_weights, generator=torch.Generator().manual_seed(seed)))
    return head


class NaiveEagle:
    """One layer over one token at a time, with a list for a KV cache; float64."""

    def __init__(self, head: EagleHead):
        self.shape = head.shape
        self.w = {name: weight.detach().double() for name, weight in head.weights().items()}

    def norm(self, x: torch.Tensor, gain: str) -> torch.Tensor:
        return x / math.sqrt(float(x @ x) / len(x) + 1e-6) * self.w[gain]

    def fused(self, aux_A: torch.Tensor) -> torch.Tensor:
        layers = aux_A.double().view(len(self.shape.layers), -1)
        return self.w["fc"] @ torch.cat([a * gain for a, gain in zip(layers, self.w["aux_norm"], strict=True)])

    def turned(self, x: torch.Tensor, position: int) -> list[float]:
        """RoPE: the numbers of the two halves are complex ones, each turned by its own angle."""
        half = len(x) // 2
        z = [
            complex(x[i], x[half + i]) * cmath.exp(1j * position * self.shape.rope_theta ** (-i / half))
            for i in range(half)
        ]
        return [c.real for c in z] + [c.imag for c in z]

    def step(self, h: torch.Tensor, token: int, position: int, cache: list) -> tuple[torch.Tensor, torch.Tensor, list]:
        """Return the next hidden state, logits, and the cache with this token."""
        shape, w, dim = self.shape, self.w, self.shape.head_dim
        x = torch.cat([self.norm(w["embed"][token], "embed_norm"), self.norm(h, "state_norm")])
        q, k, v = ((w[name] @ x).view(-1, dim) for name in "qkv")
        cache = [*cache, ([self.turned(key, position) for key in k], v)]
        outs = []
        for i in range(shape.num_heads):
            group = i // (shape.num_heads // shape.num_kv_heads)
            query = self.turned(q[i], position)
            scores = [sum(a * b for a, b in zip(query, keys[group], strict=True)) / dim**0.5 for keys, _ in cache]
            parts = [math.exp(s - max(scores)) for s in scores]
            outs.append(sum(p / sum(parts) * values[group] for p, (_, values) in zip(parts, cache, strict=True)))
        h = h + w["o"] @ torch.cat(outs)
        y = self.norm(h, "mlp_norm")
        gate = w["gate"] @ y
        h = h + w["down"] @ (gate * torch.sigmoid(gate) * (w["up"] @ y))
        return h, w["lm_head"] @ self.norm(h, "final_norm"), cache

    def chain(
        self, aux_TA: torch.Tensor, tokens_T: list[int], start: int, depth: int, first: int
    ) -> list[torch.Tensor]:
        """Logits of a chain from `start`, as an engine drafts: the text into the cache, then the chain's own steps.

        Args:
            first: the position of the first row; only differences should matter.
        """
        cache: list = []
        for t in range(start + 1):
            h, logits, cache = self.step(self.fused(aux_TA[t]), tokens_T[t], first + t, cache)
        found = [logits]
        for j in range(1, depth):
            h, logits, cache = self.step(h, tokens_T[start + j], first + start + j, cache)
            found.append(logits)
        return found


@pytest.mark.parametrize(
    "shape",
    [EAGLE, replace(EAGLE, num_heads=3, num_kv_heads=1, head_dim=6, width=20, layers=(1, 3, 4), rope_theta=1e6)],
    ids=["grouped", "odd"],
)
def test_chains_equal_an_engines_steps(shape: EagleShape) -> None:
    head, generator = head_of(shape), torch.Generator().manual_seed(0)
    num_aux = len(shape.layers)
    aux = normalized(torch.randn(2, 8, num_aux * shape.hidden_size, generator=generator), num_aux)
    tokens = torch.randint(0, shape.vocab_size, (2, 8, 3), generator=generator)
    chains = head.chain(aux, tokens, 4)
    assert [tuple(logits.shape) for logits in chains] == [(2, 7 - j, shape.vocab_size) for j in range(4)]
    naive = NaiveEagle(head)
    for b in range(2):
        for start in range(4):
            logits = naive.chain(aux[b], tokens[b, :, 0].tolist(), start, 4, first=17 * b)
            for j in range(4):
                torch.testing.assert_close(chains[j][b, start], logits[j].float(), rtol=1e-4, atol=1e-5)


def test_stretches_of_two_positions_and_more_depth_than_text() -> None:
    head = head_of(EAGLE)
    aux, tokens = torch.randn(3, 2, 2 * EAGLE.hidden_size), torch.zeros(3, 2, 1, dtype=torch.int64)
    assert [logits.shape[1] for logits in head.chain(aux, tokens, 5)] == [1]


def test_what_lies_behind_a_chain_does_not_change_it() -> None:
    """Nor do stretches of a batch each other, or padding: with poison behind, loss and gradients stay."""
    rows = rows_of(12, 9)
    batch = replay_of(rows).sample(60)
    head = head_of(EAGLE)
    found = []
    for poison in (0.0, 1e4):
        end = batch.valid_BT.sum(1) - 1
        behind = torch.arange(batch.valid_BT.shape[1])[None] >= end[:, None]
        batch.aux_BTA[behind] = poison
        head.zero_grad()
        loss = chain_loss(head, batch, 3)
        loss.backward()
        found.append([loss.detach(), *(weight.grad.clone() for weight in head.parameters())])
    for clean, poisoned in zip(*found, strict=True):
        torch.testing.assert_close(clean, poisoned)


@pytest.fixture(scope="module")
def learned():
    torch.set_num_threads(1)
    replay = replay_of(split(rows_of(150, 24), 2), capacity=8192)
    learner = Learner(EAGLE, first_weights(EAGLE, 0), 8e-3, 3)
    for _ in range(150):
        learner.step(replay.sample(256))
    return learner, replay.sample(1000, held_out=True)


def test_it_learns_the_policy_and_passes_the_gate(learned) -> None:
    learner, held_out = learned
    served = new_head(EAGLE)
    with torch.no_grad():
        served.flat.copy_(first_weights(EAGLE, 0))
    before = expected_accept(served, held_out, 3)
    gate = SwapGate(served, 3)
    assert gate.admit(learner.average.clone(), held_out) == ""
    assert gate.candidate_accept > 5 * before and gate.candidate_accept > 0.3
    assert gate.admit(torch.full_like(learner.average, float("nan")), held_out) == "not finite"
    assert gate.admit(first_weights(EAGLE, 0), held_out).startswith("accepts")
    assert torch.equal(gate.served.flat, learner.average)


def test_shapes_are_told_apart_and_survive_json() -> None:
    for shape in (EAGLE, SHAPE):
        assert shape_of(json.loads(json.dumps(shape_values(shape)))) == shape
    assert shape_of(vars(SHAPE)) == SHAPE, "files from before there were kinds"
    others = [replace(EAGLE, layers=(1, 3)), replace(EAGLE, rope_theta=5e5), replace(EAGLE, head_dim=4), SHAPE]
    assert len({shape.fingerprint() for shape in (EAGLE, *others)}) == 5
    with pytest.raises(ValueError, match="known are recurrent, eagle3"):
        shape_of({"kind": "medusa"})


def test_it_begins_with_the_policys_embeddings() -> None:
    embed = torch.randn(EAGLE.vocab_size, EAGLE.width)
    w = EAGLE.split(first_weights(EAGLE, 0, embed))
    assert float(torch.corrcoef(torch.stack([w["embed"].flatten(), embed.flatten()]))[0, 1]) > 0.999
    assert not torch.equal(w["embed"], embed), "an equal one vLLM would share with the policy"


@pytest.mark.parametrize("vocab_size", [EAGLE.vocab_size, 5000])
def test_loss_with_a_reduced_vocabulary_equals_one_position_after_the_other(vocab_size: int) -> None:
    """Of the policy's tokens only those that can be drafted count, also where 64 of many are kept."""
    layout = replace(LAYOUT, vocab_size=vocab_size)
    shape = replace(EAGLE, vocab_size=vocab_size, draft_vocab_size=vocab_size // 2, extra_tokens=(vocab_size - 3,))
    batch = replay_of(rows_of(12, 9, layout=layout), layout=layout).sample(60)
    head = head_of(shape)
    tokens = [*range(vocab_size // 2 - 1), vocab_size - 3]
    chains = head.chain(batch.aux_BTA, batch.tokens_BTN, 2)
    assert chains[0].shape[-1] == len(tokens)
    total, accepted, starts = 0.0, 0.0, 0
    paths: dict[tuple[int, int], float] = {}
    for j in range(2):
        losses = []
        for b, t in (batch.valid_BT[:, 1 + j :] & batch.valid_BT[:, : -1 - j]).nonzero().tolist():
            known = range(vocab_size) if batch.ids_BTk is None else batch.ids_BTk[b, t + 1 + j].tolist()
            policy = dict(zip(known, batch.target_BTV[b, t + 1 + j].tolist(), strict=True))
            log_q = dict(zip(tokens, chains[j][b, t].log_softmax(-1).tolist(), strict=True))
            losses.append(-sum(p * log_q[token] for token, p in policy.items() if token in log_q))
            paths[b, t] = paths.get((b, t), 1.0) * policy.get(max(log_q, key=log_q.__getitem__), 0.0)
            accepted, starts = accepted + paths[b, t], starts + (j == 0)
        total += GAMMA**j * sum(losses) / len(losses)
    assert float(chain_loss(head, batch, 2).detach()) == pytest.approx(total, rel=1e-4)
    assert expected_accept(head, batch, 2) == pytest.approx(accepted / starts, rel=1e-4)


def test_a_reduced_vocabulary_is_exported() -> None:
    with pytest.raises(ValueError, match="must ascend"):
        replace(EAGLE, draft_vocab_size=10, extra_tokens=(7, 23))
    shape = replace(EAGLE, draft_vocab_size=10, extra_tokens=(15, 23))
    found = export.tensors(shape, torch.zeros(shape.num_weights))
    assert (torch.arange(10) + found["d2t"]).tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 15, 23]
    assert found["t2d"].nonzero()[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 15, 23]
    assert found["lm_head.weight"].shape == (10, EAGLE.width)
    for made in (shape, EAGLE):
        assert export.shape_of_config(json.loads(json.dumps(export.config(made)))) == made


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """What a real trainer of this kind saves, and the file of a recurrent one."""
    folder = tmp_path_factory.mktemp("heads")
    for name, shape in (("eagle3", EAGLE), ("recurrent", SHAPE)):
        trainer = trainer_of(folder / "state" / f"{name}.pt", shape)
        try:
            assert "error" not in trainer.ask("save", path=str(folder / f"{name}.pt"))
        finally:
            trainer.close()
    return folder


def test_a_saved_head_is_exported_whole(saved, tmp_path, capsys) -> None:
    assert export.main([str(saved / "eagle3.pt"), str(tmp_path / "out")]) == 0
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    weights = load_file(tmp_path / "out" / "model.safetensors")
    expected = export.tensors(EAGLE, torch.load(saved / "eagle3.pt", weights_only=True)["served"])
    assert weights.keys() == expected.keys() and all(torch.equal(weights[name], expected[name]) for name in weights)
    assert sum(weight.numel() for weight in weights.values()) == EAGLE.num_weights
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert config["eagle_aux_hidden_state_layer_ids"] == [1, 2]


def test_a_trainer_refuses_the_file_of_another_kind(saved) -> None:
    trainer = trainer_of(saved / "state" / "other.pt", EAGLE)
    try:
        assert "another shape" in trainer.ask("open", path=str(saved / "recurrent.pt"))["error"]
        assert "error" not in trainer.ask("open", path=str(saved / "eagle3.pt"))
    finally:
        trainer.close()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda saved, path: None, "no such file"),
        (lambda saved, path: path.write_bytes((saved / "eagle3.pt").read_bytes()[:900]), "damaged"),
        (lambda saved, path: path.write_bytes((saved / "recurrent.pt").read_bytes()), "holds a recurrent head"),
        (lambda saved, path: torch.save({"shape": shape_values(EAGLE), "served": torch.zeros(5)}, path), "as many"),
        (
            lambda saved, path: torch.save(
                {"shape": shape_values(EAGLE), "served": torch.full((EAGLE.num_weights,), float("nan"))}, path
            ),
            "not finite",
        ),
    ],
    ids=["missing", "cut", "recurrent", "short", "nan"],
)
def test_what_cannot_be_exported_is_said_in_one_line(make, message, saved, tmp_path, capsys) -> None:
    make(saved, tmp_path / "head.pt")
    assert export.main([str(tmp_path / "head.pt"), str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert message in error and error.startswith("rl_accel: ") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
