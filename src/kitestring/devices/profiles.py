"""What a device is: how fast it computes and talks, how much it holds, what that costs in energy.

Four size classes are assumed, not measured: `PROFILES`. Real devices, each figure with its source,
are in `profiles.toml` beside this file; `kitestring measure --save-profile` writes a profile of the
machine it runs on; a file of one's own has the same keys (docs/profiles.md).

Energy is modelled, as a range: arithmetic at 2.3 pJ per operation (half a 32-bit float multiply
and add: 3.7 + 0.9 pJ, 45 nm, 0.9 V) up to a whole instruction of 70 pJ for each; M. Horowitz,
"Computing's energy problem (and what we can do about it)", ISSCC 2014. Radio power per throughput:
Huang et al., "A close examination of performance and power characteristics of 4G LTE networks",
MobiSys 2012, table 4 (LTE and WiFi, milliwatts per Mbit/s, which is nanojoules per bit); what the
radio takes when it idles, wakes and lingers is left out. Of both papers we read what later works
quote: docs/profiles.md says which figure was found where, and which was not.
"""

from __future__ import annotations

import hashlib
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from kitestring.errors import SettingError, unknown

ARITHMETIC_JOULES = (2.3e-12, 70e-12)
"""Joules per floating-point operation, (low, high)."""

Kind = Literal["assumed", "published", "measured", "modelled"]
KINDS: tuple[Kind, ...] = ("assumed", "published", "measured", "modelled")


@dataclass(frozen=True)
class Profile:
    """One device, or one class of devices, and its link to the cloud.

    `kind` says where `flops` comes from, `sources` where each figure does. A figure whose sources
    differ is the geometric mean of its (low, high) in `ranges`."""

    name: str
    flops: float  # floating-point operations a second that small models reach
    memory: int  # bytes that a model and its training may take
    up: float  # bytes a second
    down: float  # bytes a second
    round_trip: float  # seconds
    joules_up: float  # per byte
    joules_down: float  # per byte
    cloud_flops: float = 1e12  # operations a second that the cloud gives to one request
    kind: Kind = "assumed"
    about: str = ""
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for what in ("flops", "memory", "up", "down", "cloud_flops"):
            if getattr(self, what) <= 0:
                raise SettingError(f"{what} is {getattr(self, what)}", f"profile {self.name}")


_LTE: Any = {"joules_up": 438.39e-9 * 8, "joules_down": 51.97e-9 * 8}
_WIFI: Any = {"joules_up": 283.17e-9 * 8, "joules_down": 137.01e-9 * 8}
PROFILES = {
    p.name: p
    for p in (
        Profile("phone", 5e9, 256 * 2**20, 1.25e6, 5e6, 0.05, **_LTE),
        Profile("pc", 20e9, 2 * 2**30, 5e6, 12.5e6, 0.03, **_WIFI),
        Profile("gateway", 1e9, 64 * 2**20, 1.25e6, 2.5e6, 0.04, **_WIFI),
        Profile("microcontroller", 50e6, 512 * 2**10, 0.125e6, 0.125e6, 0.1, **_WIFI),
    )
}
"""Size classes: assumptions, which a profile of one's own devices should replace."""

FIGURES = ("flops", "memory", "up", "down", "round_trip", "joules_up", "joules_down", "cloud_flops")
LINK = ("up", "down", "round_trip", "joules_up", "joules_down")
"""What belongs to the way to the cloud, rather than to the device."""


def profile(name: str) -> Profile:
    """A size class, a device of `profiles.toml`, or the profile in a TOML file."""
    if name in PROFILES:
        return PROFILES[name]
    if is_file(name):
        return read(Path(name))
    found = published()
    if name not in found:
        raise unknown("device profile", name, [*PROFILES, *found])
    return found[name]


def is_file(name: str) -> bool:
    return name.endswith(".toml") or "/" in name


def fingerprint(name: str) -> str:
    """Of a profile that is a file, what is in it; nothing for a named one."""
    return hashlib.sha256(_text(Path(name))).hexdigest()[:16] if is_file(name) else ""


def joules(p: Profile, flops: float, bytes_up: float, bytes_down: float) -> tuple[float, float]:
    """Modelled energy (low, high) of computing and sending."""
    radio = bytes_up * p.joules_up + bytes_down * p.joules_down
    low, high = (flops * per + radio for per in ARITHMETIC_JOULES)
    return low, high


# Files of one's own


def read(path: Path) -> Profile:
    """The profile in a TOML file: its figures, or those of the size class that it is `like`.

    A figure is a number, or [low, high], of which the geometric mean is used. What does not say how
    its speed is known is assumed."""
    where = str(path)
    try:
        given = tomllib.loads(_text(path).decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingError(f"not TOML: {error}", where, _HOW) from None
    known = [f.name for f in fields(Profile) if f.name != "ranges"] + ["like"]
    for key in given:
        if key not in known:
            odd = unknown("key", key, known)
            raise SettingError(odd.what, where, odd.mend)
    like = _like(given.get("like"), where)
    sources = given.get("sources", {})
    if not isinstance(sources, dict):
        raise SettingError("sources is not a table", where, _HOW)
    kind = given.get("kind", "assumed")
    if kind not in KINDS:
        raise SettingError(f"kind is {kind!r}", where, f"It is one of: {', '.join(KINDS)}")
    figures: dict[str, Any] = {}
    ranges: dict[str, tuple[float, float]] = {}
    taken: dict[str, str] = {}
    for figure in FIGURES:
        if figure in given:
            figures[figure], spread = _number(figure, given[figure], where)
            if spread:
                ranges[figure] = spread
        elif like is not None and figure != "flops":
            figures[figure] = getattr(like, figure)
            taken[figure] = f"{like.kind}: taken over from {like.name}"
        elif figure != "cloud_flops":
            raise SettingError(f"{figure} is missing", where, _HOW)
    name = given.get("name", path.stem)
    about = given.get("about", "")
    if not isinstance(name, str) or not isinstance(about, str):
        raise SettingError("name and about are texts", where, _HOW)
    figures["memory"] = int(figures["memory"])
    said = taken | {k: str(v) for k, v in sources.items()}
    return Profile(name, **figures, kind=kind, about=about, ranges=ranges, sources=said)


_HOW = "`kitestring measure MODEL --save-profile FILE.toml` writes one to start from"


def _text(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as problem:
        what = f"cannot be read: {problem.strerror}"
        raise SettingError(what, str(path), "Give a profile's name or its file") from None


def _like(name: Any, where: str) -> Profile | None:
    if name is None:
        return None
    if not isinstance(name, str) or name not in PROFILES:
        odd = unknown("size class", str(name), PROFILES)
        raise SettingError(f"like: {odd.what}", where, odd.mend)
    return PROFILES[name]


def _number(what: str, value: Any, where: str) -> tuple[float, tuple[float, float] | None]:
    """A figure, and its range where it has one."""
    ends = value if isinstance(value, list) else [value]
    for end in ends:
        if isinstance(end, bool) or not isinstance(end, int | float):
            raise SettingError(f"{what} is {value!r}", where, "Give a number, or [low, high]")
        least = "0 or more" if what.startswith("joules") or what == "round_trip" else "above 0"
        if not math.isfinite(end) or end < 0 or (end == 0 and least == "above 0"):
            raise SettingError(f"{what} is {end}", where, f"It must be {least}")
    if len(ends) not in (1, 2) or ends[0] > ends[-1]:
        raise SettingError(f"{what} is {value!r}", where, "Give a number, or [low, high]")
    low, high = float(ends[0]), float(ends[-1])
    return (low, None) if low == high else (math.sqrt(low * high), (low, high))


# Devices whose figures were published


@dataclass(frozen=True)
class Latency:
    """A published time of one forward pass: `flops` / `seconds` operations a second were done."""

    network: str
    flops: float
    seconds: float
    threads: int  # 0: the source does not say
    runtime: str
    source: str  # a key of `references()`

    @property
    def rate(self) -> float:
        return self.flops / self.seconds

    def __str__(self) -> str:
        threads = {0: "", 1: ", 1 thread"}.get(self.threads, f", {self.threads} threads")
        return (
            f"{self.network} {_flop(self.flops)} / {self.seconds * 1e3:.4g} ms = "
            f"{_flop(self.rate)}/s ({self.runtime}{threads}) [{self.source}]"
        )


def _flop(x: float) -> str:
    return f"{x / 1e9:.3g} GFLOP" if x >= 1e9 else f"{x / 1e6:.3g} MFLOP"


@cache
def _packaged() -> dict[str, Any]:
    found = resources.files("kitestring.devices").joinpath("profiles.toml")
    return tomllib.loads(found.read_text(encoding="utf-8"))


def references() -> dict[str, str]:
    """Where published figures come from: key -> title, place and year."""
    return {key: str(words) for key, words in _packaged()["references"].items()}


def latencies(name: str) -> list[Latency]:
    """What was published of a device's speed."""
    networks = _packaged()["networks"]
    return [
        Latency(
            networks[network]["title"], float(networks[network]["flops"]), milliseconds / 1e3,
            threads, runtime, source,
        )
        for network, milliseconds, threads, runtime, source in _packaged()["devices"][name]["runs"]
    ]  # fmt: skip


@cache
def published() -> dict[str, Profile]:
    """Real devices by name. Operations a second are those of the published times, from the slowest
    to the fastest; the link is one of those in `profiles.toml`."""
    return {name: _device(name, entry) for name, entry in _packaged()["devices"].items()}


def _device(name: str, entry: Mapping[str, Any]) -> Profile:
    runs = latencies(name)
    size = PROFILES[entry["like"]]
    figures: dict[str, Any] = {"flops": [min(r.rate for r in runs), max(r.rate for r in runs)]}
    sources = {"flops": "; ".join(map(str, runs))}
    if "memory" in entry:
        figures["memory"] = entry["memory"]
        sources["memory"] = entry["memory_source"]
    else:
        sources["memory"] = f"assumed: what the class {size.name} may take"
    if "link" in entry:
        link = _packaged()["links"][entry["link"]]
        figures |= {figure: link[figure] for figure in LINK}
        sources |= {figure: link["sources"][figure] for figure in LINK}
    else:
        sources |= {figure: f"assumed: as of the class {size.name}" for figure in LINK}
    numbers = {what: _number(what, value, f"profile {name}") for what, value in figures.items()}
    values: dict[str, Any] = {what: value for what, (value, _) in numbers.items()}
    values["memory"] = int(values.get("memory", size.memory))
    return replace(
        size, name=name, **values, kind="published", about=entry["about"],
        ranges={what: spread for what, (_, spread) in numbers.items() if spread}, sources=sources,
    )  # fmt: skip
