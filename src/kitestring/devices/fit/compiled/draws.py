"""What a dropout keeps, drawn as torch's own generator draws it on the CPU.

Matsumoto and Nishimura: "Mersenne twister: a 623-dimensionally equidistributed uniform
pseudo-random number generator", ACM TOMACS 8(1), 1998. torch takes two of its words for a number
of 53 bits, and keeps an element where that lies below the chance.
"""

from __future__ import annotations

from math import ceil, prod
from typing import Any

from llvmlite import ir

from kitestring.devices.fit.compiled.emit import I32, I64, WIDTH, Emitter, i64
from kitestring.devices.fit.compiled.kernels import Kernel, Pointers
from kitestring.devices.fit.compiled.views import Buffer, View

_WORDS, _AHEAD = 624, 397
_PAIRS = _WORDS // 2


class Dice:
    """A generator's memory: its words, the numbers made of them, and how many are used."""

    def __init__(self) -> None:
        self.words = Buffer("words", "i32", _WORDS, fixed=True)
        self.numbers = Buffer("numbers", "i64", _PAIRS, fixed=True)
        self.used = Buffer("used", "i64", 1, fixed=True)

    @property
    def buffers(self) -> tuple[Buffer, ...]:
        return self.words, self.numbers, self.used

    def twist(self) -> Kernel:
        """The next 624 words, and the 312 numbers of 53 bits that they give."""
        return Kernel(("twist",), self.buffers, self._twist)

    def _twist(self, e: Emitter, at: Pointers) -> None:
        words, numbers = at[self.words], at[self.numbers]
        near, end = _WORDS - _AHEAD, _WORDS - 1
        for first, last, other in ((0, near, _AHEAD), (near, end, -near), (end, _WORDS, -near)):
            count, start = last - first, first

            def turn(i: Any, w: int, start: int = start, other: int = other) -> None:
                here = e.b.add(i, i64(start))
                after = e.b.add(here, i64(1)) if start < end else i64(0)
                mixed = _mixed(e, _load(e, words, here, w), _load(e, words, after, w), w)
                far = _load(e, words, e.b.add(here, i64(other)), w)
                _store(e, e.b.xor(far, mixed), words, here, w)

            e.vectors(count, turn)

        def number(i: Any, w: int) -> None:
            pairs = _tempered(e, _load(e, words, e.b.mul(i, i64(2)), 2 * w), 2 * w)
            wide = ir.VectorType(I64, w) if w > 1 else I64
            high, low = (e.b.zext(_every_other(e, pairs, k, w), wide) for k in (0, 1))
            high = e.b.and_(high, e.splat(i64(2**21 - 1), w))
            value = e.b.or_(e.b.shl(high, e.splat(i64(32), w)), low)
            e.store(value, numbers, "i64", i, w)

        e.vectors(_PAIRS, number)
        e.store(i64(0), at[self.used], "i64", i64(0))

    def seed(self, e: Emitter, memory: Any, key: Any) -> None:
        """As `torch.manual_seed(key >> 1)`."""
        b = e.b
        words, used = (b.gep(memory, [i64(x.at)]) for x in (self.words, self.used))
        last = e.variable(I32)
        b.store(b.trunc(b.lshr(key, i64(1)), I32), last)
        _store(e, b.load(last), words, i64(0), 1)
        with e.loop(_WORDS, start=i64(1)) as i:
            x = b.load(last)
            x = b.mul(b.xor(x, b.lshr(x, _word(30))), _word(1812433253))
            x = b.add(x, b.trunc(i, I32))
            b.store(x, last)
            _store(e, x, words, i, 1)
        e.store(i64(_PAIRS), used, "i64", i64(0))

    def draw(
        self, e: Emitter, memory: Any, view: View, chance: float, real: Any, twist: Any
    ) -> None:
        """1 with that chance, else 0, for the first `real` rows; `twist()` calls that kernel."""
        b = e.b
        assert view.buffer is not None
        used, numbers, out = (
            b.gep(memory, [i64(x.at)]) for x in (self.used, self.numbers, view.buffer)
        )
        count = b.mul(real, i64(prod(view.shape[1:])))
        below = i64(ceil(chance * 2**53))
        done = e.variable(I64, i64(0))
        with e.loop(b.add(b.sdiv(count, i64(_PAIRS)), i64(2))):  # the last turns may be empty
            empty = b.icmp_signed("==", e.load(used, "i64", i64(0)), i64(_PAIRS))
            with b.if_then(b.and_(empty, b.icmp_signed("<", b.load(done), count))):
                twist()
            first, start = e.load(used, "i64", i64(0)), b.load(done)
            there, left = b.sub(i64(_PAIRS), first), b.sub(count, start)
            run = b.select(b.icmp_signed("<", there, left), there, left)

            def turn(i: Any, w: int, first: Any = first, start: Any = start) -> None:
                number = e.load(numbers, "i64", b.add(first, i), w)
                kept = b.icmp_signed("<", number, e.splat(below, w))
                one, zero = (e.number(v, "f32", w) for v in (1.0, 0.0))
                e.store(b.select(kept, one, zero), out, "f32", b.add(start, i), w)

            whole = b.and_(run, i64(-WIDTH))
            with e.loop(whole, step=WIDTH) as i:
                turn(i, WIDTH)
            with e.loop(run, start=whole) as i:
                turn(i, 1)
            e.store(b.add(first, run), used, "i64", i64(0))
            b.store(b.add(start, run), done)


def _word(value: int, width: int = 1) -> Any:
    signed = value - 2**32 if value >= 2**31 else value
    return ir.Constant(I32, signed) if width == 1 else ir.Constant(
        ir.VectorType(I32, width), [signed] * width
    )  # fmt: skip


def _mixed(e: Emitter, here: Any, after: Any, w: int) -> Any:
    """The recurrence: one word's top bit and the next one's others, times the matrix."""
    b = e.b
    y = b.or_(b.and_(here, _word(0x80000000, w)), b.and_(after, _word(0x7FFFFFFF, w)))
    odd = b.sub(_word(0, w), b.and_(y, _word(1, w)))
    return b.xor(b.lshr(y, _word(1, w)), b.and_(odd, _word(0x9908B0DF, w)))


def _tempered(e: Emitter, y: Any, w: int) -> Any:
    b = e.b
    y = b.xor(y, b.lshr(y, _word(11, w)))
    y = b.xor(y, b.and_(b.shl(y, _word(7, w)), _word(0x9D2C5680, w)))
    y = b.xor(y, b.and_(b.shl(y, _word(15, w)), _word(0xEFC60000, w)))
    return b.xor(y, b.lshr(y, _word(18, w)))


def _every_other(e: Emitter, pairs: Any, first: int, w: int) -> Any:
    if w == 1:
        return e.b.extract_element(pairs, ir.Constant(I32, first))
    mask = ir.Constant(ir.VectorType(I32, w), [2 * k + first for k in range(w)])
    return e.b.shuffle_vector(pairs, ir.Constant(pairs.type, ir.Undefined), mask)


def _load(e: Emitter, base: Any, index: Any, w: int) -> Any:
    place = e.pointer(base, "i32", index)
    if w > 1:
        place = e.b.bitcast(place, ir.VectorType(I32, w).as_pointer())
    value = e.b.load(place)
    value.align = 4
    return value


def _store(e: Emitter, value: Any, base: Any, index: Any, w: int) -> None:
    place = e.pointer(base, "i32", index)
    if w > 1:
        place = e.b.bitcast(place, value.type.as_pointer())
    e.b.store(value, place).align = 4
