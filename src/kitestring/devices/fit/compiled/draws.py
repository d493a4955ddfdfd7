"""What a dropout keeps, drawn as `kitestring.dice.drawn` says: ones and zeros, made anew before
each step.
"""

from __future__ import annotations

from math import ceil, prod
from typing import Any

import numpy as np

from kitestring import dice
from kitestring.devices.fit.compiled.emit import WIDTH, Emitter, i64
from kitestring.devices.fit.compiled.splitmix import bits, mix, unsigned
from kitestring.devices.fit.compiled.views import Refused, View

Draw = tuple[View, float]  # 1 with that chance, else 0


def check(view: View, batch: int) -> None:
    """Of fewer rows than a batch has the first numbers are drawn: so rows must come first."""
    if not view.shape or view.shape[0] % batch:
        raise Refused("it draws what does not begin with the rows of a batch")


def draw(
    e: Emitter, memory: Any, what: Draw, key: Any, step: Any, place: int, real: Any, batch: int
) -> None:
    """Draw number `place` of a step, for the first `real` of the rows of a batch.

    Others may be written to as well: whole vectors are, and memory has room for that."""
    (view, chance), b = what, e.b
    assert view.buffer is not None
    out = b.gep(memory, [i64(view.buffer.at)])
    number = b.or_(b.shl(step, i64(16)), i64(place))
    key = mix(e, b.xor(mix(e, b.xor(key, unsigned(dice.word("draws")))), number))
    below = e.splat(i64(ceil(float(np.float32(chance)) * 2**24)), WIDTH)
    one, zero = (e.number(v, "f32", WIDTH) for v in (1.0, 0.0))
    with e.loop(b.mul(real, i64(prod(view.shape) // batch)), step=WIDTH) as i:
        kept = b.icmp_signed("<", bits(e, key, i, WIDTH), below)
        e.store(b.select(kept, one, zero), out, "f32", i, WIDTH)
