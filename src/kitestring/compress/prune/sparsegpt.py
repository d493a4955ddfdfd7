"""SparseGPT: weights go one column after the other, and those after make up for it.

Frantar, Alistarh: "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", ICML
2023, arXiv 2301.00774, algorithm 1. Removing w_j of a row costs w_j^2 / [H^-1]_jj and is answered
best by

    w -= w_j / [H^-1]_jj * [H^-1]_j          over the columns after j

with H^-1 of the columns from j on. Which weights go is decided for a block of columns at a time,
over all rows together, when the block is reached ("adaptive mask selection"); for n of m in each
row, every m columns. Later layers see what the pruned earlier ones give.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kitestring.compress.calibrate import Batches, in_turn
from kitestring.compress.hessian import blocks, factor
from kitestring.compress.matrices import copied, fill, matrices, matrix
from kitestring.compress.prune.pattern import Pattern, fine, least, least_of_each, share


def sparsegpt(
    model: nn.Module,
    batches: Batches,
    sparsity: float = 0.5,
    pattern: Pattern | None = None,
    skip: Sequence[str] = (),
    *,
    damping: float = 0.01,
    block: int | None = None,
) -> nn.Module:
    """A copy of `model` in which floor(sparsity * weights) of each layer's weights are zero, evenly
    over blocks of columns, or, with a `pattern` (n, m), n of every m consecutive ones of a row; the
    other weights are changed to make up for them.

    Layers are nn.Linear and nn.Conv2d without groups, but for those named in `skip`. A `block` is
    a sixteenth of the columns where it is None, from 16 up to the paper's 128: with that many,
    small layers would choose all at once. `damping` times the mean of H's diagonal is added to it.
    Raises `SettingError` and `TaskError` for settings, layers and batches that this cannot be done
    for."""
    found = copied(model)
    layers = matrices(found, skip)
    fine(layers, sparsity, pattern)
    if block is not None:
        blocks(0, block)  # which says what is wrong with it
    for name, inputs in in_turn(found, batches, layers):
        upper = factor(inputs.hessian, damping, name)
        weight = matrix(layers[name])
        wide = block if block is not None else min(max(weight.shape[1] // 16, 16), 128)
        fill(layers[name], pruned(weight, upper, sparsity, pattern, wide))
    return found


def pruned(
    weight: Tensor, upper: Tensor, sparsity: float, pattern: Pattern | None, block: int
) -> Tensor:
    """The pruned weights of [out, in] float64, with the upper factor [in, in] of H^-1."""
    weight = weight.clone()
    rows, columns = weight.shape
    unit = 1 if pattern is None else pattern[1]
    for start, end in blocks(columns, max(block, unit), unit):
        part, own = weight[:, start:end], upper[start:end, start:end]
        importance = own.diagonal()
        if pattern is None:  # the remainder of one block's share goes to the next one's
            count = share(sparsity, rows * end) - share(sparsity, rows * start)
            gone = least((part / importance).square().flatten(), count).reshape(part.shape)
        else:
            gone = torch.zeros_like(part, dtype=torch.bool)
        errors = part.new_zeros(part.shape)
        for j in range(end - start):
            if pattern is not None and j % pattern[1] == 0:
                four = slice(j, j + pattern[1])
                gone[:, four] = least_of_each((part / importance)[:, four].square(), pattern)
            errors[:, j] = (part[:, j] / importance[j]).where(gone[:, j], 0)
            part[:, j:] -= errors[:, j, None] * own[j, j:]
        weight[:, end:] -= errors @ upper[start:end, end:]
        part.masked_fill_(gone, 0)  # nought but for rounding before
    return weight
