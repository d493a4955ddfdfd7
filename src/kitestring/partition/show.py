"""What a study says, as tables for a terminal and as JSON. A tilde marks what is modelled."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from kitestring import units
from kitestring.devices.profiles import Profile
from kitestring.partition.choose import (
    Place,
    Range,
    cost,
    fastest,
    over_bandwidth,
    over_device,
    thriftiest,
)
from kitestring.partition.halves import Cut
from kitestring.partition.study import Study
from kitestring.report.terminal import indented

ROWS = 40  # of the table and the plot


@dataclass(frozen=True)
class Verdict:
    """A study with a device, its link and a cloud: what is the best place to cut."""

    study: Study
    device: Profile
    cloud: float  # operations a second
    cloud_said: str  # and where that is from

    @property
    def places(self) -> Sequence[Place]:
        return self.study.places

    @property
    def best(self) -> Place:
        return fastest(self.places, self.device, self.cloud)

    @property
    def least(self) -> tuple[Place, Place]:
        """The places with the least energy: by the low estimates and by the high."""
        low, high = (thriftiest(self.places, self.device, high) for high in (False, True))
        return low, high

    def total(self, place: Place) -> float:
        return cost(place, self.device, self.cloud).total

    def shown(self) -> list[Place]:
        """All places, or of many the ends and the fastest, in the model's order."""
        if len(self.places) <= ROWS:
            return list(self.places)
        ends = [self.places[0], self.places[-1]]
        inner = sorted(self.places[1:-1], key=self.total)[: ROWS - 2]
        return sorted([*ends, *inner], key=lambda place: place.at)


def called(place: Place, layers: int) -> str:
    ends = {0: "all in the cloud", layers: "all on the device"}
    return ends.get(place.at, place.name)


def table(verdict: Verdict) -> RenderableType:
    """Everything that `kitestring cut` prints, for 80 columns and more."""
    study = verdict.study
    parts: list[RenderableType] = [_costs(verdict)]
    left = len(study.places) - len(verdict.shown())
    if left:
        parts.append(indented(f"{left} slower places are in cuts.json."))
    parts.append(Text("* fastest   + least energy   ~ modelled", style="dim"))
    parts += [indented(line) for line in _refused(study.cuts)]
    parts += [Text(""), Text(_headline(verdict), style="bold")]
    parts += [indented(line) for line in [*_energy(verdict), *_changes(verdict), *_from(verdict)]]
    return Group(*parts)


def _costs(verdict: Verdict) -> Table:
    out = Table(
        title=f"One request, cut after ({verdict.device.name})", title_justify="left",
        title_style="bold", box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="dim",
    )  # fmt: skip
    out.add_column("", max_width=28, overflow="ellipsis", no_wrap=True)
    for column in ("device~", "up", "link~", "cloud~", "total~", "energy~"):
        wide = 10 if column == "energy~" else 7
        out.add_column(column, justify="right", no_wrap=True, min_width=wide)
    best, least = verdict.best, verdict.least
    for place in verdict.shown():
        spent = cost(place, verdict.device, verdict.cloud)
        mark = ("*" if place is best else " ") + ("+" if place in least else " ")
        name = called(place, len(verdict.study.graph.layers)).removeprefix("after ")
        out.add_row(
            Text(f"{mark}{name}"),
            units.duration(spent.device),
            units.size(place.up),
            units.duration(spent.link),
            units.duration(spent.cloud),
            units.duration(spent.total),
            _energies(spent.joules),
            style="bold" if place is best else "",
        )
    return out


def _energies(joules: tuple[float, float]) -> str:
    """One figure where sending outweighs all else."""
    low, high = map(units.energy, joules)
    return high if low == high else units.energies(joules)


def _refused(cuts: Sequence[Cut]) -> list[str]:
    """Where the model cannot be cut, and why; of many the first."""
    lost = [cut for cut in cuts if cut.why]
    said = [f"No cut {cut.name}: {cut.why}." for cut in lost[:5]]
    return [*said, f"Nor at {len(lost) - 5} other places."] if len(lost) > 5 else said


def _headline(verdict: Verdict) -> str:
    best, layers = verdict.best, len(verdict.study.graph.layers)
    ends = [p for p in (verdict.places[0], verdict.places[-1]) if p is not best]
    others = ", ".join(f"{called(p, layers)} {units.duration(verdict.total(p))}" for p in ends)
    where = called(best, layers)
    return f"Fastest: {where}, {units.duration(verdict.total(best))}~ ({others})."


def _energy(verdict: Verdict) -> list[str]:
    (low, high), layers = verdict.least, len(verdict.study.graph.layers)
    if low is high:
        return [f"Least energy of the device: {called(high, layers)}."]
    return [
        f"Least energy of the device: {called(low, layers)} by the low estimate of what an "
        f"operation takes, {called(high, layers)} by the high."
    ]


def _changes(verdict: Verdict) -> list[str]:
    """Where another place gets faster, as the link or the device changes."""
    layers = len(verdict.study.graph.layers)
    given = (verdict.places, verdict.device, verdict.cloud)
    link = _ranges(over_bandwidth(*given), layers, lambda x: f"{units.number(x * 8 / 1e6)} Mbit/s")
    speed = _ranges(over_device(*given), layers, _rate)
    now = f"{units.number(verdict.device.up * 8 / 1e6)} Mbit/s"
    return [
        f"By uplink (now {now}): {link}.",
        f"By device (now {_rate(verdict.device.flops)}): {speed}.",
    ]


def _rate(operations: float) -> str:
    said = units.operations(operations)
    return f"{said}OP/s" if " " in said else f"{said} OP/s"


def _ranges(found: Sequence[Range], layers: int, written: Callable[[float], str]) -> str:
    parts = []
    for r in found:
        name = called(r.place, layers)
        if r.low == 0 and math.isinf(r.high):
            parts.append(f"always {name}")
        elif r.low == 0:
            parts.append(f"{name} below {written(r.high)}")
        elif math.isinf(r.high):
            parts.append(f"{name} above {written(r.low)}")
        else:
            parts.append(f"{name} up to {written(r.high)}")
    return "; ".join(parts)


def _from(verdict: Verdict) -> list[str]:
    study, times = verdict.study, verdict.study.times
    return [
        f"~ Layers were timed on this machine: medians of {times.passes} passes with one thread, "
        f"{units.duration(times.layers)} in all ({units.duration(times.whole)} in one go), "
        f"{_rate(study.rate)}. They are scaled to the device's "
        f"{_rate(verdict.device.flops)} ({verdict.device.kind}) and the cloud's "
        f"{_rate(verdict.cloud)} ({verdict.cloud_said}): other hardware may favour "
        "other layers.",
        f"The model has {units.operations(study.operations)} operations and "
        f"{len(study.graph.layers)} layers ({study.graph.how}).",
    ]


def plain(verdict: Verdict, model: str) -> dict[str, Any]:
    """As JSON: seconds, bytes, operations, joules."""
    study, rate = verdict.study, verdict.study.rate

    def cut(found: Cut) -> dict[str, Any]:
        place = next((p for p in study.places if p.at == found.at), None)
        if place is None:
            return {"at": found.at, "name": found.name, "why_not": found.why}
        spent = cost(place, verdict.device, verdict.cloud)
        return {
            "at": place.at,
            "name": called(place, len(study.graph.layers)),
            "front_s_here": place.device / rate,
            "back_s_here": place.cloud / rate,
            "up_bytes": place.up,
            "down_bytes": place.down,
            "tensors": [node.name for node in found.alive],
            "modelled": {
                "device_s": spent.device,
                "link_s": spent.link,
                "cloud_s": spent.cloud,
                "total_s": spent.total,
                "joules": list(spent.joules),
            },
        }

    def changes(found: Sequence[Range]) -> list[dict[str, Any]]:
        """`to` is None where there is no end."""
        return [
            {"from": r.low, "to": r.high if math.isfinite(r.high) else None, "at": r.place.at}
            for r in found
        ]

    given = (verdict.places, verdict.device, verdict.cloud)
    low, high = verdict.least
    return {
        "model": model,
        "traced_by": study.graph.how,
        "operations": study.operations,
        "here": {
            "operations_per_s": rate,
            "layers_s": study.times.layers,
            "whole_s": study.times.whole,
            "passes": study.times.passes,
        },
        "device": asdict(verdict.device),
        "cloud_operations_per_s": verdict.cloud,
        "cloud_from": verdict.cloud_said,
        "cuts": [cut(found) for found in study.cuts],
        "fastest": verdict.best.at,
        "least_energy": {"low": low.at, "high": high.at},
        "by_uplink_bytes_per_s": changes(over_bandwidth(*given)),
        "by_device_operations_per_s": changes(over_device(*given)),
    }
