"""What a device may give a model, in words: "1MB, 5ms, 64MB memory"."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from kitestring import units
from kitestring.errors import SettingError

EXAMPLES = "1MB, 5ms, p95 8ms, 64MB memory"
What = Literal["size", "p50", "p95", "memory"]
K = TypeVar("K")

_SIZES = {**units.BYTES, "KB": 1e3, "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30}
_TIMES = {**units.SECONDS, "us": 1e-6}
_ROUNDED = 1 + 1e-9  # what is over a limit by less is as written
_PIECE = re.compile(
    r"(?:(?P<before>p50|p95|memory)\s+)?(?P<number>\d+(?:\.\d+)?|\.\d+)\s*(?P<unit>[A-Za-zµ]+)"
    r"(?:\s+(?P<after>p50|p95|memory))?"
)
_CALLED = {"size": "file", "p50": "p50", "p95": "p95", "memory": "memory"}


@dataclass(frozen=True)
class Figures:
    """What a model takes: bytes of its file, seconds of one request on the device, and bytes of
    memory at the most."""

    size: float
    p50: float
    p95: float
    memory: float


@dataclass(frozen=True)
class Limit:
    """`of` is the device whose profile says so, where the budget does not."""

    what: What
    most: float  # bytes, or seconds
    of: str = ""

    def __str__(self) -> str:
        return says(self.what, self.most) + (f" ({self.of})" if self.of else "")


@dataclass(frozen=True)
class Budget:
    """Limits, all of which must hold; one of a kind."""

    each: tuple[Limit, ...] = ()

    def __str__(self) -> str:
        return ", ".join(map(str, self.given or self.each)) or "none"

    @property
    def given(self) -> tuple[Limit, ...]:
        """Those that were asked for."""
        return tuple(x for x in self.each if not x.of)

    def share(self, figures: Figures) -> float:
        """How much of the limit that it comes nearest to a model takes: 1 is all of it."""
        return max((getattr(figures, x.what) / x.most for x in self.each), default=0.0)

    def meets(self, figures: Figures) -> bool:
        return not self.broken(figures)

    def broken(self, figures: Figures) -> list[Limit]:
        """Those of the limits that do not hold."""
        return [x for x in self.each if getattr(figures, x.what) > x.most * _ROUNDED]

    def of(self, what: What) -> float | None:
        return next((x.most for x in self.each if x.what == what), None)

    def admitting(self, figures: Figures) -> str:
        """The budget, in words that `parse` reads, with what is too tight for a model as wide as
        it has to be: rounded up to three digits."""
        broken = self.broken(figures)
        wide = [
            Limit(x.what, _up(getattr(figures, x.what))) if x in broken else x
            for x in self.each if x in broken or not x.of
        ]  # fmt: skip
        return ", ".join(_exact(x) for x in wide)


def parse(text: str) -> Budget:
    """A size alone is the file's, a time alone the median. Raises `SettingError`."""
    pieces = [" ".join(piece.split()) for piece in text.split(",")]
    each = [_limit(piece) for piece in pieces if piece]
    for x in each:
        if sum(x.what == other.what for other in each) > 1:
            what = f"two limits on {_CALLED[x.what]} in {text!r}"
            raise SettingError(what, "budget", "Give one of each kind")
    return Budget(tuple(each))


def _limit(piece: str) -> Limit:
    found = _PIECE.fullmatch(piece)
    unit, words = (found["unit"], [found["before"], found["after"]]) if found else ("", [])
    kind = next((w for w in words if w), None)
    mend = f"Limits are separated by commas, such as: {EXAMPLES}"
    if found and not all(words):
        number = float(found["number"])
        if number == 0:
            raise SettingError(f"nothing is as small as {piece!r}", "budget", mend)
        if unit in _SIZES and kind in (None, "memory"):
            return Limit("memory" if kind else "size", number * _SIZES[unit])
        if unit in _TIMES and kind != "memory":
            return Limit("p95" if kind == "p95" else "p50", number * _TIMES[unit])
    if re.search(r"\d\s*[kKMG]b\b", piece):
        mend = "Bits or bytes? Write MB for bytes"
    elif re.fullmatch(r"[\d.]+", piece):
        mend = f"Of what? Write {piece}MB or {piece}ms"
    elif "/" in piece or "$" in piece:
        mend = f"What a model takes of a device, such as: {EXAMPLES}"
    raise SettingError(f"cannot read {piece!r}", "budget", mend)


def says(what: What, value: float) -> str:
    """A figure with its unit: "1.0 MB", "5.0 ms", "64.0 MB memory"."""
    if what == "size":
        return units.size(value)
    if what == "memory":
        return f"{units.size(value)} memory"
    return units.duration(value) if what == "p50" else f"{units.duration(value)} p95"


def nearest(figures: Mapping[K, Figures], budget: Budget) -> K:
    """Whose largest overshoot is the smallest; of equals the smaller file, then the first."""
    return min(figures, key=lambda k: (budget.share(figures[k]), figures[k].size))


def front(points: Sequence[Sequence[float]]) -> list[int]:
    """The indices of the points that no other dominates, in their order. In every coordinate less
    is better; a point dominates another if it is nowhere worse and somewhere better."""
    return [i for i, p in enumerate(points) if not any(dominates(q, p) for q in points)]


def dominates(p: Iterable[float], q: Iterable[float]) -> bool:
    pairs = list(zip(p, q, strict=True))
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def _up(x: float) -> float:
    """Three digits, not below `x`."""
    step = 10.0 ** (math.floor(math.log10(x)) - 2)
    return math.ceil(x / step * (1 - 1e-12)) * step


def _exact(x: Limit) -> str:
    """As `parse` reads it: no rounding below what it was."""
    table = units.BYTES if x.what in ("size", "memory") else units.SECONDS
    unit = next((u for u in reversed(table) if x.most >= table[u]), next(iter(table)))
    number = f"{x.most / table[unit]:.6g}"
    if "e" in number or float(number) * table[unit] < x.most:
        number = f"{math.ceil(x.most / table[unit] * 1e6) / 1e6:f}".rstrip("0").rstrip(".")
    word = {"size": "", "p50": "", "p95": " p95", "memory": " memory"}[x.what]
    return f"{number}{unit}{word}"
