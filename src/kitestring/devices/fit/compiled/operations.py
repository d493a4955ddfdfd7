"""How each of torch's operations is lowered: by name, one function or one line each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any

from torch.fx import Node

from kitestring.devices.fit.compiled import convolve, pool
from kitestring.devices.fit.compiled.elementwise import (
    ELEMENTWISE,
    dtype_of,
    pointwise_of,
    shape_of,
    steady,
)
from kitestring.devices.fit.compiled.kernels import (
    add_rows,
    pick,
    pointwise,
    reduction,
    take_rows,
    touch_rows,
)
from kitestring.devices.fit.compiled.lowering import Lowering, Product, RowsAdded
from kitestring.devices.fit.compiled.views import (
    Buffer,
    Expr,
    Refused,
    Value,
    View,
    changed,
    constant,
    plain,
)

# Views


def _slice(low: Lowering, node: Node, x: Value, dim: int = 0, start: Any = None, end: Any = None,
           step: int = 1) -> Value:  # fmt: skip
    size = x.shape[dim]
    begin = min(size, max(0, (start or 0) + (size if (start or 0) < 0 else 0)))
    return changed(x, lambda v: v.slice(dim % len(v.shape), begin, shape_of(node)[dim], step))


def _select(low: Lowering, node: Node, x: Value, dim: int, index: int) -> Value:
    index += x.shape[dim] if index < 0 else 0
    cut = changed(x, lambda v: v.slice(dim % len(v.shape), index, 1))
    return low.reshaped(cut, shape_of(node))


def _cat(low: Lowering, node: Node, parts: list[Any], dim: int = 0) -> Value:
    out = low.fresh(shape_of(node), dtype_of(node))
    at, dim = 0, dim % len(out.shape)
    for part in parts:
        if part.shape == (0,):
            continue
        size = part.shape[dim]
        low.put(pointwise(out.slice(dim, at, size), part))
        at += size
    return out


def _scatter_part(
    low: Lowering, node: Node, x: Value, src: Value, dim: int = 0, *cut: Any
) -> Value:
    """slice_scatter and select_scatter: x with a part replaced."""
    out = low.fresh(x.shape, x.dtype)
    low.put(pointwise(out, x))
    dim %= len(x.shape)
    size = x.shape[dim]
    if "select" in str(node.target):
        index = cut[0] + (size if cut[0] < 0 else 0)
        part = out.slice(dim, index, 1)
        src = low.reshaped(src, part.shape)
    else:
        start = (cut[0] if cut else 0) or 0
        start += size if start < 0 else 0
        step = cut[2] if len(cut) > 2 else 1
        part = out.slice(dim, start, src.shape[dim], step)
    low.put(pointwise(part, src))
    return out


def _pad(low: Lowering, node: Node, x: Value, pads: Sequence[int], value: float = 0.0) -> Value:
    """Less than nothing cuts off."""
    out = low.fresh(shape_of(node), x.dtype)
    if any(pad > 0 for pad in pads):
        low.put(pointwise(out, constant(value, x.dtype, out.shape)))
    part = out
    for k in range(len(pads) // 2):
        dim, (before, after) = len(x.shape) - 1 - k, pads[2 * k : 2 * k + 2]
        left, right = max(0, -before), max(0, -after)
        length = x.shape[dim] - left - right
        if length <= 0:
            return out
        cut = partial(View.slice, dim=dim, start=left, length=length)
        x, part = changed(x, cut), part.slice(dim, max(0, before), length)
    low.put(pointwise(part, x))
    return out


# Sums and extremes


def _dims(dims: Any, x: Value) -> list[int]:
    given = dims if isinstance(dims, list | tuple) else [] if dims is None else [dims]
    return sorted(d % len(x.shape) for d in given) or list(range(len(x.shape)))


def _reduce(low: Lowering, node: Node, op: str, x: Value, dims: Any) -> Value:
    which = _dims(dims, x)
    kind = dtype_of(node)
    if x.dtype != kind:
        x = Expr("cast", (x,), kind, x.shape)
    kept = tuple(1 if d in which else n for d, n in enumerate(x.shape))
    out = low.fresh(kept, kind)
    low.put(reduction(op, out, x, which))
    return low.reshaped(out, shape_of(node))


def _sum(low: Lowering, node: Node, x: Value, dims: Any = None, *_: Any) -> Value:
    return _reduce(low, node, "sum", x, dims)


def _extreme(op: str) -> Callable[..., Value]:
    def how(low: Lowering, node: Node, x: Value, dims: Any = None, *_: Any) -> Value:
        return _reduce(low, node, op, x, dims)

    return how


def _mean(low: Lowering, node: Node, x: Value, dims: Any = None, *_: Any) -> Value:
    count = prod(x.shape[d] for d in _dims(dims, x))
    total = _reduce(low, node, "sum", x, dims)
    return Expr("mul", (total, 1.0 / count), "f32", total.shape)


def _var(low: Lowering, node: Node, x: Value, dims: Any = None, correction: Any = None,
         **_: Any) -> Value:  # fmt: skip
    correction = node.kwargs.get("correction", correction)
    which, x = _dims(dims, x), low.view(x)
    count = prod(x.shape[d] for d in which)
    kept = tuple(1 if d in which else n for d, n in enumerate(x.shape))
    total = low.fresh(kept, "f32")
    low.put(reduction("sum", total, x, which))
    mean = low.view(Expr("mul", (total, 1.0 / count), "f32", kept)).expand(x.shape)
    off = Expr("sub", (x, mean), "f32", x.shape)
    square = low.fresh(kept, "f32")
    low.put(reduction("sum", square, Expr("mul", (off, off), "f32", x.shape), which))
    less = 1 if correction is None else correction
    over = low.reshaped(square, shape_of(node))
    return Expr("mul", (over, 1.0 / max(count - less, 1e-30)), "f32", shape_of(node))


# Products


def _mm(low: Lowering, node: Node, a: Value, b: Value) -> Any:
    a, b = low.view(a), low.view(b)
    if node in low.late and len(a.shape) == 2:
        return Product(a, b)
    return low.multiply(a, b)


def _addmm(low: Lowering, node: Node, bias: Value, a: Value, b: Value) -> Value:
    if node.kwargs:
        raise Refused("addmm with factors")
    start = changed(low.view(bias), lambda v: v.expand(shape_of(node)))
    assert isinstance(start, View)
    return low.multiply(low.view(a), low.view(b), start)


# Rows by number


def _embedding(low: Lowering, node: Node, table: Value, ids: Value, *_: Any) -> Value:
    flat = low.reshaped(low.view(ids), (prod(ids.shape),))
    out = low.fresh((prod(ids.shape), *table.shape[1:]), "f32")
    table, flat = low.view(table), low.view(flat)
    if table.buffer in low.tables:
        low.put(touch_rows(low.tables[table.buffer], flat, low.wrong))
    low.put(take_rows(out, table, flat, low.wrong))
    return low.reshaped(out, shape_of(node))


def _index(low: Lowering, node: Node, x: Value, ids: list[Any]) -> Value:
    given = [d for d, i in enumerate(ids) if i is not None]
    if given == [0] and x.dtype == "f32" and ids[0].dtype != "bool":
        return _embedding(low, node, x, ids[0])
    raise Refused("an index by several tensors")


def _index_put(
    low: Lowering, node: Node, x: Value, ids: list[Any], values: Value, accumulate: bool = False
) -> Any:
    given = [d for d, i in enumerate(ids) if i is not None]
    if given != [0] or not accumulate or ids[0].dtype == "bool":
        raise Refused("index_put other than sums of rows")
    rows = changed(values, lambda v: v.expand((*ids[0].shape, *x.shape[1:])))
    count = prod(ids[0].shape)
    flat = low.view(low.reshaped(low.view(ids[0]), (count,)))
    added = low.view(low.reshaped(low.view(rows), (count, *x.shape[1:])))
    empty = isinstance(x, Expr) and x.op == "const" and x.args[0] == 0
    if empty and node in low.late:
        return RowsAdded(flat, added, x.shape)
    out = low.fresh(x.shape, x.dtype)
    low.put(pointwise(out, x))
    low.put(add_rows(out, flat, added, low.wrong))
    return out


def _gather(low: Lowering, node: Node, x: Value, dim: int, ids: Value, *_: Any) -> Value:
    out = low.fresh(shape_of(node), x.dtype)
    low.put(pick(out, low.view(x), low.view(ids), dim % len(out.shape), low.wrong))
    return out


def _scatter(low: Lowering, node: Node, x: Value, dim: int, ids: Value, src: Any) -> Value:
    """With one id along `dim`: src where the position is the id, x elsewhere."""
    dim %= len(x.shape)
    if ids.shape[dim] != 1 or any(
        i != n for d, (i, n) in enumerate(zip(ids.shape, x.shape, strict=True)) if d != dim
    ):
        raise Refused("a scatter of several along one dimension")
    strides = tuple(1 if d == dim else 0 for d in range(len(x.shape)))
    here = View(None, x.shape, strides)
    there = changed(ids, lambda v: v.expand(x.shape))
    if isinstance(src, View | Expr):
        src = changed(src, lambda v: v.expand(x.shape))
    hit = Expr("eq", (here, there), "bool", x.shape)
    return Expr("where", (hit, src, x), x.dtype, x.shape)


def _scatter_add(low: Lowering, node: Node, x: Value, dim: int, ids: Value, src: Value) -> Value:
    """The gradient of gather with one id along `dim`."""
    hit = _scatter(low, node, x, dim, ids, src)
    assert isinstance(hit, Expr)
    condition, there, _ = hit.args
    more = Expr("add", (x, there), x.dtype, x.shape)
    return Expr("where", (condition, more, x), x.dtype, x.shape)


def _broadcast_in(low: Lowering, node: Node, x: Value, shape: Sequence[int], dims: Any) -> Value:
    kept = [1] * len(shape)
    for d, n in zip(dims, x.shape, strict=True):
        kept[d] = n
    return changed(low.reshaped(x, kept), lambda v: v.expand(shape))


def _permute(low: Lowering, node: Node, x: Value, order: Sequence[int]) -> Value:
    return changed(x, lambda v: v.permute(order))


def _expand(low: Lowering, node: Node, x: Value, *_: Any) -> Value:
    x = steady(low, x, shape_of(node))
    return changed(x, lambda v: v.expand(shape_of(node)))


def _view(low: Lowering, node: Node, x: Value, *_: Any) -> Value:
    return low.reshaped(x, shape_of(node))


def _same(low: Lowering, node: Node, x: Value, *_: Any) -> Value:
    return x


def _strided(
    low: Lowering, node: Node, x: Value, shape: Any, strides: Any, offset: Any = None
) -> Value:
    """Where x lies as torch lets it lie, its memory may be looked at otherwise."""
    there = node.args[0].meta["val"]  # type: ignore[union-attr]
    x = low.view(x)
    start = there.storage_offset()
    if (x.strides, x.offset) != (tuple(there.stride()), start):
        raise Refused("as_strided of what lies otherwise")
    at = start if offset is None else offset
    return View(x.buffer, tuple(shape), tuple(strides), at)


def _bernoulli(low: Lowering, node: Node, x: Value, p: float, *_: Any) -> Value:
    """Drawn before each step: what a dropout keeps."""
    shape = shape_of(node)
    out = plain(Buffer("draw", "f32", max(1, prod(shape)), fixed=True), shape)
    low.draws.append((out, float(p)))
    return out


def _repeat(low: Lowering, node: Node, x: Value, times: Sequence[int]) -> Value:
    shape = (1,) * (len(times) - len(x.shape)) + x.shape
    apart = [n for pair in zip((1,) * len(shape), shape, strict=True) for n in pair]
    wide = [n for pair in zip(times, shape, strict=True) for n in pair]
    return low.reshaped(changed(low.reshaped(x, apart), lambda v: v.expand(wide)), shape_of(node))


def _any(low: Lowering, node: Node, x: Value, dims: Any = None, *_: Any) -> Value:
    which = _dims(dims, x)
    kept = tuple(1 if d in which else n for d, n in enumerate(x.shape))
    out = low.fresh(kept, "i64")
    low.put(reduction("amax", out, Expr("cast", (x,), "i64", x.shape), which))
    return low.reshaped(Expr("cast", (out,), "bool", kept), shape_of(node))


def _norm(low: Lowering, node: Node, x: Value, order: Any = 2, dims: Any = None, *_: Any) -> Value:
    if order != 2:
        raise Refused(f"a norm of order {order}")
    x, which = low.view(x), _dims(dims, x)
    kept = tuple(1 if d in which else n for d, n in enumerate(x.shape))
    out = low.fresh(kept, "f32")
    low.put(reduction("sum", out, Expr("mul", (x, x), "f32", x.shape), which))
    return low.reshaped(Expr("sqrt", (out,), "f32", kept), shape_of(node))


OPERATIONS: dict[str, Callable[..., Any]] = {
    **ELEMENTWISE,
    "permute": _permute, "t": _permute, "view": _view, "_unsafe_view": _view, "reshape": _view,
    "unsqueeze": _view, "squeeze": _view, "expand": _expand, "slice": _slice, "select": _select,
    "alias": _same, "clone": _same, "detach": _same, "lift_fresh_copy": _same,
    "copy": lambda low, node, x, y, *_: changed(y, lambda v: v.expand(shape_of(node))),
    "as_strided": _strided, "prims.broadcast_in_dim": _broadcast_in,
    "cat": _cat, "slice_scatter": _scatter_part, "select_scatter": _scatter_part,
    "constant_pad_nd": _pad,
    "sum": _sum, "prims.sum": _sum, "amax": _extreme("amax"), "amin": _extreme("amin"),
    "any": _any, "bernoulli.p": _bernoulli, "linalg_vector_norm": _norm, "repeat": _repeat,
    "mean": _mean, "prims.var": _var, "var": _var, "prims.div": pointwise_of("div"),
    "mm": _mm, "bmm": _mm, "addmm": _addmm,
    "embedding": _embedding, "index": _index, "index_put": _index_put,
    "_unsafe_index_put": _index_put, "gather": _gather, "scatter": _scatter,
    "scatter_add": _scatter_add,
    "convolution": convolve.forward, "convolution_backward": convolve.backward,
    "max_pool2d_with_indices": pool.max_pool,
    "max_pool2d_with_indices_backward": pool.max_pool_backward,
    "avg_pool2d": pool.mean_pool, "avg_pool2d_backward": pool.mean_pool_backward,
    "_adaptive_avg_pool2d": pool.adaptive_pool,
    "_adaptive_avg_pool2d_backward": pool.adaptive_pool_backward,
}  # fmt: skip
