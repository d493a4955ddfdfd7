"""Seeded dice: every random number is a function of seed, device, exchange, tag and position.

So a result depends neither on how devices are chunked nor on which of them ran before. The mixing
function is SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators").
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import Any

import numpy as np

CLOUD = 2**40
"""The cloud's own id, beyond every device's."""
_BLOCK = 2**14  # numbers made at a time: what lies between stays in the cache


def _number(value: Any) -> Any:
    """64 bits as an array without axes, which numpy adds to an array sooner than its scalars."""
    return np.array(value, np.uint64)


_STEP, _FIRST, _SECOND = map(_number, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
_27, _30, _31, _40 = map(_number, (27, 30, 31, 40))


def _mix(x: Any) -> Any:
    """Of an array, which it overwrites; what is too large for 64 bits wraps around."""
    x += _STEP
    x ^= x >> _30
    x *= _FIRST
    x ^= x >> _27
    x *= _SECOND
    x ^= x >> _31
    return x


def word(tag: str) -> int:
    """The 64 bits that stand for a tag."""
    return int.from_bytes(hashlib.blake2b(tag.encode(), digest_size=8).digest(), "big")


@lru_cache
def _word(tag: str) -> Any:
    return _number(word(tag))


@lru_cache
def _seeded(seed: int) -> Any:
    return _mix(_number(seed))


def keys(seed: int, ids: Any, serial: int, tag: str) -> Any:
    """One 64-bit key for each of `ids` [D]."""
    key = _mix(np.asarray(ids, np.uint64) ^ _seeded(seed))
    key = _mix(key ^ _number(serial))
    return _mix(key ^ _word(tag))


def uniform(key: Any, n: int) -> Any:
    """Numbers in [0, 1), float32 [D, n], from keys [D]. The first ones do not depend on n."""
    if n <= _BLOCK:
        return _numbers(key, 0, n)
    blocks = [_numbers(key, at, min(n, at + _BLOCK)) for at in range(0, n, _BLOCK)]
    return np.concatenate(blocks, axis=1)


def _numbers(key: Any, start: int, stop: int) -> Any:
    at = np.arange(start + 1, stop + 1, dtype=np.uint64)
    bits = _mix(key[:, None] + at * _STEP)
    return (bits >> _40).astype(np.float32) / np.float32(2**24)


def drawn(key: Any, step: Any, place: int) -> Any:
    """Keys [D] for what a forward pass in training draws, from those [D] that its fit was given.

    `step` counts the fit's minibatches from 0, on through its epochs: one number, or an array that
    broadcasts against `key`. `place` counts the draws of the pass, from 0 in their order, below
    65536. A dropout that keeps with chance p keeps element i (in C order, whatever the strides)
    where `uniform(drawn(key, step, place), n)[d, i] < p`, compared as float32."""
    return _mix(_mix(key ^ _word("draws")) ^ _number(step << 16 | place))
