"""What a search found, as words and a table for a terminal. A tilde marks what is scaled."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from kitestring import units
from kitestring.report.terminal import indented
from kitestring.shrink.budget import Figures, says
from kitestring.shrink.candidates import PRECISIONS
from kitestring.shrink.package import Packed
from kitestring.shrink.personal import Gained, How, Missing
from kitestring.shrink.results import NEAR, Change, Entry, Found, Quality, change, quality
from kitestring.shrink.search import skipped
from kitestring.shrink.taking import Scale

LEGEND = "* chosen   - not on the front   ~ scaled to the device"
PARTS: dict[How, str] = {"last": "the last layer", "adapters": "adapters beside every linear layer"}
_ROWS = 24


def table(found: Found) -> RenderableType:
    """The front and what it is held against, for 80 columns and more."""
    shown = listed(found)
    parts: list[RenderableType] = [
        Text(_title(found), style="bold"), _figures(found, shown), Text(LEGEND, style="dim"),
    ]  # fmt: skip
    if len(found.front) > len([e for e in shown if e in found.front]):
        parts.append(indented("More of the front is in front.json."))
    parts += [indented(line) for line in [*left_out(found), *found.notes]]
    return Group(*parts)


def listed(found: Found) -> list[Entry]:
    """The front, the references and the choice, by size; of a long front the smaller ones."""
    front = found.front[:_ROWS]
    more = [e for e in found.entries.values() if e.test and e not in front]
    return sorted([*front, *more], key=lambda e: found.figures(e).size)


def verdict(found: Found) -> RenderableType:
    return _said(headline(found), reasons(found))


def remeasured(found: Found, done: Packed) -> RenderableType:
    return _said("Re-measured, the package in a device's runtime:", checks(found, done))


def _said(heading: str, lines: Sequence[str]) -> RenderableType:
    return Group(Text(""), Text(heading, style="bold"), *map(indented, lines))


def _title(found: Found) -> str:
    better = "higher" if found.metric.higher_is_better else "lower"
    seeds = "1 seed" if found.seeds == 1 else f"{found.seeds} seeds"
    unit = f", {found.metric.unit}" if found.metric.unit not in ("", "%") else ""
    return (
        f"{found.metric.name} per user on test rows ({better} is better{unit}; "
        f"{len(found.users)} users, {seeds}), on {found.scale.device.name}"
    )


def _figures(found: Found, shown: Sequence[Entry]) -> Table:
    out = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="dim")
    out.add_column("", max_width=42)
    for column in ("file", "time~", "mean", "p10", "worst 10%"):
        wide = 6 if column == "worst 10%" else None  # 100.0%
        out.add_column(column, justify="right", vertical="bottom", max_width=wide)
    choice, front = found.choice, found.front
    for e in shown:
        f, q = found.figures(e), quality(e.test[found.metric.name], found.metric)
        mark = "*" if e is choice else " " if e in front else "-"
        style = "bold" if e is choice else "" if e in front else "dim"
        cells = [units.size(f.size), units.duration(f.p50), *scores(found, q)]
        out.add_row(Text(f"{mark} {e.title}"), *cells, style=style)
    return out


def scores(found: Found, q: Quality) -> list[str]:
    """Mean, p10 and worst tenth."""
    unit = "%" if found.metric.unit == "%" else ""
    return [units.score(value, unit) for value in (q.mean, q.p10, q.worst10)]


def headline(found: Found) -> str:
    choice = found.choice
    if choice is None:
        near = found.nearest
        over = ", ".join(_over(found, near))
        wider = found.budget.admitting(found.figures(near))
        return f"Nothing meets {found.budget}. Nearest: {near.title} ({over}); met by {wider!r}"
    f = found.figures(choice)
    q = quality(choice.test[found.metric.name], found.metric)
    score = units.score(q.mean, found.metric.unit)
    return (
        f"Use {choice.title}: {found.metric.name} {score}, {units.size(f.size)}, "
        f"{units.duration(f.p50)}~ a request."
    )


def _over(found: Found, entry: Entry) -> list[str]:
    """What of the budget it breaks."""
    figures = found.figures(entry)
    return [
        f"{says(x.what, getattr(figures, x.what))} of {x}" for x in found.budget.broken(figures)
    ]


def reasons(found: Found) -> list[str]:
    """Why, against what, and whom it hurts."""
    choice = found.choice
    if choice is None:
        return []
    fit = [e for e in found.judged if found.budget.meets(found.figures(e))]
    best = max(fit, key=found.good)
    if found.budget.given:
        why = f"The best on validation rows of {len(fit)} that meet {found.budget}."
    else:
        room = "a point" if found.metric.unit == "%" else f"{units.share(NEAR)}"
        why = f"The smallest within {room} of the best on validation rows ({best.title})."
    lines = [why]
    if choice is not found.large:
        lines += against(found, choice, found.large)
    plain = found.entries[choice.candidate.plain.slug]
    if plain not in (choice, found.large) and plain.test:
        lines.append(f"Against itself in float32: {_changed(found, whom(found, choice, plain))}.")
    return lines


def against(found: Found, entry: Entry, before: Entry) -> list[str]:
    """What was gained and lost from one model to another, on test rows."""
    now, then, c = found.figures(entry), found.figures(before), whom(found, entry, before)
    lines = [
        f"Against {before.title}: {_times(then.size / now.size, 'smaller', 'as large')}, "
        f"{_times(then.p50 / now.p50, 'as fast', 'as slow')}, {_changed(found, c)}."
    ]
    lines += _quarters(found, c)
    old, new = (quality(e.test[found.metric.name], found.metric) for e in (before, entry))
    unit = found.metric.unit
    lines.append(
        f"The worst served tenth: {units.score(new.worst10, unit)}, of {before.title} "
        f"{units.score(old.worst10, unit)}."
    )
    return lines


def _quarters(found: Found, c: Change) -> list[str]:
    if len(c.quarters) < 4:
        return []
    worst, best = (gap(found, c.quarters[i]) for i in (0, -1))
    return [
        f"The quarter of the users that both serve worst: {worst}; the one served best: {best}."
    ]


def whom(found: Found, entry: Entry, before: Entry) -> Change:
    """By test rows."""
    name = found.metric.name
    return change(entry.test[name], before.test[name], found.rows["test"], found.metric)


def _changed(found: Found, c: Change) -> str:
    than = " by more than a row's worth" if found.metric.unit == "%" else ""
    error = units.gap(c.error, found.metric.unit)
    return (
        f"{found.metric.name} {gap(found, c.mean)} (standard error {error}); "
        f"{units.share(c.worse)} of the users worse off{than}, {units.share(c.better)} better off"
    )


def gap(found: Found, better: float) -> str:
    """A change for the better or, below 0, for the worse, with the sign that the metric shows."""
    shown = better if found.metric.higher_is_better else -better
    sign = "+" if shown > 0 else "−" if shown < 0 else "±"
    return sign + units.gap(abs(shown), found.metric.unit)


def _times(factor: float, more: str, less: str) -> str:
    return (
        f"{units.number(factor, 2)}× {more}"
        if factor >= 1
        else f"{units.number(1 / factor, 2)}× {less}"
    )


def checks(found: Found, done: Packed) -> list[str]:
    """What was predicted, and what was found."""
    choice = found.choice
    assert choice is not None
    name, unit = found.metric.name, found.metric.unit
    was, now = found.figures(choice), found.scale(done.taken)
    before = quality([choice.scores[name][0]], found.metric).mean
    after = quality([done.scores], found.metric).mean
    return [
        f"model {units.size(now.size)} (predicted {units.size(was.size)}), "
        f"the whole package {units.size(done.size)}",
        f"a request {units.duration(now.p50)}~ p50, {units.duration(now.p95)}~ p95 "
        f"(predicted {units.duration(was.p50)}, {units.duration(was.p95)})",
        f"memory {units.size(now.memory)} at the peak (predicted {units.size(was.memory)})",
        f"{name} on validation rows {units.score(after, unit)} "
        f"(predicted {units.score(before, unit)})",
        *broken(found, now),
    ]


def broken(found: Found, now: Figures) -> list[str]:
    """What of the budget does not hold any more: times are noisy."""
    over = [f"{says(x.what, getattr(now, x.what))} of {x}" for x in found.budget.broken(now)]
    return [f"OVER THE BUDGET: {', '.join(over)}"] if over else []


def personalised(found: Found, gained: Gained | Missing) -> RenderableType:
    """What training each user's part on the device gave."""
    if isinstance(gained, Missing):
        return _said(missing(gained), [])
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="dim")
    table.add_column("  test rows")
    for column in ("mean", "p10", "worst 10%"):
        table.add_column(column, justify="right")
    for name, q in ends(found, gained):
        table.add_row(f"  {name}", *scores(found, q))
    heading = f"Personal: {PARTS[gained.how]}, trained on each user's device"
    c = gain(found, gained)
    said = [f"Against the model as it came: {_changed(found, c)}.", *_quarters(found, c)]
    said += terms(found, gained)
    return Group(Text(""), Text(heading, style="bold"), table, *map(indented, said))


def missing(gained: Missing) -> str:
    return f"Not personalised: {gained.why}"


def ends(found: Found, gained: Gained) -> list[tuple[str, Quality]]:
    """Test rows before and after."""
    name, metric = found.metric.name, found.metric
    before, after = (quality(by[name], metric) for by in (gained.before, gained.after))
    return [("as it came", before), ("personal", after)]


def gain(found: Found, gained: Gained) -> Change:
    """By test rows."""
    name = found.metric.name
    return change(gained.after[name], gained.before[name], found.rows["test"], found.metric)


def terms(found: Found, gained: Gained) -> list[str]:
    """Who keeps what came, by which rate is trained, what it takes, and whether it pays at all."""
    unit, best = found.metric.unit, gained.tried[gained.lr]
    sign = 1 if found.metric.higher_is_better else -1
    rates = ", ".join(f"{units.score(s, unit)} at {lr:g}" for lr, s in gained.tried.items())
    lines = [
        f"{gained.kept} of {len(found.users)} users keep the model as it came: no round answered "
        "the rows better that they hold out.",
        f"Learning rate {gained.lr:g}, by validation rows of {gained.tried_on} users: "
        f"{units.score(gained.untrained, unit)} as it came, {rates}.",
        f"{gained.path.name} is {units.size(gained.size)}; {gained.parameters:,} parameters are a "
        "user's own.",
    ]
    if sign * best <= sign * gained.untrained:
        lines.append("ON VALIDATION ROWS IT DOES NOT PAY: ship the choice as it is.")
    return lines


def left_out(found: Found) -> list[str]:
    """What was not tried, by reason; a width that was left out as a whole is named once."""
    out = list(skipped(found))
    reasons: dict[str, dict[str, None]] = {}
    for entry, why in out:
        shape = entry.candidate.shape
        whole = sum(e.candidate.shape == shape and w == why for e, w in out) == len(PRECISIONS)
        reasons.setdefault(why, {})[shape.title if whole else entry.title] = None
    return [f"Left out, {why}: {'; '.join(titles)}." for why, titles in reasons.items()]


def basis(scale: Scale) -> list[str]:
    """Where times and memory come from."""
    device = scale.device
    how = (
        "~ Each model was run in ONNX Runtime on this machine, one row and one thread, in turn "
        "with the large model in float32. That one "
    )
    if scale.rate is None:
        how += (
            f"takes {units.duration(scale.seconds)} here, and no operation of it could be counted: "
            f"times are this machine's, not scaled to {device.name}."
        )
    else:
        here, there = (f"{units.operations(x)}FLOP/s" for x in (scale.rate, device.flops))
        how += (
            f"reaches {here} here and {there} on {device.name} ({device.kind}), and all times are "
            "scaled so. Other hardware may favour other layers: how much faster 8 bits are than "
            "32 is this processor's ratio, and does not carry over to ARM."
        )
    memory = (
        "Memory is the measured peak above what the imports take; the runtime's own code, which it "
        "reads when it is first used, is some megabytes of it."
    )
    return [how, memory]
