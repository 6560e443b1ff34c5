"""The draft head in the form of EAGLE-3: one decoder layer over the policy's hidden states, with attention.

    h_0 = W_fc [g_1 rms(a_1), g_2 rms(a_2), ...]                                  a_i: hidden states of a few layers
    x = [g_e rms(e_token), g_h rms(h)];  r = h + W_o attention(W_q x, W_k x, W_v x);  h' = r + down(silu(gate) * up)
    logits(h') = W_lm g rms(h')

At position t the policy has made `aux` of tokens up to x_t and sampled x_{t+1}. One layer over h_0 and x_{t+1}, at
position t, gives the distribution of x_{t+2}; the next one, at t + 1, takes h' and x_{t+2}, and so on. Drafted
positions see the keys of the text up to t, made from the policy's states, and those of the chain's own steps behind it:
what EAGLE-3 calls training-time test, and what vLLM's KV cache holds. Only differences of positions matter.

Weights map one to one to vLLM's `llama_eagle3.py` with `fc_norm` (`export.py`). Embeddings and LM head are its own.

Cost: a chain's attention grows with the text, and every chain step reads the KV cache; the trainer's with the square
of a stretch. Left out: texts before a stretch (prompts leave no traces), scaled RoPE.

Source: EAGLE-3 (Li et al., 2025); vLLM 0.28.0. Differs: norms of the aux states, which differ by orders of magnitude.

Shape suffixes: B rollouts, T positions, S chain starts, A = number of layers x H their width, N tokens of a row,
G key-value heads, Q query heads of each, C head dim, D width.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from rl_accel.speculator.flat import FlatHead, FlatShape, rms


@dataclass(frozen=True)
class EagleShape(FlatShape):
    """What the weights of a head look like, and the rest of what a server has to know of it."""

    vocab_size: int
    hidden_size: int
    """H, of the policy."""
    layers: tuple[int, ...]
    """After which its hidden states are taken; the first has number 1."""
    width: int
    """D."""
    inner: int
    """Width of the MLP."""
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    max_positions: int
    draft_vocab_size: int = 0
    """Tokens that it can draft: the first ones and, at the end, `extra_tokens`. 0: all."""
    extra_tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))  # JSON has lists
        object.__setattr__(self, "extra_tokens", tuple(self.extra_tokens))
        first = self.draft_vocab_size - len(self.extra_tokens)
        ends = (first - 1, *self.extra_tokens, self.vocab_size)
        if first < 0 or any(a >= b for a, b in itertools.pairwise(ends)):
            raise ValueError(
                f"{self.draft_vocab_size} of {self.vocab_size} tokens, {self.extra_tokens} at the end: they must ascend"
            )

    @property
    def num_drafted(self) -> int:
        """Rows of the LM head."""
        return self.draft_vocab_size or self.vocab_size

    def draft_ids(self) -> torch.Tensor | None:
        """Return the token of each row of the LM head, int64 [num_drafted]; None where those are all."""
        if not self.draft_vocab_size:
            return None
        return torch.tensor([*range(self.draft_vocab_size - len(self.extra_tokens)), *self.extra_tokens])

    def sizes(self) -> dict[str, tuple[int, ...]]:
        d, queries, keys = self.width, self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        num_aux = len(self.layers)
        return {
            "aux_norm": (num_aux, self.hidden_size),
            "fc": (d, num_aux * self.hidden_size),
            "embed": (self.vocab_size, d),
            "embed_norm": (d,),
            "state_norm": (d,),
            "q": (queries, 2 * d),
            "k": (keys, 2 * d),
            "v": (keys, 2 * d),
            "o": (d, queries),
            "mlp_norm": (d,),
            "gate": (self.inner, d),
            "up": (self.inner, d),
            "down": (d, self.inner),
            "final_norm": (d,),
            "lm_head": (self.num_drafted, d),
        }


class EagleHead(FlatHead):
    """The head as it is trained."""

    shape: EagleShape

    def __init__(self, shape: EagleShape):
        super().__init__(shape)
        self.draft_ids = shape.draft_ids()

    def chain(self, aux_BTA: torch.Tensor, tokens_BTN: torch.Tensor, depth: int) -> list[torch.Tensor]:
        """As `FlatHead.chain`; attention begins with the first position given. Of a row's tokens it sees the newest."""
        w, logits = self.weights(), []
        num_starts = aux_BTA.shape[1] - 1
        h = F.linear(aux_BTA[:, :num_starts] * w["aux_norm"].flatten(), w["fc"])
        embedded_BSD = rms(F.embedding(tokens_BTN[:, :num_starts, 0], w["embed"])) * w["embed_norm"]
        cos, sin = self._rotations(num_starts)
        text = torch.ones(num_starts, num_starts, dtype=torch.bool).tril()
        keys: list[torch.Tensor] = []
        values: list[torch.Tensor] = []
        for j in range(min(depth, num_starts)):
            count = num_starts - j
            h, at = h[:, :count], slice(j, j + count)
            x = torch.cat([embedded_BSD[:, at], rms(h) * w["state_norm"]], -1)
            q_BGQSC, k_BGSC, v_BGSC = self._heads(w, x, cos[at], sin[at])
            keys.append(k_BGSC)
            values.append(v_BGSC)
            attended = _attend(q_BGQSC, keys, values, text[:count, :count])
            h = h + F.linear(attended, w["o"])
            x = rms(h) * w["mlp_norm"]
            h = h + F.linear(F.silu(F.linear(x, w["gate"])) * F.linear(x, w["up"]), w["down"])
            logits.append(F.linear(rms(h) * w["final_norm"], w["lm_head"]))
        return logits

    def _heads(
        self, w: Mapping[str, torch.Tensor], x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return queries [B, G, Q, S, C], keys and values [B, G, S, C], rotated to their positions."""
        groups, dim = self.shape.num_kv_heads, self.shape.head_dim
        q, k, v = (F.linear(x, w[name]).unflatten(-1, (-1, dim)).transpose(1, 2) for name in ("q", "k", "v"))
        return _rotated(q, cos, sin).unflatten(1, (groups, -1)), _rotated(k, cos, sin), v

    def _rotations(self, num_positions: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosines and sines, [positions, C / 2]."""
        dim = self.shape.head_dim
        frequencies = self.shape.rope_theta ** (-torch.arange(0, dim, 2, dtype=torch.float32) / dim)
        angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), frequencies)
        return angles.cos(), angles.sin()


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate [..., S, C]; the two halves of C are the coordinates of its planes."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def _attend(
    q_BGQSC: torch.Tensor, keys: list[torch.Tensor], values: list[torch.Tensor], text_SS: torch.Tensor
) -> torch.Tensor:
    """Return what chains see, [B, S, heads * C]: the text up to where each begins, and its own steps behind that.

    Args:
        keys, values: [B, G, at least S, C], of the text first, then of each step of the chains so far.
        text_SS: bool, which positions of the text a chain sees.
    """
    count = q_BGQSC.shape[3]
    q_BGQSC = q_BGQSC * q_BGQSC.shape[-1] ** -0.5
    to_text = q_BGQSC @ keys[0][:, :, None, :count].transpose(-1, -2)
    scores = [to_text.masked_fill(~text_SS, -torch.inf)]
    scores += [(q_BGQSC * k[:, :, None, :count]).sum(-1, keepdim=True) for k in keys[1:]]
    weights = torch.cat(scores, -1).softmax(-1)
    out = weights[..., :count] @ values[0][:, :, None, :count]
    for i, v in enumerate(values[1:]):
        out = out + weights[..., count + i, None] * v[:, :, None, :count]
    return out.flatten(1, 2).transpose(1, 2).flatten(2)


def first_weights(shape: EagleShape, seed: int, embed: torch.Tensor | None = None) -> torch.Tensor:
    """Return weights to begin with, float32 [num_weights]; no data are needed.

    Args:
        embed: embeddings of the policy, [V, H]; copied where the head is as wide.
    """
    flat = shape.random_weights(seed, {"embed": 1.0, "lm_head": 0.02, "o": 0.02, "down": 0.02})
    return shape.take_embeddings(flat, embed)
