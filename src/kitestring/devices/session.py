"""What the device half of a collaboration is handed, and nothing else: `core.Devices`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from kitestring import dice
from kitestring.core import Array, Fit, Recipe, Rows, Tree


class Primitives(Protocol):
    """What computes: weights and rows are stacked, `initial` and `flops` are of one model, one
    row."""

    def initial(self, program: str) -> Tree: ...
    def flops(self, program: str, columns: Mapping[str, Rows]) -> float: ...
    def predict(self, program: str, weights: Tree, inputs: Mapping[str, Rows]) -> Tree: ...
    def fit(
        self,
        program: str,
        weights: Tree,
        rows: Mapping[str, Rows],
        recipe: Recipe,
        *,
        centre: Tree | None = None,
        linear: Tree | None = None,
        key: Array,
    ) -> Fit: ...
    def backward(
        self,
        program: str,
        weights: Tree,
        rows: Mapping[str, Rows],
        *,
        cotangent: Mapping[str, Rows] | None = None,
        row_weights: Array | None = None,
    ) -> tuple[Array, Tree, Tree]: ...


def broadcast(tree: Tree, count: int) -> Tree:
    """Give every leaf a device axis without copying it."""
    return Tree({k: _stretched(np.asarray(a), count) for k, a in tree.items()})


def _stretched(a: Array, count: int) -> Array:
    """What `np.broadcast_to` gives, in a quarter of its time."""
    if not a.flags.c_contiguous or a.dtype.hasobject:
        return np.broadcast_to(a, (count, *a.shape))
    wide: Array = np.ndarray((count, *a.shape), a.dtype, a, 0, (0, *a.strides))
    wide.flags.writeable = False
    return wide


def frozen(tree: Tree) -> Tree:
    """A copy that nobody can write to: a runtime may lay it out once and for all."""
    copies = {k: np.array(a) for k, a in tree.items()}
    for a in copies.values():
        a.flags.writeable = False
    return Tree(copies)


class DeviceSession:
    """D devices, stacked; counts the operations [D] that they do in `flops`."""

    def __init__(
        self,
        compute: Primitives,
        ids: Array,
        seed: int,
        serial: int,
        data: Mapping[str, Rows],
        private: Tree,
    ) -> None:
        self.data, self.private = data, private
        self.flops: Any = np.zeros(len(ids))
        self._compute, self._ids, self._seed, self._serial = compute, ids, seed, serial

    def anew(self) -> DeviceSession:
        """The same devices, with nothing done yet."""
        return DeviceSession(
            self._compute, self._ids, self._seed, self._serial, self.data, self.private
        )

    def _spend(self, program: str, rows: Mapping[str, Rows], passes: float) -> None:
        n = np.asarray(next(iter(rows.values())).n)
        self.flops += n * passes * self._compute.flops(program, rows)

    def uniform(self, tag: str, n: int) -> Array:
        return dice.uniform(dice.keys(self._seed, self._ids, self._serial, tag), n)

    def initial(self, program: str) -> Tree:
        return broadcast(self._compute.initial(program), len(self._ids))

    def predict(self, program: str, weights: Tree, inputs: Mapping[str, Rows]) -> Tree:
        self._spend(program, inputs, 1)
        return self._compute.predict(program, weights, inputs)

    def fit(
        self,
        program: str,
        weights: Tree,
        rows: Mapping[str, Rows],
        recipe: Recipe,
        *,
        centre: Tree | None = None,
        linear: Tree | None = None,
        tag: str = "fit",
    ) -> Fit:
        # Forward, and a backward pass of twice its work.
        self._spend(program, rows, 3 * recipe.epochs)
        key = dice.keys(self._seed, self._ids, self._serial, tag)
        return self._compute.fit(
            program, weights, rows, recipe, centre=centre, linear=linear, key=key
        )

    def backward(
        self,
        program: str,
        weights: Tree,
        rows: Mapping[str, Rows],
        *,
        cotangent: Mapping[str, Rows] | None = None,
        row_weights: Array | None = None,
    ) -> tuple[Array, Tree, Tree]:
        self._spend(program, rows, 3)
        return self._compute.backward(
            program, weights, rows, cotangent=cotangent, row_weights=row_weights
        )
