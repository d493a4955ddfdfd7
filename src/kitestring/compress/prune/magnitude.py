"""Pruning by magnitude: the smallest weights become zero.

Han, Pool, Tran, Dally: "Learning both Weights and Connections for Efficient Neural Networks",
NeurIPS 2015, arXiv 1506.02626. Each layer is pruned alike, by a threshold of its own, as in the
baselines of SparseGPT (arXiv 2301.00774) and Wanda (arXiv 2306.11695): a threshold for the whole
model would empty the layers whose weights happen to be small.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from kitestring.compress.matrices import copied, fill, matrices, matrix
from kitestring.compress.prune.pattern import Pattern, fine, least, least_of_each, share


def magnitude(
    model: nn.Module,
    sparsity: float = 0.5,
    pattern: Pattern | None = None,
    skip: Sequence[str] = (),
) -> nn.Module:
    """A copy of `model` in which floor(sparsity * weights) of each layer's weights are zero, or,
    with a `pattern` (n, m), n of every m consecutive ones of a row.

    Layers are nn.Linear and nn.Conv2d without groups, but for those named in `skip`. Raises
    `SettingError` and `TaskError` for settings and layers that this cannot be done for."""
    found = copied(model)
    layers = matrices(found, skip)
    fine(layers, sparsity, pattern)
    for layer in layers.values():
        weight = matrix(layer)
        if pattern is None:
            gone = least(weight.abs().flatten(), share(sparsity, weight.numel()))
            gone = gone.reshape(weight.shape)
        else:
            gone = least_of_each(weight.abs(), pattern)
        fill(layer, weight.masked_fill(gone, 0))
    return found
