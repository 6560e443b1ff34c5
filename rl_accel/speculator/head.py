"""The draft head: a recurrent block over the policy's hidden states and the tokens that follow, without a KV cache.

    state(aux)                 h = W_fc [g_1 rms(a_1), g_2 rms(a_2), ...]          a_i: hidden states of a few layers
    block(h, x_1 .. x_n)       h = h + W_mix [rms(e_{x_1}), ..., rms(e_{x_n}), rms(h)];  h = h + down(silu(gate) * up)
    logits(h)                  W_lm rms(h)

At position t the policy has made `aux` of tokens up to x_t and sampled x_{t+1}; `state` and one `block` with the last
tokens (x_{t+1}, x_t, ...) give the distribution of x_{t+2}, each further block the next one. The block is the same at
every depth, so training with several depths is what EAGLE-3 calls training-time test.

Source: ours; EAGLE-3 (fused low, middle and high hidden states, training-time test); differs: no attention, which a
small policy's step does not pay for, and a few earlier tokens instead.

Shape suffixes: B rollouts, T positions, A = number of layers x H their width, N tokens that the head sees, D its width,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from rl_accel.speculator.flat import FlatHead, FlatShape, rms

MAX_TABLE = 8192
"""Vocabulary up to which tables of embeddings are made."""


@dataclass(frozen=True)
class HeadShape(FlatShape):
    """What the weights of a head look like."""

    vocab_size: int
    hidden_size: int
    """H, of the policy."""
    num_aux: int
    """Layers whose hidden states it sees."""
    width: int
    """D."""
    inner: int
    """Width of the gated unit."""
    history: int
    """Tokens before the last one."""

    def sizes(self) -> dict[str, tuple[int, ...]]:
        v, d, n = self.vocab_size, self.width, self.history + 1
        return {
            "aux_norm": (self.num_aux, self.hidden_size),
            "fc": (d, self.num_aux * self.hidden_size),
            "embed": (v, d),
            "embed_norm": (d,),
            "state_norm": (d,),
            "mix": (d, (n + 1) * d),
            "mlp_norm": (d,),
            "gate_up": (2 * self.inner, d),
            "down": (d, self.inner),
            "final_norm": (d,),
            "lm_head": (v, d),
        }


class DraftHead(FlatHead):
    """The head as it is trained."""

    shape: HeadShape

    def chain(self, aux_BTA: torch.Tensor, tokens_BTN: torch.Tensor, depth: int) -> list[torch.Tensor]:
        """As `FlatHead.chain`."""
        w, logits = self.weights(), []
        num_starts = aux_BTA.shape[1] - 1
        h = state(w, aux_BTA[:, :num_starts])
        added_BTD = mixed(w, tokens_BTN[:, :num_starts], tables(w, self.shape.history + 1))  # the same at every depth
        for j in range(min(depth, num_starts)):
            count = num_starts - j
            h = block(w, h[:, :count], added_BTD[:, j : j + count])
            logits.append(F.linear(rms(h) * w["final_norm"], w["lm_head"]))
        return logits


def state(w: Mapping[str, torch.Tensor], aux: torch.Tensor) -> torch.Tensor:
    return F.linear(aux * w["aux_norm"].flatten(), w["fc"])


def mixed(w: Mapping[str, torch.Tensor], tokens: torch.Tensor, tables_NVD: torch.Tensor | None = None) -> torch.Tensor:
    """Return what the tokens add to the mix, int64 [..., N] -> [..., D]; from `tables` where they are given."""
    num_tokens = tokens.shape[-1]
    if tables_NVD is not None:
        offsets_N = torch.arange(num_tokens, device=tokens.device) * tables_NVD.shape[1]
        bags = (tokens + offsets_N).flatten(0, -2)
        return F.embedding_bag(bags, tables_NVD.flatten(0, 1), mode="sum").unflatten(0, tokens.shape[:-1])
    embedded = rms(w["embed"][tokens]) * w["embed_norm"]
    return F.linear(embedded.flatten(-2), w["mix"][:, : num_tokens * embedded.shape[-1]])


def tables(w: Mapping[str, torch.Tensor], num_tokens: int) -> torch.Tensor | None:
    """Return what each token adds to the mix at each place, [N, V, D]: a gather instead of a product per step.

    None for a large vocabulary, most of which a step does not use.
    """
    if w["embed"].shape[0] > MAX_TABLE:
        return None
    embedded = rms(w["embed"]) * w["embed_norm"]
    d = embedded.shape[1]
    return torch.stack([F.linear(embedded, w["mix"][:, i * d : (i + 1) * d]) for i in range(num_tokens)])


def block(w: Mapping[str, torch.Tensor], h: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
    d = h.shape[-1]
    h = h + added + F.linear(rms(h) * w["state_norm"], w["mix"][:, -d:])
    gate, up = F.linear(rms(h) * w["mlp_norm"], w["gate_up"]).chunk(2, -1)
    return h + F.linear(F.silu(gate) * up, w["down"])


def first_weights(shape: HeadShape, seed: int, embed: torch.Tensor | None = None) -> torch.Tensor:
    """Return weights to begin with, float32 [num_weights]; no data are needed.

    Args:
        embed: embeddings of the policy, [V, H]; used where the head is as wide.
    """
    flat = shape.random_weights(seed, {"embed": 1.0, "lm_head": 0.02, "down": 0.02})
    return shape.take_embeddings(flat, embed)
