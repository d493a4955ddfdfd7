"""Layers, inputs and whole models that weights are pruned and quantised in."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from kitestring.tasks.layers import Transformer
from kitestring.tasks.llama import Llama, LlamaConfig

IDS = torch.arange(24).reshape(4, 6) % 11


def correlated(rows: int, width: int, seed: int, decades: float = 1.0) -> Tensor:
    """Columns that are mixtures of half as many, and some noise, of sizes over so many decades."""
    dice = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width // 2, generator=dice)
    mixed = hidden @ torch.randn(width // 2, width, generator=dice)
    noise = 0.3 * torch.randn(rows, width, generator=dice)
    return (mixed + noise) * 10 ** (decades * (torch.rand(width, generator=dice) - 0.5))


def one(out: int, width: int, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(width, out))


def llama(tied: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return Llama(LlamaConfig(11, 8, 16, 2, 2, 2, 6, 4, tie_word_embeddings=tied))


def transformer(tied: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return Transformer(11, 6, 8, 2, 2, dropout=0.2, past=2, tied=tied)


OF_TEXT: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "llama": (llama, IDS),
    "tied llama": (lambda: llama(True), IDS),
    "transformer": (transformer, IDS),
    "tied transformer": (lambda: transformer(True), IDS),
}
