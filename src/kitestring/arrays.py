"""The two containers that messages are made of: named arrays, and ragged rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = Any
"""A numpy array; engines turn it into whatever computes, without a copy where they can."""


class Tree(dict[str, Any]):
    """Flat dotted names -> arrays. Arithmetic keeps each leaf's dtype; a [D] operand broadcasts."""

    def _zip(self, other: Any, f: Callable[[Array, Array], Array]) -> Tree:
        named = isinstance(other, Mapping)
        per_device = not named and getattr(other, "ndim", 0) == 1

        def leaf(name: str, a: Array) -> Array:
            b = other[name] if named else other
            if per_device and a.ndim > 1:
                b = b.reshape((-1,) + (1,) * (a.ndim - 1))
            return f(a, b).astype(a.dtype, copy=False)

        return Tree({name: leaf(name, a) for name, a in self.items()})

    def __add__(self, other: Any) -> Tree:
        return self._zip(other, lambda a, b: a + b)

    def __sub__(self, other: Any) -> Tree:
        return self._zip(other, lambda a, b: a - b)

    def __mul__(self, other: Any) -> Tree:
        return self._zip(other, lambda a, b: a * b)

    def pick(self, *prefixes: str) -> Tree:
        return Tree({name: a for name, a in self.items() if name.startswith(prefixes)})

    def inside(self, prefix: str) -> Tree:
        return Tree({prefix + name: a for name, a in self.items()})

    def below(self, prefix: str) -> Tree:
        return Tree({n.removeprefix(prefix): a for n, a in self.items() if n.startswith(prefix)})


class Rows:
    """Ragged: device d has `n`[d] real rows, `values`[d, : n[d]] of [D, L, ...].

    Only real rows cross, are billed or count; the padding may hold anything. Where rows lie in one
    array of many devices, `Rows.lying` refers to them there, and `values` is made when asked for.
    """

    __slots__ = ("_lying", "_values", "n")

    def __init__(self, values: Array, n: Array) -> None:
        self._values, self.n = values, n
        self._lying: tuple[Array, Array] | None = None

    @classmethod
    def lying(cls, flat: Array, start: Array, n: Array) -> Rows:
        """Device d's rows are `flat`[start[d] : start[d] + n[d]] of [N, ...]."""
        rows = cls(None, n)
        rows._lying = flat, start
        return rows

    @property
    def values(self) -> Array:
        if self._values is None:
            assert self._lying is not None
            flat, start = self._lying
            width = self.shape[1]
            in_turn = start[:1] + width * np.arange(len(start))
            if len(start) and (start == in_turn).all() and (self.n == width).all():
                wide = flat[start[0] :][: len(start) * width].reshape(self.shape)
            else:
                real, wide = self.mask(), np.zeros(self.shape, flat.dtype)
                wide[real] = flat[(start[:, None] + np.arange(width))[real]]
            self._values = wide
        return self._values

    @property
    def shape(self) -> tuple[int, ...]:
        """Of `values`, which need not be made for it."""
        if self._values is not None:
            return tuple(self._values.shape)
        return (len(self.n), max(1, int(self.n.max(initial=0))), *self.row[0])

    @property
    def flat(self) -> tuple[Array, Array]:
        """All rows [N, ...] in plain layout, and where those of each device start [D]."""
        if self._lying is None:
            devices, width, *row = self._values.shape
            plain = np.ascontiguousarray(self._values).reshape(devices * width, *row)
            self._lying = plain, np.arange(devices) * width
        return self._lying

    @property
    def row(self) -> tuple[tuple[int, ...], Any]:
        """Shape and dtype of one row."""
        if self._values is None:
            flat, _ = self.flat
            return flat.shape[1:], flat.dtype
        return self._values.shape[2:], self._values.dtype

    def of(self, devices: Array) -> Rows:
        """The rows of some of the devices (positions, or a mask), as wide as they were."""
        return Rows(self.values[devices], self.n[devices])

    def mask(self) -> Array:
        return np.arange(self.shape[1])[None] < self.n[:, None]

    def take(self, index: Array, n: Array) -> Rows:
        """Rows `index` [D, M] of each device, of which the first `n` are real."""
        wide = index.reshape(index.shape + (1,) * (self.values.ndim - 2))
        return Rows(np.take_along_axis(self.values, wide, axis=1), n)

    def keep(self, chosen: Array) -> Rows:
        """The real rows where `chosen` [D, L], moved to the front in their order."""
        chosen = chosen & self.mask()
        n = chosen.sum(axis=1)
        order = np.argsort(~chosen, axis=1, stable=True)
        return self.take(order[:, : max(1, int(n.max(initial=0)))], n)

    def concat(self, other: Rows) -> Rows:
        """This one's real rows, then the other's."""
        both = np.concatenate([self.values, other.values], axis=1)
        real = np.concatenate([self.mask(), other.mask()], axis=1)
        return Rows(both, np.full(len(both), both.shape[1])).keep(real)
