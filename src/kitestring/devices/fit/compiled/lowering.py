"""What operations are lowered into: kernels in order, and values that are not yet computed.

Views move no data. Operations element by element are kept as expressions and computed where they
are used, in one loop, unless several users or a change of shape call for the result in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

from torch.fx import Node

from kitestring.devices.fit.compiled.kernels import (
    Kernel,
    Table,
    add_rows,
    pointwise,
)
from kitestring.devices.fit.compiled.product import lies, product
from kitestring.devices.fit.compiled.views import (
    Buffer,
    Expr,
    Value,
    View,
    constant,
    leaves,
    plain,
    substituted,
    tried,
)

HEAVY = {"exp", "log", "log1p", "expm1", "tanh", "sigmoid", "erf", "div", "sqrt"}
_LONG = 12  # operations in one expression


@dataclass(frozen=True, eq=False)
class Product:
    """A matrix product that has not been computed: it may grow a weight in place."""

    a: View
    b: View

    def turned(self) -> Product:
        return Product(self.b.permute([1, 0]), self.a.permute([1, 0]))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.a.shape[0], self.b.shape[1]


@dataclass(frozen=True, eq=False)
class RowsAdded:
    """`rows` added to zeros at `ids`: the gradient of an embedding."""

    ids: View
    rows: View
    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Tiled:
    """Memory that nobody has written: each part is the value of one of the tiles it is cut into."""

    whole: View
    parts: Sequence[tuple[Callable[[View], View], Value]]


Lowered = Value | Product | RowsAdded


@dataclass
class Lowering:
    """Kernels in order; `late` nodes may stay `Product` or `RowsAdded` for the caller."""

    kernels: list[Kernel] = field(default_factory=list)
    late: frozenset[Node] = frozenset()
    constants: dict[Buffer, Any] = field(default_factory=dict)  # buffer -> numpy array
    wrong: View = field(default_factory=lambda: plain(Buffer("wrong", "i64", 1, fixed=True), ()))
    tables: dict[Buffer, Table] = field(default_factory=dict)
    draws: list[tuple[View, float]] = field(default_factory=list)  # 1 with that chance, else 0
    cache: dict[Any, Any] = field(default_factory=dict)
    seen: dict[Expr, View] = field(default_factory=dict)  # what has been computed already
    tiled: dict[Buffer, Tiled] = field(default_factory=dict)

    def put(self, kernel: Kernel) -> None:
        for buffer in kernel.buffers:
            if buffer in self.tiled:
                tiled = self.tiled.pop(buffer)
                for cut, part in tiled.parts:
                    self.put(pointwise(cut(tiled.whole), part))
        self.kernels.append(kernel)

    def assign(self, out: View, value: Value) -> None:
        """out = value. Where one leaf is tiled, each tile is computed into its place."""
        for view in leaves(value):
            tiled = self.tiled.get(view.buffer) if view.buffer else None
            if tiled is not None and tiled.whole == view:
                for cut, part in tiled.parts:
                    found = substituted(value, view, part, cut)
                    self.put(pointwise(cut(out), found))
                return
        self.put(pointwise(out, value))

    def fresh(self, shape: Sequence[int], dtype: str, like: View | None = None) -> View:
        """Memory of its own; its dimensions lie in the order of those of `like`."""
        buffer = Buffer("", dtype, max(1, prod(shape)))
        if like is None or len(like.shape) != len(shape):
            return plain(buffer, shape)
        order = sorted(range(len(shape)), key=lambda d: -like.strides[d])
        back = sorted(range(len(shape)), key=order.__getitem__)
        return plain(buffer, [shape[d] for d in order]).permute(back)

    def view(self, value: Lowered, contiguous: bool = False) -> View:
        """In memory."""
        if isinstance(value, View) and value.buffer is not None:
            whole = plain(value.buffer, value.shape)
            if not contiguous or value.strides == whole.strides:
                return value
        if isinstance(value, Product):
            return self.multiply(value.a, value.b)
        if isinstance(value, RowsAdded):
            table = self.fresh(value.shape, "f32")
            self.put(pointwise(table, constant(0.0, "f32", value.shape)))
            self.put(add_rows(table, value.ids, value.rows, self.wrong))
            return table
        if isinstance(value, Expr) and value in self.seen and not contiguous:
            return self.seen[value]
        like = None if contiguous else _leader(value)
        out = self.fresh(value.shape, value.dtype, like)
        self.assign(out, value)
        if isinstance(value, Expr) and not contiguous:
            self.seen[value] = out
        return out

    def multiply(self, a: View, b: View, start: View | None = None) -> View:
        way = lies(a, b)
        if not way and b.shape[-1] > 1:
            b = self.view(b, contiguous=True)
            way = "columns"
        shape = (*a.shape[:-1], b.shape[-1])
        out = self.fresh(shape, "f32")
        if way == "rows":  # computed as its transpose, whose columns lie end to end
            swapped = self.fresh((*shape[:-2], shape[-1], shape[-2]), "f32")
            out = swapped.permute([*range(len(shape) - 2), -1, -2])
        self.put(product(out, a, b, start))
        return out

    def reshaped(self, value: Value, shape: Sequence[int]) -> Value:
        shape = tuple(shape)
        if -1 in shape:
            rest = prod(value.shape) // max(1, -prod(shape))
            shape = tuple(rest if s == -1 else s for s in shape)
        found = tried(value, lambda v: v.reshape(shape))
        if found is None:
            found = self.view(value, contiguous=True).reshape(shape)
        assert found is not None
        return found


def _leader(value: Value) -> View | None:
    """The first view that has a place for every element: results lie as it does."""
    for view in leaves(value):
        whole = all(s > 0 or n == 1 for n, s in zip(view.shape, view.strides, strict=True))
        if view.buffer is not None and whole and len(view.shape) > 2:
            return view
    return None
