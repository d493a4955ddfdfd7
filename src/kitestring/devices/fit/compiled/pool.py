"""Pooling as strided slices: each position in a window is a view of the input."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import prod
from typing import Any

from torch.fx import Node

from kitestring.devices.fit.compiled.kernels import pointwise, reduction
from kitestring.devices.fit.compiled.lowering import Lowering, Tiled
from kitestring.devices.fit.compiled.views import Expr, Refused, Value, View, constant

_WINDOWS = 64  # of an adaptive pooling, each with code of its own


def _windows(
    low: Lowering, x: Value, kernel_: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    out: Sequence[int], fill: float,
) -> tuple[View, list[View]]:  # fmt: skip
    """The padded input, and one slice of it for each position in a window."""
    x = low.view(x)
    k, s, p = (_pair(v) for v in (kernel_, stride, padding))
    if len(x.shape) not in (3, 4):
        raise Refused("pooling in other than two dimensions")
    first = len(x.shape) - 2
    need = [(o - 1) * t + w for o, t, w in zip(out[-2:], s, k, strict=True)]
    if p != (0, 0) or any(n > h for n, h in zip(need, x.shape[-2:], strict=True)):
        shape = (
            *x.shape[:-2],
            *(max(n, h + 2 * q) for n, h, q in zip(need, x.shape[-2:], p, strict=True)),
        )
        padded = low.fresh(shape, "f32", x)
        low.put(pointwise(padded, constant(fill, "f32", shape)))
        inside = padded.slice(first, p[0], x.shape[-2]).slice(first + 1, p[1], x.shape[-1])
        low.put(pointwise(inside, x))
        x = padded
    return x, [_slice(x, y, z, s, out[-2:]) for y in range(k[0]) for z in range(k[1])]


def _slice(x: View, y: int, z: int, stride: tuple[int, int], out: Sequence[int]) -> View:
    first = len(x.shape) - 2
    return x.slice(first, y, out[0], stride[0]).slice(first + 1, z, out[1], stride[1])


def _pair(values: Any) -> tuple[int, int]:
    v = [values] if isinstance(values, int) else list(values)
    return (int(v[0]), int(v[0])) if len(v) == 1 else (int(v[0]), int(v[1]))


def max_pool(
    low: Lowering, node: Node, x: Value, kernel_: Any, stride: Any = (), padding: Any = 0,
    dilation: Any = 1, ceil: bool = False,
) -> tuple[View, View]:  # fmt: skip
    """The maxima, and which position of its window each came from (not torch's flat index: only
    the backward pass reads it)."""
    if _pair(dilation) != (1, 1):
        raise Refused("dilated pooling")
    shape = tuple(node.meta["val"][0].shape)
    x, parts = _windows(low, x, kernel_, stride or kernel_, padding, shape, float("-inf"))
    best: Value = parts[0]
    for part in parts[1:]:
        best = Expr("amax", (best, part), "f32", shape)
    top = low.fresh(shape, "f32", x)
    low.put(pointwise(top, best))
    which: Any = constant(len(parts) - 1, "i64", shape)
    for number, part in reversed(list(enumerate(parts[:-1]))):
        hit = Expr("eq", (part, top), "bool", shape)
        which = Expr("where", (hit, constant(number, "i64", shape), which), "i64", shape)
    code = low.fresh(shape, "u8" if len(parts) <= 256 else "i64", x)
    low.put(pointwise(code, which))
    return top, code


def max_pool_backward(
    low: Lowering, node: Node, d: Value, x: Value, kernel_: Any, stride: Any, padding: Any,
    dilation: Any, ceil: bool, code: View,
) -> Value:  # fmt: skip
    d = low.view(d)

    def part(number: int) -> Expr:
        hit = Expr("eq", (code, number), "bool", code.shape)
        return Expr("where", (hit, d, 0.0), "f32", code.shape)

    return _spread(low, x, code.shape, kernel_, stride, padding, part)


def _spread(
    low: Lowering, x: Value, out: Sequence[int], kernel_: Any, stride: Any, padding: Any, part: Any
) -> View:
    """Add `part(number)` to the input's slice of each position in a window."""
    k, p = _pair(kernel_), _pair(padding)
    s = _pair(stride) if stride else k
    need = [(o - 1) * t + w for o, t, w in zip(out[-2:], s, k, strict=True)]
    size = [max(n, h + 2 * q) for n, h, q in zip(need, x.shape[-2:], p, strict=True)]
    padded = low.fresh((*x.shape[:-2], *size), "f32", x if isinstance(x, View) else None)
    spots = [(y, z) for y in range(k[0]) for z in range(k[1])]
    if s == k and need == size and padded.shape == x.shape:
        cuts = [partial(_slice, y=y, z=z, stride=s, out=out[-2:]) for y, z in spots]
        parts = [(cut, part(number)) for number, cut in enumerate(cuts)]
        assert padded.buffer is not None
        low.tiled[padded.buffer] = Tiled(padded, parts)
        return padded
    low.put(pointwise(padded, constant(0.0, "f32", padded.shape)))
    for number, (y, z) in enumerate(spots):
        there = _slice(padded, y, z, s, out[-2:])
        low.put(pointwise(there, Expr("add", (there, part(number)), "f32", there.shape)))
    first = len(x.shape) - 2
    return padded.slice(first, p[0], x.shape[-2]).slice(first + 1, p[1], x.shape[-1])


def mean_pool(
    low: Lowering, node: Node, x: Value, kernel_: Any, stride: Any = (), padding: Any = 0,
    ceil: bool = False, count_padding: bool = True, divisor: Any = None,
) -> Value:  # fmt: skip
    if ceil or (_pair(padding) != (0, 0) and not count_padding):
        raise Refused("average pooling over part of a window")
    shape = tuple(node.meta["val"].shape)
    _, parts = _windows(low, x, kernel_, stride or kernel_, padding, shape, 0.0)
    total: Value = parts[0]
    for part in parts[1:]:
        total = Expr("add", (total, part), "f32", shape)
    share = 1.0 / (divisor or prod(_pair(kernel_)))
    return low.view(Expr("mul", (total, share), "f32", shape))


def mean_pool_backward(
    low: Lowering, node: Node, d: Value, x: Value, kernel_: Any, stride: Any, padding: Any,
    ceil: bool, count_padding: bool, divisor: Any,
) -> Value:  # fmt: skip
    if ceil or (_pair(padding) != (0, 0) and not count_padding):
        raise Refused("average pooling over part of a window")
    d = low.view(d)
    share = 1.0 / (divisor or prod(_pair(kernel_)))
    part = Expr("mul", (d, share), "f32", d.shape)
    return _spread(low, x, d.shape, kernel_, stride, padding, lambda _: part)


def _cuts(size: Sequence[int], out: Sequence[int]) -> list[list[tuple[int, int]]]:
    """Start and length of torch's adaptive windows, by dimension."""
    found = [
        [(i * n // o, -(-(i + 1) * n // o) - i * n // o) for i in range(o)]
        for n, o in zip(size, out, strict=True)
    ]
    if prod(map(len, found)) > _WINDOWS:
        raise Refused("adaptive pooling into many windows")
    return found


def _cut(x: View, y: tuple[int, int], z: tuple[int, int]) -> View:
    return x.slice(-2, *y).slice(-1, *z)


def adaptive_pool(low: Lowering, node: Node, x: Value, out: Any) -> Value:
    x, shape = low.view(x), tuple(node.meta["val"].shape)
    total = low.fresh(shape, "f32")
    rows, columns = _cuts(x.shape[-2:], shape[-2:])
    for i, y in enumerate(rows):
        for j, z in enumerate(columns):
            window = _cut(x, y, z)
            dims = [len(shape) - 2, len(shape) - 1]
            part = low.fresh((*shape[:-2], 1, 1), "f32")
            low.put(reduction("sum", part, window, dims))
            mean = Expr("mul", (part, 1.0 / (y[1] * z[1])), "f32", part.shape)
            low.put(pointwise(_cut(total, (i, 1), (j, 1)), mean))
    return total


def adaptive_pool_backward(low: Lowering, node: Node, d: Value, x: Value) -> Value:
    d, out = low.view(d), low.fresh(x.shape, "f32")
    low.put(pointwise(out, constant(0.0, "f32", x.shape)))
    rows, columns = _cuts(x.shape[-2:], d.shape[-2:])
    for i, y in enumerate(rows):
        for j, z in enumerate(columns):
            window = _cut(out, y, z)
            part = _cut(d, (i, 1), (j, 1)).expand(window.shape)
            share = Expr("mul", (part, 1.0 / (y[1] * z[1])), "f32", window.shape)
            low.put(pointwise(window, Expr("add", (window, share), "f32", window.shape)))
    return out
