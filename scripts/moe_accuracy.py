"""What low-bit experts cost a policy: error of the weights, likelihood, divergence and accuracy, by method and bytes.

    python scripts/moe_accuracy.py [--model PATH] [--parts fro,likelihood,accuracy] [--tokens 24000] [--json FILE]

Weights (`fro`): relative Frobenius error on three sets: Gaussian, heavy tails on a low-rank part with outlier columns,
and the policy's experts. Likelihood: mean negative log-likelihood of the answers to fresh problems, and KL of the
policy in float32 to the quantized one, per answer token. Accuracy: at temperature 1 on test problems.

    moe.fro.<set>.<method>        rtn, hqq, ls, milo (ours) and released (its algorithm: HQQ, randomized SVD, factors in
                                  3 bits after ten rounds), all in 3 bits; `.equal` in no more bytes than milo
    moe.nll.<layers>.<method>     nats a token more than in float32; `bits`, `kl`, `fro` beside it
    moe.nll_back.<bits>           share of the loss of HQQ that ours wins back in no more bytes
    moe.accuracy.<method>

<layers>: `experts`, or `all` linear layers but routers. Methods there: name, bits, group, rank.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from make_policy import evaluate, training_batches

import rl_accel
from rl_accel import machine
from rl_accel.hosts import versions
from rl_accel.kernels.moe_int3 import api
from rl_accel.moe import budget
from rl_accel.moe.bases import BASES
from rl_accel.moe.compress import Method, compress
from rl_accel.moe.low_rank import low_rank
from rl_accel.quickstart import problems

POLICY = Path(rl_accel.__file__).parent / "quickstart" / "moe_policy"
ROUNDS = 20
Quantize = Callable[[torch.Tensor], tuple[torch.Tensor, float]]
"""[E, N, K] to what stands for it, and its bytes."""


def plain(base: str, bits: int, group: int, unbiased: bool = False) -> Quantize:
    return milo(base, bits, group, 0, unbiased=unbiased)


def milo(base: str, bits: int, group: int, rank: int, rounds: int = ROUNDS, unbiased: bool = False) -> Quantize:
    def quantize(w: torch.Tensor) -> tuple[torch.Tensor, float]:
        found = compress(w, bits, group, [rank] * len(w), Method(base, rounds, unbiased=unbiased))
        return found.weight(), found.memory_bytes()

    return quantize


def released(bits: int, rank: int) -> Quantize:
    """The published code: ten rounds of HQQ and randomized SVD, then factors in 3 bits by the largest value."""

    def quantize(w: torch.Tensor) -> tuple[torch.Tensor, float]:
        u = v = None
        for _ in range(10):
            target = w if u is None or v is None else w - u @ v
            matrix = BASES["hqq"](target.contiguous(), bits, 64)
            codes = api.dequantize(matrix)
            u, v = low_rank(w - codes, rank, "randomized")
        size = matrix.memory_bytes() + (u.numel() + v.numel()) * (3 / 8 + 2 / 64)
        return codes + _three_bits(u.mT).mT @ _three_bits(v), size

    return quantize


def _three_bits(x: torch.Tensor) -> torch.Tensor:
    padded = torch.nn.functional.pad(x, (0, -x.shape[-1] % 64)).unflatten(-1, (-1, 64))
    scale = padded.amax(-1, keepdim=True)
    scale = torch.where(scale > 0, scale, padded.abs().amax(-1, keepdim=True).clamp(min=1e-12))
    codes = (padded * 3.5 / scale).round().clamp(-4, 3)
    return (codes * scale / 3.5).flatten(-2)[..., : x.shape[-1]]


def gaussian(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def heavy(*shape: int) -> torch.Tensor:
    """Student t with 4 degrees of freedom on a low-rank part, every 37th column three times as large."""
    scale = sum(gaussian(*shape, seed=10 + i) ** 2 for i in range(4)) / 4
    w = 0.7 * gaussian(*shape, seed=1) / scale.sqrt()
    w += 0.3 * gaussian(*shape[:2], 8, seed=2) @ gaussian(shape[0], 8, shape[2], seed=3)
    w[..., ::37] *= 3
    return w


def frobenius(model: Any) -> list[dict[str, Any]]:
    sets = {
        "gaussian": [gaussian(4, 512, 256, seed=0), gaussian(2, 1024, 768, seed=0)],
        "heavy": [heavy(4, 512, 256), heavy(2, 1024, 768)],
        "policy": [w.data for name, w in model.named_parameters() if ".experts." in name],
    }
    rank = 16
    methods: dict[str, Quantize] = {
        "rtn": plain("rtn", 3, 64), "hqq": plain("hqq", 3, 64), "ls": plain("ls", 3, 64),
        "rtn.equal": plain("rtn", 3, 32), "hqq.equal": plain("hqq", 3, 32), "ls.equal": plain("ls", 3, 32),
        "released": released(3, rank), "milo": milo("ls", 3, 64, rank), "milo.rounds4": milo("ls", 3, 64, rank, 4),
    }  # fmt: skip
    rows = []
    for kind, matrices in sets.items():
        results = {}
        for name, quantize in methods.items():
            found = [(w, *quantize(w)) for w in matrices]
            bits = 8 * sum(size for _, _, size in found) / sum(w.numel() for w in matrices)
            results[name] = (mean_error([(w, hat) for w, hat, _ in found]), bits)
        # A group of 32 costs half a bit; the rank that fits into as much, for "at equal bits".
        equal = []
        for w in matrices:
            room = w[0].numel() * 0.5 / 8
            equal.append((w, *milo("ls", 3, 64, int(room // budget.rank_bytes(*w.shape[1:])))(w)))
        bits = 8 * sum(size for _, _, size in equal) / sum(w.numel() for w in matrices)
        results["milo.equal"] = (mean_error([(w, hat) for w, hat, _ in equal]), bits)
        for name, (error, bits) in results.items():
            reference = {"milo": "released", "milo.rounds4": "released", "milo.equal": "ls.equal"}.get(name)
            incumbent = results[reference][0] if reference else None
            rows.append(row(f"moe.fro.{kind}.{name}", error, "1", incumbent, bits=round(bits, 3)))
    return rows


def mean_error(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    errors = [(w - hat).flatten(1).norm(dim=1) / w.flatten(1).norm(dim=1) for w, hat in pairs]
    return float(torch.cat(errors).mean())


class Subject:
    """A policy, the answers it is judged by, and its log-probs in float32."""

    def __init__(self, model: Any, tokenizer: Any, tokens: int, seed: int):
        self.model, self.tokenizer = model, tokenizer
        self.quantized = copy.deepcopy(model)
        self.batches = list(training_batches(tokenizer, max(1, tokens // 4096), 4096, 0.6, seed))
        with torch.no_grad():
            self.wanted = [self._log_probs(model, *batch) for batch in self.batches]

    @staticmethod
    def _log_probs(model: Any, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return model(input_ids=ids, use_cache=False).logits[:, :-1][labels[:, 1:] != -100].log_softmax(-1)

    def groups(self, layers: str) -> Iterator[list[str]]:
        """Yield the names of parameters that are quantized as one, as an engine fuses them."""
        for name, parameter in self.model.named_parameters():
            if ".experts." in name:
                yield [name]
            elif layers == "all" and parameter.dim() == 2 and name.endswith("_proj.weight"):
                prefix, _, part = name.removesuffix(".weight").rpartition(".")
                fused = {"q_proj": ("q_proj", "k_proj", "v_proj"), "gate_proj": ("gate_proj", "up_proj")}.get(part)
                if part not in ("k_proj", "v_proj", "up_proj"):
                    yield [f"{prefix}.{p}.weight" for p in fused or (part,)]

    def matrices(self, layers: str) -> dict[tuple[str, ...], torch.Tensor]:
        weights = dict(self.model.named_parameters())
        found = {}
        for names in self.groups(layers):
            w = torch.cat([weights[name].data for name in names], dim=-2)
            found[tuple(names)] = w.reshape(-1, *w.shape[-2:]).contiguous()
        return found

    def put(self, layers: str, quantize: Callable[[tuple[str, ...], torch.Tensor], tuple[torch.Tensor, float]]) -> dict:
        """Quantize a copy of the policy; returns bits a weight and the mean error."""
        weights = dict(self.quantized.named_parameters())
        originals = dict(self.model.named_parameters())
        for name, weight in weights.items():
            weight.data.copy_(originals[name].data)
        size, count, pairs = 0.0, 0, []
        for names, w in self.matrices(layers).items():
            hat, bytes_ = quantize(names, w)
            size, count = size + bytes_, count + w.numel()
            pairs.append((w, hat))
            parts = hat.reshape(*originals[names[0]].shape[:-2], -1, w.shape[-1])
            for name, part in zip(names, parts.split([originals[n].shape[-2] for n in names], dim=-2), strict=True):
                weights[name].data.copy_(part)
        return {"bits": round(8 * size / count, 3), "fro": mean_error(pairs)}

    @torch.no_grad()
    def judge(self) -> dict[str, float]:
        """Return nats a token more than in float32, and KL, with the standard error of it over tokens."""
        more, kl = [], []
        for (ids, labels), wanted in zip(self.batches, self.wanted, strict=True):
            found = self._log_probs(self.quantized, ids, labels)
            answers = labels[:, 1:][labels[:, 1:] != -100][:, None]
            more.append((wanted - found).gather(1, answers)[:, 0])
            kl.append((wanted.exp() * (wanted - found)).sum(-1))
        more_T, kl_T = torch.cat(more).double(), torch.cat(kl).double()
        return {
            "nll": float(more_T.mean()),
            "nll_error": float(more_T.std() / len(more_T) ** 0.5),
            "kl": float(kl_T.mean()),
            "kl_error": float(kl_T.std() / len(kl_T) ** 0.5),
        }

    def accuracy(self, count: int, samples: int, seed: int) -> float:
        asked = problems.generate(count, seed=seed, split="test")
        return float(evaluate(self.quantized, self.tokenizer, asked, samples, seed)["accuracy_t1"])


def budgeted(subject: Subject, layers: str, bits: float) -> Callable:
    """Return bits and ranks by error per byte, chosen for all matrices together."""
    found = subject.matrices(layers)
    curves = {" ".join(names): budget.curves(w, 64) for names, w in found.items()}
    plan = budget.allocate(curves, int(bits * sum(w.numel() for w in found.values()) / 8))

    def quantize(names: tuple[str, ...], w: torch.Tensor) -> tuple[torch.Tensor, float]:
        tensor = plan[" ".join(names)]
        result = compress(w, tensor.bits, 64, tensor.ranks, Method(alternations=ROUNDS))
        return result.weight(), result.memory_bytes()

    return quantize


def methods(subject: Subject, layers: str) -> dict[str, Callable]:
    """Name -> quantizer of (names, weights). HQQ in groups of 32 takes half a bit more than in groups of 64."""
    found: dict[str, Callable] = {}
    for bits in (3, 2):
        for base in ("rtn", "hqq", "ls"):
            for group in (64, 32):
                found[f"{base}.{bits}.g{group}"] = _ignoring_names(plain(base, bits, group))
        found[f"ls_unbiased.{bits}.g64"] = _ignoring_names(plain("ls", bits, 64, True))
        found[f"released.{bits}.r16"] = _ignoring_names(released(bits, 16))
        for rank in (4, 8, 16):
            found[f"milo.{bits}.r{rank}"] = _ignoring_names(milo("ls", bits, 64, rank))
            found[f"milo_unbiased.{bits}.r{rank}"] = _ignoring_names(milo("ls", bits, 64, rank, unbiased=True))
        found[f"budget.{bits + 0.5}"] = budgeted(subject, layers, bits + 0.5)
        found[f"budget.{bits + 1.0}"] = budgeted(subject, layers, bits + 1.0)
    found["ls.4.g64"] = _ignoring_names(plain("ls", 4, 64))
    return found


def _ignoring_names(quantize: Quantize) -> Callable:
    return lambda names, w: quantize(w)


def likelihood(subject: Subject, layers: str) -> list[dict[str, Any]]:
    rows, results = [], {}
    for name, quantize in methods(subject, layers).items():
        started = time.perf_counter()
        results[name] = subject.put(layers, quantize) | subject.judge()
        r = results[name]
        print(
            f"{layers:8s} {name:20s} {r['bits']:.2f} bits, error {r['fro']:.4f}, "
            f"NLL +{r['nll']:.4f} ± {r['nll_error']:.4f}, "
            f"KL {r['kl']:.5f} ± {r['kl_error']:.5f}, {time.perf_counter() - started:.1f} s",
            flush=True,
        )
        more = {key: value for key, value in r.items() if key != "nll"}
        rows.append(row(f"moe.nll.{layers}.{name}", r["nll"], "nats", None, **more))
    return rows


def won_back(rows: list[dict[str, Any]], layers: str) -> list[dict[str, Any]]:
    """Return how much of what HQQ loses ours does not, in no more bytes: groups of 32 against half a bit of ours."""
    losses = {
        r["name"].removeprefix(f"moe.nll.{layers}."): r for r in rows if r["name"].startswith(f"moe.nll.{layers}.")
    }
    found = []
    for bits, more, group in ((3, 0.5, 64), (3, 1.0, 32), (2, 0.5, 64), (2, 1.0, 32)):
        ours, theirs = losses[f"budget.{bits + more}"], losses[f"hqq.{bits}.g{group}"]
        assert ours["bits"] <= theirs["bits"] + 0.001, "ours takes more bytes"
        name = f"moe.nll_back.{bits}{'.g64' if group == 64 else ''}{'.experts' if layers == 'experts' else ''}"
        both = {f"{key}_of_hqq": theirs[key] for key in ("bits", "kl")} | {key: ours[key] for key in ("bits", "kl")}
        found.append(row(name, 1 - ours["value"] / theirs["value"], "1", None, nll=ours["value"], **both))
        print(f"{name}: {found[-1]['value']:.0%} of HQQ's loss at {ours['bits']} bits")
    return found


def accuracies(subject: Subject, count: int, samples: int) -> list[dict[str, Any]]:
    """Return accuracy at temperature 1 with all linear layers quantized."""
    float32 = lambda names, w: (w, 4 * w.numel())  # noqa: E731
    chosen = methods(subject, "all")
    names = [
        "hqq.2.g64",
        "hqq.2.g32",
        "ls_unbiased.2.g64",
        "milo_unbiased.2.r16",
        "budget.3.0",
        "budget.4.0",
        "hqq.3.g64",
    ]
    rows: list[dict[str, Any]] = []
    for name, quantize in {"float32": float32, **{name: chosen[name] for name in names}}.items():
        bits = subject.put("all", quantize)["bits"]
        found = subject.accuracy(count, samples, 11)
        whole = rows[0]["value"] if rows else found
        error = (found * (1 - found) / (count * samples)) ** 0.5
        print(f"{name:20s} {bits:.2f} bits, accuracy {found:.3f} ± {error:.3f} ({found / whole:.2f})", flush=True)
        rows.append(row(f"moe.accuracy.{name}", found, "1", whole, bits=bits, error=error, samples=count * samples))
    return rows


def row(name: str, value: float, unit: str, incumbent: float | None, **more: Any) -> dict[str, Any]:
    ratio = incumbent / value if incumbent is not None and value else None
    return {"name": name, "value": value, "unit": unit, "incumbent": incumbent, "ratio": ratio, "bound": None, **more}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(POLICY))
    parser.add_argument("--parts", default="fro,likelihood,accuracy")
    parser.add_argument("--tokens", type=int, default=24000, help="of problems and answers, padding included")
    parser.add_argument("--problems", type=int, default=384, help="for accuracy")
    parser.add_argument("--seed", type=int, default=777)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    options = parse()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    parts, rows = options.parts.split(","), []
    if "fro" in parts:
        rows += frobenius(model)
        for r in rows:
            print(f"{r['name']:32s} {r['value']:.4f} at {r['bits']:.2f} bits")
    subject = Subject(model, tokenizer, options.tokens, options.seed)
    if "likelihood" in parts:
        for layers in ("experts", "all"):
            found = likelihood(subject, layers)
            rows += found + won_back(found, layers)
    if "accuracy" in parts:
        rows += accuracies(subject, options.problems, 2)
    if options.json:
        conditions = {
            "command": " ".join(sys.argv), "machine": machine.describe(), "versions": versions.report(),
            "model": "quickstart" if options.model == str(POLICY) else options.model,
        }  # fmt: skip
        rows.append({"name": "moe.accuracy.conditions", "value": None, **conditions})
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
