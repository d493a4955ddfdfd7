"""The page of a search: one HTML file in the style of a comparison's report, without a script."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

from kitestring import __version__, units
from kitestring.comparison.compare import write_whole
from kitestring.measure.bench import machine
from kitestring.report.html import bullets, cell, document, facts
from kitestring.report.plots import PALETTE
from kitestring.shrink import show
from kitestring.shrink.package import Packed
from kitestring.shrink.personal import Gained, Missing
from kitestring.shrink.picture import front_plot, users_plot
from kitestring.shrink.results import Change, Entry, Found, Scores, quality

SCALED = '<span class="tag">scaled</span>'
_WORST = 8  # users that are named


def write(
    found: Found, done: Packed | None, gained: Gained | Missing | None, path: Path, command: str
) -> None:
    """Write the page whole or not at all."""
    write_whole(path, page(found, done, gained, command))


def page(found: Found, done: Packed | None, gained: Gained | Missing | None, command: str) -> str:
    title = f"Kitestring: {found.task}, shrunk"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{escape(found.about)}</p>",
        _verdict(found, done),
        _plots(found),
        _whom(found),
        _personal(found, gained) if gained else "",
        _tables(found),
        _basis(found, command),
    ]
    return document(title, parts)


def _verdict(found: Found, done: Packed | None) -> str:
    said = [
        f'<p class="choice">{escape(show.headline(found))}</p>',
        f'<p class="muted">Budget: <code>{escape(str(found.budget))}</code> on '
        f"{escape(found.scale.device.name)}</p>",
    ]
    if lines := show.reasons(found):
        said.append(f"<h3>Why, and at what cost</h3>{bullets(lines)}")
    if done is not None:
        heading = f"The package {escape(done.path.name)}, re-measured in a device's runtime"
        said.append(f"<h3>{heading}</h3>{bullets(show.checks(found, done))}")
    notes = bullets([*show.left_out(found), *found.notes])
    return f'<section class="verdict">{"".join(said)}</section>\n{notes}'


def _plots(found: Found) -> str:
    name, device = escape(found.metric.name), escape(found.scale.device.name)
    common = (
        f"Mean {name} over users on validation rows, up is better. Filled: on the front, nothing "
        "else is as good, as small and as fast. The dashed line: the best up to there. Shaded: "
        "within the budget. The ring: the choice."
    )
    figures = [
        _figure("Quality against size", front_plot(found, "size"), common),
        _figure(
            "Quality against time",
            front_plot(found, "p50"),
            f"The same against the median time of a request on {device}, scaled from this machine.",
        ),
    ]
    return f'<h2>The front</h2>\n<div class="plots">{"".join(figures)}</div>'


def _whom(found: Found) -> str:
    """Whom the choice, or what comes nearest, serves worse than the large model."""
    entry = found.choice or found.nearest
    if entry is found.large or not entry.test:
        return ""
    change = show.whom(found, entry, found.large)
    if all(map(math.isnan, change.each)):
        return ""
    changes = [("against large", change)]
    plain = found.entries[entry.candidate.plain.slug]
    if plain not in (entry, found.large) and plain.test:
        changes.append(("against itself in float32", show.whom(found, entry, plain)))
    caption = (
        f"Each user's change in {escape(found.metric.name)} on test rows, above 0 better off. A "
        "user with few rows moves in large steps, by luck too: look at how many lose against how "
        "many gain."
    )
    name = found.metric.name
    hurt = _hurt(found, "large", (found.large.test[name], entry.test[name]), change)
    return (
        f"<h2>Whom {escape(entry.title)} hurts</h2>\n"
        f'<div class="plots">{_figure("Change by user", users_plot(found, changes), caption)}'
        f"<div>{_quarters(found, changes)}{hurt}</div></div>"
    )


def _personal(found: Found, gained: Gained | Missing) -> str:
    """What training on the device gives whom."""
    if isinstance(gained, Missing):
        return f"<h2>Personal</h2>\n<p>{escape(show.missing(gained))}</p>"
    change, name = show.gain(found, gained), found.metric.name
    heads = "".join(f"<th>{text}</th>" for text in ("mean", "p10", "worst 10%"))
    lines = [(label, show.scores(found, q)) for label, q in show.ends(found, gained)]
    table = _rows(heads, lines)
    caption = f"Each user's change in {escape(name)} on test rows, above 0 better off."
    changes = [("by training", change)]
    plot = ""
    if not all(map(math.isnan, change.each)):
        svg = users_plot(found, changes, "personal", (PALETTE[2],))
        plot = _figure("Gain by user", svg, caption)
    ends = (gained.before[name], gained.after[name])
    return (
        f"<h2>Personal: {escape(show.PARTS[gained.how])}, trained on each user's device</h2>\n"
        f"{bullets(show.terms(found, gained))}\n"
        f'<div class="plots">{plot}<div>{table}{_quarters(found, changes)}'
        f"{_hurt(found, 'as it came', ends, change)}</div></div>"
    )


def _quarters(found: Found, changes: Sequence[tuple[str, Change]]) -> str:
    heads = "".join(f"<th>{escape(label)}</th>" for label, _ in changes)
    unit = " by more than a row's worth" if found.metric.unit == "%" else ""
    lines = [
        ("mean change", [show.gap(found, c.mean) for _, c in changes]),
        ("standard error", [units.gap(c.error, found.metric.unit) for _, c in changes]),
        (f"worse off{unit}", [units.share(c.worse) for _, c in changes]),
        (f"better off{unit}", [units.share(c.better) for _, c in changes]),
    ]
    names = ("worst served quarter", "second quarter", "third quarter", "best served quarter")
    if any(len(c.quarters) < 4 for _, c in changes):  # fewer users than that
        return _rows(heads, lines)
    for i, name in enumerate(names):
        lines.append((name, [show.gap(found, c.quarters[i]) for _, c in changes]))
    return (
        f"{_rows(heads, lines)}<p class='small'>Quarters of the users by the mean of both models' "
        "scores: ranked by one of them, the lucky would seem to lose.</p>"
    )


def _rows(heads: str, lines: Sequence[tuple[str, Sequence[str]]]) -> str:
    """A table of lines that each have a name. `heads`: HTML; the rest is escaped."""
    body = "".join(
        f"<tr><th scope='row'>{escape(name)}</th>{''.join(map(cell, cells))}</tr>"
        for name, cells in lines
    )
    return (
        f'<div class="wide"><table><thead><tr><th></th>{heads}</tr></thead><tbody>{body}</tbody>'
        "</table></div>"
    )


def _hurt(found: Found, before: str, scores: tuple[Scores, Scores], change: Change) -> str:
    """Those who lose most, by name. `scores`: then, of what is called `before`, and now."""
    known = [i for i, x in enumerate(change.each) if x < 0]
    worst = sorted(known, key=lambda i: change.each[i])[:_WORST]
    if not worst:
        return "<p>Nobody is worse off.</p>"
    lines = []
    for i in worst:
        ends = [sum(seed[i] for seed in each) / len(each) for each in scores]
        cells = [units.score(x, found.metric.unit) for x in ends]
        lines.append((found.users[i], [*cells, str(found.rows["test"][i])]))
    heads = "".join(f"<th>{escape(text)}</th>" for text in (before, "now", "rows"))
    return f"<h3>Who loses most</h3>{_rows(heads, lines)}"


def _tables(found: Found) -> str:
    tested = show.listed(found)
    every = [e for e in found.entries.values() if e.taken is not None]
    by_size = sorted(every, key=lambda e: found.figures(e).size)
    front = found.front
    served = [
        [
            *_takes(found, e),
            *map(cell, show.scores(found, quality(e.test[found.metric.name], found.metric))),
            *_against_large(found, e),
            *(cell(_other(found, e, name)) for name in found.others),
        ]
        for e in tested
    ]
    tried = [
        [
            *_takes(found, e),
            cell(units.duration(e.taken.load) if e.taken else units.UNKNOWN),
            *_validated(found, e),
            cell("yes" if e in front else "no" if e.scores else units.UNKNOWN),
        ]
        for e in by_size
    ]
    takes = ["file", f"time p50 {SCALED}", f"p95 {SCALED}", "memory"]
    return (
        "<h2>The figures</h2>\n<h3>Test rows, served once: the front and what it is held "
        "against</h3>\n"
        + _table(
            found, tested,
            [*takes, "mean", "p10", "worst 10%", "against large", "worse off", "better off",
             *map(escape, found.others)],
            served,
        )
        + "<h3>Validation rows, by which was chosen: all that was tried</h3>\n"
        + _table(found, by_size, [*takes, "load", "mean", "p10", "worst 10%", "front"], tried)
    )  # fmt: skip


def _takes(found: Found, entry: Entry) -> list[str]:
    f = found.figures(entry)
    return [
        cell(units.size(f.size)),
        cell(units.duration(f.p50), "modelled"),
        cell(units.duration(f.p95), "modelled"),
        cell(units.size(f.memory)),
    ]


def _against_large(found: Found, entry: Entry) -> list[str]:
    if entry is found.large:
        return [cell(units.UNKNOWN)] * 3
    c = show.whom(found, entry, found.large)
    return [cell(x) for x in (show.gap(found, c.mean), units.share(c.worse), units.share(c.better))]


def _validated(found: Found, entry: Entry) -> list[str]:
    if not entry.scores:
        return [cell(units.UNKNOWN)] * 3
    return list(
        map(cell, show.scores(found, quality(entry.scores[found.metric.name], found.metric)))
    )


def _other(found: Found, entry: Entry, name: str) -> str:
    """A further metric's mean over users and seeds."""
    values = [x for seed in entry.test[name] for x in seed if not math.isnan(x)]
    return units.number(sum(values) / len(values), 4) if values else units.UNKNOWN


def _table(
    found: Found, entries: Sequence[Entry], heads: Sequence[str], cells: Sequence[Sequence[str]]
) -> str:
    body = []
    for entry, line in zip(entries, cells, strict=True):
        chosen = entry is found.choice
        style = ' class="choice-row"' if chosen else ""
        mark = '<span class="mark">chosen</span>' if chosen else ""
        name = f"<th scope='row'>{escape(entry.title)}{mark}</th>"
        body.append(f"<tr{style}>{name}{''.join(line)}</tr>")
    head = "".join(f"<th>{name}</th>" for name in heads)
    return (
        f'<div class="wide"><table><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>\n"
    )


def _basis(found: Found, command: str) -> str:
    rows = found.rows["test"]
    taken = found.large.taken
    values = {
        "Users": f"{len(found.users)} device users; {min(rows)} to {max(rows)} test rows each",
        "Seeds": str(found.seeds),
        "Kitestring": __version__,
        "Runtime": taken.runtime if taken else units.UNKNOWN,
        "Machine": machine(),
    }
    if found.seconds is not None:
        values["The search took"] = units.duration(found.seconds)
    again = f"<p><code>{escape(command)}</code></p>\n" if command else ""
    return (
        f"<h2>How the figures come about</h2>\n{bullets(show.basis(found.scale))}"
        f"<h2>To reproduce</h2>\n{again}{facts(values)}"
    )


def _figure(title: str, svg: str, caption: str) -> str:
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)
    return f"<figure><h3>{escape(title)}</h3>\n{svg}\n<figcaption>{caption}</figcaption></figure>\n"
