"""Modelled energy of one run: no joule was measured.

Arithmetic as in `devices/profiles.py`: 2.3 to 70 pJ an operation. Memory: 10 pJ for 64 bits from a
cache of 8 kB, 1.3 to 2.6 nJ from DRAM, 45 nm (Horowitz, ISSCC 2014), so 1.25 pJ a byte if
everything stays in the smallest cache, 325 pJ if everything comes from DRAM. The radio, the screen
and what the chip takes when it idles are not part of it.
"""

from __future__ import annotations

from kitestring.devices.profiles import ARITHMETIC_JOULES

MEMORY_JOULES = (10e-12 / 8, 2.6e-9 / 8)
"""Joules per byte moved, (low, high)."""


def joules(flops: float, moved: float) -> tuple[float, float]:
    """(low, high) of `flops` operations and `moved` bytes."""
    (low, high), (near, far) = ARITHMETIC_JOULES, MEMORY_JOULES
    return flops * low + moved * near, flops * high + moved * far
