"""Matrix products, convolutions, and what resamples signals and images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from kitestring.core import Array
from kitestring.export.builder import Value
from kitestring.export.operation import Lower, Operand, Operation, fixed


def _mm(op: Operation, x: Value, y: Value) -> Value:
    return op.b.matmul(x, y)


def _addmm(
    op: Operation, bias: Value, x: Value, y: Value, beta: Operand = 1, alpha: Operand = 1
) -> Value:
    b = op.b
    if (beta, alpha) == (1, 1) and len(bias.shape) <= 2:
        return b.gemm(x, y, b.real(bias))
    found = b.each("Mul", b.matmul(x, y), op.value(alpha, x.dtype))
    return b.each("Add", found, b.each("Mul", bias, op.value(beta, x.dtype)))


def _convolution(
    op: Operation, x: Value, weight: Value, bias: Value | None, stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], transposed: bool,
    output_padding: Sequence[int], groups: int,
) -> Value:  # fmt: skip
    b, k = op.b, weight.rank - 2
    stride, padding, dilation = (_each(v, k) for v in (stride, padding, dilation))
    inputs = [b.real(v) if v is not None else None for v in (x, weight, bias)]
    how: dict[str, Any] = {
        "strides": stride, "pads": [*padding, *padding], "dilations": dilation, "group": groups,
        "kernel_shape": [fixed(d, op) for d in weight.shape[2:]],
    }  # fmt: skip
    if isinstance(weight.shape[0], int):
        if transposed:
            how["output_padding"] = _each(output_padding, k)
        kind = "ConvTranspose" if transposed else "Conv"
        return b.op(kind, inputs, op.shape, x.dtype, **how)
    raise op.unsupported("across rows")


def _each(values: Sequence[int], k: int) -> list[int]:
    return list(values) if len(values) == k else list(values) * k


# Resampling is linear along each axis by itself: a matrix says what becomes of it.


def _resample(op: Operation, x: Value, *args: Any) -> Value:
    target, sizes, *rest = op.call.target, *args
    k = len(sizes) // 2 if "pad" in op.call.name else len(sizes)
    inside = [fixed(d, op) for d in x.shape[-k:]]
    return _along(op, x, _matrices(target, inside, sizes, rest))


def _resample_backward(op: Operation, slope: Value, *args: Any) -> Value:
    """By the same matrices, turned."""
    name = op.call.name.removesuffix("_backward")
    target, rest = getattr(torch.ops.aten, name).default, []
    if name.startswith("upsample") or "_exact" in name:
        sizes, whole, *rest = args
        inside = [fixed(d, op) for d in whole[2:]]
    else:
        x, *given = args
        k = len(given[0]) // 2 if given else 2
        inside = [fixed(d, op) for d in x.shape[-k:]]
        sizes = given[0] if given else [fixed(d, op) for d in slope.shape[-k:]]
    return _along(op, slope, [m.T for m in _matrices(target, inside, sizes, rest)])


def _matrices(
    target: Any, inside: Sequence[int], sizes: Sequence[int], rest: Sequence[Any]
) -> list[Array]:
    """[out, in] of each axis: what torch makes of unit vectors along it."""
    k, found = len(inside), []
    for axis, n in enumerate(inside):
        if len(sizes) == k:
            own = [m if a == axis else 1 for a, m in enumerate(sizes)]
        else:  # widths to pad by, of the last axis first
            at = 2 * (k - 1 - axis)
            own = [w if i in (at, at + 1) else 0 for i, w in enumerate(sizes)]
        lengths = [n if a == axis else 1 for a in range(k)]
        eye = torch.eye(n, dtype=torch.float64).reshape(1, n, *lengths)
        found.append(target(eye, own, *rest).reshape(n, -1).numpy().T)
    return found


def _along(op: Operation, x: Value, matrices: Sequence[Array]) -> Value:
    b = op.b
    *first, last = (m.astype(x.dtype) for m in matrices)
    found = b.matmul(x, b.exact(np.ascontiguousarray(last.T)))
    return b.matmul(b.exact(np.ascontiguousarray(first[0])), found) if first else found


_RESAMPLED = (
    "_adaptive_avg_pool2d", "upsample_nearest1d", "upsample_nearest2d", "upsample_linear1d",
    "upsample_bilinear2d", "upsample_bicubic2d", "_upsample_nearest_exact1d",
    "_upsample_nearest_exact2d", "reflection_pad1d", "reflection_pad2d", "replication_pad1d",
    "replication_pad2d",
)  # fmt: skip

PRODUCTS: Mapping[str, Lower] = {
    "mm": _mm, "bmm": _mm, "matmul": _mm, "addmm": _addmm, "convolution": _convolution,
    **dict.fromkeys(_RESAMPLED, _resample),
    **{f"{name}_backward": _resample_backward for name in _RESAMPLED},
}  # fmt: skip
