"""Kernels: loop nests over strided views, each written once for its shapes.

A kernel knows its buffers and how it is emitted. Two whose `key` is equal share one function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from kitestring.devices.fit.compiled.emit import BYTES, WIDTH, Emitter, i64
from kitestring.devices.fit.compiled.maths import apply
from kitestring.devices.fit.compiled.views import (
    Buffer,
    Expr,
    Value,
    View,
    blocks,
    leaves,
    nest,
)

Pointers = dict[Buffer, Any]


@dataclass(frozen=True)
class Kernel:
    key: tuple[Any, ...]
    buffers: tuple[Buffer, ...]
    emit: Callable[[Emitter, Pointers], None]


def kernel(name: str, emit: Callable[[Emitter, Pointers], None], *parts: Any) -> Kernel:
    """`parts` are all that the code depends on: views, expressions and plain values."""
    buffers: list[Buffer] = []

    def described(part: Any) -> Any:
        if isinstance(part, View):
            if part.buffer is None:
                where: Any = None
            else:
                if part.buffer not in buffers:
                    buffers.append(part.buffer)
                where = (buffers.index(part.buffer), part.dtype)
            return where, part.shape, part.strides, part.offset
        if isinstance(part, Expr):
            return part.op, part.dtype, tuple(described(a) for a in part.args)
        if isinstance(part, list | tuple):
            return tuple(described(p) for p in part)
        return part, type(part).__name__

    return Kernel((name, *(described(p) for p in parts)), tuple(buffers), emit)


def evaluate(
    e: Emitter, value: Value, moved: Iterator[View], at: Pointers, index: Any, width: int
) -> Any:
    """A value at `index`, its views taken in their order from `moved`; the last index is the
    lane."""
    lane = len(index) - 1
    if isinstance(value, View):
        view = next(moved)
        return e.read(at.get(view.buffer), view, index, lane, width)  # type: ignore[arg-type]
    held, kinds = [], []
    for a in value.args:
        if isinstance(a, View | Expr):
            held.append(evaluate(e, a, moved, at, index, width))
            kinds.append(a.dtype)
        else:
            held.append(a)
            kinds.append("")
    known = [k for k in kinds if k]
    source = value.dtype
    if value.op == "const":
        return e.number(held[0], value.dtype, width)
    if value.op in ("eq", "ne", "lt", "le", "gt", "ge", "cast") and known:
        source = "f32" if "f32" in known else known[0]
        if value.op != "cast" and any(isinstance(a, float) for a in held):
            source = "f32"
    out = []
    for i, (h, k) in enumerate(zip(held, kinds, strict=True)):
        wanted = "bool" if value.op == "where" and i == 0 else source
        if not k:
            out.append(e.number(h, wanted, width))
        else:
            out.append(apply(e, "cast", [h], wanted, k, width) if value.op != "cast" else h)
    return apply(e, value.op, out, value.dtype, source, width)


def pointwise(out: View, value: Value) -> Kernel:
    """out = value, element by element."""

    def emit(e: Emitter, at: Pointers) -> None:
        n = nest([out, *leaves(value)])
        target, moved = n.views[0], n.views[1:]
        size = n.shape[-1] if n.shape else 1

        def turn(index: list[Any], width: int) -> None:
            found = evaluate(e, value, iter(moved), at, index, width)
            found = apply(e, "cast", [found], target.dtype, value.dtype, width)
            e.write(found, at[out.buffer], target, index, len(index) - 1, width)  # type: ignore[index]

        with ExitStack() as stack:
            index = [stack.enter_context(e.loop(s)) for s in n.shape[:-1]]
            if not n.shape:
                return turn([], 1)
            again = all(v.buffer is not out.buffer for v in moved)
            e.vectors(size, lambda i, width: turn([*index, i], width), again)
        return None

    return kernel("pointwise", emit, out, value)


def reduction(op: str, out: View, value: Value, dims: Sequence[int]) -> Kernel:
    """out [..., 1, ...] = `op` ("sum", "amax", "amin") of value over `dims`."""
    shape = value.shape
    views = [out.expand(shape), *leaves(value)]
    real = [d for d in range(len(shape)) if shape[d] > 1]

    def contiguous(d: int) -> int:
        return sum(v.strides[d] == 1 for v in views[1:])

    best = max(real, key=lambda d: (contiguous(d), d), default=None)

    def emit(e: Emitter, at: Pointers) -> None:
        if best is None:
            return pointwise(out, value).emit(e, at)
        kept = [d for d in real if d not in dims and d != best]
        gone = [d for d in real if d in dims and d != best]
        order = [*kept, *gone, best]
        moved = [
            replace(v, shape=tuple(shape[d] for d in order),
                    strides=tuple(v.strides[d] for d in order))
            for v in views
        ]  # fmt: skip
        size = shape[best]

        def inner(index: list[Any], width: int, total: Any) -> None:
            found = evaluate(e, value, iter(moved[1:]), at, index, width)
            e.b.store(e.fold(op, e.b.load(total), found, width), total)

        start = {"sum": 0.0, "amax": float("-inf"), "amin": float("inf")}[op]
        if value.dtype != "f32":
            start = {"sum": 0, "amax": -(2**62), "amin": 2**62}[op]
        target, pointer = moved[0], at[out.buffer]  # type: ignore[index]

        def fresh(width: int) -> Any:
            place = e.variable(e.kind(value.dtype, width))
            e.b.store(e.number(start, value.dtype, width), place)
            return place

        def put(total: Any, index: list[Any], width: int) -> None:
            e.write(total, pointer, target, index, len(index) - 1, width)

        with ExitStack() as stack:
            outer = [stack.enter_context(e.loop(shape[d])) for d in kept]
            if best in dims:
                width = min(WIDTH, size)
                wide, narrow = fresh(width), fresh(1)
                with ExitStack() as inside:
                    index = [inside.enter_context(e.loop(shape[d])) for d in gone]
                    with e.loop(size - size % width, step=width) as i:
                        inner([*outer, *index, i], width, wide)
                    for k, part in blocks(size, width):
                        spot = [*outer, *index, i64(k)]
                        found = evaluate(e, value, iter(moved[1:]), at, spot, part)
                        one = e.across(op, found, part)
                        e.b.store(e.fold(op, e.b.load(narrow), one, 1), narrow)
                total = e.across(op, e.b.load(wide), width)
                total = e.fold(op, total, e.b.load(narrow), 1) if size % width else total
                put(total, [*outer, *(i64(0) for _ in gone), i64(0)], 1)
                return None

            def lanes(i: Any, width: int) -> None:
                total = fresh(width)
                with ExitStack() as inside:
                    index = [inside.enter_context(e.loop(shape[d])) for d in gone]
                    inner([*outer, *index, i], width, total)
                put(e.b.load(total), [*outer, *(i64(0) for _ in gone), i], width)

            e.vectors(size, lanes, again=True)
        return None

    return kernel("reduction", emit, op, out, value, list(dims))


def take_rows(out: View, table: View, ids: View, wrong: View) -> Kernel:
    """out [n, ...] = table [ids[n], ...]."""

    def emit(e: Emitter, at: Pointers) -> None:
        with e.loop(ids.shape[0]) as i:
            row = number(e, at, ids, [i], table.shape[0], wrong)
            _row(e, at, out, i, table, row, add=False)

    return kernel("take", emit, out, table, ids, wrong)


def number(e: Emitter, at: Pointers, ids: View, index: list[Any], limit: int, wrong: View) -> Any:
    """A row's number; 0 where it is out of range, and `wrong` then becomes 1."""
    found = e.read(at[ids.buffer], ids, index, 0, 1)  # type: ignore[index]
    good = e.b.icmp_unsigned("<", found, i64(limit))
    with e.b.if_then(e.b.not_(good)):
        e.write(i64(1), at[wrong.buffer], wrong, [], 0, 1)  # type: ignore[index]
    return e.b.select(good, found, i64(0))


def add_rows(table: View, ids: View, rows: View, wrong: View, scale: View | None = None) -> Kernel:
    """table [ids[n], ...] += rows [n, ...], times `scale` where there is one, one after the
    other."""

    def emit(e: Emitter, at: Pointers) -> None:
        factor = e.read(at[scale.buffer], scale, [], 0, 1) if scale else None  # type: ignore[index]
        with e.loop(ids.shape[0]) as i:
            row = number(e, at, ids, [i], table.shape[0], wrong)
            _row(e, at, table, row, rows, i, add=True, factor=factor)

    return kernel("add", emit, table, ids, rows, wrong, scale)


@dataclass(frozen=True)
class Table:
    """A weight of which a device has only the rows that it touched: `stamps`[row] is the number
    of the last device that did, `touched` its rows in order, `state` that device's number, how
    many rows it touched, and the address of all the rows that it may need."""

    rows: View
    stamps: View
    touched: View
    state: View


def touch_rows(table: Table, ids: View, wrong: View) -> Kernel:
    """Fetch the rows `ids` that this device has not got."""
    length = prod(table.rows.shape[1:])

    def emit(e: Emitter, at: Pointers) -> None:
        b = e.b
        rows, stamps, touched, state = (
            at[v.buffer]  # type: ignore[index]
            for v in (table.rows, table.stamps, table.touched, table.state)
        )
        turn, base = e.load(state, "i64", i64(0)), e.load(state, "i64", i64(2))
        base = b.inttoptr(base, BYTES)
        with e.loop(ids.shape[0]) as i:
            row = number(e, at, ids, [i], table.rows.shape[0], wrong)
            with b.if_then(b.icmp_signed("!=", e.load(stamps, "i64", row), turn)):
                count = e.load(state, "i64", i64(1))
                e.store(turn, stamps, "i64", row)
                e.store(row, touched, "i64", count)
                e.store(b.add(count, i64(1)), state, "i64", i64(1))
                first = b.mul(row, i64(length))
                to, source = (b.bitcast(e.pointer(p, "f32", first), BYTES) for p in (rows, base))
                e.copy(to, source, length)

    return kernel("touch", emit, table.rows, table.stamps, table.touched, table.state, ids, wrong)


def _row(
    e: Emitter, at: Pointers, to: View, t: Any, source: View, s: Any, add: bool, factor: Any = None
) -> None:
    """One row of `to` is that of `source`, or grows by it."""
    n = nest([replace(v, shape=v.shape[1:], strides=v.strides[1:], offset=0) for v in (to, source)])
    a, b = n.views
    t = e.b.add(i64(to.offset), e.b.mul(t, i64(to.strides[0])))
    s = e.b.add(i64(source.offset), e.b.mul(s, i64(source.strides[0])))

    def turn(index: list[Any], width: int) -> None:
        wide = [replace(v, shape=(1, *v.shape), strides=(1, *v.strides)) for v in (a, b)]
        lane = len(index)
        found = e.read(at[source.buffer], wide[1], [s, *index], lane, width)  # type: ignore[index]
        if factor is not None:
            found = e.b.fmul(found, e.splat(factor, width))
        if add:
            old = e.read(at[to.buffer], wide[0], [t, *index], lane, width)  # type: ignore[index]
            found = e.fold("sum", old, found, width)
        e.write(found, at[to.buffer], wide[0], [t, *index], lane, width)  # type: ignore[index]

    with ExitStack() as stack:
        if not n.shape:
            return turn([], 1)
        index = [stack.enter_context(e.loop(size)) for size in n.shape[:-1]]
        e.vectors(n.shape[-1], lambda i, width: turn([*index, i], width), not add)
    return None


def pick(out: View, source: View, ids: View, dim: int, wrong: View) -> Kernel:
    """out [..., j, ...] = source [..., ids[..., j, ...], ...] along `dim`."""

    def emit(e: Emitter, at: Pointers) -> None:
        with ExitStack() as stack:
            index = [stack.enter_context(e.loop(size)) for size in out.shape]
            there = list(index)
            there[dim] = number(e, at, ids, index, source.shape[dim], wrong)
            found = e.read(at[source.buffer], source, there, 0, 1)  # type: ignore[index]
            e.write(found, at[out.buffer], out, index, 0, 1)  # type: ignore[index]

    return kernel("pick", emit, out, source, ids, dim, wrong)
