"""Views that say where their numbers lie: strides, diagonals, windows; and what is written there.

They come from code that changes tensors in place, through torch's own derivatives of that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from kitestring.core import Array
from kitestring.export.builder import Value
from kitestring.export.operation import Lower, Operation, axis_of, fixed
from kitestring.export.sizes import ROWS, Dim, Shape, Size, times


def replaced(op: Operation, x: Value, part: Value, starts: Sequence[int], axis: int = 0) -> Value:
    """`x` with the part that begins at `starts` replaced."""
    while axis < x.rank and part.shape[axis] == x.shape[axis]:
        axis += 1
    if axis == x.rank:
        return part
    b, start = op.b, starts[axis]
    size, count = fixed(x.shape[axis], op), fixed(part.shape[axis], op)
    stop = start + count
    inner = replaced(op, b.slice(x, axis, start, stop, count), part, starts, axis + 1)
    pieces = [b.slice(x, axis, 0, start, start)] if start else []
    pieces.append(inner)
    pieces += [b.slice(x, axis, stop, size, size - stop)] if stop < size else []
    return b.concat(pieces, axis)


def _as_strided(
    op: Operation, x: Value, sizes: Sequence[Dim], strides: Sequence[Dim], offset: Dim = 0
) -> Value:
    """What lies in memory, looked at in another way. `x` lies densely, in some order of axes."""
    lay = op.source.strides if op.source else None
    if lay is None:
        raise op.unsupported()
    order = sorted(range(x.rank), key=lambda a: (-_about(lay[a]), -_about(x.shape[a])))
    lies = op.b.transpose(x, order)
    if _whole_of(lies, sizes, strides, offset):
        return op.b.reshape(lies, op.shape)
    starts = _starts(lies.shape, sizes, strides, offset)
    if starts is None:
        return _of_each_row(op, lies, sizes, strides, offset)
    for axis, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        end = 2**62 if isinstance(size, Size) else start + size
        lies = op.b.slice(lies, axis, start, end, size)
    return lies


def _as_strided_scatter(
    op: Operation, x: Value, part: Value, sizes: Sequence[Dim], strides: Sequence[Dim],
    offset: Dim = 0,
) -> Value:  # fmt: skip
    """`x`, which lies plainly, with what is looked at in such a way replaced."""
    b, part = op.b, op.b.cast(part, x.dtype)
    if _whole_of(x, sizes, strides, offset):
        return b.reshape(part, op.shape)
    starts = _starts(x.shape, sizes, strides, offset)
    if starts is not None:
        return replaced(op, x, part, starts)
    at, rows, row = _places(op, x, sizes, strides, offset)
    flat, new = b.reshape(x, (*rows, row)), b.reshape(part, (*rows, at.size))
    return b.reshape(_put(op, flat, new, at.reshape(-1)), op.shape)


def _plain(shape: Sequence[Dim]) -> list[Dim | None]:
    """How an array of that shape lies."""
    return [times(shape[i + 1 :]) for i in range(len(shape))]


def _whole_of(x: Value, sizes: Sequence[Dim], strides: Sequence[Dim], offset: Dim) -> bool:
    """Whether all of it is looked at, in its order."""
    return offset == 0 and list(strides) == _plain(sizes) and times(sizes) == times(x.shape)


def _about(dim: Dim) -> int:
    return dim.of(7) if isinstance(dim, Size) else dim


def _starts(
    shape: Sequence[Dim], sizes: Sequence[Dim], strides: Sequence[Dim], offset: Dim
) -> list[int] | None:
    """Where a part of each axis starts, as torch.chunk takes; None for any other view."""
    plain = _plain(shape)
    if list(strides) != plain or len(sizes) != len(shape) or isinstance(offset, Size):
        return None
    found = []
    for size, whole, stride in zip(sizes, shape, plain, strict=True):
        start, offset = (0, offset) if isinstance(stride, Size) else divmod(offset, stride or 1)
        if isinstance(size, Size) and (start or size != whole):
            return None
        found.append(start)
    return found


def _of_each_row(
    op: Operation, x: Value, sizes: Sequence[Dim], strides: Sequence[Dim], offset: Dim
) -> Value:
    b = op.b
    at, rows, row = _places(op, x, sizes, strides, offset)
    flat = b.real(b.reshape(x, (*rows, row)))
    return b.op("Gather", [flat, b.exact(at)], op.shape, x.dtype, axis=len(rows))


def _places(
    op: Operation, x: Value, sizes: Sequence[Dim], strides: Sequence[Dim], offset: Dim
) -> tuple[Array, Shape, int]:
    """Where each number of the view lies in its row, the rows (none where nothing grows with them),
    and how many numbers are in one."""
    grows = bool(sizes) and isinstance(sizes[0], Size)
    row = strides[0] if grows else times(x.shape)
    if isinstance(row, Size) or row is None or (grows and times(x.shape) != Size(row)):
        raise op.unsupported("across rows")
    inside, steps = (list(a[grows:]) for a in (sizes, strides))
    if any(isinstance(d, Size) for d in (*inside, *steps, offset)):
        raise op.unsupported("across rows")
    at = np.array(offset)
    for size, step in zip(inside, steps, strict=True):
        at = at[..., None] + np.arange(size) * step  # type: ignore[arg-type, operator]
    if at.max(initial=0) >= row or (grows and sizes[0] != ROWS):
        raise op.unsupported("across rows")
    return at, (ROWS,) * grows, row


def _unfold(op: Operation, x: Value, axis: int, size: int, step: int) -> Value:
    """Windows along an axis, what is in them as the last one."""
    b, axis = op.b, axis_of(axis, x.rank)
    count = fixed(op.shape[axis], op)
    at = np.arange(count)[:, None] * step + np.arange(size)
    shape = (*x.shape[:axis], count, size, *x.shape[axis + 1 :])
    found = b.op("Gather", [b.real(x), b.exact(at)], shape, x.dtype, axis=axis)
    order = [a for a in range(found.rank) if a != axis + 1]
    return b.transpose(found, [*order, axis + 1])


def _diagonal(op: Operation, x: Value, offset: int = 0, one: int = 0, other: int = 1) -> Value:
    """The diagonal of two axes, as the last one."""
    flat, _, places = _across(op, x, offset, one, other)
    axis = flat.rank - 1
    return op.b.op("Gather", [op.b.real(flat), op.b.exact(places)], op.shape, x.dtype, axis=axis)


def _diagonal_scatter(
    op: Operation, x: Value, part: Value, offset: int = 0, one: int = 0, other: int = 1
) -> Value:
    """`x` with that diagonal replaced."""
    flat, order, places = _across(op, x, offset, one, other)
    found = op.b.reshape(_put(op, flat, part, places), tuple(x.shape[a] for a in order))
    return op.b.transpose(found, [order.index(a) for a in range(x.rank)])


def _across(
    op: Operation, x: Value, offset: int, one: int, other: int
) -> tuple[Value, list[int], Array]:
    """`x` with two axes made one, the last; the order that its axes then had, and where in it the
    diagonal lies."""
    one, other = axis_of(one, x.rank), axis_of(other, x.rank)
    rest = [a for a in range(x.rank) if a not in (one, other)]
    height, width = fixed(x.shape[one], op), fixed(x.shape[other], op)
    order = [*rest, one, other]
    turned = op.b.transpose(x, order)
    flat = op.b.reshape(turned, (*(x.shape[a] for a in rest), height * width))
    return flat, order, np.arange(height * width).reshape(height, width).diagonal(offset).copy()


def _put(op: Operation, x: Value, part: Value, places: Array) -> Value:
    """`x` [..., k] with the numbers at `places` of its last axis replaced by those of `part`."""
    b, axis = op.b, x.rank - 1
    size = fixed(x.shape[axis], op)
    take = np.arange(size)
    take[places] = size + np.arange(len(places))
    joined = b.real(b.concat([x, part], axis))
    return b.op("Gather", [joined, b.exact(take)], x.shape, x.dtype, axis=axis)


PLACES: Mapping[str, Lower] = {
    "as_strided": _as_strided, "as_strided_scatter": _as_strided_scatter, "diagonal": _diagonal,
    "diagonal_scatter": _diagonal_scatter, "unfold": _unfold,
}  # fmt: skip
