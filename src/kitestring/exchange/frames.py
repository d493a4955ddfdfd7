"""Frames on a pipe: a JSON header, and packed parts behind it."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

Parts: TypeAlias = Sequence[bytes]
Header: TypeAlias = dict[str, Any]


def frame(header: Header, parts: Parts) -> bytes:
    head = json.dumps({**header, "parts": [len(p) for p in parts]}).encode()
    return b"".join([struct.pack("<I", len(head)), head, *parts])


def parse(read: Callable[[int], bytes]) -> tuple[Header, list[bytes]]:
    """`read(n)` gives exactly n bytes or raises."""
    (length,) = struct.unpack("<I", read(4))
    header: Header = json.loads(read(length))
    return header, [read(n) for n in header.pop("parts")]
