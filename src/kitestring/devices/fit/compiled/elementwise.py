"""Operations element by element: kept as expressions until somebody needs them in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

from torch.fx import Node

from kitestring.devices.fit.compiled.lowering import HEAVY, Lowering
from kitestring.devices.fit.compiled.tensors import named
from kitestring.devices.fit.compiled.views import Expr, Refused, Value, View, changed, constant


def dtype_of(node: Node) -> str:
    return named(node.meta["val"].dtype)


def shape_of(node: Node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


def expression(op: str, args: Sequence[Any], dtype: str, shape: tuple[int, ...]) -> Expr:
    """Arguments are broadcast; numbers stay numbers."""
    wide = [
        changed(a, lambda v: v.expand(shape)) if isinstance(a, View | Expr) else a for a in args
    ]
    return Expr(op, tuple(wide), dtype, shape)


def steady(low: Lowering, value: Any, shape: tuple[int, ...]) -> Any:
    """What is dear to compute is computed once before it is repeated."""
    if isinstance(value, Expr) and prod(value.shape) < prod(shape) and HEAVY & set(value.ops()):
        return low.view(value)
    return value


def pointwise_of(op: str) -> Callable[..., Value]:
    def how(low: Lowering, node: Node, *args: Any, **_: Any) -> Value:
        shape = shape_of(node)
        args = tuple(steady(low, a, shape) for a in args)
        return expression(op, args, dtype_of(node), shape)

    return how


def _composed(make: Callable[..., Any]) -> Callable[..., Value]:
    """An operation spelled out with others: `make(E, ...)`, E(op, *args) being one of them."""

    def how(low: Lowering, node: Node, *args: Any) -> Value:
        shape, dtype = shape_of(node), dtype_of(node)
        args = tuple(steady(low, a, shape) for a in args)
        wide = tuple(
            changed(a, lambda v: v.expand(shape)) if isinstance(a, View | Expr) else a for a in args
        )

        def e(op: str, *parts: Any, kind: str = dtype) -> Expr:
            return Expr(op, parts, kind, shape)

        return make(e, *wide, **{k: v for k, v in node.kwargs.items() if k in ("alpha",)})  # type: ignore[no-any-return]

    return how


def _cast(low: Lowering, node: Node, x: Value, *_: Any) -> Value:
    kind = dtype_of(node)
    return x if x.dtype == kind else Expr("cast", (x,), kind, x.shape)


def _scaled(op: str) -> Callable[..., Any]:
    def make(e: Any, a: Any, b: Any, alpha: Any = 1) -> Expr:
        return e(op, a, b if alpha == 1 else e("mul", b, alpha))  # type: ignore[no-any-return]

    return make


def _power(e: Any, x: Any, p: Any) -> Any:
    if p == 2:
        return e("mul", x, x)
    if p == 3:
        return e("mul", e("mul", x, x), x)
    if p == 0.5:
        return e("sqrt", x)
    if p == -0.5:
        return e("div", 1.0, e("sqrt", x))
    if p == -1:
        return e("div", 1.0, x)
    if p == 1:
        return x
    raise Refused(f"a power of {p}")


def _clamp(e: Any, x: Any, low: Any = None, high: Any = None) -> Any:
    if low is not None:
        x = e("amax", x, low)
    return x if high is None else e("amin", x, high)


def _elu(e: Any, x: Any, alpha: float = 1.0, scale: float = 1.0, inner: float = 1.0) -> Any:
    bent = e("mul", e("expm1", e("mul", x, inner)), alpha * scale)
    return e("where", e("gt", x, 0.0, kind="bool"), e("mul", x, scale), bent)


def _compare(op: str) -> Callable[..., Value]:
    def how(low: Lowering, node: Node, *args: Any) -> Value:
        return expression(op, args, "bool", shape_of(node))

    return how


def _fill(low: Lowering, node: Node, *args: Any) -> Value:
    name = str(node.target)
    if "zeros" in name or "empty" in name:
        value: Any = 0
    elif "ones" in name:
        value = 1
    else:
        value = args[0] if "scalar_tensor" in name else args[1]
    if isinstance(value, View | Expr):
        return changed(value, lambda v: v.expand(shape_of(node)))
    return constant(value, dtype_of(node), shape_of(node))


def _arange(low: Lowering, node: Node, *args: Any) -> Value:
    (n,) = shape_of(node)
    start, step = (args[0], args[2] if len(args) > 2 else 1) if len(args) > 1 else (0, 1)
    if not isinstance(start, int) or not isinstance(step, int):
        raise Refused("an arange of fractions")
    whole = View(None, (n,), (step,), start)
    kind = dtype_of(node)
    return whole if kind == "i64" else Expr("cast", (whole,), kind, (n,))


_ZERO = {"relu": lambda e, x: e("amax", x, 0.0)}
ELEMENTWISE: dict[str, Callable[..., Any]] = {
    **{op: _compare(op) for op in ("eq", "ne", "lt", "le", "gt", "ge")},
    **{
        op: pointwise_of(op)
        for op in (
            "mul", "exp", "log", "log1p", "expm1", "tanh", "sigmoid", "erf", "sqrt", "abs", "neg",
            "sign", "floor", "ceil", "trunc", "round", "where", "div",
        )
    },
    **{op: _composed(how) for op, how in _ZERO.items()},
    "sgn": pointwise_of("sign"),
    "maximum": pointwise_of("amax"),
    "minimum": pointwise_of("amin"),
    "add": _composed(_scaled("add")),
    "sub": _composed(_scaled("sub")),
    "rsub": _composed(lambda e, a, b, alpha=1: _scaled("sub")(e, b, a, alpha)),
    "rsqrt": _composed(lambda e, x: e("div", 1.0, e("sqrt", x))),
    "reciprocal": _composed(lambda e, x: e("div", 1.0, x)),
    "pow": _composed(_power),
    "clamp": _composed(_clamp),
    "clamp_min": _composed(_clamp),
    "clamp_max": _composed(lambda e, x, high: _clamp(e, x, None, high)),
    "hardtanh": _composed(lambda e, x, low=-1.0, high=1.0: _clamp(e, x, low, high)),
    "elu": _composed(_elu),
    "leaky_relu": _composed(
        lambda e, x, slope=0.01: e(
            "where", e("gt", x, 0.0, kind="bool"), x, e("mul", x, slope)
        )
    ),
    **{
        name: pointwise_of(op)
        for name, op in {
            "logical_and": "and", "bitwise_and": "and", "logical_or": "or", "bitwise_or": "or",
            "logical_not": "not", "bitwise_not": "not", "logical_xor": "xor", "bitwise_xor": "xor",
        }.items()
    },
    "_to_copy": _cast, "prims.convert_element_type": _cast,
    **{
        name: _fill
        for name in (
            "full", "full_like", "scalar_tensor", "zeros_like", "ones_like", "new_zeros", "zeros",
            "ones", "empty_permuted", "empty", "empty_like", "new_full", "new_empty",
        )
    },
    "fill": lambda low, node, x, value: constant(value, dtype_of(node), shape_of(node)),
    "arange": _arange,
}  # fmt: skip
