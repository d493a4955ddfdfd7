"""The comparison in a terminal: what it gives, what it costs, what left the device, what to use.

A tilde marks what was simulated or modelled; everything else was measured or follows from the
prices. Three narrow tables rather than a wide one, so that 80 columns are enough.
"""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from kitestring import units
from kitestring.comparison.results import Comparison, Row, Traffic
from kitestring.report.decide import Verdict
from kitestring.report.prices import Daily, Prices, mean_daily, mean_traffic
from kitestring.report.summary import Quality, cloud_calls, cloud_flops, latency, measured, quality

LEGEND = "* recommended   x left out by a limit   ~ simulated or modelled"


def table(comparison: Comparison, verdict: Verdict, prices: Prices) -> RenderableType:
    """Everything that `kitestring compare` prints at its end, for 80 columns and more."""
    rows = measured(comparison)
    days = {row.name: mean_daily(row, prices, comparison.device_users) for row in rows}
    scores = {row.name: quality(row, comparison) for row in rows}
    parts: list[RenderableType] = [
        _quality(rows, scores, comparison, verdict),
        Text(""),
        _cost(rows, days, verdict, prices),
        Text(""),
        _left(rows, verdict),
        Text(LEGEND, style="dim"),
    ]
    parts += [indented(line) for line in [*footnotes(comparison, scores), *comparison.notes]]
    parts.append(Text(""))
    parts.append(Text(verdict.headline, style="bold"))
    for heading, said in (("Why", verdict.reasons), ("What would change it", verdict.changes)):
        if said:
            parts.append(Text(f"{heading}:", style="bold"))
            parts += [indented(sentence) for sentence in said]
    return Group(*parts)


def explained(comparison: Comparison) -> RenderableType:
    """How each collaboration's programs were computed, and why not otherwise."""
    out = new_table(
        "How it was computed", ["program by program, where not all are compiled"], "left"
    )
    for row in comparison.rows:
        for number, how in enumerate(dict.fromkeys(seed.computed for seed in row.seeds)):
            out.add_row(Text("" if number else row.title), Text(how))
    return out


def left(traffic: Traffic) -> str:
    """What crossed, as short words: "features 1.2 MB, scalars 16 B"."""
    parts = [f"{kind} {units.size(n)}" for kind, n in traffic.kinds.items() if n > 0]
    return ", ".join(parts) or "nothing"


def footnotes(comparison: Comparison, scores: dict[str, Quality]) -> list[str]:
    """What is missing, and how many scores were left out."""
    said = [f"{row.title} did not run: {row.missing}." for row in comparison.rows if row.missing]
    undefined = {row.title: scores[row.name].undefined for row in measured(comparison)}
    if any(undefined.values()):
        counts = ", ".join(f"{title} {n}" for title, n in undefined.items() if n)
        said.append(
            f"Scores left out because {comparison.metric} is undefined for the user: {counts}."
        )
    return said


def spread(q: Quality, unit: str) -> str:
    """ "79.1 ±0.4%": the mean and its standard deviation over the seeds."""
    mean = units.score(q.mean, unit)
    if q.spread is None:
        return mean
    if unit == "%":
        return f"{mean.removesuffix('%')} ±{100 * q.spread:.1f}%"
    return f"{mean.split()[0]} ±{units.number(q.spread, 2)}"


def _quality(
    rows: list[Row], scores: dict[str, Quality], comparison: Comparison, verdict: Verdict
) -> Table:
    seeds = max((q.seeds for q in scores.values()), default=0)
    better = "higher" if comparison.higher_is_better else "lower"
    unit = f", {comparison.unit}" if comparison.unit not in ("", "%") else ""
    out = new_table(
        f"{comparison.metric} per user ({better} is better{unit}; {comparison.device_users} device "
        f"users, {seeds} {'seed' if seeds == 1 else 'seeds'})",
        ["mean ± seeds", "p10", "worst 10%", "better off", "latency p50~", "p95~"],
    )
    plain = "%" if comparison.unit == "%" else ""
    for row in rows:
        q, (p50, p95) = scores[row.name], latency(row)
        out.add_row(
            _title(row, verdict),
            spread(q, plain),
            units.score(q.p10, plain),
            units.score(q.worst10, plain),
            units.share(q.better_off),
            units.duration(p50),
            units.duration(p95),
            style=_style(row, verdict),
        )
    return out


def _cost(rows: list[Row], days: dict[str, Daily], verdict: Verdict, prices: Prices) -> Table:
    out = new_table(
        f"Cost per device and day ({units.number(prices.requests_per_day)} requests a day, "
        f"learning every {units.number(prices.learn_every_days)} days)",
        ["up", "down", "energy~", "cloud calls /1000", "cloud ops /1000", "$/month, 1000 devices"],
    )
    for row in rows:
        day = days[row.name]
        out.add_row(
            _title(row, verdict),
            units.size(day.up.total),
            units.size(day.down.total),
            units.energies(day.joules),
            units.number(1000 * cloud_calls(row)),
            units.operations(1000 * cloud_flops(row)),
            units.money(day.fleet_month),
            style=_style(row, verdict),
        )
    return out


def _left(rows: list[Row], verdict: Verdict) -> Table:
    out = new_table("What left the device", ["learning, once", "1000 requests"], justify="left")
    for row in rows:
        learnt = mean_traffic([seed.learning.up for seed in row.seeds])
        served = mean_traffic([seed.serving.up for seed in row.seeds])
        thousand = Traffic({kind: 1000 * n for kind, n in served.kinds.items()})
        out.add_row(_title(row, verdict), left(learnt), left(thousand), style=_style(row, verdict))
    return out


def new_table(title: str, columns: list[str], justify: str = "right", widest: int = 16) -> Table:
    """A plain table of these columns, after one without a heading."""
    out = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=None,
        padding=(0, 2, 0, 0),
        pad_edge=False,
        header_style="dim",
    )
    out.add_column("", no_wrap=True, max_width=widest)
    for column in columns:
        out.add_column(column, justify="left" if justify == "left" else "right", vertical="bottom")
    return out


def _title(row: Row, verdict: Verdict) -> Text:
    # Marks, not colours alone: the table is also read in logs.
    mark = "*" if row.name == verdict.choice else "x" if row.name in verdict.excluded else " "
    return Text(f"{mark} {row.title}")


def _style(row: Row, verdict: Verdict) -> str:
    if row.name == verdict.choice:
        return "bold"
    return "dim" if row.name in verdict.excluded else ""


def indented(text: str) -> RenderableType:
    """A line below a table."""
    return Padding(Text(text), (0, 0, 0, 2))
