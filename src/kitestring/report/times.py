"""Where a comparison's time went, for a terminal of 80 columns and more: who spent it, and on what.

All seconds are measured ones of this machine; those of simulated devices are in other tables.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from kitestring import units
from kitestring.comparison import clock
from kitestring.comparison.results import Comparison, Times
from kitestring.report.terminal import indented, new_table

_BAR = 20  # characters for the largest part
_FEW = 0.005  # of all the time: what is less is summed up
_LONG = 10_000  # seconds from which minutes are told
_NONE = "This run did not keep where its time went: run compare again."
_FIRST = "Jobs of one worker share rows and compiled code: who comes first pays for them."
# What a column sums up: parts by name, primitives by verb.
_COLUMNS = {
    "setup": (clock.MODELS, clock.COMPILING),
    "training": ("fit", "backward"),
    "predicting": ("predict",),
    "rows, scores": (clock.ROWS, clock.SCORES),
    "state": (clock.STATE,),
    "engine": (clock.REST,),
}
_WORDS = {
    clock.MODELS: "making models, counting operations",
    clock.COMPILING: "compiling, and trying what is faster",
    clock.ROWS: "loading rows",
    clock.SCORES: "scoring answers",
    clock.STATE: "keeping state",
    clock.REST: "engine and collaboration",
    "fit": "training",
    "predict": "predicting with",
    "backward": "gradients of",
}


def profiled(comparison: Comparison) -> RenderableType:
    """By collaboration and by part, largest first, and how busy the workers were."""
    times = comparison.times
    if times is None or not times.jobs:
        return Group(Text(""), Text(_NONE))
    by_title: defaultdict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
    by_part: defaultdict[str, float] = defaultdict(float)
    for job in times.jobs:
        for part, seconds in job.parts.items():
            by_title[job.title][part] += seconds
            by_part[part] += seconds
    said = [_busy(times), _FIRST, *_without_row(comparison, list(by_title))]
    return Group(
        Text(""), _titles(by_title, by_part), Text(""), _parts(by_part), *map(indented, said)
    )


def _titles(by_title: Mapping[str, Mapping[str, float]], by_part: Mapping[str, float]) -> Table:
    whole = sum(by_part.values())
    unit = "seconds" if whole < _LONG else "minutes"
    out = new_table(
        f"Where the time went: {unit} of work, all trials and seeds", ["total", "share", *_COLUMNS]
    )
    ordered = sorted(by_title.items(), key=lambda item: -sum(item[1].values()))
    for title, parts in ordered:
        out.add_row(Text(title), *_cells(parts, whole))
    out.add_row(Text("All"), *_cells(by_part, whole), style="bold")
    return out


def _cells(parts: Mapping[str, float], whole: float) -> list[Text]:
    sums = [
        sum(s for part, s in parts.items() if part in named or part.split()[0] in named)
        for named in _COLUMNS.values()
    ]
    cells = [Text(_amount(s, whole), style="bold" if s == max(sums) else "") for s in sums]
    total = sum(parts.values())
    return [Text(_amount(total, whole)), Text(units.share(total / whole)), *cells]


def _parts(by_part: Mapping[str, float]) -> Table:
    whole, most = sum(by_part.values()), max(by_part.values())
    out = new_table("On what", ["total", "share", ""])
    out.columns[0].max_width = None
    out.columns[-1].justify = "left"
    many = {part: s for part, s in by_part.items() if s >= _FEW * whole}
    few = [s for part, s in by_part.items() if part not in many]
    named = [(_in_words(part), s) for part, s in sorted(many.items(), key=lambda item: -item[1])]
    if few:
        named.append((f"{len(few)} more", sum(few)))
    for words, s in named:
        bar = Text("━" * round(_BAR * s / most), style="cyan")
        out.add_row(Text(words), _amount(s, whole), units.share(s / whole), bar)
    return out


def _in_words(part: str) -> str:
    verb, _, program = part.partition(" ")
    return f"{_WORDS[verb]} {program}".strip()


def _amount(x: float, whole: float) -> str:
    """Seconds, or minutes of a long time; decimals as the whole has use for them."""
    if not x:
        return units.UNKNOWN
    if whole >= _LONG:
        return f"{x / 60:,.0f}"
    return f"{x:,.{2 if whole < 10 else 1 if whole < 1000 else 0}f}"


def _busy(times: Times) -> str:
    work = sum(sum(job.parts.values()) for job in times.jobs)
    trials = sum(sum(job.parts.values()) for job in times.jobs if job.trial)
    share = units.share(trials / work)
    tuning = f"{share} of the work was in tuning trials; seed 0 is the best of them"
    if times.wall_s is None:
        return f"{tuning}. The run was resumed, so how long it took in all is not known."
    by = f"{times.workers} worker{'s' if times.workers > 1 else ''}"
    idle = units.share(max(0.0, 1 - work / (times.workers * times.wall_s)))
    return (
        f"{units.duration(work)} of work by {by} in {units.duration(times.wall_s)}: "
        f"{idle} of their time went to starting up and waiting. {tuning}."
    )


def _without_row(comparison: Comparison, titles: list[str]) -> list[str]:
    rows = {row.title for row in comparison.rows}
    others = [title for title in titles if title not in rows]
    if not others:
        return []
    return [f"Not compared, but others start from it or are held against it: {', '.join(others)}."]
