"""Limits in words: "1MB/day, 50ms, no data up"."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from kitestring import units
from kitestring.core import KINDS
from kitestring.errors import SettingError

EXAMPLES = "1MB/day, 200kB/day up, 50ms, $0.01/day, 5J/day, no data up, no features, 10% cloud"
Way = Literal["up", "down", "both"]
What = Literal["bytes", "latency", "dollars", "joules", "crossing", "cloud"]

# Mb and kb are bits to some readers and bytes to others, so Mb is refused.
_SIZES = {"B": 1.0, "kB": 1e3, "KB": 1e3, "kb": 1e3, "MB": 1e6, "mb": 1e6, "GB": 1e9, "gb": 1e9}
_TIMES = {"ms": 1e-3, "s": 1.0}
_JOULES = {"mJ": 1e-3, "J": 1.0, "kJ": 1e3}
_NUMBER = r"(\d+(?:\.\d+)?|\.\d+)"
_DAY = r"\s*(?:/|per|a)\s*day"
_PATTERNS = {
    "bytes": re.compile(rf"{_NUMBER}\s*([A-Za-z]+)(?:\s+(up|down))?{_DAY}(?:\s+(up|down))?"),
    "latency": re.compile(rf"{_NUMBER}\s*(ms|s)"),
    "dollars": re.compile(rf"\$\s*{_NUMBER}{_DAY}"),
    "joules": re.compile(rf"{_NUMBER}\s*(mJ|J|kJ){_DAY}"),
    "crossing": re.compile(r"no\s+([a-z]+)(?:\s+(up|down))?"),
    "cloud": re.compile(rf"{_NUMBER}\s*%\s*cloud"),
}


@dataclass(frozen=True)
class Limit:
    """One limit: the most that is allowed, in bytes, dollars or joules per device and day,
    seconds (p95) or a share of the requests."""

    text: str  # as it was written
    what: What
    most: float
    way: Way = "both"
    compartment: str = ""  # of "no data up"


@dataclass(frozen=True)
class Limits:
    """All of which must hold."""

    each: tuple[Limit, ...] = ()

    def __str__(self) -> str:
        return ", ".join(limit.text for limit in self.each)


def parse_limits(text: str) -> Limits:
    """Limits as in `EXAMPLES`, separated by commas; bytes count both ways unless one is named."""
    pieces = [" ".join(piece.split()) for piece in text.split(",")]
    return Limits(tuple(_limit(piece) for piece in pieces if piece))


def says(limit: Limit, value: float) -> str:
    """A value in the limit's unit: "3.4 MB/day up", "81 ms p95"."""
    way = "" if limit.way == "both" else f" {limit.way}"
    if limit.what == "bytes":
        return f"{units.size(value)}/day{way}"
    if limit.what == "latency":
        return f"{units.duration(value)} p95"
    if limit.what == "dollars":
        return f"{units.money(value)}/day"
    if limit.what == "joules":
        return f"up to {units.energy(value)}/day"
    if limit.what == "cloud":
        return f"{units.share(value)} of the requests to the cloud"
    return f"{units.size(value)}/day of {limit.compartment}{way}"


def _limit(piece: str) -> Limit:
    found = {what: match for what, p in _PATTERNS.items() if (match := p.fullmatch(piece))}
    if match := found.get("latency"):
        return Limit(piece, "latency", float(match[1]) * _TIMES[match[2]])
    if match := found.get("dollars"):
        return Limit(piece, "dollars", float(match[1]))
    if match := found.get("joules"):
        return Limit(piece, "joules", float(match[1]) * _JOULES[match[2]])
    if (match := found.get("cloud")) and float(match[1]) <= 100:
        return Limit(piece, "cloud", float(match[1]) / 100)
    if (match := found.get("crossing")) and match[1] in KINDS:
        return Limit(piece, "crossing", 0.0, _way(match[2]), match[1])
    if (match := found.get("bytes")) and match[2] in _SIZES and not (match[3] and match[4]):
        return Limit(piece, "bytes", float(match[1]) * _SIZES[match[2]], _way(match[3] or match[4]))
    mend = f"Limits are separated by commas, such as: {EXAMPLES}"
    if re.search(r"\d\s*[MGK]b\b", piece):
        mend = "Bits or bytes? Write MB for bytes"
    elif match and match[2] in _SIZES:
        mend = "Name one way, up or down, or none for both together"
    elif re.fullmatch(rf"{_NUMBER}\s*({'|'.join(_SIZES)}|mJ|J|kJ)", piece):
        mend = f"Per what? Write {piece}/day: the limit is per device and day"
    raise SettingError(f"cannot read the limit {piece!r}", "limits", mend)


def _way(word: str | None) -> Way:
    return "up" if word == "up" else "down" if word == "down" else "both"
