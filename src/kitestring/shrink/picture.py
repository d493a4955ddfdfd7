"""The front drawn: quality against size and against time; and what became of each user."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from kitestring import units
from kitestring.report.plots import FONT, GRID, INK, MUTED, PALETTE, STYLE, svg
from kitestring.shrink.budget import What, front
from kitestring.shrink.candidates import PRECISIONS, REFERENCES, SHAPES, Precision, Shape
from kitestring.shrink.results import Change, Entry, Found, quality

MARKERS: dict[Precision, str] = {"float32": "o", "int8": "s", "weights8": "^", "weights4": "D"}
COLOURS = dict(zip(SHAPES, (INK, *PALETTE), strict=True))
"""Of a width; the large model as it is has the colour of the text."""
_MEETS = "#009e73"
_WIDTH, _HEIGHT = 8.6, 4.6  # inches


def draw(found: Found, title: str, folder: Path) -> list[Path]:
    """`front.svg`, which lies on light and dark pages alike, and `front.png` on white."""
    style: Any = {**STYLE, "svg.hashsalt": "shrink"}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(_WIDTH, _HEIGHT), dpi=150)
        left = figure.add_axes((0.085, 0.36, 0.425, 0.55))
        right = figure.add_axes((0.555, 0.36, 0.425, 0.55), sharey=left)
        panel(left, found, "size")
        panel(right, found, "p50")
        right.set_ylabel("")
        right.tick_params(labelleft=False)
        figure.text(0.02, 0.975, title, va="top", fontweight="bold")
        _legend(figure, found, 0.085, 0.2)
        made = [folder / "front.svg", folder / "front.png"]
        figure.patch.set_alpha(0)
        figure.savefig(made[0], transparent=True, metadata={"Date": None})
        figure.savefig(made[1], facecolor="white")
    return made


def front_plot(found: Found, what: What) -> str:
    """One of the two for the page: an SVG."""

    def drawn(figure: Figure) -> None:
        axes = figure.add_axes((0.17, 0.44, 0.81, 0.54))
        panel(axes, found, what)
        _legend(figure, found, 0.04, 0.335, FONT - 1.5)

    return svg(drawn, 4.7, f"front-{what}", True)


def users_plot(
    found: Found, changes: Sequence[tuple[str, Change]], name: str = "users",
    colours: Sequence[str] = (PALETTE[1], PALETTE[0]),
) -> str:  # fmt: skip
    """How much better or worse off each user is, from the worst off to the best: an SVG. `name`:
    one that no other on the page has."""

    def drawn(figure: Figure) -> None:
        axes = figure.add_axes((0.17, 0.17, 0.81, 0.72))
        for (label, c), colour in zip(changes, colours, strict=False):
            each = sorted(x for x in c.each if math.isfinite(x))
            at = [(i + 0.5) / len(each) for i in range(len(each))]
            axes.plot(at, each, color=colour, linewidth=1.8, label=label, drawstyle="steps-mid")
            if c is changes[0][1]:
                axes.fill_between(at, each, step="mid", color=colour, alpha=0.25, linewidth=0)
        axes.axhline(0, color=MUTED, linewidth=0.8)
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_formatter(lambda x, _: f"{100 * x:.0f}%")
        share = found.metric.unit == "%"
        axes.yaxis.set_major_formatter(lambda y, _: f"{100 * y if share else y:+.4g}")
        axes.set_xlabel("users, from the worst off to the best")
        axes.set_ylabel("points" if share else f"{found.metric.name}, up is better")
        axes.grid(True)
        figure.legend(loc="upper left", bbox_to_anchor=(0.1, 1.0), ncols=2, frameon=False)

    return svg(drawn, 3.2, name, True)


def panel(axes: Axes, found: Found, what: What) -> None:
    """Mean quality on validation rows against bytes or seconds; empty where none is a number."""
    judged, choice = [e for e in found.judged if math.isfinite(_mean(found, e))], found.choice
    if not judged:
        return
    points = [(_at(found, e, what), _mean(found, e)) for e in judged]
    xs, ys = zip(*points, strict=True)
    low, high = min(ys), max(ys)
    room = 0.12 * (high - low) or 0.05 * abs(high) or 1.0
    up = found.metric.higher_is_better
    axes.set_ylim((low - room, high + room) if up else (high + room, low - room))
    axes.set_xscale("log")
    left, right = min(xs) / 1.5, max(xs) * 1.5
    most = found.budget.of(what)
    if most is not None:
        axes.axvspan(left / 10, most, color=_MEETS, alpha=0.12, linewidth=0)
        axes.axvline(most, color=_MEETS, linewidth=1)
        left, right = min(left, most / 1.3), max(right, most * 1.3)
    axes.set_xlim(left, right)
    sign = -1.0 if up else 1.0
    steps = sorted(points[i] for i in front([(x, sign * y) for x, y in points]))
    edge = [*steps, (right, steps[-1][1])]
    axes.plot(*zip(*edge, strict=True), color=MUTED, linewidth=1, drawstyle="steps-post",
              linestyle=(0, (4, 2)), zorder=1)  # fmt: skip
    on_front = found.front
    for entry, (x, y) in zip(judged, points, strict=True):
        colour, marker = COLOURS[entry.candidate.shape], MARKERS[entry.candidate.precision]
        filled = entry in on_front
        inside = colour if filled else "none"
        axes.plot([x], [y], marker, color=colour, markersize=6, markerfacecolor=inside, zorder=3)
        if entry is choice:
            axes.plot([x], [y], "o", color=INK, markersize=13, fillstyle="none", zorder=2)
        if entry.candidate in REFERENCES:
            below = (0, -10) if entry.candidate.shape.base == "small" else (0, 9)
            axes.annotate(
                entry.title, (x, y), below, textcoords="offset points", ha="center", va="center",
                fontsize=FONT - 2, color=INK,
            )  # fmt: skip
    axes.grid(True, color=GRID, linewidth=0.5, alpha=0.45)
    said = units.size if what == "size" else units.duration
    axes.xaxis.set_major_formatter(lambda x, _: re.sub(r"\.0 ", " ", said(x)))
    axes.xaxis.set_minor_formatter(lambda x, _: _minor(x, left, right, said))
    axes.tick_params(axis="x", which="minor", labelsize=FONT - 3)
    axes.set_xlabel("file" if what == "size" else f"a request on {found.scale.device.name}, scaled")
    percent = found.metric.unit == "%"
    axes.yaxis.set_major_formatter(lambda y, _: f"{100 * y:.4g}%" if percent else f"{y:.6g}")
    axes.set_ylabel(found.metric.name + ("" if up else " (lower is better)"))


def _minor(x: float, left: float, right: float, said: Callable[[float], str]) -> str:
    """Between powers of ten only where there are few of those."""
    if math.log10(right / left) > 1.5:
        return ""
    digit = round(x / 10 ** math.floor(math.log10(x)))
    return re.sub(r"\.0 ", " ", said(x)) if digit in (2, 5) else ""


def _at(found: Found, entry: Entry, what: What) -> float:
    return float(getattr(found.figures(entry), what))


def _mean(found: Found, entry: Entry) -> float:
    return quality(entry.scores[found.metric.name], found.metric).mean


def _legend(figure: Figure, found: Found, left: float, top: float, size: float = FONT - 1) -> None:
    """Widths by colour, precisions by mark."""
    judged = found.judged
    shapes: list[Shape] = [s for s in SHAPES if any(e.candidate.shape == s for e in judged)]
    kinds = [p for p in PRECISIONS if any(e.candidate.precision == p for e in judged)]

    def dot(marker: str, colour: str, label: str, filled: bool = True) -> Line2D:
        return Line2D(
            [], [], linestyle="", marker=marker, color=colour, label=label, markersize=6,
            markerfacecolor=colour if filled else "none",
        )  # fmt: skip

    first = [dot("o", COLOURS[s], s.title) for s in shapes]
    second = [dot(MARKERS[p], MUTED, PRECISIONS[p] or "float32") for p in kinds]
    second += [dot("o", MUTED, "not on the front", False)]
    line = 1.75 * size / 72 / figure.get_figheight()
    wide = figure.get_figwidth() > 6
    for handles, columns in ((first, 4 if wide else 2), (second, 5 if wide else 2)):
        figure.legend(
            handles=handles, loc="upper left", bbox_to_anchor=(left - 0.02, top), ncols=columns,
            frameon=False, fontsize=size, handletextpad=0.2, columnspacing=1.0, borderpad=0,
            labelspacing=0.35,
        )  # fmt: skip
        top -= line * -(-len(handles) // columns)
