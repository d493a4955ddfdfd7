"""LLVM IR, written with a few words: loops, vectors of any width, and the functions of arithmetic.

A width of 1 is a scalar. Polynomials are those of Cephes (S. Moshier) unless said otherwise; they
agree with libm within a few units in the last place, and NaN goes through all of them.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir

from kitestring.devices.fit.compiled.views import Refused, View, blocks

F32, I64, I32, I8, I1 = ir.FloatType(), ir.IntType(64), ir.IntType(32), ir.IntType(8), ir.IntType(1)
BYTES = I8.as_pointer()
STORED = {"f32": F32, "i64": I64, "i32": I32, "u8": I8, "bool": I8}
HELD = {"f32": F32, "i64": I64, "i32": I64, "u8": I64, "bool": I1}  # once loaded
FLAGS = ("contract", "nsz")  # products and sums may be fused; NaN and infinity stay what they are
WIDTH = 16  # floats in a vector; LLVM splits it where the processor's are shorter


def i64(value: int) -> Any:
    return ir.Constant(I64, value)


def f32(value: float) -> Any:
    return ir.Constant(F32, struct.unpack("f", struct.pack("f", value))[0])


class _Builder(ir.IRBuilder):  # type: ignore[misc]
    """llvmlite's own, but that sums and products of known numbers are known: most of the text
    that LLVM would have to read is arithmetic on addresses."""

    def add(self, a: Any, b: Any, name: str = "", flags: Any = ()) -> Any:
        if a.type == I64:
            known = [isinstance(v, ir.Constant) for v in (a, b)]
            if all(known):
                return i64(a.constant + b.constant)
            if known[0] and a.constant == 0:
                return b
            if known[1] and b.constant == 0:
                return a
        return super().add(a, b, name, flags)

    def mul(self, a: Any, b: Any, name: str = "", flags: Any = ()) -> Any:
        if a.type == I64:
            known = [isinstance(v, ir.Constant) for v in (a, b)]
            if all(known) and abs(a.constant * b.constant) < 2**62:
                return i64(a.constant * b.constant)
            for k, v, other in ((known[0], a, b), (known[1], b, a)):
                if k and v.constant in (0, 1):
                    return other if v.constant else v
        return super().mul(a, b, name, flags)


class Emitter:
    """Writes into one LLVM function with `b`."""

    def __init__(self, function: Any) -> None:
        self.function, self.module = function, function.module
        self.entry = function.append_basic_block("entry")
        self.b = _Builder(function.append_basic_block("body"))

    def done(self) -> None:
        self.b.ret_void()
        ir.IRBuilder(self.entry).branch(self.function.basic_blocks[1])

    # Control

    @contextmanager
    def loop(self, stop: Any, start: Any = None, step: int = 1) -> Iterator[Any]:
        """i = start, start + step, ... below stop. Numbers known to give one turn give no loop."""
        start = i64(0) if start is None else start
        if isinstance(stop, int):
            if isinstance(start, ir.Constant):
                assert start.constant < stop, "a loop of no turns"
                if start.constant + step >= stop:
                    yield start
                    return
            stop = i64(stop)
        b, before = self.b, self.b.block
        head, body = b.append_basic_block("head"), b.append_basic_block("turn")
        end = b.append_basic_block("end")
        b.branch(head)
        b.position_at_end(head)
        i = b.phi(I64)
        i.add_incoming(start, before)
        b.cbranch(b.icmp_signed("<", i, stop), body, end)
        b.position_at_end(body)
        yield i
        i.add_incoming(b.add(i, i64(step)), b.block)
        b.branch(head)
        b.position_at_end(end)

    def vectors(self, count: int, body: Callable[[Any, int], None], again: bool = False) -> None:
        """`body(i, width)` over `count` elements: whole vectors in a loop, then what is left. With
        `again` that is one more vector, which computes some elements twice."""
        if count >= WIDTH:
            with self.loop(count - count % WIDTH, step=WIDTH) as i:
                body(i, WIDTH)
            if again and count % WIDTH:
                return body(i64(count - WIDTH), WIDTH)
        for start, width in blocks(count, WIDTH):
            body(i64(start), width)
        return None

    def variable(self, kind: Any, value: Any = None) -> Any:
        """A place that LLVM turns into a register."""
        place = ir.IRBuilder(self.entry).alloca(kind)
        if value is not None:
            self.b.store(value, place)
        return place

    # Memory: addresses are pointers to bytes and a count of elements

    def pointer(self, base: Any, dtype: str, index: Any) -> Any:
        typed = self.b.bitcast(base, STORED[dtype].as_pointer())
        return self.b.gep(typed, [index])

    def load(self, base: Any, dtype: str, index: Any, width: int = 1) -> Any:
        place = self.pointer(base, dtype, index)
        kind = STORED[dtype]
        if width > 1:
            place = self.b.bitcast(place, ir.VectorType(kind, width).as_pointer())
        value = self.b.load(place)
        value.align = {"f32": 4, "i64": 8, "i32": 4}.get(dtype, 1)
        return self._held(value, dtype, width)

    def _held(self, value: Any, dtype: str, width: int) -> Any:
        if dtype == "i32":
            return self.b.sext(value, self.kind("i64", width))
        if dtype == "u8":
            return self.b.zext(value, self.kind("i64", width))
        if dtype == "bool":
            zero = ir.Constant(value.type, [0] * width if width > 1 else 0)
            return self.b.icmp_signed("!=", value, zero)
        return value

    def some(self, base: Any, index: Any, count: int) -> Any:
        """A vector of the first `count` floats from `index`, and zeros."""
        if count == WIDTH:
            return self.load(base, "f32", index, WIDTH)
        whole = self.number(0.0, "f32", WIDTH)
        for start, width in blocks(count, WIDTH):
            part = self.load(base, "f32", self.b.add(index, i64(start)), width)
            for lane in range(width):
                one = self.lane(part, lane, width)
                whole = self.b.insert_element(whole, one, ir.Constant(I32, start + lane))
        return whole

    def store(self, value: Any, base: Any, dtype: str, index: Any, width: int = 1) -> None:
        place = self.pointer(base, dtype, index)
        kind = STORED[dtype] if width == 1 else ir.VectorType(STORED[dtype], width)
        if dtype == "bool":
            value = self.b.zext(value, kind)
        elif dtype in ("u8", "i32"):
            value = self.b.trunc(value, kind)
        if width > 1:
            place = self.b.bitcast(place, kind.as_pointer())
        self.b.store(value, place).align = {"f32": 4, "i64": 8, "i32": 4}.get(dtype, 1)

    def copy(self, to: Any, source: Any, count: int, dtype: str = "f32") -> None:
        """`count` elements that lie end to end."""

        def turn(i: Any, w: int) -> None:
            self.store(self.load(source, dtype, i, w), to, dtype, i, w)

        self.vectors(count, turn, again=True)

    def clear(self, to: Any, count: int) -> None:
        """Zeros for `count` floats."""
        self.vectors(count, lambda i, w: self.store(self.number(0.0, "f32", w), to, "f32", i, w))

    def grow(self, to: Any, more: Any, count: int) -> None:
        """`count` floats grow by others."""

        def turn(i: Any, w: int) -> None:
            old, new = (self.load(base, "f32", i, w) for base in (to, more))
            self.store(self.fold("sum", old, new, w), to, "f32", i, w)

        self.vectors(count, turn)

    # Vectors

    def kind(self, dtype: str, width: int) -> Any:
        return HELD[dtype] if width == 1 else ir.VectorType(HELD[dtype], width)

    def splat(self, scalar: Any, width: int) -> Any:
        if width == 1:
            return scalar
        kind = ir.VectorType(scalar.type, width)
        if isinstance(scalar, ir.Constant):
            return ir.Constant(kind, [scalar.constant] * width)
        one = self.b.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.Constant(I32, 0))
        zeros = ir.Constant(ir.VectorType(I32, width), [0] * width)
        return self.b.shuffle_vector(one, ir.Constant(kind, ir.Undefined), zeros)

    def number(self, value: float, dtype: str, width: int) -> Any:
        if dtype == "f32":
            return self.splat(f32(float(value)), width)
        return self.splat(ir.Constant(HELD[dtype], int(value)), width)

    def lanes(self, values: Sequence[Any]) -> Any:
        if len(values) == 1:
            return values[0]
        out = ir.Constant(ir.VectorType(values[0].type, len(values)), ir.Undefined)
        for lane, value in enumerate(values):
            out = self.b.insert_element(out, value, ir.Constant(I32, lane))
        return out

    def lane(self, vector: Any, lane: int, width: int) -> Any:
        return vector if width == 1 else self.b.extract_element(vector, ir.Constant(I32, lane))

    def across(self, op: str, vector: Any, width: int) -> Any:
        """One number of all lanes: "sum", "amax", "amin" or "prod"."""
        while width > 1:
            half = width // 2
            low = self._part(vector, 0, half)
            vector = self.fold(op, low, self._part(vector, half, half), half)
            width = half
        return vector

    def _part(self, vector: Any, start: int, width: int) -> Any:
        if width == 1:
            return self.b.extract_element(vector, ir.Constant(I32, start))
        mask = ir.Constant(ir.VectorType(I32, width), list(range(start, start + width)))
        return self.b.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), mask)

    def fold(self, op: str, a: Any, b: Any, width: int) -> Any:
        floats = a.type in (F32, ir.VectorType(F32, width))
        if op == "sum":
            return self.b.fadd(a, b, flags=FLAGS) if floats else self.b.add(a, b)
        if op == "prod":
            return self.b.fmul(a, b, flags=FLAGS) if floats else self.b.mul(a, b)
        return self.extreme(op, a, b, floats)

    def extreme(self, op: str, a: Any, b: Any, floats: bool = True) -> Any:
        """The larger ("amax") or smaller, NaN if either is."""
        sign = ">" if op == "amax" else "<"
        if not floats:
            return self.b.select(self.b.icmp_signed(sign, a, b), a, b)
        chosen = self.b.select(self.b.fcmp_ordered(sign, a, b), a, b)
        return self.b.select(self.b.fcmp_unordered("uno", a, a), a, chosen)

    def read(self, base: Any, view: View, index: Sequence[Any], lane: int, width: int) -> Any:
        """`width` elements of a view from `index`, along dimension `lane`."""
        at = self.address(view, index)
        stride = view.strides[lane] if view.strides else 0
        if view.buffer is None:
            steps = ir.Constant(ir.VectorType(I64, width), [stride * k for k in range(width)])
            return at if width == 1 else self.b.add(self.splat(at, width), steps)
        return self.along(base, view.dtype, at, stride, width)

    def along(self, base: Any, dtype: str, at: Any, stride: int, width: int) -> Any:
        """`width` elements from `at`, each `stride` after the last."""
        if width == 1 or stride == 0:
            return self.splat(self.load(base, dtype, at), width)
        if stride == 1:
            return self.load(base, dtype, at, width)
        apart = [self.b.add(at, i64(stride * k)) for k in range(width)]
        return self.lanes([self.load(base, dtype, a) for a in apart])

    def write(
        self, value: Any, base: Any, view: View, index: Sequence[Any], lane: int, width: int
    ) -> None:
        at = self.address(view, index)
        stride = view.strides[lane] if view.strides else 0
        self.spread(value, base, view.dtype, at, stride, width)

    def spread(self, value: Any, base: Any, dtype: str, at: Any, stride: int, width: int) -> None:
        """The reverse of `along`."""
        if width == 1 or stride == 1:
            return self.store(value, base, dtype, at, width)
        for k in range(width):
            place = self.b.add(at, i64(stride * k))
            self.store(self.lane(value, k, width), base, dtype, place)
        return None

    def address(self, view: View, index: Sequence[Any]) -> Any:
        at = i64(view.offset)
        for i, stride in zip(index, view.strides, strict=True):
            if stride:
                at = self.b.add(at, self.b.mul(i, i64(stride)))
        return at

    # Arithmetic on floats, at any width

    def _numbers(self, width: int) -> Callable[[float], Any]:
        return lambda value: self.number(value, "f32", width)

    def _poly(self, x: Any, width: int, *coefficients: float) -> Any:
        total = self.number(coefficients[0], "f32", width)
        for c in coefficients[1:]:
            total = self.fma(total, x, self.number(c, "f32", width))
        return total

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        return self.b.fadd(self.b.fmul(a, b, flags=FLAGS), c, flags=FLAGS)

    def call(self, name: str, x: Any, width: int) -> Any:
        """An LLVM intrinsic of one float."""
        kind = self.kind("f32", width)
        suffix = "f32" if width == 1 else f"v{width}f32"
        full = f"llvm.{name}.{suffix}"
        known = self.module.globals.get(full)
        f = known or ir.Function(self.module, ir.FunctionType(kind, [kind]), full)
        return self.b.call(f, [x])

    def exp(self, x: Any, w: int) -> Any:
        b, n = self.b, self._numbers(w)
        kept = self.extreme("amin", self.extreme("amax", x, n(-103.0)), n(88.7228))
        k = self.call("floor", self.fma(kept, n(1.44269504088896341), n(0.5)), w)
        r = self.fma(k, n(-0.693359375), kept)
        r = self.fma(k, n(2.12194440e-4), r)
        p = self._poly(
            r, w, 1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2,
            1.6666665459e-1, 5.0000001201e-1,
        )  # fmt: skip
        y = b.fadd(self.fma(b.fmul(r, r), p, r), n(1.0))
        sure = b.select(b.fcmp_unordered("uno", k, k), n(0.0), k)  # NaN has no whole number
        whole = b.fptosi(sure, I32 if w == 1 else ir.VectorType(I32, w))
        half = b.ashr(whole, self._ints(1, w))  # in two steps, so that the ends do not overflow
        y = b.fmul(b.fmul(y, self._power(half, w)), self._power(b.sub(whole, half), w))
        over = b.fcmp_ordered(">", x, n(88.7228))
        return b.select(over, n(float("inf")), b.select(b.fcmp_ordered("<", x, n(-103)), n(0), y))

    def _ints(self, value: int, w: int) -> Any:
        return self.splat(ir.Constant(I32, value), w)

    def _power(self, k: Any, w: int) -> Any:
        bits = self.b.shl(self.b.add(k, self._ints(127, w)), self._ints(23, w))
        return self.b.bitcast(bits, self.kind("f32", w))

    def log(self, x: Any, w: int) -> Any:
        b, n = self.b, self._numbers(w)
        ints = I32 if w == 1 else ir.VectorType(I32, w)
        tiny = b.fcmp_ordered("<", x, n(1.17549435e-38))
        scaled = b.select(tiny, b.fmul(x, n(8388608.0)), x)
        bits = b.bitcast(scaled, ints)
        k = b.sub(b.ashr(bits, self._ints(23, w)), self._ints(126, w))
        part = b.or_(b.and_(bits, self._ints(0x007FFFFF, w)), self._ints(0x3F000000, w))
        m = b.bitcast(part, self.kind("f32", w))
        e = b.fsub(b.sitofp(k, self.kind("f32", w)), b.select(tiny, n(23.0), n(0.0)))
        low = b.fcmp_ordered("<", m, n(0.707106781186547524))
        e = b.select(low, b.fsub(e, n(1.0)), e)
        f = b.fsub(b.select(low, b.fadd(m, m), m), n(1.0))
        z = b.fmul(f, f)
        p = self._poly(
            f, w, 7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1,
            1.4249322787e-1, -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1,
        )  # fmt: skip
        y = b.fmul(b.fmul(f, z), p)
        y = self.fma(e, n(-2.12194440e-4), y)
        y = self.fma(z, n(-0.5), y)
        y = self.fma(e, n(0.693359375), b.fadd(f, y))
        y = b.select(b.fcmp_unordered("==", x, n(float("inf"))), x, y)  # infinity and NaN
        y = b.select(b.fcmp_ordered("==", x, n(0.0)), n(float("-inf")), y)
        return b.select(b.fcmp_ordered("<", x, n(0.0)), n(float("nan")), y)

    def log1p(self, x: Any, w: int) -> Any:
        """log u x / (u - 1) with u = 1 + x: what rounding took from u is given back (Kahan)."""
        b, one = self.b, self.number(1.0, "f32", w)
        u = b.fadd(x, one)
        flat = b.fcmp_ordered("==", u, one)
        under = b.select(flat, one, b.fsub(u, one))
        y = b.select(flat, x, b.fdiv(b.fmul(self.log(u, w), x), under))
        return b.select(b.fcmp_ordered("==", x, self.number(float("inf"), "f32", w)), x, y)

    def expm1(self, x: Any, w: int) -> Any:
        """x + x^2/2 + ... near 0, exp x - 1 elsewhere."""
        b = self.b
        near = self._poly(
            x, w, 1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2,
            1.6666665459e-1, 5.0000001201e-1,
        )  # fmt: skip
        near = self.fma(b.fmul(x, x), near, x)
        far = b.fsub(self.exp(x, w), self.number(1.0, "f32", w))
        small = b.fcmp_ordered("<", self.call("fabs", x, w), self.number(0.34, "f32", w))
        return b.select(small, near, far)

    def tanh(self, x: Any, w: int) -> Any:
        b, n = self.b, self._numbers(w)
        size = self.call("fabs", x, w)
        z = b.fmul(x, x)
        p = self._poly(
            z, w, -5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1,
            -3.33332819422e-1,
        )  # fmt: skip
        near = self.fma(b.fmul(z, p), x, x)
        e = self.exp(b.fadd(size, size), w)
        far = b.fsub(n(1.0), b.fdiv(n(2.0), b.fadd(e, n(1.0))))
        far = b.select(b.fcmp_ordered("<", x, n(0.0)), b.fneg(far), far)
        return b.select(b.fcmp_ordered("<", size, n(0.625)), near, far)

    def sigmoid(self, x: Any, w: int) -> Any:
        one = self.number(1.0, "f32", w)
        return self.b.fdiv(one, self.b.fadd(one, self.exp(self.b.fneg(x), w)))

    def erf(self, x: Any, w: int) -> Any:
        """A rational approximation on [-4, 4], that of Eigen's generic erf."""
        b, n = self.b, self._numbers(w)
        kept = self.extreme("amin", self.extreme("amax", x, n(-4.0)), n(4.0))
        z = b.fmul(kept, kept)
        over = self._poly(
            z, w, -2.72614225801306e-10, 2.77068142495902e-08, -2.10102402082508e-06,
            -5.69250639462346e-05, -7.34990630326855e-04, -2.95459980854025e-03,
            -1.60960333262415e-02,
        )  # fmt: skip
        under = self._poly(
            z, w, -1.45660718464996e-05, -2.13374055278905e-04, -1.68282697438203e-03,
            -7.37332916720468e-03, -1.42647390514189e-02,
        )  # fmt: skip
        return b.fdiv(b.fmul(kept, over), under)

    # Operations of `views.Expr`

    def apply(self, op: str, args: Sequence[Any], dtype: str, source: str, w: int) -> Any:
        """One operation on held values; `source` is the dtype of the arguments."""
        b = self.b
        if op == "cast":
            return self._cast(args[0], source, dtype, w)
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
            return self.extreme(op, args[0], args[1], dtype == "f32")
        if dtype == "f32":
            return self._float(op, args, w)
        if op == "neg":
            return b.neg(args[0])
        found = {"add": b.add, "sub": b.sub, "mul": b.mul}.get(op)
        if found is None:
            raise Refused(f"{op} of whole numbers")
        return found(*args)

    def _float(self, op: str, args: Sequence[Any], w: int) -> Any:
        b, x = self.b, args[0]
        two = {"add": b.fadd, "sub": b.fsub, "mul": b.fmul, "div": b.fdiv}
        if op in two:
            return two[op](x, args[1], flags=FLAGS)
        if op in ("exp", "log", "log1p", "expm1", "tanh", "sigmoid", "erf"):
            return getattr(self, op)(x, w)
        if op in ("sqrt", "floor", "ceil", "trunc"):
            return self.call(op, x, w)
        if op == "abs":
            return self.call("fabs", x, w)
        if op == "round":
            return self.call("rint", x, w)
        if op == "neg":
            return b.fneg(x)
        if op == "sign":
            zero, one = (self.number(v, "f32", w) for v in (0.0, 1.0))
            below = b.select(b.fcmp_ordered("<", x, zero), b.fneg(one), x)
            return b.select(b.fcmp_ordered(">", x, zero), one, below)
        raise Refused(op)

    def _cast(self, x: Any, source: str, to: str, w: int) -> Any:
        b = self.b
        if HELD[source] == HELD[to]:
            return x
        if to == "f32":
            kind = self.kind("f32", w)
            return b.uitofp(x, kind) if source == "bool" else b.sitofp(x, kind)
        if to == "bool":
            zero = self.number(0, source, w)
            different = b.fcmp_unordered if source == "f32" else b.icmp_signed
            return different("!=", x, zero)
        if source == "bool":
            return b.zext(x, self.kind("i64", w))
        return b.fptosi(x, self.kind("i64", w))
