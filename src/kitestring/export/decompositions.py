"""How operations are taken apart into those that have a counterpart in ONNX.

Most of it is torch's own table. What is written here replaces torch's where that would leave
operations which nothing but torch has, or where a shorter way leads to the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import product
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

aten = torch.ops.aten
_TAPS = 25  # of a kernel; with more of them, one convolution is shorter than a slice for each
_MORE = [
    aten.native_layer_norm_backward, aten.native_group_norm, aten.native_group_norm_backward,
    aten.native_batch_norm_backward, aten.gelu_backward, aten._softmax_backward_data,
    aten._log_softmax_backward_data, aten._fused_rms_norm, aten._fused_rms_norm_backward,
    aten.stack,
]  # fmt: skip
_KEPT = (
    "embedding_dense_backward", "slice_backward", "select_backward", "bernoulli",
    "avg_pool", "reflection_pad", "replication_pad", "upsample", "roll", "addmm", "gelu",
    "triu", "tril", "multi_margin", "multilabel_margin", "_fused_moving_avg", "_embedding_bag",
)  # fmt: skip
"""Names, or how they begin, of what is not taken apart: there is a way for the whole."""


@cache
def table() -> Mapping[Any, Callable[..., Any]]:
    from torch._decomp import core_aten_decompositions, get_decompositions

    found = {**core_aten_decompositions(), **get_decompositions(_MORE)}
    wanted = {op: how for op, how in found.items() if not _kept(str(op))}
    return {**wanted, **_OURS}


def _kept(name: str) -> bool:
    bare = name.split(".")[1]
    return any(bare == kept or (bare.startswith(kept) and kept != "gelu") for kept in _KEPT)


def _dims(x: Tensor, dim: Sequence[int] | None) -> list[int]:
    return [d % x.ndim for d in dim] if dim else list(range(x.ndim))


def _var_mean(
    x: Tensor, dim: Sequence[int] | None = None, *, correction: float | None = None,
    keepdim: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dims = _dims(x, dim)
    less = 1.0 if correction is None else correction
    count = prod(x.shape[d] for d in dims)
    mean = x.mean(dims, keepdim=True)
    far = x - mean
    var = (far * far).sum(dims, keepdim=keepdim)
    return var / max(0, count - less), mean if keepdim else x.mean(dims)


def _var(
    x: Tensor, dim: Sequence[int] | None = None, *, correction: float | None = None,
    keepdim: bool = False,
) -> Tensor:  # fmt: skip
    return _var_mean(x, dim, correction=correction, keepdim=keepdim)[0]


def _split_with_sizes(x: Tensor, sizes: Sequence[int], dim: int = 0) -> list[Tensor]:
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [aten.slice(x, dim, end - size, end) for size, end in zip(sizes, ends, strict=True)]


def _native_batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None,
    var: Tensor | None, training: bool, momentum: float, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """By kept statistics; or by those of the numbers at hand, as instances are normed."""
    if not training:
        kept = aten._native_batch_norm_legit_no_training(x, weight, bias, mean, var, momentum, eps)
        return kept[0], kept[1], kept[2]
    rest = [0, *range(2, x.ndim)]
    here, middle = _var_mean(x, rest, correction=0, keepdim=True)
    scale = torch.rsqrt(here + eps)
    found = (x - middle) * scale
    wide = [1, -1, *[1] * (x.ndim - 2)]
    if weight is not None:
        found = found * weight.reshape(wide)
    if bias is not None:
        found = found + bias.reshape(wide)
    return found, middle.reshape(-1), scale.reshape(-1)


def _convolution_backward(
    slope: Tensor, x: Tensor, weight: Tensor, bias: Sequence[int] | None, stride: list[int],
    padding: list[int], dilation: list[int], transposed: bool, output_padding: list[int],
    groups: int, mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """By the input, the weight and the bias. 1, 2 or 3 dimensions, any stride, dilation, groups."""
    by_x = by_weight = by_bias = None
    args = (stride, padding, dilation)
    if mask[0] and transposed:
        by_x = aten.convolution(slope, weight, None, *args, False, [0] * len(stride), groups)
    elif mask[0]:
        by_x = _by_input(slope, x, weight, *args, groups)
    if mask[1]:
        # In a transposed convolution, the input and the slope change places.
        pair = (slope, x) if transposed else (x, slope)
        by_weight = _by_weight(*pair, list(weight.shape), *args, groups)
    if mask[2]:
        by_bias = slope.sum([0, *range(2, slope.ndim)])
    return by_x, by_weight, by_bias


def _by_input(
    slope: Tensor, x: Tensor, weight: Tensor, stride: list[int], padding: list[int],
    dilation: list[int], groups: int,
) -> Tensor:  # fmt: skip
    """As a transposed convolution; of each channel by itself as one with the kernel turned round,
    for which runtimes have faster code."""
    kernel = list(weight.shape[2:])
    inner = [d * (k - 1) - p for d, k, p in zip(dilation, kernel, padding, strict=True)]
    alone = len(weight) == groups > 1 == weight.shape[1]
    if alone and set(stride) == {1} and min(inner) >= 0:
        turned = weight.flip(list(range(2, weight.ndim)))
        found = aten.convolution(
            slope, turned, None, stride, inner, dilation, False, [0] * len(stride), groups
        )
    else:
        spans = zip(x.shape[2:], slope.shape[2:], kernel, stride, padding, dilation, strict=True)
        left = [n - ((m - 1) * s - 2 * p + d * (k - 1) + 1) for n, m, k, s, p, d in spans]
        found = aten.convolution(slope, weight, None, stride, padding, dilation, True, left, groups)
    return found  # type: ignore[no-any-return]


def _by_weight(
    x: Tensor, slope: Tensor, shape: list[int], stride: list[int], padding: list[int],
    dilation: list[int], groups: int,
) -> Tensor:  # fmt: skip
    """Of a kernel [O, C / groups, ...] from inputs [n, C, ...] and slopes [n, O, ...]."""
    if prod(shape[2:]) <= _TAPS:
        return _by_taps(x, slope, shape, stride, padding, dilation, groups)
    # As a convolution whose kernel is the slope, and whose channels are the rows.
    n, wide = x.shape[0], shape[1]
    x = x.reshape(n, groups, wide, *x.shape[2:]).transpose(0, 2)
    x = x.reshape(wide, groups * n, *x.shape[3:])
    kernel = slope.transpose(0, 1)
    found: Tensor = aten.convolution(
        x, kernel, None, dilation, padding, stride, False, [0] * len(stride), groups
    )
    for axis, size in enumerate(shape[2:], 2):
        found = found.narrow(axis, 0, size)
    return found.transpose(0, 1)


def _by_taps(
    x: Tensor, slope: Tensor, shape: list[int], stride: list[int], padding: list[int],
    dilation: list[int], groups: int,
) -> Tensor:  # fmt: skip
    """As a product: what lies under each place of the kernel, side by side, by the slope."""
    (n, out), places = slope.shape[:2], list(slope.shape[2:])
    if any(padding):
        x = F.pad(x, [p for p in reversed(padding) for _ in (0, 1)])
    taps, many = [], prod(places)
    for at in product(*(range(k) for k in shape[2:])):
        tap = x
        for axis, (i, m) in enumerate(zip(at, places, strict=True)):
            start, step = i * dilation[axis], stride[axis]
            tap = aten.slice(tap, axis + 2, start, start + (m - 1) * step + 1, step)
        taps.append(tap)
    if groups > 1:
        return _by_taps_in_groups(taps, slope, shape, groups)
    many, wide = prod(places), shape[1] * len(taps)
    under = torch.cat(taps, 1).reshape(n, wide, many)
    slopes = slope.reshape(n, out, many)
    if many * (out + wide) < out * wide:  # less to move than to add up
        under, slopes = (v.transpose(0, 1).reshape(v.shape[1], n * many) for v in (under, slopes))
        found = slopes @ under.t()
    else:
        found = (slopes @ under.transpose(1, 2)).sum(0)
    return found.reshape(out, len(taps), shape[1]).transpose(1, 2).reshape(shape)


def _by_taps_in_groups(
    taps: Sequence[Tensor], slope: Tensor, shape: list[int], groups: int
) -> Tensor:
    (n, out), many = slope.shape[:2], prod(slope.shape[2:])
    parts = [tap.reshape(n, tap.shape[1], 1, many) for tap in taps]
    under = torch.cat(parts, 2).reshape(n, groups, shape[1] * len(taps), many)
    slopes = slope.reshape(n, groups, out // groups, many)
    return (under @ slopes.transpose(2, 3)).sum(0).transpose(1, 2).reshape(shape)


_OURS: dict[Any, Callable[..., Any]] = {
    aten.var_mean.correction: _var_mean,
    aten.var.correction: _var,
    aten.convolution_backward.default: _convolution_backward,
    aten.split_with_sizes.default: _split_with_sizes,
    aten.native_batch_norm.default: _native_batch_norm,
}
