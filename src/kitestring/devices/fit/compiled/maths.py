"""Arithmetic on what was read: the operations of `views.Expr`, at any width of vector.

Polynomials are those of Cephes (S. Moshier) unless said otherwise; they agree with libm within a
few units in the last place, and NaN goes through all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir

from kitestring.devices.fit.compiled.emit import FLAGS, HELD, I32, Emitter
from kitestring.devices.fit.compiled.views import Refused


def _poly(e: Emitter, x: Any, width: int, *coefficients: float) -> Any:
    total = e.number(coefficients[0], "f32", width)
    for c in coefficients[1:]:
        total = e.fma(total, x, e.number(c, "f32", width))
    return total


def exp(e: Emitter, x: Any, w: int) -> Any:
    b, n = e.b, e.numbers(w)
    kept = e.extreme("amin", e.extreme("amax", x, n(-103.0)), n(88.7228))
    k = e.call("floor", e.fma(kept, n(1.44269504088896341), n(0.5)), w)
    r = e.fma(k, n(-0.693359375), kept)
    r = e.fma(k, n(2.12194440e-4), r)
    p = _poly(
        e, r, w, 1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2,
        1.6666665459e-1, 5.0000001201e-1,
    )  # fmt: skip
    y = b.fadd(e.fma(b.fmul(r, r), p, r), n(1.0))
    sure = b.select(b.fcmp_unordered("uno", k, k), n(0.0), k)  # NaN has no whole number
    whole = b.fptosi(sure, I32 if w == 1 else ir.VectorType(I32, w))
    half = b.ashr(whole, _ints(e, 1, w))  # in two steps, so that the ends do not overflow
    y = b.fmul(b.fmul(y, _power(e, half, w)), _power(e, b.sub(whole, half), w))
    over = b.fcmp_ordered(">", x, n(88.7228))
    return b.select(over, n(float("inf")), b.select(b.fcmp_ordered("<", x, n(-103)), n(0), y))


def _ints(e: Emitter, value: int, w: int) -> Any:
    return e.splat(ir.Constant(I32, value), w)


def _power(e: Emitter, k: Any, w: int) -> Any:
    bits = e.b.shl(e.b.add(k, _ints(e, 127, w)), _ints(e, 23, w))
    return e.b.bitcast(bits, e.kind("f32", w))


def log(e: Emitter, x: Any, w: int) -> Any:
    b, n = e.b, e.numbers(w)
    ints = I32 if w == 1 else ir.VectorType(I32, w)
    tiny = b.fcmp_ordered("<", x, n(1.17549435e-38))
    scaled = b.select(tiny, b.fmul(x, n(8388608.0)), x)
    bits = b.bitcast(scaled, ints)
    k = b.sub(b.ashr(bits, _ints(e, 23, w)), _ints(e, 126, w))
    part = b.or_(b.and_(bits, _ints(e, 0x007FFFFF, w)), _ints(e, 0x3F000000, w))
    m = b.bitcast(part, e.kind("f32", w))
    power = b.fsub(b.sitofp(k, e.kind("f32", w)), b.select(tiny, n(23.0), n(0.0)))
    low = b.fcmp_ordered("<", m, n(0.707106781186547524))
    power = b.select(low, b.fsub(power, n(1.0)), power)
    f = b.fsub(b.select(low, b.fadd(m, m), m), n(1.0))
    z = b.fmul(f, f)
    p = _poly(
        e, f, w, 7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1,
        1.4249322787e-1, -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1,
    )  # fmt: skip
    y = b.fmul(b.fmul(f, z), p)
    y = e.fma(power, n(-2.12194440e-4), y)
    y = e.fma(z, n(-0.5), y)
    y = e.fma(power, n(0.693359375), b.fadd(f, y))
    y = b.select(b.fcmp_unordered("==", x, n(float("inf"))), x, y)  # infinity and NaN
    y = b.select(b.fcmp_ordered("==", x, n(0.0)), n(float("-inf")), y)
    return b.select(b.fcmp_ordered("<", x, n(0.0)), n(float("nan")), y)


def log1p(e: Emitter, x: Any, w: int) -> Any:
    """log u x / (u - 1) with u = 1 + x: what rounding took from u is given back (Kahan)."""
    b, one = e.b, e.number(1.0, "f32", w)
    u = b.fadd(x, one)
    flat = b.fcmp_ordered("==", u, one)
    under = b.select(flat, one, b.fsub(u, one))
    y = b.select(flat, x, b.fdiv(b.fmul(log(e, u, w), x), under))
    return b.select(b.fcmp_ordered("==", x, e.number(float("inf"), "f32", w)), x, y)


def expm1(e: Emitter, x: Any, w: int) -> Any:
    """x + x^2/2 + ... near 0, exp x - 1 elsewhere."""
    b = e.b
    near = _poly(
        e, x, w, 1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2,
        1.6666665459e-1, 5.0000001201e-1,
    )  # fmt: skip
    near = e.fma(b.fmul(x, x), near, x)
    far = b.fsub(exp(e, x, w), e.number(1.0, "f32", w))
    small = b.fcmp_ordered("<", e.call("fabs", x, w), e.number(0.34, "f32", w))
    return b.select(small, near, far)


def tanh(e: Emitter, x: Any, w: int) -> Any:
    b, n = e.b, e.numbers(w)
    size = e.call("fabs", x, w)
    z = b.fmul(x, x)
    p = _poly(
        e, z, w, -5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1,
        -3.33332819422e-1,
    )  # fmt: skip
    near = e.fma(b.fmul(z, p), x, x)
    grown = exp(e, b.fadd(size, size), w)
    far = b.fsub(n(1.0), b.fdiv(n(2.0), b.fadd(grown, n(1.0))))
    far = b.select(b.fcmp_ordered("<", x, n(0.0)), b.fneg(far), far)
    return b.select(b.fcmp_ordered("<", size, n(0.625)), near, far)


def sigmoid(e: Emitter, x: Any, w: int) -> Any:
    one = e.number(1.0, "f32", w)
    return e.b.fdiv(one, e.b.fadd(one, exp(e, e.b.fneg(x), w)))


def erf(e: Emitter, x: Any, w: int) -> Any:
    """A rational approximation on [-4, 4], that of Eigen's generic erf."""
    b, n = e.b, e.numbers(w)
    kept = e.extreme("amin", e.extreme("amax", x, n(-4.0)), n(4.0))
    z = b.fmul(kept, kept)
    over = _poly(
        e, z, w, -2.72614225801306e-10, 2.77068142495902e-08, -2.10102402082508e-06,
        -5.69250639462346e-05, -7.34990630326855e-04, -2.95459980854025e-03,
        -1.60960333262415e-02,
    )  # fmt: skip
    under = _poly(
        e, z, w, -1.45660718464996e-05, -2.13374055278905e-04, -1.68282697438203e-03,
        -7.37332916720468e-03, -1.42647390514189e-02,
    )  # fmt: skip
    return b.fdiv(b.fmul(kept, over), under)


def apply(e: Emitter, op: str, args: Sequence[Any], dtype: str, source: str, w: int) -> Any:
    """One operation on held values; `source` is the dtype of the arguments."""
    b = e.b
    if op == "cast":
        return _cast(e, args[0], source, dtype, w)
    if op == "where":
        return b.select(*args)
    if op in ("eq", "ne", "lt", "le", "gt", "ge"):
        sign = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}[op]
        if source == "f32":
            compare = b.fcmp_unordered if op == "ne" else b.fcmp_ordered
            return compare(sign, *args)
        return b.icmp_signed(sign, *args)
    if op in ("and", "or", "xor"):
        return {"and": b.and_, "or": b.or_, "xor": b.xor}[op](*args)
    if op == "not":
        return b.not_(args[0])
    if op in ("amax", "amin"):
        return e.extreme(op, args[0], args[1], dtype == "f32")
    if dtype == "f32":
        return _float(e, op, args, w)
    if op == "neg":
        return b.neg(args[0])
    found = {"add": b.add, "sub": b.sub, "mul": b.mul}.get(op)
    if found is None:
        raise Refused(f"{op} of whole numbers")
    return found(*args)


def _float(e: Emitter, op: str, args: Sequence[Any], w: int) -> Any:
    b, x = e.b, args[0]
    two = {"add": b.fadd, "sub": b.fsub, "mul": b.fmul, "div": b.fdiv}
    if op in two:
        return two[op](x, args[1], flags=FLAGS)
    if op in _FUNCTIONS:
        return _FUNCTIONS[op](e, x, w)
    if op in ("sqrt", "floor", "ceil", "trunc"):
        return e.call(op, x, w)
    if op == "abs":
        return e.call("fabs", x, w)
    if op == "round":
        return e.call("rint", x, w)
    if op == "neg":
        return b.fneg(x)
    if op == "sign":
        zero, one = (e.number(v, "f32", w) for v in (0.0, 1.0))
        below = b.select(b.fcmp_ordered("<", x, zero), b.fneg(one), x)
        return b.select(b.fcmp_ordered(">", x, zero), one, below)
    raise Refused(op)


def _cast(e: Emitter, x: Any, source: str, to: str, w: int) -> Any:
    b = e.b
    if HELD[source] == HELD[to]:
        return x
    if to == "f32":
        kind = e.kind("f32", w)
        return b.uitofp(x, kind) if source == "bool" else b.sitofp(x, kind)
    if to == "bool":
        zero = e.number(0, source, w)
        different = b.fcmp_unordered if source == "f32" else b.icmp_signed
        return different("!=", x, zero)
    if source == "bool":
        return b.zext(x, e.kind("i64", w))
    return b.fptosi(x, e.kind("i64", w))


_FUNCTIONS: dict[str, Callable[[Emitter, Any, int], Any]] = {
    "exp": exp, "log": log, "log1p": log1p, "expm1": expm1, "tanh": tanh, "sigmoid": sigmoid,
    "erf": erf,
}  # fmt: skip
