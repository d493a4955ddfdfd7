"""Pools, and their slopes: of windows that overlap, and faster of such that lie side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

import numpy as np

from kitestring.core import Array
from kitestring.export.builder import Value
from kitestring.export.operation import Lower, Operation, fixed
from kitestring.export.sizes import Dim, Shape, times

_WHOLE, _BOOL = np.dtype(np.int64), np.dtype(np.bool_)


@dataclass(frozen=True)
class _Windows:
    """Along each axis: numbers, windows, and a window's size, step, padding and dilation."""

    inside: list[int]
    out: list[int]
    kernel: list[int]
    stride: list[int]
    padding: list[int]
    dilation: list[int]

    @property
    def k(self) -> int:
        return len(self.kernel)

    @property
    def reach(self) -> list[int]:
        """From the first window's start to the last one's end."""
        spans = zip(self.out, self.stride, self.dilation, self.kernel, strict=True)
        return [(m - 1) * s + d * (k - 1) + 1 for m, s, d, k in spans]

    @property
    def after(self) -> list[int]:
        """What sticks out at the end, where sizes are rounded up too, is padding."""
        spans = zip(self.reach, self.inside, self.padding, strict=True)
        return [max(0, r - n - p) for r, n, p in spans]

    @property
    def side_by_side(self) -> bool:
        """They neither overlap nor leave anything out."""
        filled = [m * k for m, k in zip(self.out, self.kernel, strict=True)]
        still = not any(self.padding) and set(self.dilation) == {1}
        return self.stride == self.kernel and still and self.inside == filled

    def cut(self, front: Shape) -> Shape:
        """An axis of windows, then one of what is in each, and so on."""
        pairs = zip(self.out, self.kernel, strict=True)
        return (*front, *(d for pair in pairs for d in pair))

    def each(self, front: Shape) -> Shape:
        """The same of one number for each window."""
        return (*front, *(d for m in self.out for d in (m, 1)))

    def share(self, counted: bool, divisor: int | None) -> Array:
        """What a number counts in each window's mean; numbers of the padding are counted or not."""
        if divisor:
            return np.full(self.out, 1 / divisor)
        total = np.ones(())
        spans = zip(self.inside, self.out, self.kernel, self.stride, self.padding, strict=True)
        for n, m, kernel, stride, padding in spans:
            start = np.arange(m) * stride - padding
            end = np.minimum(start + kernel, n + padding)
            if not counted:
                start, end = np.maximum(start, 0), np.minimum(end, n)
            total = total[..., None] * (end - start)
        return 1 / total


def _windows(
    op: Operation, inside: Shape, out: Shape, kernel: Sequence[int], stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int] = (1,),
) -> _Windows:  # fmt: skip
    k = len(kernel)

    def each(values: Sequence[int]) -> list[int]:
        return list(values) if len(values) == k else list(values) * k

    before, after = ([fixed(d, op) for d in shape[-k:]] for shape in (inside, out))
    steps = each(stride or kernel), each(padding), each(dilation)
    return _Windows(before, after, list(kernel), *steps)


def _batched(op: Operation, x: Value, k: int) -> Value:
    return x if x.rank == k + 2 else op.b.unsqueeze(x, 0)


def _most(op: Operation, x: Value, w: _Windows, out: Shape, places: bool) -> Value:
    """The largest number of each window; or where in its plane it is. ONNX counts on through all
    planes, and finds places on a slower way, so these are a node of their own."""
    b, batched = op.b, _batched(op, x, w.k)
    shape = (*batched.shape[:2], *w.out)
    how = {"kernel_shape": w.kernel, "strides": w.stride, "dilations": w.dilation,
           "pads": [*w.padding, *w.after]}  # fmt: skip
    if not places:
        return b.reshape(b.op("MaxPool", [b.real(batched)], shape, x.dtype, **how), out)
    found = b.ops("MaxPool", [b.real(batched)], [(shape, x.dtype), (shape, _WHOLE)], **how)
    return b.reshape(b.each("Mod", found[1], b.number(prod(w.inside), _WHOLE)), out)


def _max_pool(
    op: Operation, x: Value, kernel: Sequence[int], stride: Sequence[int] = (),
    padding: Sequence[int] = (0,), dilation: Sequence[int] = (1,), ceil: bool = False,
) -> tuple[Value, Value]:  # fmt: skip
    w = _windows(op, x.shape, op.shape, kernel, stride, padding, dilation)
    return _most(op, x, w, op.shape, False), _most(op, x, w, op.shape, True)


def _max_pool_backward(
    op: Operation, slope: Value, x: Value, kernel: Sequence[int], stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], ceil: bool, places: Value,
) -> Value:  # fmt: skip
    w = _windows(op, x.shape, slope.shape, kernel, stride, padding, dilation)
    if w.side_by_side:
        return _to_the_first(op, slope, x, _most(op, x, w, slope.shape, False), w)
    return _to_places(op, slope, x, places, w.k)


def _to_places(op: Operation, slope: Value, x: Value, places: Value, k: int) -> Value:
    """Each slope goes to where its number came from."""
    b, front = op.b, x.shape[:-k]
    plane, count = (prod(fixed(d, op) for d in v.shape[-k:]) for v in (x, slope))
    zeros = b.expand(b.number(0, x.dtype), (*front, plane))
    flat, where = (b.reshape(v, (*front, count)) for v in (slope, places))
    inputs = [b.real(v) for v in (zeros, where, flat)]
    found = b.op("ScatterElements", inputs, zeros.shape, x.dtype, axis=len(front), reduction="add")
    return b.reshape(found, op.shape)


def _to_the_first(op: Operation, slope: Value, x: Value, most: Value, w: _Windows) -> Value:
    """The same of windows side by side: to the first of a window's numbers that is its largest."""
    b, front, zero = op.b, x.rank - w.k, op.b.number(0, x.dtype)
    parts: list[Value] = []
    before: Value | None = None
    for at in product(*map(range, w.kernel)):
        here = x  # the number at this place of every window
        for axis, (i, m, k) in enumerate(zip(at, w.out, w.kernel, strict=True)):
            here = b.slice(here, front + axis, i, i + (m - 1) * k + 1, m, k)
        first = same = b.each("Equal", here, most, dtype=_BOOL)
        if before is not None:
            first = b.each("And", same, b.each("Not", before))
        before = same if before is None else b.each("Or", before, same)
        parts.append(b.reshape(b.where(first, slope, zero), w.each(x.shape[:front])))
    for axis in reversed(range(w.k)):
        n = w.kernel[axis]
        rows = [parts[i : i + n] for i in range(0, len(parts), n)]
        parts = [b.concat(row, front + 2 * axis + 1) for row in rows]
    return b.reshape(parts[0], op.shape)


def _mean_pool(
    op: Operation, x: Value, kernel: Sequence[int], stride: Sequence[int] = (),
    padding: Sequence[int] = (0,), ceil: bool = False, counted: bool = True,
    divisor: int | None = None,
) -> Value:  # fmt: skip
    w = _windows(op, x.shape, op.shape, kernel, stride, padding)
    b, lead = op.b, [0] * (x.rank - w.k)
    wide = _batched(op, b.pad(x, lead + w.padding, lead + w.after), w.k)
    shape = (*wide.shape[:2], *w.out)
    found = b.op("AveragePool", [b.real(wide)], shape, x.dtype,
                 kernel_shape=w.kernel, strides=w.stride)  # fmt: skip
    scale = b.constant((w.share(counted, divisor) * prod(w.kernel)).astype(x.dtype))
    return b.each("Mul", b.reshape(found, op.shape), scale)


def _mean_pool_backward(
    op: Operation, slope: Value, x: Value, kernel: Sequence[int], stride: Sequence[int],
    padding: Sequence[int], ceil: bool, counted: bool, divisor: int | None,
) -> Value:  # fmt: skip
    """Each slope's share to all of its window: spread out where windows lie side by side, else by
    a transposed convolution of each plane with ones, less what falls into the padding."""
    w = _windows(op, x.shape, slope.shape, kernel, stride, padding)
    b, front = op.b, x.shape[: -w.k]
    shared = b.each("Mul", slope, b.constant(w.share(counted, divisor).astype(x.dtype)))
    if w.side_by_side:
        spread = b.expand(b.reshape(shared, w.each(front)), w.cut(front))
        return b.reshape(spread, op.shape)
    planes = b.reshape(shared, (_planes(op, front), 1, *w.out))
    ones = b.exact(np.ones((1, 1, *w.kernel), x.dtype))
    shape = (planes.shape[0], 1, *w.reach)
    found = b.op("ConvTranspose", [b.real(planes), ones], shape, x.dtype,
                 kernel_shape=w.kernel, strides=w.stride)  # fmt: skip
    more = [n + p - r for n, p, r in zip(w.inside, w.padding, w.reach, strict=True)]
    found = b.pad(found, [0, 0, *(-p for p in w.padding)], [0, 0, *more])
    return b.reshape(found, op.shape)


def _planes(op: Operation, front: Shape) -> Dim:
    found = times(front)
    if found is None:
        raise op.unsupported("across rows")
    return found


def _adaptive_max_pool(op: Operation, x: Value, size: Sequence[int]) -> tuple[Value, Value]:
    inside = [fixed(d, op) for d in x.shape[-len(size) :]]
    if any(n % m for n, m in zip(inside, size, strict=True)):
        raise op.unsupported("with windows of different sizes")
    return _max_pool(op, x, [n // m for n, m in zip(inside, size, strict=True)])


def _adaptive_max_pool_backward(op: Operation, slope: Value, x: Value, places: Value) -> Value:
    return _to_places(op, slope, x, places, 2)


POOLS: Mapping[str, Lower] = {
    "max_pool2d_with_indices": _max_pool, "max_pool3d_with_indices": _max_pool,
    "max_pool2d_with_indices_backward": _max_pool_backward,
    "max_pool3d_with_indices_backward": _max_pool_backward,
    "avg_pool2d": _mean_pool, "avg_pool3d": _mean_pool,
    "avg_pool2d_backward": _mean_pool_backward, "avg_pool3d_backward": _mean_pool_backward,
    "adaptive_max_pool2d": _adaptive_max_pool,
    "adaptive_max_pool2d_backward": _adaptive_max_pool_backward,
}  # fmt: skip
