"""The numbers of `kitestring.dice`, as native code: SplitMix64."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from kitestring.devices.fit.compiled.emit import I64, Emitter, i64

_STEP, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def unsigned(value: int) -> Any:
    """64 bits without a sign, as a constant."""
    return ir.Constant(I64, _signed(value))


def mix(e: Emitter, x: Any, width: int = 1) -> Any:
    b = e.b

    def shifted(x: Any, by: int) -> Any:
        return b.xor(x, b.lshr(x, e.splat(i64(by), width)))

    x = b.add(x, e.splat(unsigned(_STEP), width))
    x = b.mul(shifted(x, 30), e.splat(unsigned(_FIRST), width))
    x = b.mul(shifted(x, 27), e.splat(unsigned(_SECOND), width))
    return shifted(x, 31)


def bits(e: Emitter, key: Any, i: Any, width: int = 1) -> Any:
    """2^24 times the numbers i, i + 1, ... that `uniform` makes of a key."""
    b = e.b
    at = e.splat(b.add(key, b.mul(b.add(i, i64(1)), unsigned(_STEP))), width)
    if width > 1:
        steps = [_signed(k * _STEP) for k in range(width)]
        at = b.add(at, ir.Constant(ir.VectorType(I64, width), steps))
    return b.lshr(mix(e, at, width), e.splat(i64(40), width))


def _signed(value: int) -> int:
    value %= 2**64
    return value - 2**64 if value >= 2**63 else value
