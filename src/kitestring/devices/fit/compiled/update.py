"""What torch.optim does with a gradient, over all trained weights in one run."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from kitestring.devices.fit.compiled.emit import F32, FLAGS, WIDTH, Emitter, i64
from kitestring.devices.fit.compiled.layout import HYPER, Layout


def update(e: Emitter, memory: Any, layout: Layout, powers: list[Any]) -> None:
    """`powers` are places for Adam's beta1^t and beta2^t, 1 before the first step."""
    b, kind, size, extra = e.b, layout.kind, layout.trained_size, layout.extra

    def at(buffer: Any) -> Any:
        return b.gep(memory, [i64(buffer.at)])

    weights = at(layout.weights)
    gradient, one, two = (at(extra[k]) for k in ("gradient", "first", "second"))

    def setting(name: str) -> Any:
        return e.load(at(layout.hyper), "f32", i64(HYPER.index(name)))

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
        less_root = b.fdiv(e.number(1.0, "f32", 1), e.call("sqrt", known, 1))

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
            under = e.fma(e.call("sqrt", v, w), e.splat(less_root, w), e.number(1e-8, "f32", w))
            p = b.fadd(p, b.fmul(b.fdiv(m, under), e.splat(size_, w)))
        else:
            if kind.momentum:
                g = e.fma(get(one, i, w), e.splat(settings["momentum"], w), g)
                e.store(g, one, "f32", i, w)
            p = b.fadd(p, b.fmul(g, e.splat(settings["less"], w), flags=FLAGS), flags=FLAGS)
        e.store(p, weights, "f32", i, w)

    e.vectors(size, step)
