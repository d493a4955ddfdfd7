"""Small modules as programs, and devices for them: different weights and ragged rows for each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import tiny
from kitestring import dice
from kitestring.compress.distil.objective import cross_entropy
from kitestring.core import Rows, Tree
from kitestring.devices.fit.compute import TorchCompute
from kitestring.devices.fit.programs import Program


class Column(nn.Module):
    """A module of one column."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, batch: Any) -> dict[str, Tensor]:
        return {"out": self.inner(batch["x"])}


class Attention(nn.Module):
    """Without biases: a key's has no gradient but noise, which Adam blows up to whole steps."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(5, width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.tokens(x)).chunk(3, -1)
        mixed = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v
        return self.out(mixed.mean(1))  # type: ignore[no-any-return]


def loss(out: Any, batch: Any) -> Tensor:
    return cross_entropy(out["out"], batch["y"])


def program(inner: nn.Module) -> Program:
    return Program("p", Column(inner), loss)


MODULES: dict[str, Callable[[int], nn.Module]] = {
    "mlp": lambda w: nn.Sequential(nn.Linear(4, w), nn.ReLU(), nn.Linear(w, 3)),
    "norm": lambda w: nn.Sequential(nn.Linear(4, w), nn.LayerNorm(w), nn.Tanh(), nn.Linear(w, 3)),
    "embedding": lambda w: nn.Sequential(
        nn.Embedding(5, w), nn.Flatten(), nn.Tanh(), nn.Linear(2 * w, 3)
    ),
    "attention": Attention,
}
FLOATING = ("mlp", "norm")


def devices(
    kind: str, n: list[int], seed: int = 0, width: int = 6
) -> tuple[Program, Tree, dict[str, Rows]]:
    """A program, different weights for each device and ragged rows; the padding is rubbish."""
    torch.manual_seed(seed)
    made = program(MODULES[kind](width))
    draw = np.random.default_rng(seed)
    weights = Tree(
        {
            k: np.stack([a + draw.normal(0, 0.1, a.shape).astype(a.dtype) for _ in n])
            for k, a in made.initial().items()
        }
    )
    if kind in FLOATING:
        x = [draw.normal(0, 1, (m, 4)).astype(np.float32) for m in n]
    else:
        x = [draw.integers(0, 5, (m, 2)) for m in n]
    rows = tiny.stacked({"x": x, "y": [draw.integers(0, 3, m) for m in n]})
    return made, weights, rows


def keys(count: int) -> Any:
    return dice.keys(3, np.arange(count), 1, "fit")


def device(tree: Any, d: int) -> Any:
    """The d-th of stacked trees or rows, still stacked, and padded no wider than it needs be."""
    out = {}
    for k, v in tree.items():
        if isinstance(v, Rows):
            out[k] = Rows(v.values[d : d + 1, : max(1, int(v.n[d]))], v.n[d : d + 1])
        else:
            out[k] = v[d : d + 1]
    return Tree(out)


def both(made: Program) -> tuple[TorchCompute, TorchCompute]:
    return TorchCompute({"p": made}, "vmap"), TorchCompute({"p": made}, "sequential")
