"""Operations that make one number of many: sums, extremes, norms, orders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kitestring.export.builder import Value
from kitestring.export.operation import (
    COMPUTED,
    Lower,
    Operation,
    axes_of,
    axis_of,
    fixed,
)

_WHOLE, _BOOL = np.dtype(np.int64), np.dtype(np.bool_)
Axes = int | Sequence[int] | None


def _wide(op: Operation, x: Value) -> Value:
    """In what is computed in: truths and bytes as integers."""
    return x if x.dtype in COMPUTED else op.b.cast(x, _WHOLE)


def _reduced(kind: str) -> Lower:
    def lower(op: Operation, x: Value, axes: Axes = None, keep: bool = False, **_: Any) -> Value:
        x = op.b.cast(x, op.dtype) if op.dtype.kind == "f" else _wide(op, x)
        return op.b.cast(op.b.reduce(kind, x, axes_of(axes, x.rank), keep), op.dtype)

    return lower


def _truth(kind: str) -> Lower:
    def lower(op: Operation, x: Value, axes: Axes = None, keep: bool = False) -> Value:
        numbers = op.b.cast(op.b.cast(x, _BOOL), _WHOLE)
        return op.b.cast(op.b.reduce(kind, numbers, axes_of(axes, x.rank), keep), op.dtype)

    return lower


def _where_most(kind: str) -> Lower:
    """argmax, argmin: the first of equals. Without an axis, of all numbers in a row."""

    def lower(op: Operation, x: Value, axis: int | None = None, keep: bool = False) -> Value:
        if axis is None:
            flat = op.b.reshape(x, (_count(op, x),))
            found = op.b.op(kind, [op.b.real(flat)], (), _WHOLE, axis=0, keepdims=0)
            return op.b.reshape(found, op.shape)
        x = op.b.real(_wide(op, x))
        axis = axis_of(axis, x.rank)
        return op.b.op(kind, [x], op.shape, _WHOLE, axis=axis, keepdims=int(keep))

    return lower


def _count(op: Operation, x: Value) -> int:
    total = 1
    for d in x.shape:
        total *= fixed(d, op)
    return total


def _extreme(kind: str) -> Lower:
    """max, min: over everything, or along an axis, and where."""
    value, place = f"Reduce{kind}", f"Arg{kind}"

    def lower(op: Operation, x: Value, axis: int | None = None, keep: bool = False) -> Any:
        if axis is None:
            return _reduced(value)(op, x)
        return _reduced(value)(op, x, axis, keep), _where_most(place)(
            Operation(op.b, _second(op)), x, axis, keep
        )

    return lower


def _second(op: Operation) -> Any:
    """The call as its second output sees it."""
    return type(op.call)(op.call.name, op.call.target, op.call.args, op.call.kwargs,
                         op.call.outs[1:])  # fmt: skip


def _norm(
    op: Operation, x: Value, order: float = 2, axes: Axes = None, keep: bool = False, **_: Any
) -> Value:
    b, over = op.b, axes_of(axes, x.rank)
    x = b.cast(x, op.dtype)
    if order in (1, 2):
        return b.reduce(f"ReduceL{int(order)}", x, over, keep)
    size = b.each("Abs", x)
    if order in (float("inf"), -float("inf")):
        return b.reduce("ReduceMax" if order > 0 else "ReduceMin", size, over, keep)
    if order == 0:
        there = b.cast(b.cast(x, _BOOL), op.dtype)
        return b.reduce("ReduceSum", there, over, keep)
    total = b.reduce("ReduceSum", b.each("Pow", size, b.number(order, x.dtype)), over, keep)
    return b.each("Pow", total, b.number(1 / order, x.dtype))


def _softmax(kind: str) -> Lower:
    def lower(op: Operation, x: Value, axis: int, *_: Any) -> Value:
        x = op.b.real(op.b.cast(x, op.dtype))
        return op.b.op(kind, [x], op.shape, op.dtype, axis=axis_of(axis, x.rank))

    return lower


def _cumsum(op: Operation, x: Value, axis: int, **_: Any) -> Value:
    x = op.b.real(op.b.cast(x, op.dtype))
    where = op.b.number(axis_of(axis, x.rank), np.int64)
    return op.b.op("CumSum", [x, where], op.shape, x.dtype)


def _topk(
    op: Operation, x: Value, k: int, axis: int = -1, largest: bool = True, ordered: bool = True
) -> tuple[Value, ...]:
    b = op.b
    if not largest and x.dtype.kind == "b":
        raise op.unsupported()
    shape = op.shape
    return b.ops("TopK", [b.real(x), b.sizes([k])], [(shape, x.dtype), (shape, _WHOLE)],
                 axis=axis_of(axis, x.rank), largest=int(largest), sorted=int(ordered))  # fmt: skip


def _sort(
    op: Operation, x: Value, *given: Any, stable: bool | None = None, **named: Any
) -> tuple[Value, ...]:
    """`axis`, `descending`; of equals the first comes first, as ONNX has it in TopK."""
    flags = [a for a in given if not isinstance(a, bool)], [a for a in given if isinstance(a, bool)]
    axis = named.get("dim", flags[0][0] if flags[0] else -1)
    descending = named.get("descending", flags[1][-1] if flags[1] else False)
    size = fixed(x.shape[axis_of(axis, x.rank)], op)
    return _topk(op, x, size, axis, bool(descending))


def _layer_norm(
    op: Operation, x: Value, shape: Sequence[int], weight: Value | None, bias: Value | None,
    eps: float,
) -> tuple[Value, ...]:  # fmt: skip
    """Normed, the mean and 1 / deviation."""
    b, axis = op.b, x.rank - len(shape)
    ones = b.expand(b.number(1, x.dtype), x.shape[axis:])
    inputs = [b.real(x), b.real(weight or ones), b.real(bias) if bias else None]
    few = (*x.shape[:axis], *(1 for _ in shape))
    outs = [(x.shape, x.dtype), (few, x.dtype), (few, x.dtype)]
    return b.ops("LayerNormalization", inputs, outs, axis=axis, epsilon=float(eps))


def _batch_norm(
    op: Operation, x: Value, weight: Value | None, bias: Value | None, mean: Value, var: Value,
    *rest: Any,
) -> tuple[Value | None, ...]:  # fmt: skip
    """By the statistics that were kept."""
    b, eps = op.b, rest[-1]
    size = mean.shape
    scale = weight or b.expand(b.number(1, x.dtype), size)
    shift = bias or b.expand(b.number(0, x.dtype), size)
    inputs = [b.real(v) for v in (x, scale, shift, mean, var)]
    found = b.op("BatchNormalization", inputs, x.shape, x.dtype, epsilon=float(eps))
    return found, None, None


SUMS: Mapping[str, Lower] = {
    "sum": _reduced("ReduceSum"), "prims.sum": _reduced("ReduceSum"),
    "mean": _reduced("ReduceMean"),
    "amax": _reduced("ReduceMax"), "amin": _reduced("ReduceMin"), "any": _truth("ReduceMax"),
    "all": _truth("ReduceMin"), "argmax": _where_most("ArgMax"), "argmin": _where_most("ArgMin"),
    "max": _extreme("Max"), "min": _extreme("Min"), "linalg_vector_norm": _norm,
    "_softmax": _softmax("Softmax"), "_log_softmax": _softmax("LogSoftmax"), "cumsum": _cumsum,
    "topk": _topk, "sort": _sort, "native_layer_norm": _layer_norm,
    "_native_batch_norm_legit_no_training": _batch_norm,
}  # fmt: skip
