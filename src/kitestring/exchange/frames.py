"""Frames on a pipe: a JSON header, and packed parts behind it."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from kitestring.errors import BadBytes

Parts: TypeAlias = Sequence[bytes]
Header: TypeAlias = dict[str, Any]

_HEADER = 16 * 2**20  # bytes; a header has verbs and numbers, arrays are parts
_PART = 2 * 2**30


def frame(header: Header, parts: Parts) -> bytes:
    head = json.dumps({**header, "parts": [len(p) for p in parts]}).encode()
    return b"".join([struct.pack("<I", len(head)), head, *parts])


def parse(read: Callable[[int], bytes]) -> tuple[Header, list[bytes]]:
    """`read(n)` gives exactly n bytes or raises. Raises `BadBytes` for what is no frame: where the
    next one begins is not known then."""
    (length,) = struct.unpack("<I", read(4))
    if length > _HEADER:
        raise BadBytes(f"a header of {length} bytes; {_HEADER} is the most", "a frame")
    head = read(length)
    try:
        header = json.loads(head)
    except (ValueError, RecursionError) as problem:
        raise BadBytes(f"its header is not JSON ({problem})", "a frame") from None
    if not isinstance(header, dict):
        raise BadBytes("its header is not an object", "a frame")
    lengths = header.pop("parts", None)
    if not isinstance(lengths, list) or not all(
        type(n) is int and 0 <= n <= _PART for n in lengths
    ):
        raise BadBytes(f"its parts are not lengths from 0 to {_PART}", "a frame")
    return header, [read(n) for n in lengths]
