"""Convolutions as products without unrolled copies, and pooling as strided slices.

The input is copied once into rows of equal pitch with zeros around (and, for a stride s, into
s x s phases). Then position y * pitch + x of the output reads `pitch * dy + dx` further on in the
input for each weight: whole images are single vectors, and each weight is a table of offsets. The
columns between the end of a row and the pitch are computed for nothing and never read.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from math import prod
from typing import Any

from torch.fx import Node

from kitestring.devices.fit.compiled import channels
from kitestring.devices.fit.compiled.emit import WIDTH, Emitter, i64
from kitestring.devices.fit.compiled.kernels import Kernel, Pointers, kernel, pointwise, reduction
from kitestring.devices.fit.compiled.lowering import Lowering
from kitestring.devices.fit.compiled.planes import Shape
from kitestring.devices.fit.compiled.product import DOT, REGISTERS, grow, runs, stripes
from kitestring.devices.fit.compiled.views import (
    Buffer,
    Refused,
    Value,
    View,
    blocks,
    changed,
    constant,
)

_SLACK = 4 * WIDTH  # elements that may be read past the last image


def _shape(x: Value, w: Value, pairs: Sequence[Any], groups: int) -> Shape:
    if len(x.shape) != 4:
        raise Refused(f"a convolution in {len(x.shape) - 2} dimensions")
    (_, _, hi, wi), (outs, ins, ky, kx) = x.shape, w.shape
    stride, padding, dilation = ((int(a), int(b)) for a, b in pairs)
    return Shape(
        x.shape[0], groups, ins, outs // groups, (hi, wi), (ky, kx), stride, padding, dilation
    )


def _flat(low: Lowering, x: Value, w: Value, *pairs: Any) -> tuple[Value, Value, list[Any]]:
    """One dimension as two."""
    if len(x.shape) != 3:
        return x, w, list(pairs)
    x = low.reshaped(x, (*x.shape[:2], 1, x.shape[2]))
    w = low.reshaped(w, (*w.shape[:2], 1, w.shape[2]))
    given = [[fill, *pair] for fill, pair in zip((1, 0, 1), pairs, strict=True)]
    return x, w, given


def _planes(s: Shape, every: int, phases: int, rows: int, last: bool, pitch: int) -> View:
    """Zeros [batch, every, phases, rows, pitch]; memory of its own starts as zeros, and only the
    inside is ever written. With `last` the channels, which are `every` many, lie innermost."""
    shape = (s.batch, every, phases, rows, pitch)
    size = prod(shape) + s.reach[0] * pitch + s.reach[1] + _SLACK
    if last:
        row = pitch * every
        strides = (phases * rows * row, 1, rows * row, row, every)
    else:
        strides = tuple(prod(shape[d + 1 :]) for d in range(5))  # type: ignore[assignment]
    return View(Buffer("", "f32", size, fixed=True), shape, strides)


def _phased(low: Lowering, x: Value, s: Shape, last: bool = False) -> View:
    """The padded input by phases; that of the forward pass serves the backward pass too."""
    if (x, s, last) in low.cache:
        return low.cache[x, s, last]  # type: ignore[no-any-return]
    rows, columns = s.padded
    pitch = columns if last else s.pitch
    planes = _planes(s, s.groups * s.ins, len(s.phases), rows, last, pitch)
    low.cache[x, s, last] = planes
    for number, phase in enumerate(s.phases):
        there, here = planes.select(2, number), x
        spans = [s.span(d, phase) for d in (0, 1)]
        if min(count for *_, count in spans) > 0:
            for d, (first, start, count) in enumerate(spans):
                cut = partial(View.slice, dim=2 + d, start=start, length=count, step=s.stride[d])
                here, there = changed(here, cut), there.slice(2 + d, first, count)
            low.put(pointwise(there, here))
    return planes


def _offsets(s: Shape, planes: View, weights: Sequence[tuple[int, int, int]]) -> list[int]:
    """Where each weight (channel, y, x) of a group reads, from a group's first element."""
    _, channel, phase_stride, row, _ = planes.strides
    out = []
    for c, y, x in weights:
        phase, (dy, dx) = s.place(y, x)
        out.append(c * channel + s.phases.index(phase) * phase_stride + dy * row + dx)
    return out


def _weights(s: Shape) -> list[tuple[int, int, int]]:
    ky, kx = s.kernel
    return [(c, y, x) for c in range(s.ins) for y in range(ky) for x in range(kx)]


def forward(
    low: Lowering, node: Node, x: Value, w: Value, bias: Any, stride: Any, padding: Any,
    dilation: Any, transposed: bool, _: Any, groups: int,
) -> Value:  # fmt: skip
    if transposed:
        raise Refused("a transposed convolution")
    x, w, pairs = _flat(low, x, w, stride, padding, dilation)
    s = _shape(x, w, pairs, groups)
    w = low.view(w, contiguous=True)
    bias = None if bias is None else low.view(bias)
    if channels.suits(groups, s.outs):
        out = channels.forward(low, s, _phased(low, x, s, last=True), w, bias)
        return low.reshaped(out, tuple(node.meta["val"].shape))
    planes = _phased(low, x, s)
    flat, out = _output(s, s.outs, *s.out)
    reads = _offsets(s, planes, _weights(s))
    low.put(correlate(flat, w, _natural(s, w), w.strides[0], planes, reads, 0, bias))
    return low.reshaped(out, tuple(node.meta["val"].shape))


def _natural(s: Shape, w: View) -> list[int]:
    """Offsets of a row's weights in w [out, in, ky, kx]."""
    _, c, y, x = w.strides
    return [a * c + b * y + d * x for a, b, d in _weights(s)]


def backward(
    low: Lowering, node: Node, d_out: Value, x: Value, w: Value, _sizes: Any, stride: Any,
    padding: Any, dilation: Any, transposed: bool, _: Any, groups: int, wanted: Sequence[bool],
) -> tuple[Any, ...]:  # fmt: skip
    if transposed:
        raise Refused("a transposed convolution")
    shape_x, shape_w = x.shape, w.shape
    if len(d_out.shape) == 3:
        d_out = low.reshaped(d_out, (*d_out.shape[:2], 1, d_out.shape[2]))
    x, w, pairs = _flat(low, x, w, stride, padding, dilation)
    s = _shape(x, w, pairs, groups)
    w = low.view(w, contiguous=True)
    if (wanted[0] and channels.suits(groups, s.ins)) or channels.suits(groups, s.outs):
        d_out = _inside(s, _around(low, s, d_out, last=True))
    d_out = low.view(d_out)
    d_x: Value | None = None
    d_w: Value | None = None
    d_b: Value | None = None
    if wanted[0]:
        if channels.suits(groups, s.ins):
            d_x = channels.input_slope(low, s, _around(low, s, d_out, last=True), w)
        else:
            d_x = _input_slope(low, s, _around(low, s, d_out), w)
        d_x = low.reshaped(d_x, shape_x)
    if wanted[1]:
        if channels.suits(groups, s.outs):
            d_w = channels.weight_slope(low, s, _phased(low, x, s, last=True), d_out)
        else:
            inside = _inside(s, _around(low, s, d_out))
            d_w = _weight_slope(low, s, inside, x)
        d_w = low.reshaped(d_w, shape_w)
    if wanted[2]:
        total = low.fresh((1, s.groups * s.outs, 1, 1), "f32")
        low.put(reduction("sum", total, d_out, [0, 2, 3]))
        d_b = low.reshaped(total, (s.groups * s.outs,))
    return d_x, d_w, d_b


def _around(low: Lowering, s: Shape, d_out: Value, last: bool = False) -> View:
    """The output's gradient with zeros around it."""
    if (d_out, s, last) in low.cache:
        return low.cache[d_out, s, last]  # type: ignore[no-any-return]
    rows, columns = (s.before[d] + s.out[d] + s.after[d] for d in (0, 1))
    around = _planes(s, s.groups * s.outs, 1, rows, last, columns if last else s.pitch)
    inside = _inside(s, around)
    low.cache[d_out, s, last] = low.cache[inside, s, last] = around
    low.assign(inside, d_out)
    return around


def _inside(s: Shape, around: View) -> View:
    inside = around.select(2, 0)
    for d in (0, 1):
        inside = inside.slice(2 + d, s.before[d], s.out[d])
    return inside


def _weight_slope(low: Lowering, s: Shape, inside: View, x: Value) -> View:
    planes = _phased(low, x, s)
    out = low.fresh((s.groups, s.outs, s.ins * prod(s.kernel)), "f32")
    low.put(correlate_weights(out, inside, planes, _offsets(s, planes, _weights(s)), s))
    return low.reshaped(out, (s.groups * s.outs, s.ins, *s.kernel))  # type: ignore[return-value]


def _input_slope(low: Lowering, s: Shape, around: View, w: View) -> View:
    """Each phase is a convolution of the gradient with the weights that read it, turned round."""
    d_x = low.fresh((s.batch, s.groups * s.ins, *s.size), "f32")
    read = sum(prod(s.span(d, phase)[2] for d in (0, 1)) for phase in s.phases)
    if read < prod(s.size):  # some inputs are read by no weight
        low.put(pointwise(d_x, constant(0.0, "f32", d_x.shape)))
    _, channel, _, row, _ = around.strides
    wo, wc, wy, wx = w.strides
    for phase in s.phases:
        (y0, y1, high), (x0, x1, wide) = (s.span(d, phase) for d in (0, 1))
        if not high or not wide:
            continue
        spots = [
            (c, y, x, s.place(y, x)[1])
            for c in range(s.outs)
            for y in range(s.kernel[0])
            for x in range(s.kernel[1])
            if s.place(y, x)[0] == phase
        ]
        top, left = s.before[0] + y0, s.before[1] + x0
        reads = [c * channel + (top - dy) * row + left - dx for c, _, _, (dy, dx) in spots]
        taken = [c * wo + y * wy + x * wx for c, y, x, _ in spots]
        flat, here = _output(s, s.ins, high, wide)
        low.put(correlate(flat, w, taken, wc, around, reads, s.outs * wo, None))
        if (high, wide) == s.size:
            return here
        there = d_x.slice(2, y1, high, s.stride[0]).slice(3, x1, wide, s.stride[1])
        low.put(pointwise(there, here))
    return d_x


def _output(s: Shape, each: int, high: int, wide: int) -> tuple[View, View]:
    """What a convolution writes, [batch, groups, channels, positions], and its images."""
    every, span = s.groups * each, high * s.pitch
    buffer = Buffer("", "f32", s.batch * every * span + _SLACK)
    shape = (s.batch, s.groups, each, (high - 1) * s.pitch + wide)
    flat = View(buffer, shape, (every * span, each * span, span, 1))
    return flat, View(buffer, (s.batch, every, high, wide), (every * span, span, s.pitch, 1))


def correlate(
    out: View, w: View, taken: Sequence[int], step: int, planes: View, reads: Sequence[int],
    group: int, bias: View | None,
) -> Kernel:  # fmt: skip
    """out [batch, groups, m, n] = sum over k of w[m * step + taken[k]] planes[reads[k] + n].

    `group` is how far the weights of the next group lie; 0 where rows of w go on."""
    batch, groups, m, n = out.shape
    inputs = planes.shape[1] // groups * planes.strides[1]
    apart = group or m * step

    def emit(e: Emitter, at: Pointers) -> None:
        b = e.b
        offset, weight = channels.table(e, reads), channels.table(e, taken)
        image, weights, target = (at[v.buffer] for v in (planes, w, out))  # type: ignore[index]
        with ExitStack() as stack:
            i = stack.enter_context(e.loop(batch))
            g = stack.enter_context(e.loop(groups))
            start = b.add(b.mul(i, i64(planes.strides[0])), b.mul(g, i64(inputs)))
            first = b.add(i64(w.offset), b.mul(g, i64(apart)))
            to = b.add(b.mul(i, i64(out.strides[0])), b.mul(g, i64(out.strides[1])))

            def block(j: Any, wide: int) -> None:
                parts = [(p, WIDTH) for p in range(0, wide - wide % WIDTH, WIDTH)]
                if wide % WIDTH and n >= WIDTH:  # the last vector computes some of them again
                    parts.append((wide - WIDTH, WIDTH))
                elif wide % WIDTH:
                    parts += blocks(wide, WIDTH)

                def rows(r0: Any, count: int) -> None:
                    cells = [(r, p) for r in range(count) for p in range(len(parts))]
                    totals = {c: e.variable(e.kind("f32", parts[c[1]][1])) for c in cells}
                    for r in range(count):
                        row = b.add(r0, i64(r))
                        head = None
                        if bias is not None:
                            which = b.add(b.mul(g, i64(m)), row)
                            head = e.read(at[bias.buffer], bias, [which], 0, 1)  # type: ignore[index]
                        for p, (_, width) in enumerate(parts):
                            zero = e.number(0.0, "f32", width)
                            b.store(zero if head is None else e.splat(head, width), totals[r, p])
                    with e.loop(len(reads)) as k:
                        there = b.add(b.add(start, offset(k)), j)
                        x = [
                            (e.load(image, "f32", b.add(there, i64(p)), wd), wd) for p, wd in parts
                        ]
                        where = b.add(first, weight(k))
                        for r in range(count):
                            row = b.mul(b.add(r0, i64(r)), i64(step))
                            a = e.load(weights, "f32", b.add(where, row))
                            grow(e, [totals[r, p] for p in range(len(parts))], a, x)
                    for r, p in cells:
                        shift, width = parts[p]
                        row = b.mul(b.add(r0, i64(r)), i64(out.strides[2]))
                        place = b.add(b.add(to, row), b.add(j, i64(shift)))
                        e.store(b.load(totals[r, p]), target, "f32", place, width)

                runs(e, m, max(1, REGISTERS // len(parts)), rows)

            stripes(e, n, block)

    return kernel("correlate", emit, out, w, list(taken), step, planes, list(reads), group, bias)


def correlate_weights(
    out: View, inside: View, planes: View, reads: Sequence[int], s: Shape
) -> Kernel:
    """out [groups, m, k] = sum over images and positions n of inside[m, n] planes[reads[k] + n].

    Between its rows `inside` holds zeros, so all positions may be taken in one go."""
    groups, m, count = out.shape
    inputs = planes.shape[1] // groups * planes.strides[1]
    n = s.positions
    rest = n % WIDTH
    lines = s.before[0] + s.after[0]  # of zeros between the last row and the next image's first
    sure = s.pitch - s.out[1] + lines * s.pitch >= WIDTH - rest

    def emit(e: Emitter, at: Pointers) -> None:
        b = e.b
        offset = channels.table(e, reads)
        image, slope, target = (at[v.buffer] for v in (planes, inside, out))  # type: ignore[index]

        def group(g: Any) -> None:
            def rows(r0: Any, high: int) -> None:
                def columns(k0: Any, wide: int) -> None:
                    cells = [(r, c) for r in range(high) for c in range(wide)]
                    totals = {p: e.variable(e.kind("f32", WIDTH)) for p in cells}
                    for total in totals.values():
                        b.store(e.number(0.0, "f32", WIDTH), total)
                    shifts = [offset(b.add(k0, i64(c))) for c in range(wide)]
                    with e.loop(s.batch) as i:
                        here = b.add(b.mul(i, i64(planes.strides[0])), b.mul(g, i64(inputs)))
                        row = b.add(b.mul(g, i64(m)), r0)
                        there = b.add(
                            b.mul(i, i64(inside.strides[0])), b.mul(row, i64(inside.strides[1]))
                        )
                        there = b.add(there, i64(inside.offset))

                        def step(j: Any, count: int) -> None:
                            spots = [
                                b.add(b.add(there, i64(r * inside.strides[1])), j)
                                for r in range(high)
                            ]
                            d = [e.some(slope, spot, count) for spot in spots]
                            reads = [b.add(b.add(here, shift), j) for shift in shifts]
                            x = [e.load(image, "f32", spot, WIDTH) for spot in reads]
                            for r, c in cells:
                                total = totals[r, c]
                                b.store(e.fma(d[r], x[c], b.load(total)), total)

                        if n >= WIDTH:
                            with e.loop(n - rest, step=WIDTH) as j:
                                step(j, WIDTH)
                        if rest:
                            step(i64(n - rest), WIDTH if sure else rest)
                    for r, c in cells:
                        total = e.across("sum", b.load(totals[r, c]), WIDTH)
                        index = [g, b.add(r0, i64(r)), b.add(k0, i64(c))]
                        e.write(total, target, out, index, 2, 1)

                runs(e, count, DOT[1], columns)

            runs(e, m, DOT[0], rows)

        with e.loop(groups) as g:
            group(g)

    return kernel("correlate_weights", emit, out, inside, planes, list(reads), n, sure)
