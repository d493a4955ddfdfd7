"""The report: one HTML file with everything a comparison found, for phones, paper and dark rooms.

It asks nothing of the network and needs no script. Measured figures are set upright; simulated and
modelled ones are slanted and carry a tilde.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from html import escape
from pathlib import Path

import numpy as np

from kitestring import units
from kitestring.comparison.results import Comparison, Row, Traffic
from kitestring.core import KINDS
from kitestring.errors import RunError
from kitestring.report import terminal
from kitestring.report.decide import Verdict
from kitestring.report.html import bullets, cell, document, facts, plain, settings
from kitestring.report.plots import bytes_plot, rounds_plot, users_plot
from kitestring.report.prices import FIGURES, MONTH, Prices, mean_daily, mean_traffic
from kitestring.report.summary import cloud_calls, cloud_flops, latency, measured, quality

SHOWN_LEAVES = 8
SIMULATED = '<span class="tag">simulated</span>'
MODELLED = '<span class="tag">modelled</span>'
PRICED = '<span class="tag">from the prices</span>'


def write(
    comparison: Comparison, verdict: Verdict, prices: Prices, path: Path, *, command: str = ""
) -> None:
    """Write the report to `path`, all of it or nothing; `command` is what a reader would type."""
    _replace(path, page(comparison, verdict, prices, command))


def write_plot(comparison: Comparison, prices: Prices, path: Path) -> None:
    """Write quality against bytes alone, as an SVG for light and dark pages."""
    _replace(path, bytes_plot(comparison, prices, page=False))


def page(comparison: Comparison, verdict: Verdict, prices: Prices, command: str = "") -> str:
    """The report as HTML."""
    task = escape(comparison.task)
    parts = [
        f"<h1>Kitestring: {task}</h1>",
        f"<p>{escape(comparison.about)}</p>",
        _verdict(comparison, verdict),
        _plots(comparison, prices),
        _tables(comparison, verdict, prices),
        _crossing(comparison),
        _large(comparison),
        _settings(comparison),
        _basis(comparison, prices),
        _reproduce(comparison, command),
    ]
    return document(f"Kitestring: {comparison.task}", parts)


def _verdict(comparison: Comparison, verdict: Verdict) -> str:
    said = [f'<p class="choice">{escape(verdict.headline)}</p>']
    limits = f"<code>{escape(str(verdict.limits))}</code>" if verdict.limits.each else "none given"
    said.append(f'<p class="muted">Limits: {limits}</p>')
    for heading, sentences in (("Why", verdict.reasons), ("What would change it", verdict.changes)):
        if sentences:
            said.append(f"<h3>{heading}</h3>{bullets(sentences)}")
    notes = bullets(comparison.notes)
    return f'<section class="verdict">{"".join(said)}</section>\n{notes}'


def _plots(comparison: Comparison, prices: Prices) -> str:
    if not measured(comparison):
        return ""
    better = "higher" if comparison.higher_is_better else "lower"
    metric = escape(comparison.metric)
    figures = [
        _figure(
            "Quality against bytes",
            bytes_plot(comparison, prices),
            f"Mean {metric} over users ({better} is better, and up); bars span the seeds. "
            "The dashed line is the Pareto front: nothing else is both better and smaller. "
            f"At {units.number(prices.requests_per_day)} requests a day, learning repeated every "
            f"{units.number(prices.learn_every_days)} days. Marks: circle baseline, square "
            "parameters, triangle features, diamond data, cross request.",
        ),
        _figure(
            "Who is served how well",
            users_plot(comparison),
            f"{metric.capitalize()} of each user on test rows, averaged over the seeds; better is "
            "right. Bar: the middle half of the users; tick: the median; tail: to p10, the "
            "badly served end. Dashed: the median on the device alone.",
        ),
    ]
    if rounds := rounds_plot(comparison):
        figures.append(
            _figure(
                "Quality over the rounds",
                rounds,
                f"{metric.capitalize()} on validation rows, averaged over the seeds: thick the "
                "mean over users, thin p10. Rows that do not learn in rounds are not drawn.",
            )
        )
    return (
        f'<h2>Quality, at what cost and for whom</h2>\n<div class="plots">{"".join(figures)}</div>'
    )


def _figure(title: str, svg: str, caption: str) -> str:
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)
    return f"<figure><h3>{escape(title)}</h3>\n{svg}\n<figcaption>{caption}</figcaption></figure>\n"


def _tables(comparison: Comparison, verdict: Verdict, prices: Prices) -> str:
    rows, unit = measured(comparison), comparison.unit
    scores = {row.name: quality(row, comparison) for row in rows}
    shared = "%" if unit == "%" else ""
    others = sorted({name for row in rows for seed in row.seeds for name in seed.others})
    served = [
        [
            cell(terminal.spread(scores[row.name], shared)),
            cell(units.score(scores[row.name].p10, shared)),
            cell(units.score(scores[row.name].worst10, shared)),
            cell(units.share(scores[row.name].better_off)),
            *(cell(_other(row, name)) for name in others),
            cell(units.duration(latency(row)[0]), "modelled"),
            cell(units.duration(latency(row)[1]), "modelled"),
        ]
        for row in rows
    ]
    days = {row.name: mean_daily(row, prices, comparison.device_users) for row in rows}
    costs = [
        [
            cell(units.size(days[row.name].up.total)),
            cell(units.size(days[row.name].down.total)),
            cell(units.energies(days[row.name].joules), "modelled"),
            cell(units.number(1000 * cloud_calls(row))),
            cell(units.operations(1000 * cloud_flops(row))),
            cell(units.money(days[row.name].compute * MONTH * 1000), "modelled"),
            cell(units.money(days[row.name].traffic * MONTH * 1000), "modelled"),
            cell(units.money(days[row.name].requests * MONTH * 1000), "modelled"),
            cell(units.money(days[row.name].fleet_month), "modelled"),
        ]
        for row in rows
    ]
    learnt = [
        [
            cell(str(_mean([seed.learning.rounds for seed in row.seeds]))),
            cell(units.duration(_average([s.learning.seconds for s in row.seeds])), "modelled"),
            cell(units.duration(_average([s.learning.clock for s in row.seeds])), "modelled"),
            cell(units.operations(_average([s.learning.flops for s in row.seeds]))),
            cell(units.operations(_average([s.learning.cloud_flops for s in row.seeds]))),
            cell(str(sum(seed.learning.lost for seed in row.seeds))),
            cell(str(sum(seed.learning.refused for seed in row.seeds))),
        ]
        for row in rows
    ]
    better = "higher" if comparison.higher_is_better else "lower"
    shown = f", in {escape(unit)}" if unit not in ("", "%") else ""
    quality_heads = [
        f"{escape(comparison.metric)}, mean ± seeds",
        "p10",
        "worst 10%",
        "users better off",
        *(escape(name) for name in others),
        f"latency p50 {SIMULATED}",
        f"latency p95 {SIMULATED}",
    ]
    cost_heads = [
        "up",
        "down",
        f"energy, low-high {MODELLED}",
        "cloud calls per 1000",
        "cloud operations per 1000",
        f"$/month, computing {PRICED}",
        f"$/month, traffic {PRICED}",
        f"$/month, requests {PRICED}",
        f"$/month, all {PRICED}",
    ]
    learn_heads = [
        "rounds",
        f"time of a device {SIMULATED}",
        f"start to end {SIMULATED}",
        "operations of a device",
        "operations of the cloud",
        "replies lost",
        "replies refused",
    ]
    lines = terminal.footnotes(comparison, scores)
    return (
        '<h2>The figures</h2>\n<p class="muted">Upright figures were measured on held-out rows or '
        'read off the ledger. <span class="modelled">~ Slanted ones</span> were simulated with the '
        "device profile, modelled, or follow from the prices.</p>\n"
        f"<h3>Quality per user ({better} is better{shown}) and latency</h3>\n"
        + _table(rows, quality_heads, served, verdict)
        + "<p class='small'>± is the standard deviation over seeds. p10: nine users in ten are "
        "served at least this well. Worst 10%: the mean over the worst tenth of the users. Better "
        "off: than on the device alone, user by user at the same seed.</p>\n"
        "<h3>Cost per device and day; money per month for 1000 devices</h3>\n"
        + _table(rows, cost_heads, costs, verdict)
        + "<h3>Learning, once</h3>\n"
        + _table(rows, learn_heads, learnt, verdict)
        + (bullets(lines) if lines else "")
    )


def _crossing(comparison: Comparison) -> str:
    rows = measured(comparison)
    if not rows:
        return ""
    body = []
    for row in rows:
        learning = [seed.learning for seed in row.seeds]
        serving = [seed.serving for seed in row.seeds]
        deploy = _average([part.deploy_bytes for part in serving])
        down = mean_traffic([part.down for part in learning])
        if deploy:
            leaves = {**down.leaves, "parameters (deploy)": deploy}
            kinds = {**down.kinds, "parameters": down.kinds.get("parameters", 0.0) + deploy}
            down = Traffic(kinds, leaves)
        four = (
            mean_traffic([part.up for part in learning]),
            down,
            mean_traffic([part.up for part in serving]),
            mean_traffic([part.down for part in serving]),
        )
        cells = "".join(f'<td class="words">{_leaves(traffic)}</td>' for traffic in four)
        body.append(f"<tr><th scope='row'>{escape(row.title)}</th>{cells}</tr>")
    key = "".join(f'<span class="{kind}"></span>{kind}' for kind in KINDS)
    return (
        "<h2>What left the device, and what came back</h2>\n"
        '<p class="muted">Bytes that were packed, per device, by compartment and leaf, means over '
        "devices and seeds. A bar shows the shares within its cell, not its size.</p>\n"
        f'<p class="key small">{key}</p>\n'
        '<div class="wide"><table><thead><tr><th></th><th class="words">learning once, up</th>'
        '<th class="words">learning once, down</th><th class="words">each request, up</th>'
        f'<th class="words">each request, down</th></tr></thead><tbody>{"".join(body)}'
        "</tbody></table></div>"
    )


def _leaves(traffic: Traffic) -> str:
    if traffic.total <= 0:
        return '<span class="muted">nothing</span>'
    bars = "".join(
        f'<span class="{escape(kind)}" style="flex:{size / traffic.total:.4f} 0 0"></span>'
        for kind, size in traffic.kinds.items()
        if size > 0
    )
    leaves = sorted(traffic.leaves.items(), key=lambda leaf: -leaf[1])
    lines = [f"<code>{escape(name)}</code> {units.size(size)}" for name, size in leaves]
    if len(lines) > SHOWN_LEAVES:
        rest = sum(size for _, size in leaves[SHOWN_LEAVES:])
        hidden = "<br>".join(lines[SHOWN_LEAVES:])
        lines = [
            *lines[:SHOWN_LEAVES],
            f"<details><summary>{len(leaves) - SHOWN_LEAVES} more, {units.size(rest)}</summary>"
            f"{hidden}</details>",
        ]
    return (
        f'<b>{units.size(traffic.total)}</b><div class="bar">{bars}</div>'
        f'<span class="small">{"<br>".join(lines)}</span>'
    )


def _large(comparison: Comparison) -> str:
    rows = []
    for row in measured(comparison):
        before = [s.large_before for s in row.seeds if s.large_before is not None]
        after = [s.large_after for s in row.seeds if s.large_after is not None]
        if before or after:
            ends = [
                units.score(_average(values), comparison.unit) if values else units.UNKNOWN
                for values in (before, after)
            ]
            rows.append(
                f"<tr><th scope='row'>{escape(row.title)}</th>{''.join(map(cell, ends))}</tr>"
            )
    if not rows:
        return ""
    return (
        "<h2>The large model, before and after</h2>\n"
        f'<p class="muted">Its {escape(comparison.metric)}, the mean over device users and seeds: '
        "as it came, and after learning. A dash: not evaluated, or the row leaves it alone.</p>\n"
        '<div class="wide"><table><thead><tr><th></th><th>before</th><th>after</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _settings(comparison: Comparison) -> str:
    body, trials = [], []
    for row in comparison.rows:
        state = f"did not run: {row.missing}" if row.missing else settings(row.settings)
        how = sorted({seed.computed for seed in row.seeds})
        seconds = _average([seed.wall_s for seed in row.seeds]) if row.seeds else float("nan")
        body.append(
            f"<tr><th scope='row'>{escape(row.title)}</th>"
            f'<td class="words">{escape(row.says)}</td><td class="words">{escape(state)}</td>'
            f'<td class="words">{escape(row.source)}</td>'
            f'<td class="words">{escape("; ".join(how))}</td>'
            f"{cell(units.UNKNOWN if row.missing else units.duration(seconds))}</tr>"
        )
        if row.trials:
            lines = [
                f"{settings(trial.get('settings', {}))}: "
                f"{units.score(float(trial.get('score', float('nan'))), comparison.unit)}"
                for trial in row.trials
            ]
            trials.append(
                f"<details><summary>{escape(row.title)}: settings tried "
                f"({len(lines)})</summary>"
                f"{bullets(lines)}</details>"
            )
    return (
        "<h2>Settings and trials</h2>\n"
        f"<p>Budget: {escape(comparison.budget)}. Up to {comparison.trials} settings were tried "
        f"per row, chosen on validation rows.</p>\n"
        '<div class="wide"><table><thead><tr><th></th><th class="words">what it does</th>'
        '<th class="words">settings</th><th class="words">from</th>'
        '<th class="words">computed by</th><th>wall time, one seed</th></tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>\n" + "".join(trials)
    )


def _basis(comparison: Comparison, prices: Prices) -> str:
    low, middle, high = comparison.rows_per_device
    data = {
        "Users": f"{comparison.device_users} on devices, {comparison.pool_users} in the pool",
        "Training rows per device": f"{units.number(low)} to {units.number(high)}, "
        f"median {units.number(middle)}",
        "One request": comparison.request,
        "Small model": f"{comparison.small_parameters:,} parameters",
        "Large model": f"{comparison.large_parameters:,} parameters",
    }
    priced = "".join(
        f"<tr><th scope='row'>{escape(means)}</th>{cell(_figure_of(getattr(prices, name)))}"
        f'<td class="words">{escape(prices.sources.get(name, ""))}</td></tr>'
        for section in FIGURES.values()
        for name, means in section.items()
    )
    profile = {name: plain(value) for name, value in comparison.profile.items() if value}
    return (
        f"<h2>What it rests on</h2>\n<h3>Task</h3>\n{facts(data)}"
        f"<h3>Device profile {MODELLED}</h3>\n<p class='muted'>Latency, time and energy follow "
        f"from these figures; no device was measured here unless a figure says so.</p>"
        f"{facts(profile)}"
        '<h3>Prices and use</h3>\n<div class="wide"><table><thead><tr><th></th><th>value</th>'
        f'<th class="words">where it comes from</th></tr></thead><tbody>{priced}</tbody></table>'
        "</div>"
    )


def _reproduce(comparison: Comparison, command: str) -> str:
    seeds = sorted({seed.seed for row in measured(comparison) for seed in row.seeds})
    about = {
        "Kitestring": comparison.version,
        "Machine": comparison.machine,
        "Seeds": ", ".join(map(str, seeds)) or "none",
    }
    typed = f"<p><code>{escape(command)}</code></p>\n" if command else ""
    return f"<h2>To reproduce</h2>\n{typed}{facts(about)}"


def _table(
    rows: Sequence[Row], heads: Sequence[str], cells: Sequence[Sequence[str]], verdict: Verdict
) -> str:
    """One row per collaboration; `heads` and `cells` are HTML."""
    body = []
    for row, line in zip(rows, cells, strict=True):
        style, mark = "", ""
        if row.name == verdict.choice:
            style, mark = ' class="choice-row"', '<span class="mark">recommended</span>'
        elif row.name in verdict.excluded:
            style, mark = ' class="out-row"', '<span class="mark">left out by a limit</span>'
        body.append(
            f"<tr{style}><th scope='row'>{escape(row.title)}{mark}</th>{''.join(line)}</tr>"
        )
    head = "".join(f"<th>{name}</th>" for name in heads)
    return (
        f'<div class="wide"><table><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>\n"
    )


def _figure_of(value: float) -> str:
    return f"{value:.3g}" if value >= 1e6 else f"{value:g}"


def _other(row: Row, name: str) -> str:
    """The mean over users and seeds of a further metric, NaN left out."""
    values = [v for seed in row.seeds for v in seed.others.get(name, []) if v == v]
    return units.number(_average(values), 4) if values else units.UNKNOWN


def _average(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _mean(values: Sequence[int]) -> str:
    """A count that may differ between seeds."""
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}-{high}"


def _replace(path: Path, text: str) -> None:
    """Write `path` as a whole or leave it as it was."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)
    except OSError as error:
        with suppress(OSError):
            beside.unlink()
        mend = "Free some space there, or choose another path"
        raise RunError(f"cannot write it: {error.strerror}", str(path), mend) from error
