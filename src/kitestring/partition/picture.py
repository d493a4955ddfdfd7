"""The cuts as stacked bars: device, link and cloud, one bar a place; SVG and PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from kitestring import units
from kitestring.partition.choose import cost
from kitestring.partition.show import Verdict, called
from kitestring.report.plots import FONT, GRID, INK, MUTED, PALETTE

_PARTS = (("device", PALETTE[0]), ("link", PALETTE[4]), ("cloud", PALETTE[2]))
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "cut",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": FONT,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
}
_WIDTH, _LONGEST = 7.5, 34  # inches; letters of a layer's name


def draw(verdict: Verdict, title: str, folder: Path) -> list[Path]:
    """`cuts.svg`, which lies on light and dark pages alike, and `cuts.png` on white."""
    places = verdict.shown()
    height = 1.3 + 0.27 * len(places)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, height), dpi=150)
        axes = figure.add_axes((0.33, 0.55 / height, 0.62, 1 - 1.3 / height))
        costs = [cost(place, verdict.device, verdict.cloud) for place in places]
        left = [0.0] * len(places)
        for part, colour in _PARTS:
            wide = [getattr(spent, part) for spent in costs]
            axes.barh(range(len(places)), wide, 0.72, left, color=colour, label=part)
            left = [a + b for a, b in zip(left, wide, strict=True)]
        longest = max(left)
        axes.set_xlim(0, longest * 1.25)
        for y, (place, end) in enumerate(zip(places, left, strict=True)):
            best = place is verdict.best
            said = units.duration(end) + (", fastest" if best else "")
            axes.text(
                end + 0.01 * longest, y, said, va="center", fontsize=FONT - 2,
                fontweight="bold" if best else "normal",
            )  # fmt: skip
        names = [called(p, len(verdict.study.graph.layers)).removeprefix("after ") for p in places]
        short = [n if len(n) <= _LONGEST else f"{n[: _LONGEST - 1]}…" for n in names]
        sizes = [f", {units.size(place.up)}" if place.up else "" for place in places]
        both = [f"{name}{size}" for name, size in zip(short, sizes, strict=True)]
        axes.set_yticks(range(len(places)), both, fontsize=FONT - 2)
        axes.set_ylim(len(places) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.xaxis.set_major_formatter(lambda x, _: units.duration(x))
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5))
        axes.grid(True, axis="x", color=GRID, linewidth=0.5, alpha=0.45)
        axes.set_axisbelow(True)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.set_xlabel("time of one request, modelled")
        figure.text(0.02, 1 - 0.2 / height, title, va="top", fontweight="bold")
        figure.text(0.32, 1 - 0.55 / height, "cut after, bytes up", ha="right", color=MUTED)
        figure.legend(
            loc="upper right", bbox_to_anchor=(0.97, 1 - 0.35 / height), ncols=3, frameon=False
        )
        made = [folder / "cuts.svg", folder / "cuts.png"]
        figure.savefig(made[0], transparent=True, metadata={"Date": None})
        figure.savefig(made[1], facecolor="white")
    return made
