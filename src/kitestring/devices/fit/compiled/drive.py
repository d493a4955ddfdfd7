"""The loop over devices, epochs and batches around one training step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

from llvmlite import ir

from kitestring.devices.fit.compiled.build import Builder
from kitestring.devices.fit.compiled.draws import Draw, draw
from kitestring.devices.fit.compiled.emit import BYTES, F32, Emitter, i64
from kitestring.devices.fit.compiled.kernels import Table
from kitestring.devices.fit.compiled.layout import Layout
from kitestring.devices.fit.compiled.order import shuffled
from kitestring.devices.fit.compiled.update import update
from kitestring.devices.fit.compiled.views import SIZES, Buffer


def drive(builder: Builder, step: Any, layout: Layout, draws: Sequence[Draw]) -> None:
    """for each device: load its weights; for each epoch, each batch: gather, step; store them.

    `draws` are filled before every step. Numbers given: devices, epochs, shuffle, memory, n, keys,
    losses, order; for each column its rows and starts; for each table where its rows are, where
    each device's touched ones go, how many those are, their numbers and the rows themselves; for
    each other weight where it is, how far the next device's lies (0: shared) and, if it is trained,
    where it goes; and the first two for each trained weight's centre and linear term where those
    are used."""
    e, numbers = builder.main()
    b, kind = e.b, layout.kind
    count = iter(range(10_000))

    def given() -> Any:
        return b.load(b.gep(numbers, [i64(next(count))]))

    def pointer() -> Any:
        return b.inttoptr(given(), BYTES)

    devices, epochs, shuffle = given(), given(), given()
    memory, n_at, keys, losses, order = (pointer() for _ in range(5))
    sources = {name: (pointer(), pointer()) for name in layout.columns}
    tables = {name: (given(), pointer(), pointer(), pointer(), pointer()) for name in layout.tables}
    trained = [name for name in layout.trained if name not in layout.tables]
    places = {name: (pointer(), given(), pointer()) for name in trained}
    places.update({name: (pointer(), given(), None) for name in layout.held})
    also = [w for w, used in (("centre", kind.mu), ("linear", kind.linear)) if used]
    more = {w: {name: (pointer(), given()) for name in trained} for w in also}

    def at(buffer: Buffer, element: int = 0) -> Any:
        return b.gep(memory, [i64(buffer.at + element * SIZES[buffer.dtype])])

    def load_all(d: Any, which: Mapping[str, Any], to: Callable[[str], Any]) -> None:
        for name, (source, apart, *_) in which.items():
            first = e.pointer(source, "f32", b.mul(d, apart))
            e.copy(to(name), b.bitcast(first, BYTES), prod(layout.views[name].shape))

    with e.loop(devices) as d:
        n = e.load(n_at, "i64", d)
        load_all(d, places, lambda name: at(layout.weights, layout.views[name].offset))
        for what, spots in more.items():
            aim = layout.extra[what]
            load_all(d, spots, lambda name, aim=aim: at(aim, layout.views[name].offset))  # type: ignore[misc]
        for name, (base, *_) in tables.items():
            _open(e, at(_buffer(layout.tables[name])), base)
        if not kind.simple:
            for name in ("first", "second"):
                e.clear(at(layout.extra[name]), layout.trained_size)
        key = e.load(keys, "i64", d)
        steps = b.sdiv(b.add(n, i64(kind.batch - 1)), i64(kind.batch))
        loss = e.variable(F32)
        b.store(ir.Constant(F32, 0.0), loss)
        powers = [e.variable(ir.DoubleType()) for _ in range(2)]
        for p in powers:
            b.store(ir.Constant(ir.DoubleType(), 1.0), p)
        with e.loop(epochs) as epoch:
            shuffled(e, order, n, key, epoch, shuffle)
            with e.loop(steps) as t:
                first = b.mul(t, i64(kind.batch))
                left = b.sub(n, first)
                real = b.select(b.icmp_signed("<", left, i64(kind.batch)), left, i64(kind.batch))
                _gather(e, layout, memory, sources, order, d, first, real)
                now = b.add(b.mul(epoch, steps), t)
                for place, one in enumerate(draws):
                    draw(e, memory, one, key, now, place, real, kind.batch)
                b.call(step, [memory])
                found = e.load(at(layout.loss), "f32", i64(0))
                b.store(b.fadd(b.load(loss), found), loss)
                if not kind.simple:
                    update(e, memory, layout, powers)
        many = b.mul(steps, epochs)
        under = b.select(b.icmp_signed(">", many, i64(0)), many, i64(1))
        e.store(b.fdiv(b.load(loss), b.sitofp(under, F32)), losses, "f32", d)
        for name in trained:
            length = prod(layout.views[name].shape)
            to = e.pointer(places[name][2], "f32", b.mul(d, i64(length)))
            e.copy(b.bitcast(to, BYTES), at(layout.weights, layout.views[name].offset), length)
        for name, (_, *out) in tables.items():
            _close(e, memory, layout.tables[name], d, *out)
    e.done()


def _buffer(table: Table) -> Buffer:
    assert table.state.buffer is not None
    return table.state.buffer


def _open(e: Emitter, state: Any, base: Any) -> None:
    """The next device, which has touched nothing."""
    turn = e.b.add(e.load(state, "i64", i64(0)), i64(1))
    for at, value in enumerate((turn, i64(0), base)):
        e.store(value, state, "i64", i64(at))


def _close(
    e: Emitter, memory: Any, table: Table, d: Any, first: Any, counts: Any, ids: Any, rows: Any
) -> None:
    """Write out what this device touched."""
    b, length = e.b, prod(table.rows.shape[1:])
    mine, touched, state = (
        b.gep(memory, [i64(v.buffer.at)])  # type: ignore[union-attr]
        for v in (table.rows, table.touched, table.state)
    )
    count, start = e.load(state, "i64", i64(1)), e.load(first, "i64", d)
    e.store(count, counts, "i64", d)
    with e.loop(count) as i:
        row, aim = e.load(touched, "i64", i), b.add(start, i)
        e.store(row, ids, "i64", aim)
        to = b.bitcast(e.pointer(rows, "f32", b.mul(aim, i64(length))), BYTES)
        e.copy(to, b.bitcast(e.pointer(mine, "f32", b.mul(row, i64(length))), BYTES), length)


def _gather(
    e: Emitter, layout: Layout, memory: Any, sources: Mapping[str, Any], order: Any, d: Any,
    start: Any, real: Any,
) -> None:  # fmt: skip
    """The batch's rows and their shares in its mean; where it is short its first row fills it,
    and counts for nothing."""
    b = e.b
    weight = b.fdiv(ir.Constant(F32, 1.0), b.sitofp(real, F32))
    with e.loop(layout.kind.batch) as row:
        inside = b.icmp_signed("<", row, real)
        share = b.gep(memory, [i64(layout.share.at)])
        e.store(b.select(inside, weight, ir.Constant(F32, 0.0)), share, "f32", row)
        number = e.load(order, "i64", b.add(start, b.select(inside, row, i64(0))))
        for name, view in layout.columns.items():
            assert view.buffer is not None
            flat, starts = sources[name]
            length = prod(view.shape[1:])
            there = b.mul(b.add(e.load(starts, "i64", d), number), i64(length))
            source = b.bitcast(e.pointer(flat, view.dtype, there), BYTES)
            batch = b.gep(memory, [i64(view.buffer.at)])
            here = b.bitcast(e.pointer(batch, view.dtype, b.mul(row, i64(length))), BYTES)
            e.copy(here, source, length, view.dtype)
