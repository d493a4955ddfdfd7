"""Which weights go: the least of some scores, in each row, in a matrix, or n of every m columns.

n of m is the pattern of Mishra et al., "Accelerating Sparse Deep Neural Networks", arXiv 2104.08378
(2:4: two of every four consecutive weights of a row are zero).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import Tensor, nn

from kitestring.compress.matrices import Layer
from kitestring.errors import SettingError, TaskError

Pattern: TypeAlias = tuple[int, int]
"""(n, m): n of every m consecutive weights of a row are zero."""


def least(scores: Tensor, count: int) -> Tensor:
    """A mask of the `count` least scores along the last axis; of equals the first."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    return mask.scatter(-1, scores.argsort(dim=-1, stable=True)[..., :count], True)


def least_of_each(scores: Tensor, pattern: Pattern) -> Tensor:
    """A mask of the n least of every m scores in the rows of [rows, columns]."""
    n, m = pattern
    return least(scores.reshape(len(scores), -1, m), n).flatten(1)


def share(sparsity: float, count: int) -> int:
    """floor(sparsity * count), as in decimal numbers: 0.29 of 100 is 29."""
    return int(sparsity * count + 1e-9)


def fine(layers: Mapping[str, Layer], sparsity: float, pattern: Pattern | None) -> None:
    """Raises `SettingError` for settings that mean nothing, and `TaskError` for a layer whose rows
    are not whole patterns."""
    if pattern is None:
        if not 0 <= sparsity < 1:
            raise SettingError(f"sparsity is {sparsity}", "prune", "Give 0 or more, below 1")
        return
    whole = len(pattern) == 2 and all(type(part) is int for part in pattern)
    if not (whole and 0 < pattern[0] < pattern[1]):
        what = f"the pattern is {pattern!r}"
        raise SettingError(what, "prune", "Give (n, m), n of every m to be zero: (2, 4)")
    m = pattern[1]
    odd = [f"{n} ({w.weight[0].numel()})" for n, w in layers.items() if w.weight[0].numel() % m]
    if odd:
        what = f"rows are no whole number of {m} columns: {', '.join(odd)}"
        raise TaskError(what, "prune", "Name these layers in skip")


def sparsity(model: nn.Module) -> dict[str, float]:
    """The share of weights that are zero, for each nn.Linear and convolution by dotted name, and
    under "" over all of them."""
    found: dict[str, float] = {}
    zeros = total = 0
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            none = int((layer.weight == 0).sum())
            found[name] = none / layer.weight.numel()
            zeros, total = zeros + none, total + layer.weight.numel()
    return {**found, "": zeros / max(1, total)}
