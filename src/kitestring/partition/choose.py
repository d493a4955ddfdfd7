"""The best place to cut: plain arithmetic, after Kang et al., "Neurosurgeon: Collaborative
Intelligence Between the Cloud and Mobile Edge", ASPLOS 2017: of all places the one with the least

    T_device + bytes / bandwidth + T_cloud,     or with the least energy of the device.

Beyond the paper the answer comes down, over a link with a round trip. All on the device crosses
nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from kitestring.devices.profiles import Profile, joules


@dataclass(frozen=True)
class Place:
    """A cut in numbers: operations on each side, and bytes across for one request."""

    at: int
    name: str
    device: float
    cloud: float
    up: int
    down: int


@dataclass(frozen=True)
class Cost:
    """Of one request: seconds on the device, on the way and in the cloud; joules of the device,
    (low, high)."""

    device: float
    link: float
    cloud: float
    joules: tuple[float, float]

    @property
    def total(self) -> float:
        return self.device + self.link + self.cloud


@dataclass(frozen=True)
class Range:
    """From `low` up to `high` (bytes or operations a second) the best place is `place`."""

    low: float
    high: float
    place: Place


def cost(place: Place, profile: Profile, cloud: float) -> Cost:
    """`cloud`: operations a second there; device and link are the profile's."""
    crosses = place.up or place.down
    link = place.up / profile.up + place.down / profile.down + profile.round_trip
    return Cost(
        place.device / profile.flops,
        link if crosses else 0.0,
        place.cloud / cloud,
        joules(profile, place.device, place.up, place.down),
    )


def fastest(places: Sequence[Place], profile: Profile, cloud: float) -> Place:
    """The first of the places with the least seconds."""
    return min(places, key=lambda place: cost(place, profile, cloud).total)


def thriftiest(places: Sequence[Place], profile: Profile, high: bool = True) -> Place:
    """The first of the places with the least joules: of the high estimates, or of the low."""
    return min(places, key=lambda p: joules(profile, p.device, p.up, p.down)[high])


def over_bandwidth(places: Sequence[Place], profile: Profile, cloud: float) -> list[Range]:
    """Which place is the fastest at which bytes a second up; down keeps its ratio to it."""
    ratio = profile.down / profile.up
    lines = []
    for place in places:
        still = cost(place, replace(profile, up=float("inf"), down=float("inf")), cloud).total
        lines.append((still, place.up + place.down / ratio))
    return _ranges(places, lines)


def over_device(places: Sequence[Place], profile: Profile, cloud: float) -> list[Range]:
    """Which place is the fastest at which operations a second of the device."""
    lines = []
    for place in places:
        still = cost(place, profile, cloud)
        lines.append((still.link + still.cloud, place.device))
    return _ranges(places, lines)


def _ranges(places: Sequence[Place], lines: Sequence[tuple[float, float]]) -> list[Range]:
    """Seconds are `still` + `slope` / speed: where which is the least, from the lowest speed on.

    In 1 / speed these are straight lines, so that the least of them is a hull: each time the next
    is the one that the present one meets first."""
    now = min(range(len(lines)), key=lambda i: lines[i])  # as fast as can be
    at, turns, order = 0.0, [0.0], [now]
    while True:
        (still, slope), best = lines[now], None
        for i, (other, less) in enumerate(lines):
            if less < slope:
                meets = max(at, (other - still) / (slope - less))
                if best is None or (meets, less) < best[:2]:
                    best = (meets, less, i)
        if best is None:
            break
        at, _, now = best
        turns.append(at)
        order.append(now)
    ends = [1 / turn if turn else float("inf") for turn in turns] + [0.0]
    found = zip(pairwise(ends), order, strict=True)
    return [Range(low, high, places[i]) for (high, low), i in found if low < high][::-1]
