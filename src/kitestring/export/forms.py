"""Operations that move numbers and change none: views, parts, joins, fills."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from kitestring.export.builder import Value
from kitestring.export.operation import (
    COMPUTED,
    Lower,
    Number,
    Operation,
    axes_of,
    axis_of,
    fixed,
)
from kitestring.export.places import replaced
from kitestring.export.sizes import Dim, Size, times


def _same(op: Operation, x: Value, *_: Any, **__: Any) -> Value:
    return op.b.cast(x, op.dtype)


def _view(op: Operation, x: Value, *_: Any) -> Value:
    return op.b.reshape(x, op.shape)


def _unsqueeze(op: Operation, x: Value, axis: int) -> Value:
    return op.b.unsqueeze(x, axis % (x.rank + 1))


def _expand(op: Operation, x: Value, *_: Any, **__: Any) -> Value:
    return op.b.expand(x, op.shape)


def _permute(op: Operation, x: Value, order: Sequence[int]) -> Value:
    return op.b.transpose(x, [axis_of(a, x.rank) for a in order])


def _t(op: Operation, x: Value) -> Value:
    return op.b.transpose(x, range(x.rank)[::-1])


def _swap(op: Operation, x: Value, one: int, other: int) -> Value:
    order = list(range(x.rank))
    one, other = axis_of(one, x.rank), axis_of(other, x.rank)
    order[one], order[other] = order[other], order[one]
    return op.b.transpose(x, order)


def _slice(
    op: Operation, x: Value, axis: int = 0, start: Dim | None = None, end: Dim | None = None,
    step: int = 1,
) -> Value:  # fmt: skip
    axis = axis_of(axis, x.rank)
    start = 0 if start is None else start
    end = 2**62 if end is None else end
    return op.b.slice(x, axis, start, end, op.shape[axis], step)


def _select(op: Operation, x: Value, axis: int, index: Dim) -> Value:
    b, axis = op.b, axis_of(axis, x.rank)
    return b.op("Gather", [b.real(x), b.number(index, np.int64)], op.shape, x.dtype, axis=axis)


def _cat(op: Operation, parts: Sequence[Value], axis: int = 0) -> Value:
    real = [op.b.cast(p, op.dtype) for p in parts if p.shape != (0,)]
    return op.b.concat(real, axis_of(axis, len(op.shape)))


def _pad(op: Operation, x: Value, widths: Sequence[int], value: float = 0) -> Value:
    """`widths` from the last axis on, before and after."""
    pairs = [(0, 0)] * (x.rank - len(widths) // 2)
    pairs += [(widths[i], widths[i + 1]) for i in range(len(widths) - 2, -1, -2)]
    return op.b.pad(x, [p[0] for p in pairs], [p[1] for p in pairs], value)


def _slice_backward(
    op: Operation, slope: Value, sizes: Sequence[Dim], axis: int, start: int, end: int, step: int
) -> Value:
    """Zeros around; between the parts too, where every `step`th was taken."""
    axis = axis_of(axis, slope.rank)
    whole = sizes[axis]
    if isinstance(whole, Size) and slope.shape[axis] == whole and step == 1:
        return slope
    size, count = fixed(whole, op), fixed(slope.shape[axis], op)
    start = min(size, start + size if start < 0 else start)
    if step > 1:
        slope = _apart(op, slope, axis, step)
        count = (count - 1) * step + 1
    return _inside(op, slope, axis, start, size - start - count)


def _apart(op: Operation, x: Value, axis: int, step: int) -> Value:
    """Along the axis, `step` - 1 zeros after each but the last."""
    b, shape = op.b, x.shape
    wide = b.unsqueeze(x, axis + 1)
    wide = _inside(op, wide, axis + 1, 0, step - 1)
    count = fixed(shape[axis], op)
    flat = b.reshape(wide, (*shape[:axis], count * step, *shape[axis + 1 :]))
    return b.slice(flat, axis, 0, (count - 1) * step + 1, (count - 1) * step + 1)


def _inside(op: Operation, x: Value, axis: int, before: int, after: int) -> Value:
    """Between zeros along one axis."""
    left, right = [0] * x.rank, [0] * x.rank
    left[axis], right[axis] = before, after
    return op.b.pad(x, left, right)


def _select_backward(
    op: Operation, slope: Value, sizes: Sequence[Dim], axis: int, index: int
) -> Value:
    axis = axis_of(axis, len(sizes))
    size = fixed(sizes[axis], op)
    index %= size
    return _inside(op, op.b.unsqueeze(slope, axis), axis, index, size - index - 1)


def _slice_scatter(
    op: Operation, x: Value, part: Value, axis: int = 0, start: int | None = None,
    end: Any = None, step: int = 1,
) -> Value:  # fmt: skip
    """`x` with a part replaced."""
    axis = axis_of(axis, x.rank)
    if part.shape == x.shape:
        return part
    size = fixed(x.shape[axis], op)
    if step != 1:
        raise op.unsupported("by steps")
    start = start or 0
    starts = [0] * x.rank
    starts[axis] = min(size, start + size if start < 0 else start)
    return replaced(op, x, op.b.cast(part, x.dtype), starts)


def _flip(op: Operation, x: Value, axes: Sequence[int]) -> Value:
    return op.b.reversed(x, axes_of(axes, x.rank)) if axes else x


def _roll(op: Operation, x: Value, shifts: Any, axes: Any = ()) -> Value:
    shifts, axes = (a if isinstance(a, list | tuple) else [a] for a in (shifts, axes))
    b, found = op.b, x if axes else op.b.reshape(x, (_whole(op, x),))
    for shift, axis in zip(shifts, axes or [0], strict=True):
        axis = axis_of(axis, found.rank)
        size = fixed(found.shape[axis], op)
        cut = -shift % size
        if cut:
            parts = [b.slice(found, axis, cut, size, size - cut), b.slice(found, axis, 0, cut, cut)]
            found = b.concat(parts, axis)
    return b.reshape(found, op.shape)


def _whole(op: Operation, x: Value) -> Dim:
    found = times(x.shape)
    if found is None:
        raise op.unsupported("across rows")
    return found


def _repeat(op: Operation, x: Value, times_each: Sequence[Dim]) -> Value:
    b = op.b
    wide = b.reshape(x, (1,) * (len(times_each) - x.rank) + x.shape)
    if all(d == 1 for d in wide.held):
        return replace(wide, shape=op.shape)
    return b.op("Tile", [b.real(wide), b.sizes(times_each)], op.shape, x.dtype)


def _broadcast_in(op: Operation, x: Value, _: Sequence[Dim], axes: Sequence[int]) -> Value:
    wide: list[Dim] = [1] * len(op.shape)
    for axis, dim in zip(axes, x.shape, strict=True):
        wide[axis] = dim
    return op.b.expand(op.b.reshape(x, tuple(wide)), op.shape)


def _full(op: Operation, sizes: Sequence[Dim], value: Number, *_: Any, **__: Any) -> Value:
    return op.b.expand(op.b.number(value, op.dtype), op.shape)


def _full_like(op: Operation, x: Value, value: Number, *_: Any, **__: Any) -> Value:
    return op.b.expand(op.b.number(value, op.dtype), op.shape)


def _scalar(op: Operation, value: Number, **_: Any) -> Value:
    return op.b.number(value, op.dtype)


def _filled(value: float) -> Lower:
    """What was never written is zero here."""

    def lower(op: Operation, *_: Any, **__: Any) -> Value:
        return op.b.expand(op.b.number(value, op.dtype), op.shape)

    return lower


def _arange(op: Operation, *bounds: Number, **_: Any) -> Value:
    """`start`, `end`, `step`."""
    b = op.b
    start, end, step = {1: (0, *bounds, 1), 2: (*bounds, 1), 3: bounds}[len(bounds)]
    kind = op.dtype if op.dtype in COMPUTED else np.dtype(np.int64)
    given = [b.number(v, kind) for v in (start, end, step)]
    return b.cast(b.op("Range", given, op.shape, kind), op.dtype)


def _copy(op: Operation, x: Value, y: Value, *_: Any) -> Value:
    return op.b.expand(op.b.cast(y, op.dtype), op.shape)


def _triangle(upper: bool) -> Lower:
    def lower(op: Operation, x: Value, diagonal: int = 0) -> Value:
        rows, columns = (fixed(d, op) for d in x.shape[-2:])
        keep = (np.triu if upper else np.tril)(np.ones((rows, columns), bool), diagonal)
        return op.b.where(op.b.exact(keep), x, op.b.number(0, x.dtype))

    return lower


FORMS: Mapping[str, Lower] = {
    **dict.fromkeys(("alias", "clone", "detach", "lift_fresh_copy", "contiguous", "_conj",
                     "positive"), _same),
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "squeeze", "flatten", "_reshape_alias",
                     "view_as"), _view),
    "unsqueeze": _unsqueeze, "expand": _expand, "prims.broadcast_in_dim": _broadcast_in,
    "permute": _permute, "t": _t, "transpose": _swap, "slice": _slice, "select": _select,
    "cat": _cat, "constant_pad_nd": _pad, "slice_backward": _slice_backward,
    "select_backward": _select_backward, "slice_scatter": _slice_scatter, "flip": _flip,
    "roll": _roll, "repeat": _repeat, "full": _full,
    "full_like": _full_like, "new_full": lambda op, x, sizes, value, **_: _full(op, sizes, value),
    "scalar_tensor": _scalar, "arange": _arange, "copy": _copy, "fill": _copy,
    **dict.fromkeys(("zeros", "zeros_like", "new_zeros", "empty", "empty_like", "empty_permuted",
                     "new_empty", "empty_strided", "new_empty_strided"), _filled(0)),
    **dict.fromkeys(("ones", "ones_like", "new_ones"), _filled(1)),
    "triu": _triangle(True), "tril": _triangle(False),
}  # fmt: skip
