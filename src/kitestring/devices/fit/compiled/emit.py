"""LLVM IR, written with a few words: loops, memory, and vectors of any width.

A width of 1 is a scalar.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir

from kitestring.devices.fit.compiled.views import View, blocks

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
        `again` that is one more vector, which computes some elements twice. Less than a vector
        is one of its own width."""
        if count >= WIDTH:
            with self.loop(count - count % WIDTH, step=WIDTH) as i:
                body(i, WIDTH)
            if again and count % WIDTH:
                return body(i64(count - WIDTH), WIDTH)
        elif count > 1:
            return body(i64(0), count)
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

    def lanes_from(self, first: int) -> Any:
        """A mask of the lanes from `first` on."""
        return ir.Constant(ir.VectorType(I1, WIDTH), [int(k >= first) for k in range(WIDTH)])

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
        if op == "sum" and width > 1 and vector.type.element == F32:
            kind = ir.FunctionType(F32, [F32, vector.type])
            f = self._intrinsic(f"llvm.vector.reduce.fadd.v{width}f32", kind)
            return self.b.call(f, [f32(-0.0), vector], fastmath=("reassoc", "nsz"))
        while width > 1:
            half = width // 2
            low, high = self._part(vector, 0, half), self._part(vector, half, half)
            found = self.fold(op, low, high, half)
            if width % 2:
                last = self.lane(vector, width - 1, width)
                first = self.fold(op, self.lane(found, 0, half), last, 1)
                zero = ir.Constant(I32, 0)
                found = first if half == 1 else self.b.insert_element(found, first, zero)
            vector, width = found, half
        return vector

    def sums(self, vectors: Sequence[Any], width: int) -> Any:
        """A vector of the sums across so many vectors' lanes: a power of two, at most `width`.

        Two vectors' halves are added side by side, so that each step works on whole vectors."""
        parts, lanes = list(vectors), width
        while lanes > 1:
            half, some = lanes // 2, 1 if len(parts) == 1 else 2
            pairs = [(parts[k], parts[k + some - 1]) for k in range(0, len(parts), some)]
            starts = range(0, some * parts[0].type.count, lanes)
            low = [start + lane for start in starts for lane in range(half)]
            parts = [
                self.b.fadd(
                    self._lanes(v, w, low), self._lanes(v, w, [k + half for k in low]), FLAGS
                )
                for v, w in pairs
            ]
            lanes = half
        return parts[0]

    def _lanes(self, v: Any, w: Any, chosen: Sequence[int]) -> Any:
        mask = ir.Constant(ir.VectorType(I32, len(chosen)), list(chosen))
        return self.b.shuffle_vector(v, w, mask)

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

    # Arithmetic

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        return self.b.fadd(self.b.fmul(a, b, flags=FLAGS), c, flags=FLAGS)

    def call(self, name: str, x: Any, width: int) -> Any:
        """An LLVM intrinsic of one float."""
        kind = self.kind("f32", width)
        suffix = "f32" if width == 1 else f"v{width}f32"
        f = self._intrinsic(f"llvm.{name}.{suffix}", ir.FunctionType(kind, [kind]))
        return self.b.call(f, [x])

    def _intrinsic(self, name: str, kind: Any) -> Any:
        return self.module.globals.get(name) or ir.Function(self.module, kind, name)

    def numbers(self, width: int) -> Callable[[float], Any]:
        return lambda value: self.number(value, "f32", width)
