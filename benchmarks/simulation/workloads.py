"""Seven workloads of federated averaging, the same for every contender. numpy only.

All devices' rows are views into one pool of made-up rows, so that loading costs nobody anything and
what is timed is simulation. Sizes are log-normal; one local epoch, rows in their order, the last
batch ragged; the average is weighted by rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
POOL = 12_000  # rows
SPREAD = 0.5  # of the logarithm of a device's rows
ITEMS = 3_000  # that the recommender knows
TOKENS, LENGTH = 80, 80  # of a text


def _reals(width: int, rng: np.random.Generator) -> Array:
    return rng.standard_normal((POOL, width), dtype=np.float32)


def _images(rng: np.random.Generator) -> Array:
    return rng.random((POOL, 1, 28, 28), dtype=np.float32)


def _texts(rng: np.random.Generator) -> Array:
    return rng.integers(0, TOKENS, (POOL, LENGTH))


def _items(rng: np.random.Generator) -> Array:
    """A few items are in most rows, as in any catalogue."""
    rank = np.minimum((30 * rng.pareto(0.8, POOL)).astype(np.int64), ITEMS - 1)
    return rng.permutation(ITEMS)[rank]


@dataclass(frozen=True)
class Workload:
    """`first` and `rest`: multiplications that one row's forward pass needs in the first layer,
    whose input needs no gradient, and in the others. `classes` 0 is a binary label."""

    name: str
    about: str
    devices: int
    cohort: int
    rows: int  # of a device, on average
    batch: int
    lr: float
    draw: Callable[[np.random.Generator], Array] = field(compare=False)  # a pool's x
    classes: int
    first: int
    rest: int

    @property
    def flops(self) -> int:
        """Useful operations of training on a row: the products of the forward pass, the weights'
        gradients and the inputs' gradients, an addition with each multiplication."""
        return 2 * (2 * self.first + 3 * self.rest)


_POSITION = 12 * 128 * 128 + 2 * LENGTH * 128  # of a transformer block
WORKLOADS = {
    w.name: w
    for w in (
        Workload(
            "W1a", "logistic regression 60-10", 1000, 100, 100, 10, 0.05,
            partial(_reals, 60), 10, first=60 * 10, rest=0,
        ),
        Workload(
            "W1", "MLP 561-64-6", 1000, 100, 100, 10, 0.05,
            partial(_reals, 561), 6, first=561 * 64, rest=64 * 6,
        ),
        Workload(
            "W4", "recommender 3000x32 and MLP", 6000, 100, 100, 20, 0.1,
            _items, 0, first=0, rest=64 * 32 + 32 * 16 + 16,
        ),
        Workload(
            "W2s", "CNN, 0.22 M parameters", 3400, 50, 200, 20, 0.05, _images, 62,
            first=784 * 25 * 16, rest=196 * 400 * 32 + 1568 * 128 + 128 * 62,
        ),
        Workload(
            "W2", "CNN, 6.6 M parameters", 3400, 50, 200, 20, 0.01, _images, 62,
            first=784 * 25 * 32, rest=196 * 800 * 64 + 3136 * 2048 + 2048 * 62,
        ),
        Workload(
            "W3", "LSTM, two layers of 256", 700, 20, 40, 10, 0.5, _texts, TOKENS,
            first=0, rest=LENGTH * 1024 * (8 + 256 + 256 + 256) + 256 * TOKENS,
        ),
        Workload(
            "W3t", "transformer, two blocks of 128", 700, 20, 40, 10, 0.1, _texts, TOKENS,
            first=0, rest=LENGTH * 2 * _POSITION + 128 * TOKENS,
        ),
    )
}  # fmt: skip


@cache
def sizes(workload: Workload) -> Array:
    """Rows of each device."""
    rng = np.random.default_rng(0)
    drawn = rng.lognormal(np.log(workload.rows) - SPREAD**2 / 2, SPREAD, workload.devices)
    return np.clip(np.rint(drawn), 8, 5 * workload.rows).astype(np.int64)


@cache
def pool(workload: Workload) -> tuple[Array, Array]:
    rng = np.random.default_rng(1)
    x = workload.draw(rng)
    if workload.classes:
        return x, rng.integers(0, workload.classes, POOL)
    return x, rng.integers(0, 2, POOL).astype(np.float32)


def rows(workload: Workload, device: int) -> tuple[Array, Array]:
    """A device's x and y, without a copy."""
    x, y = pool(workload)
    n = int(sizes(workload)[device])
    start = 7919 * device % (POOL - n)
    return x[start : start + n], y[start : start + n]


def cohort(workload: Workload, turn: int) -> Array:
    """The devices of round `turn`, drawn as Kitestring's cloud draws them with seed 0."""
    rng = np.random.default_rng([0, turn])
    return np.sort(rng.choice(workload.devices, workload.cohort, replace=False))
