"""The two containers that messages are made of: named arrays, and ragged rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = Any
"""A numpy array; engines turn it into whatever computes, without a copy where they can."""


class Tree(dict[str, Any]):
    """Flat dotted names -> arrays. Arithmetic keeps each leaf's dtype; a [D] operand broadcasts."""

    def _zip(self, other: Any, f: Callable[[Array, Array], Array]) -> Tree:
        def leaf(name: str, a: Array) -> Array:
            b = other[name] if isinstance(other, Mapping) else other
            if getattr(b, "ndim", 0) == 1 and a.ndim > 1 and not isinstance(other, Mapping):
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


@dataclass(frozen=True)
class Rows:
    """Ragged: `values` [D, L, ...], of which the first `n`[d] rows of device d are real.

    Only real rows cross, are billed or count; the padding may hold anything."""

    values: Array
    n: Array

    def mask(self) -> Array:
        return np.arange(self.values.shape[1])[None] < self.n[:, None]

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
