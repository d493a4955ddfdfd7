"""What messages are made of: named arrays, ragged rows, and tables of which little changes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = Any
"""A numpy array; engines turn it into whatever computes, without a copy where they can."""


def one_step(f: Callable[..., Array]) -> Callable[..., Array]:
    """A function whose result's shape follows from values or from how many rows there are.

    Who records what a device does (`kitestring.package.record`) keeps it as one step."""

    @wraps(f)
    def call(*given: Any) -> Array:
        for a in given:
            if hasattr(a, "__record__"):
                return a.__record__(f, given)
        return f(*given)

    return call


@one_step
def real(n: Array, width: int) -> Array:
    """[D, width]: which rows there are."""
    return np.arange(width)[None] < n[:, None]


@one_step
def fullest(wide: Array, n: Array) -> Array:
    """As many columns of [D, L] as the device with the most rows needs, one at least."""
    return wide[:, : max(1, int(n.max(initial=0)))]


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


class Touched(np.lib.mixins.NDArrayOperatorsMixin):
    """An array [D, N, ...] in which each device has the rows of one `base`, but for a few.

    Row `ids`[i] of device `owner`[i] is `rows`[i]; without a base the others are zero. Differences
    to the base, multiples and sums over devices look at those rows only; for all else it is the
    whole array, made when asked for."""

    def __init__(self, base: Array, owner: Array, ids: Array, rows: Array, zero: bool = False):
        self._base, self._owner, self._ids, self._rows = base, owner, ids, rows
        self._zero = zero
        self.shape, self.dtype, self.ndim = base.shape, rows.dtype, base.ndim

    def __len__(self) -> int:
        return int(self.shape[0])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        whole = np.zeros(self.shape, self.dtype) if self._zero else np.array(self._base)
        whole[self._owner, self._ids] = self._rows
        return whole if dtype is None else whole.astype(dtype, copy=False)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(np.asarray(self), name)

    def __getitem__(self, index: Any) -> Array:
        return np.asarray(self)[index]

    def astype(self, dtype: Any, copy: bool = True) -> Any:
        return self if dtype == self.dtype else np.asarray(self).astype(dtype)

    def _with(self, rows: Array) -> Touched:
        return Touched(self._base, self._owner, self._ids, rows.astype(self.dtype), zero=True)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **how: Any) -> Any:
        other: Any = inputs[1] if len(inputs) > 1 and inputs[0] is self else None
        plainly = method == "__call__" and not how
        if plainly and ufunc is np.subtract and not self._zero and _same(other, self._base):
            return self._with(self._rows - self._base[0][self._ids])
        if plainly and ufunc is np.multiply and self._zero and _per_device(other, len(self)):
            factor = np.broadcast_to(np.reshape(other, -1), len(self))[self._owner]
            return self._with(self._rows * factor.reshape(-1, *[1] * (self._rows.ndim - 1)))
        summed = method == "reduce" and ufunc is np.add and self._zero
        if summed and how == {"axis": 0, "dtype": np.float64, "keepdims": True}:
            return self._sum()
        whole = [np.asarray(a) if isinstance(a, Touched) else a for a in inputs]
        return getattr(ufunc, method)(*whole, **how)

    def _sum(self) -> Array:
        """Over devices in float64, [1, N, ...]."""
        length = math.prod(self.shape[2:])
        there = (self._ids[:, None] * length + np.arange(length)).ravel()
        flat = np.bincount(there, self._rows.ravel(), math.prod(self.shape[1:]))
        return flat.reshape(1, *self.shape[1:])


def _same(a: Any, b: Any) -> bool:
    """The same rows of the same memory for every device."""
    if not (isinstance(a, np.ndarray) and isinstance(b, np.ndarray)):
        return False
    return a.shape == b.shape and a.strides == b.strides and a.ctypes.data == b.ctypes.data


def _per_device(a: Any, count: int) -> bool:
    """One number, or one for each device: [], [D], [D, 1, ...]."""
    if isinstance(a, Touched) or a is None:
        return False
    return np.size(a) == 1 or (np.size(a) == count and np.shape(a)[0] == count)


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
        return real(self.n, self.shape[1])

    def take(self, index: Array, n: Array) -> Rows:
        """Rows `index` [D, M] of each device, of which the first `n` are real."""
        return Rows(self.values[np.arange(len(index))[:, None], index], n)

    def keep(self, chosen: Array) -> Rows:
        """The real rows where `chosen` [D, L], moved to the front in their order."""
        return _front(self.values, chosen & self.mask())

    def concat(self, other: Rows) -> Rows:
        """This one's real rows, then the other's."""
        both = np.concatenate([self.values, other.values], axis=1)
        return _front(both, np.concatenate([self.mask(), other.mask()], axis=1))


def _front(values: Array, chosen: Array) -> Rows:
    n = chosen.sum(axis=1)
    order = fullest(np.argsort(~chosen, axis=1, stable=True), n)
    return Rows(values, n).take(order, n)
