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
    """`index` [D, T, B] rows, of which `real` [D, T, B] count; device d stops after `steps`[d].

    The rows that count come first in their batch."""

    index: Any
    real: Any
    steps: Any


def schedule(key: Any, n: Any, batch: int, epochs: int, shuffle: bool = True) -> Schedule:
    """Minibatches, the last of an epoch ragged: every epoch a fresh permutation, or the rows in
    their order.

    Row 0 fills what is not real, so that padded values are never touched."""
    n = np.asarray(n)
    per = -(-n // batch)
    most, width = int(per.max(initial=0)), int(n.max(initial=0))
    order = np.zeros((len(n), epochs, most * batch), np.int64)
    order[..., :width] = _permutations(key, n, width, epochs) if shuffle else np.arange(width)
    held = np.arange(most * batch) < n[:, None]
    order *= held[:, None]
    index = order.reshape(len(n), epochs, most, batch)
    real = np.broadcast_to(held.reshape(len(n), 1, most, batch), index.shape)
    steps = per * epochs
    total = most * epochs
    if (per == most).all():
        shape = (len(n), total, batch)
        return Schedule(index.reshape(shape), real.reshape(shape), steps)
    # A device with fewer batches goes on to its next epoch at once: close the gaps between.
    used = np.broadcast_to(np.arange(most) < per[:, None, None], index.shape[:3])
    front = np.arange(total) < steps[:, None]
    close = np.zeros((len(n), total, batch), np.int64), np.zeros((len(n), total, batch), bool)
    close[0][front], close[1][front] = index[used], real[used]
    return Schedule(*close, steps)


def _permutations(key: Any, n: Any, width: int, epochs: int) -> Any:
    """[D, epochs, width]: each device's rows by the dice they drew, then what is not real."""
    with np.errstate(over="ignore"):
        keys = (key[:, None] + np.arange(epochs, dtype=np.uint64)).reshape(-1)
    draw = (dice.uniform(keys, width) * 2**24).astype(np.int64).reshape(len(n), epochs, width)
    span = np.arange(width)
    draw[np.broadcast_to((span >= n[:, None])[:, None], draw.shape)] = 2**24
    # Sorting (draw, row) as one number is a stable sort by the draw, and several times as fast.
    ranked = draw << 32 | span
    ranked.sort(axis=-1)
    return ranked & (2**32 - 1)
