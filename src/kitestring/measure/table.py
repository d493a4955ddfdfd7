"""What was measured, and the known device profiles, as tables for a terminal.

A tilde marks what was modelled; the rest was measured here, or counted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from kitestring import units
from kitestring.devices.profiles import LINK, PROFILES, Profile, published, references
from kitestring.measure.bench import Measured, Pair, Ratio, Report
from kitestring.report.terminal import indented, new_table

_LEGEND = (
    "memory: at its peak, beyond imports   moved: bytes of weights and activations\n"
    "~ modelled: arithmetic and memory, without radio and screen"
)


def results(report: Report) -> RenderableType:
    """Everything that `kitestring measure` prints, for 80 columns and more."""
    setting = report.setting
    threads = "1 thread" if setting.threads == 1 else f"{setting.threads} threads"
    rows = "1 row" if setting.inputs.rows == 1 else f"{setting.inputs.rows} rows"
    turns = ", in turn with the baseline" if any(p.baseline for p in report.pairs) else ""
    times = new_table(
        f"Time of one run ({rows}, {threads}, {setting.runs} runs{turns})",
        ["load", "wall p50", "p95", "CPU p50", "p95", *["to baseline"] * bool(turns)],
        widest=24,
    )
    needs = new_table(
        "What it takes", ["on disk", "memory", "FLOP", "FLOP/s", "moved", "energy~"], widest=24
    )
    for pair in report.pairs:
        times.add_row(*_times(pair.subject), *[against(pair.wall)] * bool(turns))
        needs.add_row(*_needs(pair.subject))
        if pair.baseline:
            times.add_row(*_times(pair.baseline), "baseline", style="dim")
            needs.add_row(*_needs(pair.baseline), style="dim")
    parts: list[RenderableType] = [times, Text(""), needs]
    parts.append(Text(_LEGEND, style="dim"))
    parts += [indented(line) for line in [*_notes(report.pairs), *report.notes, report.machine]]
    return Group(*parts)


def _times(m: Measured) -> list[str]:
    if m.wall is None or m.cpu is None:
        return [m.name, *[units.UNKNOWN] * 5]
    seconds = [m.load or 0.0, m.wall.p50, m.wall.p95, m.cpu.p50, m.cpu.p95]
    return [m.name, *map(units.duration, seconds)]


def _needs(m: Measured) -> list[str]:
    return [
        m.name,
        units.UNKNOWN if m.size is None else units.size(m.size),
        units.UNKNOWN if m.peak is None else units.size(m.peak),
        units.UNKNOWN if m.flops is None else units.operations(m.flops),
        units.UNKNOWN if m.rate is None else units.operations(m.rate),
        units.UNKNOWN if m.moved is None else units.size(m.moved),
        units.UNKNOWN if m.joules is None else units.energies(m.joules),
    ]


def against(r: Ratio | None) -> str:
    """ "0.52× (0.49–0.58)": of the wall times, pair by pair."""
    if r is None:
        return units.UNKNOWN
    return f"{units.number(r.median)}× ({units.number(r.low)}–{units.number(r.high)})"


def _notes(pairs: Sequence[Pair]) -> Iterable[str]:
    every = [m for p in pairs for m in (p.subject, p.baseline) if m is not None]
    for m in every:
        if m.failed:
            yield f"{m.name} ({m.runtime}) was not timed: it {m.failed}."
        if m.skipped:
            yield f"{m.name}: operations of {', '.join(m.skipped)} are not counted."
    for runtime in dict.fromkeys(m.runtime for m in every):
        names = ", ".join(dict.fromkeys(m.name for m in every if m.runtime == runtime))
        yield f"{names}: {runtime}."
    if any(m.runtime.startswith("torch") for m in every):
        yield "On disk: a module is no file, so this is the size of its weights."
    if any(p.wall for p in pairs):
        yield "Against the baseline: wall time, run by run; the median and the middle eight tenths."


# Profiles


def profiles() -> RenderableType:
    """Every profile with its figures, then where each figure comes from."""
    every = [*PROFILES.values(), *published().values()]
    out = Table(
        title="Device profiles", title_justify="left", title_style="bold", box=None,
        padding=(0, 2, 0, 0), pad_edge=False, header_style="dim",
    )  # fmt: skip
    out.add_column("", no_wrap=True)
    for heading in ("", "FLOP/s", "up", "down", "round trip"):
        out.add_column(heading, justify="left" if not heading else "right", no_wrap=True)
    for p in every:
        out.add_row(p.name, p.kind, *_figures(p), style="dim" if p.kind == "assumed" else "")
    parts: list[RenderableType] = [out, Text("")]
    for p in published().values():
        parts.append(Text(f"{p.name}: {p.about}", style="bold"))
        parts += [indented(f"{what}: {p.sources[what]}") for what in ("flops", "memory")]
    for names, lines in links().items():
        parts.append(Text(f"The way to the cloud of {names}", style="bold"))
        parts += [indented(line) for line in lines]
    parts.append(Text("Sources", style="bold"))
    parts += [indented(f"[{key}] {words}") for key, words in references().items()]
    parts.append(
        Text("Ranges are those of the sources; their geometric mean is used.", style="dim")
    )
    return Group(*parts)


def _figures(p: Profile) -> list[str]:
    way = [units.duration(p.round_trip)]
    if "round_trip" in p.ranges:
        way = [_range(*map(units.duration, p.ranges["round_trip"]))]
    rates = [f"{units.size(getattr(p, which))}/s" for which in ("up", "down")]
    return [reached(p), *rates, *way]


def reached(p: Profile) -> str:
    """ "6.4–19 G": operations a second, the range where there is one."""
    low, high = p.ranges.get("flops", (p.flops, p.flops))
    return units.operations(low) if low == high else _range(*map(units.operations, (low, high)))


def _range(low: str, high: str) -> str:
    """A unit that both share is named once."""
    number, _, unit = low.rpartition(" ")
    return f"{number}–{high}" if unit == high.rpartition(" ")[2] else f"{low}–{high}"


def links() -> dict[str, list[str]]:
    """Where the figures of the way to the cloud come from, by the devices that share them."""
    shared: dict[tuple[str, ...], list[str]] = {}
    for p in published().values():
        shared.setdefault(tuple(p.sources[figure] for figure in LINK), []).append(p.name)
    found = {}
    for sources, names in shared.items():
        said: dict[str, list[str]] = {}
        for figure, words in zip(LINK, sources, strict=True):
            said.setdefault(words, []).append(figure.replace("_", " "))
        found[", ".join(names)] = [f"{', '.join(which)}: {words}" for words, which in said.items()]
    return found


def markdown() -> str:
    """The published profiles as a Markdown table, for the documents."""
    lines = [
        "| name | what it is | FLOP/s, from the slowest to the fastest source | how it follows |",
        "|---|---|---|---|",
    ]
    for p in published().values():
        how = p.sources["flops"].replace("; ", "<br>")
        lines.append(f"| `{p.name}` | {p.about} | {reached(p)} | {how} |")
    return "\n".join(lines)
