"""Which rows make up which batch: drawn from keys, the same however devices are chunked or
padded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from kitestring import dice


@dataclass(frozen=True)
class Schedule:
    """`index` [D, T, B] rows, of which `real` [D, T, B] count; device d stops after `steps`[d]."""

    index: Any
    real: Any
    steps: Any


def schedule(key: Any, n: Any, batch: int, epochs: int) -> Schedule:
    """Shuffled minibatches: every epoch a fresh permutation, the last batch ragged.

    Row 0 fills what is not real, so that padded values are never touched."""
    n = np.asarray(n)
    per = -(-n // batch)
    most, width = int(per.max(initial=0)), int(n.max(initial=0))
    index = np.zeros((len(n), most * epochs, batch), np.int64)
    real = np.zeros(index.shape, bool)
    span = np.arange(most * batch)
    for epoch in range(epochs):
        draw = dice.uniform(key + np.uint64(epoch), width)
        order = np.argsort(np.where(np.arange(width) < n[:, None], draw, 2), axis=1, stable=True)
        order = np.pad(order, ((0, 0), (0, most * batch - width)))
        held = span < n[:, None]
        order = np.where(held, order, 0).reshape(len(n), most, batch)
        held = held.reshape(len(n), most, batch)
        for step in range(most):
            d = np.nonzero(step < per)[0]
            at = epoch * per[d] + step
            index[d, at], real[d, at] = order[d, step], held[d, step]
    return Schedule(index, real, per * epochs)
