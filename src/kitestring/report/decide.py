"""What the limits exclude and which row to use: every sentence from a figure.

The rule. Rows that break a limit are left out. Of the rest, the one with the best mean per-user
quality leads. A row that it leads by no more than two standard errors (paired over users and over
seeds, whichever error is larger; see `summary.lead`) is tied with it, and of tied rows the
cheapest by dollars, then by bytes, is recommended. The runner-up is what the same rule picks once
the recommended row is gone. All figures are means over the seeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from kitestring import units
from kitestring.comparison.results import Comparison, Row
from kitestring.report.limits import Limit, Limits, says
from kitestring.report.limits import parse_limits as parse_limits
from kitestring.report.prices import Daily, Prices, mean_daily
from kitestring.report.summary import Lead, Quality, cloud_calls, latency, lead, measured
from kitestring.report.summary import quality as summarise


@dataclass(frozen=True)
class Breach:
    """A limit that a row breaks: its value, and that value over the limit (inf for "no ...")."""

    limit: Limit
    value: float
    factor: float


@dataclass(frozen=True)
class Verdict:
    """What to use, what was left out and why, and what would change the choice; rows by name."""

    limits: Limits
    choice: str | None
    best: str | None  # the best mean quality among the allowed rows
    tied: tuple[str, ...]  # with the best, itself included; empty if it leads clearly
    runner_up: str | None
    excluded: dict[str, tuple[Breach, ...]] = field(default_factory=dict)
    nearest: str | None = None  # where nothing is left
    headline: str = ""
    reasons: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Entry:
    row: Row
    quality: Quality
    daily: Daily
    p95: float
    calls: float  # share


def decide(comparison: Comparison, limits: Limits, prices: Prices) -> Verdict:
    """Apply the rule at the top of this module."""
    entries = [_entry(row, comparison, prices) for row in measured(comparison)]
    scored = [e for e in entries if not math.isnan(e.quality.mean)]
    excluded = {e.row.name: breaches for e in entries if (breaches := _breaches(e, limits.each))}
    allowed = [e for e in scored if e.row.name not in excluded]
    if not allowed:
        return _nothing(comparison, limits, scored, excluded)
    best, tied, choice = _pick(allowed, comparison)
    rest = [e for e in allowed if e is not choice]
    runner = _pick(rest, comparison)[2] if rest else None
    return Verdict(
        limits=limits,
        choice=choice.row.name,
        best=best.row.name,
        tied=tuple(e.row.name for e in tied) if len(tied) > 1 else (),
        runner_up=runner.row.name if runner else None,
        excluded=excluded,
        headline=_headline(choice, comparison),
        reasons=tuple(_reasons(best, tied, choice, runner, scored, excluded, comparison)),
        changes=tuple(
            _changes(choice, runner, allowed, scored, excluded, comparison, limits, prices)
        ),
    )


def _entry(row: Row, comparison: Comparison, prices: Prices) -> _Entry:
    daily = mean_daily(row, prices, comparison.device_users)
    return _Entry(row, summarise(row, comparison), daily, latency(row)[1], cloud_calls(row))


def _value(entry: _Entry, limit: Limit) -> float:
    daily = entry.daily
    if limit.what in ("bytes", "crossing"):
        ways = {"up": (daily.up,), "down": (daily.down,), "both": (daily.up, daily.down)}
        if limit.what == "bytes":
            return sum(traffic.total for traffic in ways[limit.way])
        return sum(traffic.kinds.get(limit.compartment, 0.0) for traffic in ways[limit.way])
    if limit.what == "dollars":
        return daily.dollars
    if limit.what == "joules":
        return daily.joules[1]
    return entry.p95 if limit.what == "latency" else entry.calls


def _breaches(entry: _Entry, limits: Sequence[Limit]) -> tuple[Breach, ...]:
    broken = []
    for limit in limits:
        value = _value(entry, limit)
        # A limit given in decimal must not be broken by the last bit of a mean that meets it.
        if value > limit.most and not math.isclose(value, limit.most, rel_tol=1e-9):
            factor = value / limit.most if limit.most > 0 else math.inf
            broken.append(Breach(limit, value, factor))
    return tuple(broken)


def _rank(entry: _Entry, comparison: Comparison) -> float:
    return entry.quality.mean if comparison.higher_is_better else -entry.quality.mean


def _pick(entries: Sequence[_Entry], comparison: Comparison) -> tuple[_Entry, list[_Entry], _Entry]:
    """The best, those tied with it (itself first), and the cheapest of these."""
    best = max(entries, key=lambda e: _rank(e, comparison))
    others = (e for e in entries if e is not best)
    tied = [best, *(e for e in others if not lead(best.row, e.row, comparison).clear)]
    return best, tied, min(tied, key=lambda e: (e.daily.dollars, e.daily.bytes))


def _nothing(
    comparison: Comparison,
    limits: Limits,
    scored: Sequence[_Entry],
    excluded: dict[str, tuple[Breach, ...]],
) -> Verdict:
    if not scored:
        return Verdict(limits, None, None, (), None, excluded, headline="No row was measured.")

    def far(entry: _Entry) -> tuple[int, float, float]:
        breaches = excluded[entry.row.name]
        worst = max(breach.factor for breach in breaches)
        return len(breaches), worst, -_rank(entry, comparison)

    near = min(scored, key=far)
    broken = _broken(excluded[near.row.name])
    value = units.score(near.quality.mean, comparison.unit)
    return Verdict(
        limits=limits,
        choice=None,
        best=None,
        tied=(),
        runner_up=None,
        excluded=excluded,
        nearest=near.row.name,
        headline=(
            f"No row meets all limits ({limits}). Nearest is {near.row.title}, {comparison.metric} "
            f"{value}: it needs {broken}."
        ),
        reasons=tuple(_exclusions(scored, excluded)),
    )


def _headline(choice: _Entry, comparison: Comparison) -> str:
    quality, daily = choice.quality, choice.daily
    seeds = "1 seed" if quality.seeds == 1 else f"{quality.seeds} seeds"
    return (
        f"Use {choice.row.title}: {comparison.metric} "
        f"{units.score(quality.mean, comparison.unit)} ({quality.users} users, {seeds}), "
        f"{units.size(daily.bytes)} per device and day, {units.duration(choice.p95)} p95 "
        f"(simulated), {units.money(daily.fleet_month)} a month for 1000 devices."
    )


def _reasons(
    best: _Entry,
    tied: Sequence[_Entry],
    choice: _Entry,
    runner: _Entry | None,
    scored: Sequence[_Entry],
    excluded: dict[str, tuple[Breach, ...]],
    comparison: Comparison,
) -> list[str]:
    unit = comparison.unit
    said = []
    if choice.quality.better_off is not None:
        value = units.score(choice.quality.worst10, unit)
        said.append(
            f"{units.share(choice.quality.better_off)} of the users are better off than on the "
            f"device alone; the worst served tenth has {comparison.metric} {value}."
        )
    if len(tied) > 1:
        names = _list([e.row.title for e in tied])
        bill = units.money(choice.daily.fleet_month)
        if choice is best:
            said.append(
                f"{names} are tied: the lead of {best.row.title} over each of the others is within "
                f"two standard errors. {best.row.title} is also the cheapest of them ({bill} per "
                f"month for 1000 devices)."
            )
        else:
            ahead = lead(best.row, choice.row, comparison)
            saved = units.money(best.daily.fleet_month)
            cheaper = f"({bill} against {saved} a month for 1000 devices)"
            if choice.daily.dollars == best.daily.dollars:
                sizes = units.size(choice.daily.bytes), units.size(best.daily.bytes)
                cheaper = f"(the same dollars; {sizes[0]} against {sizes[1]} a day)"
            said.append(
                f"{best.row.title} has the best mean, "
                f"{units.score(best.quality.mean, unit)}, but its lead of {_lead(ahead, unit)} is "
                f"within two standard errors: {names} are tied, and {choice.row.title} is the "
                f"cheapest of them {cheaper}."
            )
    if runner:
        ahead = lead(choice.row, runner.row, comparison)
        word = "ahead" if ahead.mean >= 0 else "behind"
        said.append(
            f"Runner-up: {runner.row.title}, {comparison.metric} "
            f"{units.score(runner.quality.mean, unit)}, "
            f"{units.money(runner.daily.fleet_month)} a month for 1000 devices. "
            f"{choice.row.title} is {_lead(ahead, unit)} {word}."
        )
    return said + _exclusions(scored, excluded)


def _exclusions(scored: Sequence[_Entry], excluded: dict[str, tuple[Breach, ...]]) -> list[str]:
    return [
        f"Left out: {e.row.title}, which needs {_broken(excluded[e.row.name])}."
        for e in scored
        if e.row.name in excluded
    ]


def _changes(
    choice: _Entry,
    runner: _Entry | None,
    allowed: Sequence[_Entry],
    scored: Sequence[_Entry],
    excluded: dict[str, tuple[Breach, ...]],
    comparison: Comparison,
    limits: Limits,
    prices: Prices,
) -> list[str]:
    said = []
    out = [e for e in scored if e.row.name in excluded]
    if out:
        said.append(_without_limits(choice, out, excluded, comparison))
    if len(allowed) > 1:
        said.append(_if_p10_counted(choice, allowed, comparison))
    said += _headroom(choice, limits, comparison, prices)
    if runner:
        said += _flip(choice, runner, comparison, prices, "requests_per_day")
        said += _flip(choice, runner, comparison, prices, "gpu_hour")
    return said


def _without_limits(
    choice: _Entry,
    out: Sequence[_Entry],
    excluded: dict[str, tuple[Breach, ...]],
    comparison: Comparison,
) -> str:
    best = max(out, key=lambda e: _rank(e, comparison))
    unit, ahead = comparison.unit, lead(best.row, choice.row, comparison)
    value = units.score(best.quality.mean, unit)
    if not ahead.mean > 0:
        return (
            f"The limits cost no quality: the best row left out, {best.row.title}, has "
            f"{comparison.metric} {value}."
        )
    noise = "" if ahead.clear else ", which is within two standard errors"
    broken = _broken(excluded[best.row.name])
    return (
        f"The best row left out, {best.row.title}, would gain {_lead(ahead, unit)}{noise} "
        f"({comparison.metric} {value}). It needs {broken}."
    )


def _if_p10_counted(choice: _Entry, allowed: Sequence[_Entry], comparison: Comparison) -> str:
    shown = {units.score(e.quality.p10, comparison.unit) for e in allowed}
    if len(shown) == 1:
        return f"p10 tells no two rows apart: it is {shown.pop()} for all of them."
    first = min(allowed, key=lambda e: _p10_rank(e, comparison))
    best, own = (units.score(e.quality.p10, comparison.unit) for e in (first, choice))
    if own == best:
        return f"If p10 were what counts, {choice.row.title} would still be first ({own})."
    return (
        f"If p10 were what counts, {first.row.title} would be first "
        f"({best} against {own} for {choice.row.title})."
    )


def _p10_rank(entry: _Entry, comparison: Comparison) -> float:
    return -entry.quality.p10 if comparison.higher_is_better else entry.quality.p10


def _headroom(choice: _Entry, limits: Limits, comparison: Comparison, prices: Prices) -> list[str]:
    """The requests per day at which the choice would first break a limit, if it ever does.

    Bytes, dollars and joules per day are linear in the requests."""
    turns = []
    still, once = (
        _entry(choice.row, comparison, replace(prices, requests_per_day=asked))
        for asked in (0.0, 1.0)
    )
    for limit in limits.each:
        fixed = _value(still, limit)
        slope = _value(once, limit) - fixed
        if slope > 0 and limit.most > fixed:
            turns.append(((limit.most - fixed) / slope, limit.text))
    if not turns:
        return []
    turn, text = min(turns)
    return [
        f"Above {units.number(turn)} requests per device and day (now "
        f"{units.number(prices.requests_per_day)}), {choice.row.title} would break {text}."
    ]


def _flip(
    choice: _Entry,
    runner: _Entry,
    comparison: Comparison,
    prices: Prices,
    name: Literal["requests_per_day", "gpu_hour"],
) -> list[str]:
    """The value of one figure at which the cheaper of the two rows changes, if there is one.

    Dollars per day are linear in both figures, so two points give the crossing."""

    def gap(value: float) -> float:
        at = (
            replace(prices, requests_per_day=value)
            if name == "requests_per_day"
            else replace(prices, gpu_hour=value)
        )
        ours, theirs = (mean_daily(e.row, at, comparison.device_users) for e in (choice, runner))
        return ours.dollars - theirs.dollars

    now = prices.requests_per_day if name == "requests_per_day" else prices.gpu_hour
    fixed, slope, today = gap(0.0), gap(1.0) - gap(0.0), gap(now)
    # Dollars per day this small are rounding, not a difference between the rows.
    if abs(slope) < 1e-15 or abs(today) < 1e-15:
        return []
    turn = -fixed / slope
    if not 0 < turn < math.inf:
        return []
    cheap, dear = (choice, runner) if today < 0 else (runner, choice)
    side = "above" if turn > now else "below"
    if name == "requests_per_day":
        here, there = units.number(now), f"{units.number(turn)} requests per device and day"
        what = f"At {here} requests per device and day"
    else:
        here, there = units.money(now), f"{units.money(turn)} per GPU-hour"
        what = f"At {here} per GPU-hour"
    return [
        f"{what}, {cheap.row.title} is cheaper than {dear.row.title}; {side} {there}, "
        f"{dear.row.title} is."
    ]


def _lead(ahead: Lead, unit: str) -> str:
    """The size of a lead, with its standard error."""
    error = "" if math.isinf(ahead.error) else f" (standard error {units.gap(ahead.error, unit)})"
    return f"{units.gap(abs(ahead.mean), unit)}{error}"


def _broken(breaches: Sequence[Breach]) -> str:
    return _list([_breach(breach) for breach in breaches])


def _breach(breach: Breach) -> str:
    value = says(breach.limit, breach.value)
    if math.isinf(breach.factor):
        return f"{value} (limit: {breach.limit.text})"
    if breach.factor < 1.1:
        over = units.number(100 * (breach.factor - 1), 2)
        return f"{value} ({over}% over the limit of {breach.limit.text})"
    return f"{value} ({units.number(breach.factor)} times the limit of {breach.limit.text})"


def _list(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
