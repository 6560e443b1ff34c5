"""The draft head as an engine runs it: norms folded into the products, in buffers that a swap overwrites in place.

Cost: per chain step one gather and four products for all rows together. The trainer folds, so a swap is one copy.

Shape suffixes: R rows (requests), K draft tokens, N tokens that the head sees, A hidden states, V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from rl_accel.speculator.flat import rms
from rl_accel.speculator.head import MAX_TABLE, HeadShape, tables


def folded_sizes(shape: HeadShape) -> dict[str, tuple[int, ...]]:
    """Return the shapes of folded weights, in the order in which they are laid out."""
    d, n = shape.width, shape.history + 1
    by_table = shape.vocab_size <= MAX_TABLE
    return {
        "fc": (d, shape.num_aux * shape.hidden_size),
        "tokens": ((n if by_table else 1) * shape.vocab_size, d),
        "token_mix": (d, 0 if by_table else n * d),
        "mix": (d, d),
        "gate_up": (2 * shape.inner, d),
        "down": (d, shape.inner),
        "lm_head": (shape.vocab_size, d),
    }


def num_folded(shape: HeadShape) -> int:
    return sum(torch.Size(size).numel() for size in folded_sizes(shape).values())


@torch.no_grad()
def fold(shape: HeadShape, flat: torch.Tensor) -> torch.Tensor:
    """Return weights as `ServedHead.load` takes them, float32 [num_folded], from those of a `DraftHead`."""
    w, d = shape.split(flat), shape.width
    by_place = tables(w, shape.history + 1)
    folded = {
        "fc": w["fc"] * w["aux_norm"].flatten(),
        "tokens": rms(w["embed"]) * w["embed_norm"] if by_place is None else by_place,
        "token_mix": w["mix"][:, :-d] if by_place is None else w["mix"][:, :0],
        "mix": w["mix"][:, -d:] * w["state_norm"],
        "gate_up": w["gate_up"] * w["mlp_norm"],
        "down": w["down"],
        "lm_head": w["lm_head"] * w["final_norm"],
    }
    return torch.cat([folded[name].reshape(-1) for name in folded_sizes(shape)])


class ServedHead:
    """Not thread-safe; a swap happens between two calls."""

    def __init__(self, shape: HeadShape, folded: torch.Tensor, device: torch.device | str = "cpu"):
        self.shape = shape
        self.device = torch.device(device)
        self._offsets_N = torch.arange(shape.history + 1, device=self.device) * shape.vocab_size
        self._flat = folded.to(self.device, copy=True)
        self._buffers, start = {}, 0
        for name, size in folded_sizes(shape).items():
            end = start + torch.Size(size).numel()
            self._buffers[name] = self._flat[start:end].view(size)
            start = end

    def load(self, folded: torch.Tensor) -> None:
        """Overwrite the weights in place; storage stays, so captured graphs stay valid.

        Args:
            folded: what `fold` returned.
        """
        self._flat.copy_(folded)

    def begin(self, aux_RA: torch.Tensor) -> torch.Tensor:
        """Return the state of each row, [R, D], from normalized hidden states."""
        return F.linear(aux_RA, self._buffers["fc"])

    def step(self, h_RD: torch.Tensor, tokens_RN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the next state and logits [R, V], from int64 tokens [R, N], newest first."""
        b = self._buffers
        if b["token_mix"].numel():
            added = F.linear(b["tokens"][tokens_RN].flatten(1), b["token_mix"])
        else:
            added = F.embedding_bag(tokens_RN + self._offsets_N, b["tokens"], mode="sum")
        h = h_RD + added + F.linear(rms(h_RD), b["mix"])
        gate, up = F.linear(rms(h), b["gate_up"]).chunk(2, -1)
        h = h + F.linear(F.silu(gate) * up, b["down"])
        return h, F.linear(rms(h), b["lm_head"])

    def draft(
        self,
        aux_RA: torch.Tensor,
        tokens_RN: torch.Tensor,
        max_tokens: int,
        min_path_probs_R: torch.Tensor,
        min_step_gain: float = 0.0,
        temperatures: Sequence[float] = (),
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return greedy chains and the probability of each path, as long as a further token is worth it.

        The gain of a token is path probability / min_path_prob - 1, where that is above zero.

        Args:
            aux_RA: normalized hidden states of the last accepted token.
            tokens_RN: int64, the tokens sampled from them and those before, newest first.
            max_tokens: longest draft, at least 1.
            min_path_probs_R: from which probability on a draft token is worth its cost.
            min_step_gain: the chains end where the gains of all rows sum to less than this, or to nothing.
            temperatures: of the probabilities at each depth, 1 beyond; the drafts themselves do not depend on them; see
                `ServedWatch`.

        Returns:
            Draft tokens int64 [R, K] and path probabilities float32 [R, K], K from 1 to `max_tokens`.
        """
        h = self.begin(aux_RA)
        path_R = torch.ones(len(aux_RA), device=self.device)
        floor_R = min_path_probs_R.to(self.device).clamp(min=1e-6)
        drafts, paths = [], []
        for j in range(max_tokens):
            h, logits = self.step(h, tokens_RN)
            best, token_R = logits.max(-1)
            cold = 1.0 / temperatures[j] if j < len(temperatures) else 1.0
            path_R = path_R * torch.exp((logits - best[:, None]).mul_(cold)).sum(-1).reciprocal_()
            drafts.append(token_R)
            paths.append(path_R)
            if j + 1 == max_tokens or float((path_R / floor_R - 1.0).clamp(min=0.0).sum()) <= min_step_gain:
                break
            tokens_RN = torch.cat([token_R[:, None], tokens_RN[:, :-1]], 1)
        return torch.stack(drafts, 1), torch.stack(paths, 1)

    def memory_bytes(self) -> int:
        return self._flat.numel() * self._flat.element_size()
