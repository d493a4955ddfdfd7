"""Layers that several tasks' models share. Imports torch, so factories import this when called."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional


class Scale(nn.Module):
    """uint8 0..255 -> float 0..1, so that a row is sent and kept as bytes."""

    def forward(self, x: Tensor) -> Tensor:
        return x.float() / 255


class Past(nn.Module):
    """[n, T, d] -> [n, T, size * d]: each position beside the size - 1 before, zeros at first."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        wide = functional.pad(x, (0, 0, self.size - 1, 0))
        return torch.cat([wide[:, i : i + length] for i in range(self.size)], dim=-1)


class Block(nn.Module):
    """A pre-norm transformer block: causal self-attention, then a feed-forward layer."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.feed = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        """`hidden` [n or 1, 1, T, T] is added to the attention scores: 0, or far below."""
        parts = self.qkv(self.norm(x))
        n, length, whole = parts.shape
        each = whole // (3 * self.heads)  # of a head; there may be fewer than share the width
        q, k, v = parts.reshape(n, length, 3, self.heads, each).permute(2, 0, 3, 1, 4).unbind(0)
        scores = q @ k.transpose(-1, -2) / math.sqrt(each) + hidden
        mixed = (self.dropout(scores.softmax(-1)) @ v).transpose(1, 2)
        x = x + self.dropout(self.out(mixed.reshape(n, length, whole // 3)))
        return x + cast(Tensor, self.dropout(self.feed(x)))


class Transformer(nn.Module):
    """Token ids [n, T] -> logits [n, T, vocabulary] of the next token; T may be at most `length`.

    With `padding`, token 0 is padding and nothing attends to it. With `past` above 1 a position
    starts from that many tokens at once: on characters that saves much of the training. With
    `tied` a token is scored by its own embedding, as in SASRec: that helps where many are rare."""

    def __init__(
        self,
        vocabulary: int,
        length: int,
        width: int,
        heads: int,
        blocks: int,
        dropout: float = 0.0,
        padding: bool = False,
        past: int = 1,
        tied: bool = False,
    ) -> None:
        super().__init__()
        self.padding = padding
        self.tokens = nn.Embedding(vocabulary, width)
        self.places = nn.Embedding(length, width)
        for table in (self.tokens, self.places):
            nn.init.normal_(table.weight, std=0.02)
        self.past = nn.Sequential(Past(past), nn.Linear(past * width, width)) if past > 1 else None
        self.blocks = nn.ModuleList([Block(width, heads, dropout) for _ in range(blocks)])
        self.norm = nn.LayerNorm(width)
        self.back = None if tied else nn.Linear(width, vocabulary)
        self.bias = nn.Parameter(torch.zeros(vocabulary)) if tied else None
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        # -1e9 and not -inf: a row of padding would have nothing to attend to, and give NaN.
        later = torch.ones(length, length, device=x.device).triu(1)
        hidden = (later * -1e9)[None, None]
        if self.padding:
            hidden = hidden + (x == 0)[:, None, None, :].float() * -1e9
        h = self.tokens(x)
        if self.past is not None:
            h = h + self.past(h)
        h = self.dropout(h + self.places.weight[:length])
        for block in self.blocks:
            h = block(h, hidden)
        h = self.norm(h)
        if self.back is None:
            return functional.linear(h, self.tokens.weight, self.bias)
        return cast(Tensor, self.back(h))
