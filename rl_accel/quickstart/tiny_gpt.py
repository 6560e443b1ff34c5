"""A small language model and a text with structure, made on the spot: for tests and benchmarks of training."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

VOCABULARY = 64


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):  # [B, T, D]
        batch, length, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape)
        x = x + self.out(mixed)
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class TinyGPT(nn.Module):
    def __init__(self, width: int = 64, layers: int = 2, heads: int = 4, length: int = 64):
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, ids):  # [B, T] -> [B, T, V]
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class MarkovText:
    """Text of an order-2 Markov chain with a fixed table: each pair of tokens has four followers, the first of which
    comes 77 % of the time."""

    def __init__(self, length: int = 64, seed: int = 7):
        generator = torch.Generator().manual_seed(seed)
        self.length = length
        self.followers = torch.randint(0, VOCABULARY, (VOCABULARY, VOCABULARY, 4), generator=generator)

    def batch(self, size: int, seed: int) -> torch.Tensor:
        """Token ids [size, length + 1]."""
        generator = torch.Generator().manual_seed(seed)
        ids = torch.zeros(size, self.length + 1, dtype=torch.long)
        ids[:, :2] = torch.randint(0, VOCABULARY, (size, 2), generator=generator)
        choice = torch.randint(0, 4, ids.shape, generator=generator)
        choice[torch.rand(ids.shape, generator=generator) < 0.7] = 0
        for t in range(2, self.length + 1):
            ids[:, t] = self.followers[ids[:, t - 2], ids[:, t - 1], choice[:, t]]
        return ids


def loss_of(model, ids: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy, in nats a token."""
    return F.cross_entropy(model(ids[:, :-1]).float().flatten(0, 1), ids[:, 1:].flatten())
