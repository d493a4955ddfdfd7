"""Operations element by element."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from kitestring.export.builder import Value
from kitestring.export.operation import COMPUTED, Lower, Number, Operand, Operation

_WIDE = np.dtype(np.int64)
_BOOL = np.dtype(np.bool_)


def _one(kind: str) -> Lower:
    """Of numbers: where torch gives a float of an integer, it is one first."""

    def lower(op: Operation, x: Value, *_: Any) -> Value:
        dtype = op.dtype if op.dtype in COMPUTED else _WIDE
        return op.b.cast(op.b.each(kind, op.b.cast(x, dtype)), op.dtype)

    return lower


def _two(kind: str) -> Lower:
    def lower(op: Operation, x: Operand, y: Operand, alpha: Number = 1) -> Value:
        dtype = op.dtype if op.dtype in COMPUTED else _WIDE
        a, c = op.value(x, dtype), op.value(y, dtype)
        if alpha != 1:
            c = op.b.each("Mul", c, op.b.number(alpha, dtype))
        return op.b.cast(op.b.each(kind, a, c), op.dtype)

    return lower


def _compare(kind: str, negated: bool = False) -> Lower:
    def lower(op: Operation, x: Operand, y: Operand) -> Value:
        dtype = op.common(x, y)
        if dtype not in COMPUTED and not (dtype == _BOOL and kind == "Equal"):
            dtype = _WIDE
        found = op.b.each(kind, op.value(x, dtype), op.value(y, dtype), dtype=_BOOL)
        return op.b.each("Not", found) if negated else found

    return lower


def _logical(kind: str, bits: str = "") -> Lower:
    """Of truths; `bits` is the operator for integers, where there is one."""

    def lower(op: Operation, *xs: Operand) -> Value:
        if bits and op.dtype != _BOOL:
            return op.b.each(bits, *(op.value(x, op.dtype) for x in xs))
        return op.b.each(kind, *(op.value(x, _BOOL) for x in xs))

    return lower


def _rsub(op: Operation, x: Operand, y: Operand, alpha: Number = 1) -> Value:
    return _two("Sub")(op, y, x, alpha)  # type: ignore[return-value]


def _div(op: Operation, x: Operand, y: Operand, rounding_mode: str | None = None) -> Value:
    """Whole numbers are divided as doubles, so that nothing is rounded twice."""
    whole = op.dtype.kind in "iub"
    dtype = np.dtype(np.float64) if whole else op.dtype
    found = op.b.each("Div", op.value(x, dtype), op.value(y, dtype))
    if rounding_mode == "floor":
        found = op.b.each("Floor", found)
    elif rounding_mode == "trunc":
        found = _truncated(op, found)
    return op.b.cast(found, op.dtype)


def _truncated(op: Operation, x: Value) -> Value:
    return op.b.each("Mul", op.b.each("Sign", x), op.b.each("Floor", op.b.each("Abs", x)))


def _trunc(op: Operation, x: Value) -> Value:
    return x if x.dtype.kind in "iu" else _truncated(op, x)


def _remainder(op: Operation, x: Operand, y: Operand) -> Value:
    """x - floor(x / y) y, of the sign of y."""
    a, c = op.value(x, op.dtype), op.value(y, op.dtype)
    if op.dtype.kind in "iu":
        return op.b.each("Mod", a, c)
    whole = op.b.each("Floor", op.b.each("Div", a, c))
    return op.b.each("Sub", a, op.b.each("Mul", whole, c))


def _fmod(op: Operation, x: Operand, y: Operand) -> Value:
    return op.b.each("Mod", op.value(x, op.dtype), op.value(y, op.dtype), fmod=1)


def _pow(op: Operation, x: Operand, y: Operand) -> Value:
    a = op.value(x, op.dtype)
    if y == 2:
        return op.b.each("Mul", a, a)
    if y in (0.5, -0.5):
        root = op.b.each("Sqrt", a)
        return root if y == 0.5 else op.b.each("Reciprocal", root)
    return op.b.each("Pow", a, op.value(y, op.dtype))


def _rsqrt(op: Operation, x: Value) -> Value:
    return op.b.each("Reciprocal", op.b.each("Sqrt", op.b.cast(x, op.dtype)))


def _clamp(op: Operation, x: Value, low: Any = None, high: Any = None, **named: Any) -> Value:
    low, high = named.get("min", low), named.get("max", high)
    found = op.b.cast(x, op.dtype)
    for kind, bound in (("Max", low), ("Min", high)):
        if bound is not None:
            found = op.b.each(kind, found, op.value(bound, op.dtype))
    return found


def _hardtanh(op: Operation, x: Value, low: float = -1, high: float = 1) -> Value:
    return _clamp(op, x, low, high)


def _leaky_relu(op: Operation, x: Value, slope: float = 0.01) -> Value:
    return op.b.each("LeakyRelu", x, alpha=float(slope))


def _elu(op: Operation, x: Value, alpha: float = 1, scale: float = 1, inside: float = 1) -> Value:
    """scale x above 0, else scale alpha (exp(inside x) - 1)."""
    b = op.b
    if inside == 1:
        found = b.each("Elu", x, alpha=float(alpha))
        return found if scale == 1 else b.each("Mul", found, b.number(scale, x.dtype))
    low = b.each("Elu", b.each("Mul", x, b.number(inside, x.dtype)), alpha=float(scale * alpha))
    high = b.each("Mul", x, b.number(scale, x.dtype))
    return b.where(b.each("Greater", x, b.number(0, x.dtype), dtype=_BOOL), high, low)


def _gelu(op: Operation, x: Value, approximate: str = "none") -> Value:
    """Hendrycks and Gimpel 2016, section 2, equation 1 and the approximation after it."""
    b = op.b

    def number(value: float) -> Value:
        return b.number(value, x.dtype)

    if approximate == "none":
        inner = b.each("Erf", b.each("Mul", x, number(math.sqrt(0.5))))
    else:
        cube = b.each("Mul", b.each("Mul", x, x), x)
        inside = b.each("Add", x, b.each("Mul", cube, number(0.044715)))
        inner = b.each("Tanh", b.each("Mul", inside, number(math.sqrt(2 / math.pi))))
    return b.each("Mul", b.each("Mul", x, number(0.5)), b.each("Add", inner, number(1)))


def _softplus(op: Operation, x: Value, beta: float = 1, threshold: float = 20) -> Value:
    """log(1 + exp(beta x)) / beta, or x where beta x is above the threshold."""
    b = op.b
    inside = x if beta == 1 else b.each("Mul", x, b.number(beta, x.dtype))
    far = b.each("Greater", inside, b.number(threshold, x.dtype), dtype=_BOOL)
    soft = _log1p(op, b.each("Exp", inside))
    if beta != 1:
        soft = b.each("Div", soft, b.number(beta, x.dtype))
    return b.where(far, x, soft)


def _log1p(op: Operation, x: Value) -> Value:
    """log(u) x / (u - 1) with u the rounded 1 + x, which loses no digit (Goldberg, "What every
    computer scientist should know about floating-point arithmetic", ACM Computing Surveys 1991,
    theorem 4). Infinity stays what it is."""
    b = op.b
    one = b.number(1, x.dtype)
    u = b.each("Add", x, one)
    less = b.each("Sub", u, one)
    small = b.each("Equal", less, b.number(0, x.dtype), dtype=_BOOL)
    log = b.each("Log", u)
    exact = b.each("Mul", log, b.each("Div", x, b.where(small, one, less)))
    large = b.each("Greater", x, b.number(1e6, x.dtype), dtype=_BOOL)
    return b.where(small, x, b.where(large, log, exact))


def _expm1(op: Operation, x: Value) -> Value:
    """tanh(x / 2) (exp(x) + 1), which loses no digit near 0."""
    b = op.b
    x = b.cast(x, op.dtype)
    half = b.each("Tanh", b.each("Mul", x, b.number(0.5, x.dtype)))
    return b.each("Mul", half, b.each("Add", b.each("Exp", x), b.number(1, x.dtype)))


def _log_by(base: float) -> Lower:
    def lower(op: Operation, x: Value) -> Value:
        log = op.b.each("Log", op.b.cast(x, op.dtype))
        return op.b.each("Mul", log, op.b.number(1 / math.log(base), op.dtype))

    return lower


def _exp2(op: Operation, x: Value) -> Value:
    x = op.b.cast(x, op.dtype)
    return op.b.each("Exp", op.b.each("Mul", x, op.b.number(math.log(2), op.dtype)))


def _erfc(op: Operation, x: Value) -> Value:
    return op.b.each("Sub", op.b.number(1, x.dtype), op.b.each("Erf", x))


def _square(op: Operation, x: Value) -> Value:
    return op.b.each("Mul", x, x)


def _where(op: Operation, condition: Value, x: Operand, y: Operand) -> Value:
    b = op.b
    dtype = op.dtype if op.dtype in (*COMPUTED, np.dtype(np.uint8)) else _WIDE
    found = b.where(b.cast(condition, _BOOL), op.value(x, dtype), op.value(y, dtype))
    return b.cast(found, op.dtype)


def _convert(op: Operation, x: Value, *_: Any, **__: Any) -> Value:
    """To integers, what lies between is cut off, in ONNX as in torch."""
    return op.b.cast(x, op.dtype)


def _test(kind: str) -> Lower:
    def lower(op: Operation, x: Value) -> Value:
        if x.dtype.kind != "f":
            return op.b.expand(op.b.number(False, _BOOL), x.shape)
        return op.b.each(kind, x, dtype=_BOOL)

    return lower


def _abs(op: Operation, x: Value) -> Value:
    return x if x.dtype.kind in "ub" else _one("Abs")(op, x)  # type: ignore[return-value]


def _rounded(kind: str) -> Lower:
    def lower(op: Operation, x: Value, *_: Any) -> Value:
        return x if x.dtype.kind in "iu" else op.b.each(kind, x)

    return lower


def _softshrink_backward(op: Operation, slope: Value, x: Value, lambd: float) -> Value:
    """The slope where x lies outside of the middle, else 0; the same of hardshrink."""
    b = op.b
    inside = b.each("LessOrEqual", b.each("Abs", x), b.number(lambd, x.dtype), dtype=_BOOL)
    return b.where(inside, b.number(0, x.dtype), slope)


ELEMENTWISE: Mapping[str, Lower] = {
    **{name: _one(kind) for name, kind in {
        "neg": "Neg", "exp": "Exp", "log": "Log", "sqrt": "Sqrt", "reciprocal": "Reciprocal",
        "sin": "Sin", "cos": "Cos", "tan": "Tan", "asin": "Asin", "acos": "Acos", "atan": "Atan",
        "sinh": "Sinh", "cosh": "Cosh", "asinh": "Asinh", "acosh": "Acosh", "atanh": "Atanh",
        "tanh": "Tanh", "sigmoid": "Sigmoid", "erf": "Erf", "relu": "Relu", "sign": "Sign",
    }.items()},
    "add": _two("Add"), "sub": _two("Sub"), "mul": _two("Mul"), "rsub": _rsub,
    "maximum": _two("Max"), "minimum": _two("Min"), "fmax": _two("Max"), "fmin": _two("Min"),
    "div": _div, "prims.div": _div, "remainder": _remainder, "fmod": _fmod, "pow": _pow,
    "eq": _compare("Equal"), "ne": _compare("Equal", negated=True), "lt": _compare("Less"),
    "le": _compare("LessOrEqual"), "gt": _compare("Greater"), "ge": _compare("GreaterOrEqual"),
    "logical_and": _logical("And"), "logical_or": _logical("Or"), "logical_xor": _logical("Xor"),
    "logical_not": _logical("Not"), "bitwise_and": _logical("And", "BitwiseAnd"),
    "bitwise_or": _logical("Or", "BitwiseOr"), "bitwise_xor": _logical("Xor", "BitwiseXor"),
    "bitwise_not": _logical("Not", "BitwiseNot"), "abs": _abs, "square": _square,
    "rsqrt": _rsqrt, "clamp": _clamp, "clamp_min": _clamp, "clamp_max": lambda op, x, high:
    _clamp(op, x, None, high), "hardtanh": _hardtanh, "leaky_relu": _leaky_relu, "elu": _elu,
    "gelu": _gelu, "softplus": _softplus, "log1p": lambda op, x: _log1p(op, op.b.cast(x, op.dtype)),
    "expm1": _expm1, "log2": _log_by(2), "log10": _log_by(10), "exp2": _exp2, "erfc": _erfc,
    "floor": _rounded("Floor"), "ceil": _rounded("Ceil"), "round": _rounded("Round"),
    "trunc": _trunc, "isnan": _test("IsNaN"), "isinf": _test("IsInf"), "where": _where,
    "_to_copy": _convert, "prims.convert_element_type": _convert, "to": _convert,
    "softshrink_backward": _softshrink_backward, "hardshrink_backward": _softshrink_backward,
}  # fmt: skip
