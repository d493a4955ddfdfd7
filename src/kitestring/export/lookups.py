"""Operations that find numbers by where they are: tables, indices, scatters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kitestring.export.builder import Value
from kitestring.export.operation import Lower, Operand, Operation, axis_of, fixed
from kitestring.export.sizes import Dim, Shape, broadcast, times

_WHOLE, _BOOL = np.dtype(np.int64), np.dtype(np.bool_)
_MASKS = (_BOOL, np.dtype(np.uint8))
"""As an index, bytes are a mask in torch."""


def _embedding(op: Operation, table: Value, ids: Value, *_: Any) -> Value:
    return op.b.op("Gather", [op.b.real(table), op.b.real(ids)], op.shape, table.dtype, axis=0)


def _embedding_backward(
    op: Operation, slope: Value, ids: Value, count: int, padding: int = -1, by_count: bool = False
) -> Value:
    """Each slope is added to the row of its id; none to the row of the padding."""
    b = op.b
    if by_count:
        raise op.unsupported("scaled by how often a row is used")
    if padding >= 0:
        other = b.each("Equal", ids, b.number(padding, ids.dtype), dtype=_BOOL)
        slope = b.where(b.unsqueeze(other, other.rank), b.number(0, slope.dtype), slope)
    wide, many = fixed(slope.shape[-1], op), _product(op, ids.shape)
    zeros = b.expand(b.number(0, slope.dtype), (count, wide))
    flat = b.reshape(slope, (many, wide))
    return _put_rows(op, zeros, b.reshape(ids, (many, 1)), flat, "add")


def _put_rows(op: Operation, x: Value, where: Value, rows: Value, how: str) -> Value:
    """`rows` [n, w] put into `x` [N, w] at `where` [n, 1], or added. ScatterElements does one after
    the other; threads of ScatterND lose what adds up at equal places."""
    b = op.b
    wide = b.expand(b.cast(where, _WHOLE), rows.shape)
    inputs = [b.real(v) for v in (x, wide, rows)]
    return b.op("ScatterElements", inputs, x.shape, x.dtype, axis=0, reduction=how)


def _product(op: Operation, shape: Sequence[Dim]) -> Dim:
    found = times(shape)
    if found is None:
        raise op.unsupported("across rows")
    return found


def _index_select(op: Operation, x: Value, axis: int, ids: Value) -> Value:
    inputs = [op.b.real(x), op.b.real(ids)]
    return op.b.op("Gather", inputs, op.shape, x.dtype, axis=axis_of(axis, x.rank))


def _gather(op: Operation, x: Value, axis: int, ids: Value, *_: Any, **__: Any) -> Value:
    inputs = [op.b.real(x), op.b.real(ids)]
    axis = axis_of(axis, x.rank)
    return op.b.op("GatherElements", inputs, op.shape, x.dtype, axis=axis)


def _scatter(
    op: Operation, x: Value, axis: int, ids: Value, source: Operand, reduce: str = "none",
    include_self: bool = True,
) -> Value:  # fmt: skip
    b = op.b
    if not include_self:
        raise op.unsupported("without what was there")
    if reduce not in ("none", "add", "sum", "multiply", "prod", "amax", "amin"):
        raise op.unsupported(f"by {reduce}")
    part = source if isinstance(source, Value) else b.number(source, x.dtype)
    if not isinstance(source, Value):
        part = b.expand(part, ids.shape)
    if part.shape != ids.shape:  # only as many as there are ids
        for at, (size, all_of_it) in enumerate(zip(ids.shape, part.shape, strict=True)):
            if size != all_of_it:
                part = b.slice(part, at, 0, size, size)
    how = {"sum": "add", "multiply": "mul", "prod": "mul", "amax": "max", "amin": "min"}
    inputs = [b.real(v) for v in (x, ids, b.cast(part, x.dtype))]
    return b.op("ScatterElements", inputs, x.shape, x.dtype, axis=axis_of(axis, x.rank),
                reduction=how.get(reduce, reduce))  # fmt: skip


def _scatter_add(op: Operation, x: Value, axis: int, ids: Value, source: Value) -> Value:
    return _scatter(op, x, axis, ids, source, "add")


def _index(op: Operation, x: Value, given: Sequence[Value | None]) -> Value:
    """As numpy indexes by arrays."""
    b = op.b
    axes = [i for i, g in enumerate(given) if g is not None]
    ids = [_whole(op, g) for g in given if g is not None]
    if len(ids) == 1:
        inputs = [b.real(x), b.real(ids[0])]
        return b.op("Gather", inputs, op.shape, x.dtype, axis=axes[0])
    turned, rest, where, front = _by_places(op, x, axes, ids)
    shape = (*front, *(x.shape[a] for a in rest))
    found = b.op("GatherND", [b.real(turned), where], shape, x.dtype)
    # What was found stands in the place of the first index, where they are beside one another.
    if axes == list(range(axes[0], axes[-1] + 1)) and axes[0]:
        k, lead = len(front), axes[0]
        order = [*range(k, k + lead), *range(k), *range(k + lead, found.rank)]
        found = b.transpose(found, order)
    return found


def _whole(op: Operation, ids: Value) -> Value:
    if ids.dtype in _MASKS:
        raise op.unsupported("by a mask")
    return op.b.cast(ids, _WHOLE)


def _by_places(
    op: Operation, x: Value, axes: Sequence[int], ids: Sequence[Value]
) -> tuple[Value, list[int], Value, Shape]:
    """`x` with the indexed axes first, the other axes, places [..., k], and their shape."""
    b = op.b
    front = broadcast(*(i.shape for i in ids))
    wide = [b.expand(i, front) for i in ids]
    where = b.concat([b.unsqueeze(i, len(front)) for i in wide], len(front))
    rest = [a for a in range(x.rank) if a not in axes]
    return b.transpose(x, [*axes, *rest]), rest, b.real(where), front


def _index_put(
    op: Operation, x: Value, given: Sequence[Value | None], source: Value, add: bool = False,
    *_: Any,
) -> Value:  # fmt: skip
    b = op.b
    axes = [i for i, g in enumerate(given) if g is not None]
    ids = [g for g in given if g is not None]
    if len(ids) == 1 and ids[0].dtype in _MASKS and not add:
        return _where_masked(op, x, axes[0], b.cast(ids[0], _BOOL), source)
    ids = [_whole(op, i) for i in ids]
    front = broadcast(*(i.shape for i in ids))
    rest = [a for a in range(x.rank) if a not in axes]
    order, kept = [*axes, *rest], [x.shape[a] for a in rest]
    # What is put stands where the first index does, if they are beside one another.
    lead = axes[0] if axes == list(range(axes[0], axes[-1] + 1)) else 0
    whole, k = (*kept[:lead], *front, *kept[lead:]), len(front)
    parts = b.expand(_ranked(op, b.cast(source, x.dtype), len(whole)), whole)
    turn = [*range(lead, lead + k), *range(lead), *range(lead + k, len(whole))]
    flat = (_product(op, [x.shape[a] for a in axes]), _product(op, kept))
    many = _product(op, front)
    found = _put_rows(
        op, b.reshape(b.transpose(x, order), flat),
        b.reshape(_places(op, ids, [x.shape[a] for a in axes]), (many, 1)),
        b.reshape(b.transpose(parts, turn), (many, flat[1])), "add" if add else "none",
    )  # fmt: skip
    found = b.reshape(found, tuple(x.shape[a] for a in order))
    return b.transpose(found, [order.index(a) for a in range(x.rank)])


def _where_masked(op: Operation, x: Value, axis: int, mask: Value, source: Value) -> Value:
    """`source` put where `mask` holds, whose first axis is number `axis` of `x`."""
    b = op.b
    after, axes = x.rank - axis - mask.rank, mask.rank
    if source.rank > after:
        # The axis of what is picked becomes those of the mask.
        if source.shape[-after - 1] != 1:
            raise op.unsupported("by a mask with a number for each place")
        for _ in range(axes - 1):
            source = b.unsqueeze(source, source.rank - after)
    for _ in range(after):
        mask = b.unsqueeze(mask, mask.rank)
    return b.where(_ranked(op, mask, x.rank), b.cast(source, x.dtype), x)


def _places(op: Operation, ids: Sequence[Value], sizes: Sequence[Dim]) -> Value:
    """Indices of several axes as one of all of them together, none below 0."""
    b, found = op.b, None
    for i, size in zip(ids, sizes, strict=True):
        length = b.number(size, _WHOLE)
        below = b.each("Less", i, b.number(0, _WHOLE), dtype=_BOOL)
        i = b.where(below, b.each("Add", i, length), i)
        found = i if found is None else b.each("Add", b.each("Mul", found, length), i)
    assert found is not None
    return found


def _ranked(op: Operation, x: Value, rank: int) -> Value:
    while x.rank < rank:
        x = op.b.unsqueeze(x, 0)
    return x


def _index_add(
    op: Operation, x: Value, axis: int, ids: Value, source: Value, alpha: float = 1
) -> Value:
    b, axis = op.b, axis_of(axis, x.rank)
    if alpha != 1:
        source = b.each("Mul", source, b.number(alpha, source.dtype))
    return _index_put(op, x, [None] * axis + [ids], source, True)


LOOKUPS: Mapping[str, Lower] = {
    "embedding": _embedding, "embedding_dense_backward": _embedding_backward,
    "index_select": _index_select, "gather": _gather, "scatter": _scatter,
    "scatter_add": _scatter_add, "scatter_reduce": _scatter, "index": _index,
    "_unsafe_index": _index, "index_put": _index_put, "_unsafe_index_put": _index_put,
    "index_add": _index_add,
}  # fmt: skip
