"""Tiny language models for tests of text: tables that can be enumerated, and a small Llama."""

from __future__ import annotations

from itertools import product
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from kitestring.tasks.llama import Llama, LlamaConfig

M = TypeVar("M", bound=nn.Module)


class Table(nn.Module):
    """Logits of the next token for each whole history of up to `longest` tokens."""

    def __init__(self, vocabulary: int, longest: int, seed: int = 0) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        generator = torch.Generator().manual_seed(seed)
        size = (vocabulary + 1) ** longest
        self.logits = nn.Parameter(torch.randn(size, vocabulary, generator=generator).double())

    def forward(self, ids: Tensor) -> Tensor:
        base = self.vocabulary + 1
        code = torch.zeros_like(ids[:, 0])
        found = []
        for token in ids.T:  # the digits 1 .. V in base V + 1: no two histories are alike
            code = code * base + token + 1
            found.append(self.logits[code])
        return torch.stack(found, 1)


def sequences(vocabulary: int, length: int, prompt: tuple[int, ...] = (0,)) -> Tensor:
    """Every sequence of that many tokens after the prompt: [vocabulary ** length, P + length]."""
    return torch.tensor([(*prompt, *rest) for rest in product(range(vocabulary), repeat=length)])


def log_likelihood(model: nn.Module, ids: Tensor, prompt: int = 1) -> Tensor:
    """Of what follows the first `prompt` tokens: [n]."""
    logs = model(ids[:, :-1]).log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return cast(Tensor, logs[:, prompt - 1 :].sum(1))


def llama(
    vocabulary: int = 11, width: int = 16, layers: int = 2, context: int = 24, *,
    tied: bool = False, seed: int = 0, stir: float = 12,
) -> Llama:  # fmt: skip
    """Two query heads for each head of keys and values."""
    torch.manual_seed(seed)
    return stirred(Llama(LlamaConfig(vocabulary, width, 2 * width, layers, 4, 2, context,
                                     width // 4, tie_word_embeddings=tied)), stir)  # fmt: skip


def stirred(model: M, by: float = 12) -> M:
    """With weights so large that what it says depends on what it read."""
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p *= by
    return model


def chain(rows: int, length: int, vocabulary: int = 11, seed: int = 0) -> Tensor:
    """Text [rows, length] in which a token mostly follows from the one before it."""
    generator = torch.Generator().manual_seed(seed)
    rule = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(99))
    ids = torch.randint(0, vocabulary, (rows, length), generator=generator)
    ruled = torch.rand(rows, length, generator=generator) < 0.7
    for t in range(1, length):
        ids[:, t] = torch.where(ruled[:, t], rule[ids[:, t - 1]], ids[:, t])
    return ids
