"""Where buffers lie in a device's memory: some throughout, the others only while they are used."""

from __future__ import annotations

from collections.abc import Sequence

from kitestring.devices.fit.compiled.kernels import Kernel
from kitestring.devices.fit.compiled.views import SIZES, Buffer

_LINE = 64  # bytes of a cache line, and of the widest vector
_SLACK = 64  # that vectors may reach past an end


def place(fixed: Sequence[Buffer], kernels: Sequence[Kernel]) -> int:
    """Give every buffer its `at`; returns the bytes needed. Buffers that are never alive at the
    same kernel may share memory."""
    at = 0
    every = dict.fromkeys(b for k in kernels for b in k.buffers)
    for buffer in [*fixed, *(b for b in every if b.fixed and b not in set(fixed))]:
        buffer.at = at
        at += _room(buffer)
    used: dict[Buffer, list[int]] = {}
    for time, kernel in enumerate(kernels):
        for buffer in kernel.buffers:
            if buffer.at < 0:
                used.setdefault(buffer, []).append(time)
    top = at
    placed: list[tuple[Buffer, int]] = []
    for buffer, times in sorted(used.items(), key=lambda p: p[1][0]):
        first, last = times[0], times[-1]
        busy = sorted((b.at, b.at + _room(b)) for b, end in placed if end >= first)
        spot = at
        for low, high in busy:
            if low - spot >= _room(buffer):
                break
            spot = max(spot, high)
        buffer.at = spot
        placed = [(b, end) for b, end in placed if end >= first]
        placed.append((buffer, last))
        top = max(top, spot + _room(buffer))
    return top + _LINE


def _room(buffer: Buffer) -> int:
    return -(-(buffer.size * SIZES[buffer.dtype] + _SLACK) // _LINE) * _LINE
