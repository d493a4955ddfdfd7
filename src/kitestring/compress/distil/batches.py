"""Minibatches of given rows."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from kitestring.compress.distil.objective import Batch
from kitestring.errors import DataError, SettingError

Batches: TypeAlias = Callable[[int, nn.Module], Batch]
"""(step, the student as it is then) -> a batch. A function of these and of torch's dice alone."""


def rows(
    x: Tensor,
    y: Tensor | None = None,
    *,
    batch: int = 32,
    seed: int = 0,
    teacher: Tensor | None = None,
) -> Batches:
    """Epochs of x [n, ...], y [n, ...] and the teacher's outputs [n, ...], shuffled anew each time.

    All batches have `batch` rows, or n where that is fewer: what is left over at the end of an
    epoch is not seen in it. Step i has the same rows whatever was asked for before."""
    n = len(x)
    if n < 1:
        raise DataError("no rows", "rows", "Give one at least")
    for name, column in (("y", y), ("teacher", teacher)):
        if column is not None and len(column) != n:
            raise DataError(f"{n} rows of x, {len(column)} of {name}", "rows", "Give as many")
    if batch < 1 or seed < 0:
        what = f"batch {batch}, seed {seed}"
        raise SettingError(what, "rows", "Give a batch of 1 or more and a seed of 0 or more")
    steps = max(1, n // batch)  # of an epoch

    @lru_cache(maxsize=1)
    def order(epoch: int) -> Tensor:
        return torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(n))

    def at(step: int, student: nn.Module) -> Batch:
        epoch, i = divmod(step, steps)
        index = order(epoch)[i * batch : (i + 1) * batch].to(x.device)
        return Batch(
            x[index],
            None if y is None else y[index],
            index,
            None if teacher is None else teacher[index],
        )

    return at
