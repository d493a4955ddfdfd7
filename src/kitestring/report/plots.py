"""The report's plots: quality against bytes, the distribution over users, quality over rounds.

Each is an SVG of text and paths. On the page its colours are CSS variables, so that it follows the
reader's light or dark mode; on its own they are colours that both backgrounds carry.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, TypeAlias

import matplotlib
import matplotlib.ticker
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kitestring import units
from kitestring.comparison.results import Comparison, Row
from kitestring.report.prices import Prices, mean_daily
from kitestring.report.summary import REFERENCE, find, measured, p10, per_user, quality

WIDTH = 4.3  # inches: on a phone the text comes out at about its nominal size
FONT = 10.0  # points
DOTS = 150  # per row of the strip plot; more users than that are drawn as quantiles

# Okabe and Ito's palette without its yellow and black, which one of the two backgrounds swallows.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
INK, MUTED, GRID = "#7a7a7b", "#7a7a7a", "#7a7a7c"
VARIABLES = {
    **{colour: f"var(--c{i})" for i, colour in enumerate(PALETTE)},
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--grid)",
}
MARKERS = {
    "baseline": "o",
    "parameters": "s",
    "features": "^",
    "data": "D",
    "request": "P",
}
OTHER = "X"
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a title may hold a dollar sign
    "font.family": "DejaVu Sans",  # always there, and wider than what browsers put in its place
    "font.size": FONT,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.formatter.use_mathtext": False,
    "grid.color": GRID,
    "grid.linewidth": 0.5,
    "grid.alpha": 0.45,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
}


Point: TypeAlias = tuple[float, float]


@dataclass(frozen=True)
class Look:
    """How one row is drawn in every plot: colour by row, marker by family."""

    title: str
    colour: str
    marker: str
    line: Any


def looks(comparison: Comparison) -> dict[str, Look]:
    """Row name -> look. Baselines are grey; the others take the palette in turn."""
    out: dict[str, Look] = {}
    taken = 0
    for row in comparison.rows:
        plain = row.family == "baseline"
        # A second turn through the palette is told apart by its dashes.
        dashes = "-" if taken < len(PALETTE) else (0, (4, 2))
        colour = MUTED if plain else PALETTE[taken % len(PALETTE)]
        taken += not plain
        title = row.title if len(row.title) <= 14 else f"{row.title[:13]}…"
        out[row.name] = Look(
            title, colour, MARKERS.get(row.family, OTHER), (0, (1, 1.5)) if plain else dashes
        )
    return out


def bytes_plot(comparison: Comparison, prices: Prices, *, page: bool = True) -> str:
    """Mean quality per user against bytes per device and day, with the Pareto front; an SVG."""

    def draw(figure: Figure) -> None:
        axes = figure.add_axes((0.17, 0.14, 0.81, 0.83))
        _bytes(axes, comparison, prices)

    return svg(draw, 3.5, "bytes", page)


def users_plot(comparison: Comparison) -> str:
    """The users' scores in each row: dots, quartiles, p10 and mean; an SVG."""
    rows = measured(comparison)
    height = 0.6 + 0.34 * max(1, len(rows))

    def draw(figure: Figure) -> None:
        axes = figure.add_axes((0.29, 0.5 / height, 0.69, 1 - 0.56 / height))
        _users(axes, comparison, rows)

    return svg(draw, height, "users", True)


def rounds_plot(comparison: Comparison) -> str | None:
    """Mean and p10 on validation rows over the rounds; an SVG, or None if no row has rounds."""
    curves = {row.name: curve for row in measured(comparison) if len(curve := _curve(row)) > 1}
    if not curves:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.add_axes((0.17, 0.15, 0.61, 0.82))
        _rounds(axes, comparison, curves)

    return svg(draw, 3.1, "rounds", True)


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """The indices of (bytes, goodness) points that no other beats on both, by bytes."""
    front: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if not front or points[i][1] > points[front[-1]][1]:
            front.append(i)
    return front


def _bytes(axes: Axes, comparison: Comparison, prices: Prices) -> None:
    look = looks(comparison)
    rows = [r for r in measured(comparison) if not math.isnan(quality(r, comparison).mean)]
    scores = [quality(row, comparison) for row in rows]
    sizes = [mean_daily(row, prices, comparison.device_users).bytes for row in rows]
    some = [size for size in sizes if size > 0] or [1.0]
    # A log axis has no zero: rows that send nothing stand at the left, behind a line.
    nothing = min(some) / 8
    xs = [size if size > 0 else nothing for size in sizes]
    axes.set_xscale("log")
    right = max(some) * 10  # room for the names of the rows that send most
    left = nothing / 2.2 if min(sizes, default=1.0) == 0 else min(some) / 2.5
    axes.set_xlim(left, right)
    lows, highs = [q.low for q in scores] or [0.0], [q.high for q in scores] or [1.0]
    room = 0.12 * (max(highs) - min(lows)) or 0.05 * abs(max(highs)) or 1.0
    _up_is_better(axes, comparison, min(lows) - room, max(highs) + room)
    sign = 1.0 if comparison.higher_is_better else -1.0
    front = pareto([(x, sign * q.mean) for x, q in zip(xs, scores, strict=True)])
    steps: list[tuple[float, float]] = []
    for i, after in zip(front, [*front[1:], None], strict=True):
        end = right if after is None else xs[after]
        steps += [(xs[i], scores[i].mean), (end, scores[i].mean)]
    if steps:
        edge_x, edge_y = zip(*steps, strict=True)
        axes.plot(edge_x, edge_y, color=MUTED, linewidth=1, linestyle=(0, (4, 2)), zorder=1)
    for row, x, q in zip(rows, xs, scores, strict=True):
        style = look[row.name]
        axes.plot([x, x], [q.low, q.high], color=style.colour, linewidth=1.4, zorder=2)
        axes.plot([x], [q.mean], style.marker, color=style.colour, markersize=6, zorder=3)
    axes.grid(True)
    axes.set_xlabel("bytes per device and day, up and down (log)")
    axes.set_ylabel(_axis(comparison))
    _byte_ticks(axes, left, right, nothing if min(sizes, default=1.0) == 0 else None)
    bars = [((x, q.low), (x, q.high)) for x, q in zip(xs, scores, strict=True)]
    _label_points(
        axes,
        [look[row.name].title for row in rows],
        [(x, q.mean) for x, q in zip(xs, scores, strict=True)],
        [*bars, *pairwise(steps)],
    )


def _users(axes: Axes, comparison: Comparison, rows: Sequence[Row]) -> None:
    look = looks(comparison)
    every = [score for row in rows for score in per_user(row).values()] or [0.0, 1.0]
    room = 0.04 * (max(every) - min(every)) or 1.0
    axes.set_xlim(min(every) - room, max(every) + room)
    if not comparison.higher_is_better:
        axes.invert_xaxis()  # the better side is the right one in every report
    axes.set_ylim(len(rows) - 0.45, -0.55)
    reference = find(comparison, REFERENCE)
    if reference and (middle := list(per_user(reference).values())):
        axes.axvline(float(np.median(middle)), color=MUTED, linewidth=1, linestyle=(0, (4, 2)))
    for y, row in enumerate(rows):
        scores = sorted(per_user(row).values())
        if not scores:
            continue
        colour = look[row.name].colour
        shown = scores
        if len(scores) > DOTS:
            shown = [float(s) for s in np.quantile(scores, (np.arange(DOTS) + 0.5) / DOTS)]
        offsets = [0.14 + 0.2 * _spread_out(i) for i in range(len(shown))]
        axes.plot(
            shown,
            [y + offset for offset in offsets],
            "o",
            color=colour,
            markersize=2.2,
            alpha=0.55,
            markeredgewidth=0,
        )
        low, middle_half, high = (float(np.quantile(scores, q)) for q in (0.25, 0.5, 0.75))
        axes.plot([low, high], [y - 0.12] * 2, color=colour, linewidth=5, solid_capstyle="butt")
        tail = p10(scores, comparison.higher_is_better)
        end = low if comparison.higher_is_better else high
        axes.plot([tail, end], [y - 0.12] * 2, color=colour, linewidth=1.2)
        axes.plot([tail] * 2, [y - 0.24, y], color=colour, linewidth=1.2)
        axes.plot([middle_half] * 2, [y - 0.27, y + 0.03], color=INK, linewidth=1.6)
    axes.set_yticks(range(len(rows)), [look[row.name].title for row in rows])
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(True, axis="x")
    _score_ticks(axes, comparison, "x")
    axes.set_xlabel(_axis(comparison))


def _rounds(
    axes: Axes, comparison: Comparison, curves: dict[str, list[tuple[int, float, float]]]
) -> None:
    look = looks(comparison)
    values = [v for curve in curves.values() for point in curve for v in point[1:]]
    room = 0.06 * (max(values) - min(values)) or 1.0
    _up_is_better(axes, comparison, min(values) - room, max(values) + room)
    last = max(curve[-1][0] for curve in curves.values())
    first = min(curve[0][0] for curve in curves.values())
    axes.set_xlim(first - 0.02 * (last - first), last)
    ends = []
    for name, curve in curves.items():
        rounds, means, tails = zip(*curve, strict=True)
        style = look[name]
        axes.plot(rounds, means, color=style.colour, linewidth=1.8, linestyle=style.line)
        axes.plot(rounds, tails, color=style.colour, linewidth=0.8, linestyle=style.line)
        axes.plot(
            rounds[-1:], means[-1:], style.marker, color=style.colour, markersize=4.5, clip_on=False
        )
        ends.append((name, rounds[-1], means[-1]))
    axes.grid(True)
    axes.set_xlabel("share of its exchanges done (%)")
    axes.set_ylabel(_axis(comparison))
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(6, integer=True))
    _label_ends(axes, [(look[n].title, x, y) for n, x, y in ends])


def _curve(row: Row) -> list[tuple[int, float, float]]:
    """Round -> mean and p10, averaged over the seeds that have the round, without NaN."""
    at: dict[int, list[tuple[float, float]]] = {}
    for seed in row.seeds:
        for number, mean, tail in seed.curve:
            if not (math.isnan(mean) or math.isnan(tail)):
                at.setdefault(number, []).append((mean, tail))
    return [
        (
            number,
            float(np.mean([m for m, _ in at[number]])),
            float(np.mean([t for _, t in at[number]])),
        )
        for number in sorted(at)
    ]


def _axis(comparison: Comparison) -> str:
    metric = comparison.metric if len(comparison.metric) <= 16 else f"{comparison.metric[:15]}…"
    unit = f", {comparison.unit[:8]}" if comparison.unit not in ("", "%") else ""
    return f"{metric}{unit}" + ("" if comparison.higher_is_better else " (lower is better)")


def _up_is_better(axes: Axes, comparison: Comparison, low: float, high: float) -> None:
    axes.set_ylim((low, high) if comparison.higher_is_better else (high, low))
    _score_ticks(axes, comparison, "y")


def _score_ticks(axes: Axes, comparison: Comparison, which: Literal["x", "y"]) -> None:
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(matplotlib.ticker.MaxNLocator(5))
    if comparison.unit == "%":
        axis.set_major_formatter(lambda x, _: f"{100 * x:.4g}%")
    else:
        axis.set_major_formatter(lambda x, _: f"{x:.6g}")


def _byte_ticks(axes: Axes, left: float, right: float, nothing: float | None) -> None:
    decades = range(math.floor(math.log10(left)), math.ceil(math.log10(right)) + 1)
    floor = left if nothing is None else nothing * 2.5
    ticks = [10.0**d for d in decades if floor <= 10.0**d <= right]
    step = -(-len(ticks) // 5)
    ticks = ticks[::step]
    names = [units.size(tick).replace(".0 ", " ") for tick in ticks]
    if nothing is not None:
        axes.axvline(nothing * 2.2, color=GRID, linewidth=0.8, linestyle=(0, (1, 2)))
        ticks, names = [nothing, *ticks], ["0", *names]
    axes.set_xticks(ticks, names)
    axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())


def _label_points(
    axes: Axes,
    names: Sequence[str],
    points: Sequence[Point],
    lines: Sequence[tuple[Point, Point]],
) -> None:
    """Each name beside its point, where it covers no point, line or name; a leader if far.

    `lines` are upright or level."""

    def place(point: Point) -> Point:
        # The canvas has 72 dots per inch, so display units are points.
        x, y = axes.transData.transform(point)
        return float(x), float(y)

    spots = [place(point) for point in points]
    frame = axes.get_window_extent()
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in spots]
    for (x0, y0), (x1, y1) in ((place(a), place(b)) for a, b in lines):
        taken.append((min(x0, x1) - 1, min(y0, y1) - 1, max(x0, x1) + 1, max(y0, y1) + 1))
    # From the top down, so that the same points always get the same places.
    for i in sorted(range(len(names)), key=lambda i: -spots[i][1]):
        x, y = spots[i]
        wide, high = 0.6 * FONT * len(names[i]) + 2, 1.15 * FONT
        best: tuple[float, tuple[float, float]] | None = None
        for reach in (6, 12, 20, 30, 42):
            for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1)):
                left = x + dx * reach + (dx - 1) * wide / 2
                low = y + dy * reach + (dy - 1) * high / 2
                box = (left, low, left + wide, low + high)
                inside = frame.x0 <= box[0] and box[2] <= frame.x1
                inside = inside and frame.y0 <= box[1] and box[3] <= frame.y1
                clash = sum(_overlap(box, other) for other in taken)
                cost = clash + (0 if inside else 1e4)
                if best is None or cost < best[0]:
                    best = (cost, (left, low))
            if best and best[0] == 0:
                break
        assert best is not None
        left, low = best[1]
        taken.append((left, low, left + wide, low + high))
        away = math.hypot(max(left - x, 0, x - left - wide), max(low - y, 0, y - low - high))
        axes.annotate(
            names[i],
            points[i],
            xytext=(left + wide / 2 - x, low + high / 2 - y),
            textcoords="offset points",
            ha="center",
            va="center",
            arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.6} if away > 10 else None,
        )


def _overlap(a: Sequence[float], b: Sequence[float]) -> float:
    wide = min(a[2], b[2]) - max(a[0], b[0])
    high = min(a[3], b[3]) - max(a[1], b[1])
    return wide * high if wide > 0 and high > 0 else 0.0


def _label_ends(axes: Axes, ends: Sequence[tuple[str, float, float]]) -> None:
    """Names in a column right of the plot, pushed apart, each led to the end of its curve."""
    frame = axes.get_window_extent()
    spots = [tuple(axes.transData.transform((x, y))) for _, x, y in ends]
    order = sorted(range(len(ends)), key=lambda i: -spots[i][1])
    step, heights = 1.35 * FONT, [spots[i][1] for i in order]
    for k in range(1, len(heights)):
        heights[k] = min(heights[k], heights[k - 1] - step)
    lift = max(0.0, frame.y0 - heights[-1])
    for i, height in zip(order, heights, strict=True):
        name, x, y = ends[i]
        axes.annotate(
            name,
            (x, y),
            xytext=(frame.x1 + 8 - spots[i][0], height + lift - spots[i][1]),
            textcoords="offset points",
            ha="left",
            va="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": MUTED,
                "linewidth": 0.7,
                "linestyle": (0, (1, 2)),
                "shrinkB": 4,
            },
        )


def _spread_out(i: int) -> float:
    """The i-th of a sequence that fills [0, 1) evenly: jitter without dice."""
    value, part = 0.0, 0.5
    while i:
        value, part, i = value + part * (i & 1), part / 2, i >> 1
    return value


def svg(draw: Callable[[Figure], None], height: float, name: str, page: bool) -> str:
    """The drawing as SVG text: without date or header, and with ids of its own."""
    style: Any = {**STYLE, "svg.hashsalt": name}
    with matplotlib.rc_context(style), warnings.catch_warnings():
        # A glyph that our font lacks is drawn by the reader's browser in a font of its own.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=(WIDTH, height), dpi=72)
        figure.patch.set_alpha(0)
        draw(figure)
        for axes in figure.axes:
            axes.patch.set_alpha(0)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # Several plots share a page, where an id must name one thing.
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    text = text.replace("'DejaVu Sans'", "system-ui, 'DejaVu Sans'")
    if page:
        text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
        text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
        for colour, variable in VARIABLES.items():
            text = text.replace(colour, variable)
    return text
