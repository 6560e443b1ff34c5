"""Weights of a draft model in one block of memory, whatever its architecture: what trainer, gate and swap deal with.

Shape suffixes: B rollouts, T positions, A hidden states, N tokens of a row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b

import torch
from torch import nn
from torch.nn import functional as F

EPS = 1e-6


class FlatShape:
    """What the weights of a model look like; two models of one shape can be swapped. Derived ones are dataclasses."""

    def sizes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each weight, in the order in which they are laid out."""
        raise NotImplementedError

    @property
    def num_weights(self) -> int:
        return sum(torch.Size(size).numel() for size in self.sizes().values())

    def fingerprint(self) -> int:
        """Return 63 bits that tell shapes apart, also those of different architectures."""
        text = f"{type(self).__name__} {sorted(vars(self).items())}".encode()
        return int.from_bytes(blake2b(text, digest_size=8).digest(), "little") >> 1

    def split(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return views into flat weights, float32 [num_weights]."""
        views, start = {}, 0
        for name, size in self.sizes().items():
            end = start + torch.Size(size).numel()
            views[name] = flat[start:end].view(size)
            start = end
        return views

    def random_weights(self, seed: int, stds: Mapping[str, float]) -> torch.Tensor:
        """Return weights to begin with, float32 [num_weights]: norms are 1, the others normal.

        Args:
            stds: their standard deviation, where it is not that of a product which keeps the size of its input.
        """
        generator = torch.Generator().manual_seed(seed)
        flat = torch.zeros(self.num_weights)
        for name, weight in self.split(flat).items():
            if name.endswith("norm"):
                weight.fill_(1.0)
            else:
                weight.copy_(torch.randn(weight.shape, generator=generator))
                weight.mul_(stds.get(name, weight.shape[-1] ** -0.5))
        return flat

    def take_embeddings(self, flat: torch.Tensor, embed: torch.Tensor | None) -> torch.Tensor:
        """Return `flat` with the embeddings of the policy, [V, H], at a deviation of 1, where they fit."""
        own = self.split(flat)["embed"]
        if embed is not None and embed.shape == own.shape:
            own.copy_(embed.float() / embed.float().std().clamp(min=1e-6))
        return flat


class FlatHead(nn.Module):
    """A draft model as it is trained. Float32."""

    draft_ids: torch.Tensor | None = None
    """Token of each entry of its logits, int64 [entries]; None where those are all tokens."""

    def __init__(self, shape: FlatShape):
        super().__init__()
        self.shape = shape
        self.flat = torch.zeros(shape.num_weights)
        """All weights; the parameters are views of it."""
        self._weights = nn.ParameterDict({name: nn.Parameter(view) for name, view in shape.split(self.flat).items()})

    def weights(self) -> dict[str, torch.Tensor]:
        return dict(self._weights)

    def chain(self, aux_BTA: torch.Tensor, tokens_BTN: torch.Tensor, depth: int) -> list[torch.Tensor]:
        """Return logits after each of `depth` tokens of the text itself, from every position that has so many.

        Args:
            aux_BTA: [B, T, A], hidden states of some layers of the policy, normalized per layer (`normalized`).
            tokens_BTN: int64 [B, T, N], at position t the token sampled there, the one before, and so on.

        Returns:
            Entry j is [B, T - 1 - j, V]: of the token sampled at position t + 1 + j, for a chain begun at t. V is here
            the number of tokens that can be drafted (`draft_ids`).
        """
        raise NotImplementedError


def rms(x: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, (x.shape[-1],), None, EPS)


def normalized(aux: torch.Tensor, num_aux: int) -> torch.Tensor:
    """Return hidden states [..., num_aux * H], each layer's by itself divided by its root mean square."""
    return rms(aux.unflatten(-1, (num_aux, -1))).flatten(-2)
