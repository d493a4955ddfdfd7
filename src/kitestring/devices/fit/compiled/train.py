"""The training of many devices, one after the other, as one native function."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from llvmlite import ir

from kitestring.devices.fit.compiled import trace
from kitestring.devices.fit.compiled.build import Builder, Native, compiled, step_function
from kitestring.devices.fit.compiled.emit import BYTES, F32, FLAGS, I64, WIDTH, Emitter, i64
from kitestring.devices.fit.compiled.kernels import Kernel, add_rows, pointwise
from kitestring.devices.fit.compiled.lower import lower
from kitestring.devices.fit.compiled.lowering import Lowering, Product, RowsAdded
from kitestring.devices.fit.compiled.memory import place
from kitestring.devices.fit.compiled.order import shuffled
from kitestring.devices.fit.compiled.product import product
from kitestring.devices.fit.compiled.tensors import (
    Columns,
    column_views,
    sample,
    weight_shapes,
    weight_views,
)
from kitestring.devices.fit.compiled.views import SIZES, Buffer, Expr, View, leaves, plain
from kitestring.devices.fit.programs import Program

FILL = ir.FunctionType(ir.VoidType(), [I64, I64, I64])  # device, step, rows that count
HYPER = ("lr", "less", "momentum", "decay", "mu", "clip")


@dataclass(frozen=True)
class Kind:
    """All that the code of a fit depends on, beside the program."""

    batch: int
    columns: Columns
    trained: frozenset[str]
    optimiser: str
    momentum: bool
    decay: bool
    clip: bool
    mu: bool
    linear: bool

    @property
    def simple(self) -> bool:
        """The gradient may go into the weights as soon as it is computed."""
        return self.optimiser == "sgd" and not (
            self.momentum or self.decay or self.clip or self.mu or self.linear
        )


@dataclass
class Trainer:
    native: Native
    weights: tuple[tuple[str, bool], ...]  # names in order, and which are trained
    hyper: int  # where the settings lie in memory
    draws: tuple[tuple[View, float], ...]  # filled before every step


def trainer(program: Program, kind: Kind) -> Trainer:
    """Raises `Refused` where the program holds what there is no code for."""
    shapes, state = weight_shapes(program)
    trained = sorted(kind.trained)
    held = sorted(set(state) - kind.trained)
    size = sum(prod(shapes[k]) for k in trained)
    weights = Buffer("weights", "f32", size + sum(prod(shapes[k]) for k in held), fixed=True)
    views = weight_views(shapes, [*trained, *held], weights)
    columns = column_views(kind.columns, kind.batch)
    share = plain(Buffer("share", "f32", kind.batch, fixed=True), (kind.batch,))
    hyper = plain(Buffer("hyper", "f32", len(HYPER) + 2, fixed=True), (len(HYPER) + 2,))
    graph, names = trace.step(
        program, state, kind.trained, {**sample(kind.columns, kind.batch),
                                       "share": torch.ones(kind.batch)},
    )  # fmt: skip
    inputs = [views[k] for k in sorted(views)]
    every = {**columns, "share": share}
    inputs += [every[k] for k in sorted(every)]
    low, (loss, *slopes) = lower(graph, inputs, late=True)
    total = plain(Buffer("loss", "f32", 1, fixed=True), ())
    low.put(pointwise(total, low.view(loss)))
    extra: dict[str, Buffer] = {}
    if kind.simple:
        _grow(low, views, names, slopes, hyper)
    else:
        for name in ("gradient", "first", "second", "centre", "linear"):
            extra[name] = Buffer(name, "f32", size, fixed=True)
        aims = weight_views(shapes, trained, extra["gradient"])
        for name, slope in zip(names, slopes, strict=True):
            _into(low, aims[name], slope)
    fixed = [weights, *(v.buffer for v in columns.values() if v.buffer), share.buffer, hyper.buffer,
             total.buffer, *extra.values()]  # fmt: skip
    size_bytes = place([b for b in fixed if b], low.kernels)
    builder = Builder()
    _drive(builder, low.kernels, kind, views, trained, held, columns, share, total, hyper, extra,
           size, bool(low.draws))  # fmt: skip
    native = compiled(builder, size_bytes, low.constants)
    order = tuple((k, True) for k in trained) + tuple((k, False) for k in held)
    assert hyper.buffer
    return Trainer(native, order, hyper.buffer.at, tuple(low.draws))


def _grow(
    low: Lowering, views: Mapping[str, View], names: Sequence[str], slopes: Sequence[Any],
    hyper: View,
) -> None:  # fmt: skip
    """Weights grow by -lr times their gradients, in place, once all gradients are known."""
    less = hyper.slice(0, HYPER.index("less"), 1).select(0, 0)
    ready = []
    for slope in slopes:
        if not isinstance(slope, Product | RowsAdded):
            weights = next(iter(views.values())).buffer
            if isinstance(slope, Expr) or any(v.buffer is weights for v in leaves(slope)):
                slope = low.view(Expr("add", (slope, 0.0), "f32", slope.shape))
        ready.append(slope)
    for name, slope in zip(names, ready, strict=True):
        weight = views[name]
        if isinstance(slope, Product):
            low.put(product(weight, slope.a, slope.b, weight, less))
        elif isinstance(slope, RowsAdded):
            low.put(add_rows(weight, slope.ids, slope.rows, less))
        else:
            step = Expr("mul", (slope, less.expand(slope.shape)), "f32", slope.shape)
            low.put(pointwise(weight, Expr("add", (weight, step), "f32", slope.shape)))


def _into(low: Lowering, aim: View, slope: Any) -> None:
    if isinstance(slope, Product):
        low.put(product(aim, slope.a, slope.b))
    else:
        low.put(pointwise(aim, low.view(slope)))


def _drive(
    builder: Builder, kernels: Sequence[Kernel], kind: Kind, views: Mapping[str, View],
    trained: Sequence[str], held: Sequence[str], columns: Mapping[str, View], share: View,
    total: View, hyper: View, extra: Mapping[str, Buffer], size: int, draws: bool,
) -> None:  # fmt: skip
    """for each device: load its weights; for each epoch, each batch: gather, step; store them.

    Numbers given: a function that draws (if anything is drawn), devices, epochs, shuffle, memory,
    n, keys, losses, order; then for each column its rows and starts; for each weight where it is,
    how far the next device's lies (0: shared) and, if it is trained, where it goes; and the first
    two for each trained weight's centre and linear term where those are used.
    """
    step = step_function(builder, kernels)
    e, numbers = builder.main()
    b = e.b
    count = iter(range(10_000))

    def given() -> Any:
        return b.load(b.gep(numbers, [i64(next(count))]))

    def pointer() -> Any:
        return b.inttoptr(given(), BYTES)

    fill = b.inttoptr(given(), FILL.as_pointer())
    devices, epochs, shuffle, memory, n_at, keys, losses, order = (
        given(), given(), given(), pointer(), pointer(), pointer(), pointer(), pointer(),
    )  # fmt: skip
    sources = {name: (pointer(), pointer()) for name in columns}
    places = {name: (pointer(), given(), pointer()) for name in trained}
    places.update({name: (pointer(), given(), None) for name in held})
    also = [w for w, used in (("centre", kind.mu), ("linear", kind.linear)) if used]
    more = {w: {name: (pointer(), given()) for name in trained} for w in also}

    def at(buffer: Buffer | None, element: int = 0) -> Any:
        assert buffer is not None
        return b.gep(memory, [i64(buffer.at + element * SIZES[buffer.dtype])])

    def load_all(d: Any, which: Mapping[str, Any], to: Callable[[str], Any]) -> None:
        for name, (source, apart, *_) in which.items():
            first = e.pointer(source, "f32", b.mul(d, apart))
            e.copy(to(name), b.bitcast(first, BYTES), prod(views[name].shape))

    with e.loop(devices) as d:
        n = e.load(n_at, "i64", d)
        load_all(d, places, lambda name: at(views[name].buffer, views[name].offset))
        for what, spots in more.items():
            load_all(d, spots, lambda name, w=what: at(extra[w], views[name].offset))  # type: ignore[misc]
        if not kind.simple:
            for name in ("first", "second"):
                e.clear(at(extra[name]), size)
        steps = b.sdiv(b.add(n, i64(kind.batch - 1)), i64(kind.batch))
        loss = e.variable(F32, ir.Constant(F32, 0.0))
        b.store(ir.Constant(F32, 0.0), loss)
        powers = [e.variable(ir.DoubleType()) for _ in range(2)]
        for p in powers:
            b.store(ir.Constant(ir.DoubleType(), 1.0), p)
        with e.loop(epochs) as epoch:
            shuffled(e, order, n, e.load(keys, "i64", d), epoch, shuffle)
            with e.loop(steps) as t:
                first = b.mul(t, i64(kind.batch))
                left = b.sub(n, first)
                real = b.select(b.icmp_signed("<", left, i64(kind.batch)), left, i64(kind.batch))
                _gather(e, columns, sources, order, d, first, real, kind.batch, at)
                weight = b.fdiv(ir.Constant(F32, 1.0), b.sitofp(real, F32))
                with e.loop(kind.batch) as row:
                    counted = b.icmp_signed("<", row, real)
                    value = b.select(counted, weight, ir.Constant(F32, 0.0))
                    e.store(value, at(share.buffer), "f32", row)
                if draws:
                    b.call(fill, [d, b.add(b.mul(epoch, steps), t), real])
                b.call(step, [memory])
                found = e.load(at(total.buffer), "f32", i64(0))
                b.store(b.fadd(b.load(loss), found), loss)
                if not kind.simple:
                    _update(e, kind, at, views, extra, hyper, powers, size)
        many = b.mul(steps, epochs)
        under = b.select(b.icmp_signed(">", many, i64(0)), many, i64(1))
        e.store(b.fdiv(b.load(loss), b.sitofp(under, F32)), losses, "f32", d)
        for name in trained:
            length = prod(views[name].shape)
            to = e.pointer(places[name][2], "f32", b.mul(d, i64(length)))
            source = at(views[name].buffer, views[name].offset)
            e.copy(b.bitcast(to, BYTES), source, length)
    e.done()


def _gather(
    e: Emitter, columns: Mapping[str, View], sources: Mapping[str, Any], order: Any, d: Any,
    first: Any, real: Any, batch: int, at: Callable[..., Any],
) -> None:  # fmt: skip
    """The batch's rows; where it is short its first row fills it, and counts for nothing."""
    b = e.b
    with e.loop(batch) as row:
        inside = b.icmp_signed("<", row, real)
        number = e.load(order, "i64", b.add(first, b.select(inside, row, i64(0))))
        for name, view in columns.items():
            flat, starts = sources[name]
            length = prod(view.shape[1:])
            there = b.mul(b.add(e.load(starts, "i64", d), number), i64(length))
            source = b.bitcast(e.pointer(flat, view.dtype, there), BYTES)
            here = e.pointer(at(view.buffer), view.dtype, b.mul(row, i64(length)))
            e.copy(b.bitcast(here, BYTES), source, length, view.dtype)


def _update(
    e: Emitter, kind: Kind, at: Callable[..., Any], views: Mapping[str, View],
    extra: Mapping[str, Buffer], hyper: View, powers: list[Any], size: int,
) -> None:  # fmt: skip
    """What torch.optim does, over all trained weights in one run."""
    b = e.b
    weights = at(next(iter(views.values())).buffer)
    gradient, one, two = (at(extra[k]) for k in ("gradient", "first", "second"))

    def setting(name: str) -> Any:
        return e.load(at(hyper.buffer), "f32", i64(HYPER.index(name)))

    settings = {name: setting(name) for name in HYPER}

    def get(base: Any, i: Any, w: int) -> Any:
        return e.load(base, "f32", i, w)

    if kind.mu or kind.linear or kind.clip:
        square, single = e.variable(e.kind("f32", WIDTH)), e.variable(F32)
        b.store(e.number(0.0, "f32", WIDTH), square)
        b.store(e.number(0.0, "f32", 1), single)

        def add(i: Any, w: int) -> None:
            g = get(gradient, i, w)
            if kind.mu:
                off = b.fsub(get(weights, i, w), get(at(extra["centre"]), i, w))
                g = b.fadd(g, b.fmul(off, e.splat(settings["mu"], w)))
            if kind.linear:
                g = b.fadd(g, get(at(extra["linear"]), i, w))
            e.store(g, gradient, "f32", i, w)
            if w == WIDTH:
                b.store(e.fma(g, g, b.load(square)), square)
            else:
                more = e.across("sum", b.fmul(g, g), w)
                b.store(b.fadd(b.load(single), more), single)

        e.vectors(size, add)
        if kind.clip:
            norm = e.call("sqrt", b.fadd(e.across("sum", b.load(square), WIDTH), b.load(single)), 1)
            ratio = b.fdiv(settings["clip"], b.fadd(norm, e.number(1e-6, "f32", 1)))
            one_ = e.number(1.0, "f32", 1)
            factor = b.select(b.fcmp_ordered(">", ratio, one_), one_, ratio)

            def shrink(i: Any, w: int) -> None:
                e.store(b.fmul(get(gradient, i, w), e.splat(factor, w)), gradient, "f32", i, w)

            e.vectors(size, shrink)
    if kind.optimiser == "adam":
        double = ir.DoubleType()
        for power, beta in zip(powers, (0.9, 0.999), strict=True):
            b.store(b.fmul(b.load(power), ir.Constant(double, beta)), power)
        left = [b.fsub(ir.Constant(double, 1.0), b.load(p)) for p in powers]
        size_ = b.fptrunc(b.fdiv(b.fpext(settings["less"], double), left[0]), F32)
        known = b.fptrunc(left[1], F32)
        root = e.call("sqrt", known, 1)

    def step(i: Any, w: int) -> None:
        g, p = get(gradient, i, w), get(weights, i, w)
        if kind.decay:
            g = e.fma(p, e.splat(settings["decay"], w), g)
        if kind.optimiser == "adam":
            m, v = get(one, i, w), get(two, i, w)
            m = b.fadd(m, b.fmul(b.fsub(g, m), e.number(0.1, "f32", w)))
            v = b.fadd(
                b.fmul(v, e.number(0.999, "f32", w)),
                b.fmul(b.fmul(g, g), e.number(0.001, "f32", w)),
            )
            e.store(m, one, "f32", i, w)
            e.store(v, two, "f32", i, w)
            under = b.fdiv(e.call("sqrt", v, w), e.splat(root, w))
            under = b.fadd(under, e.number(1e-8, "f32", w))
            p = b.fadd(p, b.fmul(b.fdiv(m, under), e.splat(size_, w)))
        else:
            if kind.momentum:
                g = e.fma(get(one, i, w), e.splat(settings["momentum"], w), g)
                e.store(g, one, "f32", i, w)
            p = b.fadd(p, b.fmul(g, e.splat(settings["less"], w), flags=FLAGS), flags=FLAGS)
        e.store(p, weights, "f32", i, w)

    e.vectors(size, step)
