"""Seeded dice: every random number is a function of seed, device, exchange, tag and position.

So a result depends neither on how devices are chunked nor on which of them ran before. The mixing
function is SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators").
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

CLOUD = 2**40
"""The cloud's own id, beyond every device's."""
_STEP = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: Any) -> Any:
    with np.errstate(over="ignore"):
        x = x + _STEP
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def keys(seed: int, ids: Any, serial: int, tag: str) -> Any:
    """One 64-bit key for each of `ids` [D]."""
    word = np.uint64(int.from_bytes(hashlib.blake2b(tag.encode(), digest_size=8).digest(), "big"))
    key = _mix(np.full(len(ids), seed, np.uint64))
    key = _mix(key ^ np.asarray(ids, np.uint64))
    key = _mix(key ^ np.uint64(serial))
    return _mix(key ^ word)


def uniform(key: Any, n: int) -> Any:
    """Numbers in [0, 1), float32 [D, n], from keys [D]."""
    with np.errstate(over="ignore"):
        bits = _mix(key[:, None] + np.arange(1, n + 1, dtype=np.uint64)[None] * _STEP)
    return (bits >> np.uint64(40)).astype(np.float32) / np.float32(2**24)
