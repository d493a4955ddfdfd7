"""Outputs or gradients of many devices, one after the other, as one native function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from kitestring.devices.fit.compiled import trace
from kitestring.devices.fit.compiled.build import Builder, Native, compiled, step_function
from kitestring.devices.fit.compiled.emit import BYTES, i64
from kitestring.devices.fit.compiled.kernels import pointwise
from kitestring.devices.fit.compiled.lower import lower
from kitestring.devices.fit.compiled.memory import place
from kitestring.devices.fit.compiled.tensors import (
    Columns,
    column_views,
    sample,
    weight_shapes,
    weight_views,
)
from kitestring.devices.fit.compiled.views import SIZES, Buffer, Refused, View, plain
from kitestring.devices.fit.programs import Program


@dataclass(frozen=True)
class Kind:
    """All that the code of an evaluation depends on, beside the program."""

    block: int  # rows at a time
    columns: Columns
    slopes: bool  # gradients, and not outputs
    cotangents: tuple[str, ...] = ()


@dataclass
class Evaluator:
    """`rows` and `sums`: name, shape (of a row, of the whole) and dtype of what comes out."""

    native: Native
    weights: tuple[str, ...]
    rows: Columns
    sums: Columns
    wrong: Buffer  # 1 where a row's number was out of range


def evaluator(program: Program, kind: Kind) -> Evaluator:
    """Raises `Refused` where the program holds what there is no code for."""
    shapes, state = weight_shapes(program)
    names = sorted(shapes)
    weights = Buffer("weights", "f32", sum(prod(s) for s in shapes.values()), fixed=True)
    views = weight_views(shapes, names, weights)
    columns = column_views(kind.columns, kind.block)
    batch = sample(kind.columns, kind.block)
    if kind.slopes:
        graph, outputs = trace.backward(program, state, batch, list(kind.cotangents))
    else:
        graph, outputs = trace.forward(program, state, batch)
    inputs = [views[k] for k in names] + [columns[k] for k in sorted(columns)]
    low, found = lower(graph, inputs)
    if low.draws:
        raise Refused("it draws when it predicts")
    rows: list[Any] = []
    sums: list[Any] = []
    fixed = [weights, *(v.buffer for v in columns.values() if v.buffer)]
    results: dict[str, View] = {}
    for name, value in zip(outputs, found, strict=True):
        if value is None:
            raise Refused("a gradient of nothing")
        by_row = not kind.slopes or name.startswith("x:")
        if by_row and (not value.shape or value.shape[0] != kind.block):
            raise Refused(f"an output of shape {value.shape} for {kind.block} rows")
        out = plain(Buffer(name, value.dtype, max(1, prod(value.shape)), fixed=True), value.shape)
        low.put(pointwise(out, value))
        results[name] = out
        (rows if by_row else sums).append((name, value.shape[by_row:], value.dtype))
        fixed += [out.buffer] if out.buffer else []
    assert low.wrong.buffer is not None
    size = place([*fixed, low.wrong.buffer], low.kernels)
    builder = Builder()
    step = step_function(builder, low.kernels)
    _drive(builder, step, kind, views, names, columns, results, rows, sums)
    return Evaluator(compiled(builder, size, low.constants), tuple(names), tuple(rows), tuple(sums),
                     low.wrong.buffer)  # fmt: skip


def _drive(
    builder: Builder, step: Any, kind: Kind, views: Mapping[str, View], names: Sequence[str],
    columns: Mapping[str, View], results: Mapping[str, View], rows: Sequence[Any],
    sums: Sequence[Any],
) -> None:  # fmt: skip
    """for each device: load its weights; for each block of rows: gather, step, store.

    Numbers given: devices, memory, n, rows of a device in what comes out; then for each column its
    rows and starts; for each weight where it is and how far the next device's lies (0: shared);
    for each output where it goes."""
    e, numbers = builder.main()
    b = e.b
    count = iter(range(10_000))

    def given() -> Any:
        return b.load(b.gep(numbers, [i64(next(count))]))

    def pointer() -> Any:
        return b.inttoptr(given(), BYTES)

    devices, memory, n_at, wide = given(), pointer(), pointer(), given()
    sources = {name: (pointer(), pointer()) for name in columns}
    places = {name: (pointer(), given()) for name in names}
    to = {name: pointer() for name, *_ in [*rows, *sums]}

    def at(view: View) -> Any:
        assert view.buffer is not None
        return b.gep(memory, [i64(view.buffer.at + view.offset * SIZES[view.dtype])])

    def there(base: Any, dtype: str, index: Any) -> Any:
        return b.bitcast(e.pointer(base, dtype, index), BYTES)

    masked = [name for name in columns if name == "share" or name.startswith("by:")]
    with e.loop(devices) as d:
        n = e.load(n_at, "i64", d)
        for name, (source, apart) in places.items():
            own = b.or_(b.icmp_signed("!=", apart, i64(0)), b.icmp_signed("==", d, i64(0)))
            with b.if_then(own):
                first = there(source, "f32", b.mul(d, apart))
                e.copy(at(views[name]), first, prod(views[name].shape))
        with e.loop(n, step=kind.block) as first:
            left = b.sub(n, first)
            real = b.select(b.icmp_signed("<", left, i64(kind.block)), left, i64(kind.block))
            with e.loop(kind.block) as row:
                inside = b.icmp_signed("<", row, real)
                number = b.add(first, b.select(inside, row, i64(0)))
                for name, view in columns.items():
                    flat, starts = sources[name]
                    length = prod(view.shape[1:])
                    start = b.mul(b.add(e.load(starts, "i64", d), number), i64(length))
                    here = there(at(view), view.dtype, b.mul(row, i64(length)))
                    e.copy(here, there(flat, view.dtype, start), length, view.dtype)
                    if name in masked:
                        with b.if_then(b.not_(inside)):
                            e.clear(here, length)
            b.call(step, [memory])
            for name, shape, dtype in rows:
                length = prod(shape)
                aim = b.mul(b.add(b.mul(d, wide), first), i64(length))
                with e.loop(real) as row:
                    out = there(to[name], dtype, b.add(aim, b.mul(row, i64(length))))
                    e.copy(out, there(at(results[name]), dtype, b.mul(row, i64(length))), length,
                           dtype)  # fmt: skip
            for name, shape, dtype in sums:
                length = prod(shape)
                e.grow(there(to[name], dtype, b.mul(d, i64(length))), at(results[name]), length)
    e.done()
