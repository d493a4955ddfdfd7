"""The order of a device's rows in an epoch, as `schedule` draws it: by 24 random bits each."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from kitestring.devices.fit.compiled.emit import I64, Emitter, i64
from kitestring.devices.fit.compiled.splitmix import bits


def shuffled(e: Emitter, order: Any, n: Any, key: Any, epoch: Any, shuffle: Any) -> None:
    """order [n] = the rows sorted by their draws, or 0, 1, 2, ... without `shuffle`.

    `order` has room for twice n and 256 counts: it is sorted by 8 bits three times, back and
    forth, each time keeping the order of equals."""
    b = e.b
    spare = e.pointer(order, "i64", n)
    counts = e.pointer(order, "i64", b.mul(n, i64(2)))
    raw = [b.bitcast(p, ir.IntType(8).as_pointer()) for p in (spare, counts)]
    spare, counts = raw
    with e.loop(n) as i:
        e.store(i, order, "i64", i)
    with b.if_then(b.icmp_signed("!=", shuffle, i64(0))):
        key = b.add(key, epoch)
        with e.loop(n) as i:  # the draw above, the row below
            draw = bits(e, key, i)
            e.store(b.or_(b.shl(draw, i64(32)), i), order, "i64", i)
        source, to = order, spare
        for shift in (32, 40, 48):
            _by_byte(e, source, to, counts, n, shift)
            source, to = to, source
        with e.loop(n) as i:
            row = b.and_(e.load(source, "i64", i), i64(0xFFFFFFFF))
            e.store(row, order, "i64", i)


def _by_byte(e: Emitter, source: Any, to: Any, counts: Any, n: Any, shift: int) -> None:
    b = e.b

    def digit(value: Any) -> Any:
        return b.and_(b.lshr(value, i64(shift)), i64(255))

    with e.loop(256) as i:
        e.store(i64(0), counts, "i64", i)
    with e.loop(n) as i:
        which = digit(e.load(source, "i64", i))
        e.store(b.add(e.load(counts, "i64", which), i64(1)), counts, "i64", which)
    total = e.variable(I64)
    b.store(i64(0), total)
    with e.loop(256) as i:
        here = e.load(counts, "i64", i)
        e.store(b.load(total), counts, "i64", i)
        b.store(b.add(b.load(total), here), total)
    with e.loop(n) as i:
        value = e.load(source, "i64", i)
        which = digit(value)
        spot = e.load(counts, "i64", which)
        e.store(value, to, "i64", spot)
        e.store(b.add(spot, i64(1)), counts, "i64", which)
