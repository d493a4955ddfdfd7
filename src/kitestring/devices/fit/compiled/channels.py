"""Convolutions whose vectors lie along channels, for those that have enough of them.

Images are kept with their channels innermost. Output position p then is a product of the weights,
[taps x channels in, channels out], with the input at p plus each tap's offset: nothing is computed
for nothing, and every vector is whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from math import prod
from typing import Any

from llvmlite import ir

from kitestring.devices.fit.compiled.emit import I64, WIDTH, Emitter, i64
from kitestring.devices.fit.compiled.kernels import Kernel, Pointers, kernel, pointwise
from kitestring.devices.fit.compiled.lowering import Lowering
from kitestring.devices.fit.compiled.planes import Shape
from kitestring.devices.fit.compiled.product import REGISTERS, grow, runs, stripes, vectors
from kitestring.devices.fit.compiled.views import Buffer, View, constant

_CACHED = 2**16  # floats of images that are read again and again


def suits(groups: int, channels: int) -> bool:
    return groups == 1 and channels >= WIDTH


def images(batch: int, channels: int, high: int, wide: int) -> View:
    """[batch, channels, high, wide] with the channels innermost."""
    buffer = Buffer("", "f32", batch * channels * high * wide)
    strides = (high * wide * channels, 1, wide * channels, channels)
    return View(buffer, (batch, channels, high, wide), strides)


def table(e: Emitter, values: Sequence[int]) -> Callable[[Any], Any]:
    """A constant array of offsets."""
    array = ir.ArrayType(I64, len(values))
    place = ir.GlobalVariable(e.module, array, e.module.get_unique_name("offsets"))
    place.initializer = ir.Constant(array, list(values))
    place.global_constant = True
    place.linkage = "internal"
    return lambda k: e.b.load(e.b.gep(place, [i64(0), k]))


def _spots(s: Shape) -> list[tuple[int, int]]:
    return [(y, x) for y in range(s.kernel[0]) for x in range(s.kernel[1])]


def _reads(s: Shape, planes: View) -> list[int]:
    """Where each tap reads, from where an output position lies."""
    _, _, phase_stride, row, column = planes.strides
    out = []
    for y, x in _spots(s):
        phase, (dy, dx) = s.place(y, x)
        out.append(s.phases.index(phase) * phase_stride + dy * row + dx * column)
    return out


def forward(low: Lowering, s: Shape, planes: View, w: View, bias: View | None) -> View:
    """w [out, in, ky, kx]; the result [batch, out, high, wide]."""
    taps = low.fresh((*s.kernel, s.ins, s.outs), "f32")
    low.put(pointwise(taps, w.permute([2, 3, 1, 0])))
    out = images(s.batch, s.outs, *s.out)
    low.put(convolve(out, planes.select(2, 0), _reads(s, planes), s.ins, taps, bias))
    return out


def weight_slope(low: Lowering, s: Shape, planes: View, d_out: View) -> View:
    """[out, in, ky, kx], lying as [ky, kx, in, out]."""
    out = low.fresh((*s.kernel, s.ins, s.outs), "f32")
    offsets = [at + c for at in _reads(s, planes) for c in range(s.ins)]
    low.put(convolve_weights(out, planes.select(2, 0), offsets, d_out))
    return out.permute([3, 2, 0, 1])


def input_slope(low: Lowering, s: Shape, around: View, w: View) -> View:
    """Each phase is a convolution of the gradient with the taps that read it, turned round."""
    d_x = images(s.batch, s.ins, *s.size)
    read = sum(prod(s.span(d, phase)[2] for d in (0, 1)) for phase in s.phases)
    if read < prod(s.size):  # some inputs are read by no weight
        low.put(pointwise(d_x, constant(0.0, "f32", d_x.shape)))
    _, _, _, row, column = around.strides
    for phase in s.phases:
        (y0, y1, high), (x0, x1, wide) = (s.span(d, phase) for d in (0, 1))
        spots = [spot for spot in _spots(s) if s.place(*spot)[0] == phase]
        if not high or not wide:
            continue
        taps = low.fresh((len(spots), s.outs, s.ins), "f32")
        reads = []
        for at, (y, x) in enumerate(spots):
            low.put(pointwise(taps.select(0, at), w.select(3, x).select(2, y)))
            dy, dx = s.place(y, x)[1]
            reads.append((s.before[0] + y0 - dy) * row + (s.before[1] + x0 - dx) * column)
        there = d_x.slice(2, y1, high, s.stride[0]).slice(3, x1, wide, s.stride[1])
        low.put(convolve(there, around.select(2, 0), reads, s.outs, taps, None))
    return d_x


def convolve(
    out: View, planes: View, reads: Sequence[int], depth: int, taps: View, bias: View | None
) -> Kernel:
    """out [b, n, y, x] = bias[n] + sum over taps t and channels c of
    planes[b, c, y, x + reads[t]] taps[t, c, n]."""
    batch, n, high, wide = out.shape

    def emit(e: Emitter, at: Pointers) -> None:
        b, offset = e.b, table(e, reads)
        image, weights, target = (at[v.buffer] for v in (planes, taps, out))  # type: ignore[index]
        with ExitStack() as stack:
            i, y = (stack.enter_context(e.loop(size)) for size in (batch, high))
            line = b.add(b.mul(i, i64(planes.strides[0])), b.mul(y, i64(planes.strides[2])))
            aim = b.add(b.mul(i, i64(out.strides[0])), b.mul(y, i64(out.strides[2])))
            aim = b.add(aim, i64(out.offset))

            def block(j: Any, count: int) -> None:
                parts = vectors(count)

                def run(x: Any, length: int) -> None:
                    cells = [(r, p) for r in range(length) for p in range(len(parts))]
                    totals = {c: e.variable(e.kind("f32", parts[c[1]][1])) for c in cells}
                    for p, (shift, width) in enumerate(parts):
                        head = e.number(0.0, "f32", width)
                        if bias is not None:
                            index = [b.add(j, i64(shift))]
                            head = e.read(at[bias.buffer], bias, index, 0, width)  # type: ignore[index]
                        for r in range(length):
                            b.store(head, totals[r, p])
                    with e.loop(len(reads)) as t:
                        start = b.add(line, b.add(offset(t), b.mul(x, i64(planes.strides[3]))))
                        with e.loop(depth) as c:
                            k = b.add(b.mul(t, i64(depth)), c)
                            row = b.add(b.mul(k, i64(n)), j)
                            w = [
                                (e.load(weights, "f32", b.add(row, i64(p)), wd), wd)
                                for p, wd in parts
                            ]
                            for r in range(length):
                                place = b.add(start, b.add(c, i64(r * planes.strides[3])))
                                one = e.load(image, "f32", place)
                                grow(e, [totals[r, p] for p in range(len(parts))], one, w)
                    for r, p in cells:
                        shift, width = parts[p]
                        spot = b.mul(b.add(x, i64(r)), i64(out.strides[3]))
                        place = b.add(aim, b.add(spot, b.add(j, i64(shift))))
                        e.store(b.load(totals[r, p]), target, "f32", place, width)

                runs(e, wide, max(1, REGISTERS // len(parts)), run)

            stripes(e, n, block)

    return kernel("convolve", emit, out, planes, list(reads), depth, taps, bias)


def convolve_weights(out: View, planes: View, reads: Sequence[int], d: View) -> Kernel:
    """out [m, n] = sum over images and positions of planes[b, 0, y, x + reads[m]] d[b, n, y, x].

    As many images at a time as stay in the cache: each is read once for every few rows of out."""
    batch, n, high, wide = d.shape
    each = planes.strides[0] + n * high * wide
    few = max(1, min(batch, _CACHED // each))

    def emit(e: Emitter, at: Pointers) -> None:
        b, offset = e.b, table(e, reads)
        image, slope, target = (at[v.buffer] for v in (planes, d, out))  # type: ignore[index]

        def images(first: Any, count: int, again: bool) -> None:
            def rows(m: Any, length: int, j: Any, columns: int) -> None:
                parts = vectors(columns)
                cells = [(r, p) for r in range(length) for p in range(len(parts))]
                totals = {c: e.variable(e.kind("f32", parts[c[1]][1])) for c in cells}
                places = {
                    (r, p): b.add(
                        b.mul(b.add(m, i64(r)), i64(n)), b.add(j, i64(parts[p][0]))
                    )
                    for r, p in cells
                }  # fmt: skip
                for (r, p), total in totals.items():
                    width = parts[p][1]
                    known = e.load(target, "f32", places[r, p], width) if again else None
                    b.store(known or e.number(0.0, "f32", width), total)
                shifts = [offset(b.add(m, i64(r))) for r in range(length)]
                with ExitStack() as stack:
                    i, y = (stack.enter_context(e.loop(size)) for size in (count, high))
                    i = b.add(i, first)
                    here = b.add(b.mul(i, i64(planes.strides[0])), b.mul(y, i64(planes.strides[2])))
                    there = b.add(b.mul(i, i64(d.strides[0])), b.mul(y, i64(d.strides[2])))
                    there = b.add(there, b.add(j, i64(d.offset)))
                    starts = [b.add(here, shift) for shift in shifts]
                    x = stack.enter_context(e.loop(wide))
                    spot = b.add(there, b.mul(x, i64(d.strides[3])))
                    g = [(e.load(slope, "f32", b.add(spot, i64(p)), wd), wd) for p, wd in parts]
                    along = b.mul(x, i64(planes.strides[3]))
                    for r in range(length):
                        one = e.load(image, "f32", b.add(starts[r], along))
                        grow(e, [totals[r, p] for p in range(len(parts))], one, g)
                for (r, p), total in totals.items():
                    e.store(b.load(total), target, "f32", places[r, p], parts[p][1])

            def block(j: Any, columns: int) -> None:
                most = max(1, REGISTERS // len(vectors(columns)))
                runs(e, len(reads), most, lambda m, length: rows(m, length, j, columns))

            stripes(e, n, block)

        images(i64(0), few, again=False)
        rest = batch - few
        if rest // few:
            with e.loop(few * (1 + rest // few), start=i64(few), step=few) as first:
                images(first, few, again=True)
        if rest % few:
            images(i64(batch - rest % few), rest % few, again=True)

    return kernel("convolve_weights", emit, out, planes, list(reads), d)
