"""Limits in words, the rule that picks a row, and the sentences that follow from figures."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kitestring.comparison.results import Comparison, Row
from kitestring.errors import SettingError
from kitestring.report import prices
from kitestring.report.decide import decide
from kitestring.report.limits import Limits, parse_limits
from kitestring.report.prices import Prices
from synthetic import comparison, seed_result, traffic

PRICES = prices.load()
WHOLE = comparison()
LIMITS = st.sampled_from(
    [
        "1MB/day",
        "100kB/day up",
        "30kB/day down",
        "10B/day",
        "50ms",
        "1ms",
        "$0.00001/day",
        "5J/day",
        "1J/day",
        "no data up",
        "no features",
        "no parameters down",
        "10% cloud",
        "0% cloud",
    ]
)


def row(name: str, scores: list[float], **serving: float) -> Row:
    """One seed that learns and sends nothing, but for what `serving` says."""
    base = seed_result("device_only", 0, 1)
    seed = replace(
        base,
        users=[f"u{u}" for u in range(len(scores))],
        scores=scores,
        learning=replace(base.learning, cloud_flops=0.0),
        serving=replace(base.serving, **serving),  # type: ignore[arg-type]
    )
    return Row(name, name.title(), "baseline", "made up", "made up", seeds=[seed])


def of(*rows: Row, higher: bool = True) -> Comparison:
    return replace(comparison(only=(), higher_is_better=higher), rows=list(rows), device_users=4)


def chosen(c: Comparison, limits: str = "", at: Prices = PRICES) -> str | None:
    return decide(c, parse_limits(limits), at).choice


@pytest.mark.parametrize(
    ("text", "what", "most", "way"),
    [
        ("1MB/day", "bytes", 1e6, "both"),
        ("1.5 GB per day", "bytes", 1.5e9, "both"),
        ("200 kB/day up", "bytes", 2e5, "up"),
        ("200kb down/day", "bytes", 2e5, "down"),
        ("50ms", "latency", 0.05, "both"),
        (".5 s", "latency", 0.5, "both"),
        ("$0.01/day", "dollars", 0.01, "both"),
        ("2 kJ a day", "joules", 2000.0, "both"),
        ("no features", "crossing", 0.0, "both"),
        ("no  data   up", "crossing", 0.0, "up"),
        ("10 % cloud", "cloud", 0.1, "both"),
    ],
)
def test_limits_are_read(text: str, what: str, most: float, way: str) -> None:
    (limit,) = parse_limits(text).each
    assert (limit.what, limit.way) == (what, way)
    assert limit.most == pytest.approx(most)


def test_several_limits_and_none() -> None:
    assert [limit.what for limit in parse_limits("1MB/day, 50ms, no data up").each] == [
        "bytes",
        "latency",
        "crossing",
    ]
    assert parse_limits("").each == ()
    assert str(parse_limits(" 50ms ,no data up,")) == "50ms, no data up"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("cheap", "such as"),
        ("1MB", "Write 1MB/day"),
        ("1Mb/day", "Bits or bytes?"),
        ("1MB/day up, 3 parsecs", "'3 parsecs'"),
        ("no secrets up", "'no secrets up'"),
        ("-5ms", "such as"),
        ("200% cloud", "such as"),
        ("1MB up/day down", "Name one way"),
    ],
)
def test_what_cannot_be_read_is_named(text: str, says: str) -> None:
    with pytest.raises(SettingError) as error:
        parse_limits(text)
    assert says in str(error.value)


@given(
    st.integers(0, 10**6),
    st.sampled_from([("B", 1.0), ("kB", 1e3), ("MB", 1e6), ("GB", 1e9)]),
    st.sampled_from(["", " up", " down"]),
)
def test_bytes_round_trip(n: int, unit: tuple[str, float], way: str) -> None:
    (limit,) = parse_limits(f"{n}{unit[0]}/day{way}").each
    assert limit.most == n * unit[1]
    assert limit.way == (way.strip() or "both")
    assert parse_limits(limit.text).each == (limit,)


@settings(max_examples=40, deadline=None)
@given(st.lists(LIMITS, max_size=4, unique=True), LIMITS)
def test_a_further_limit_allows_no_more(some: list[str], further: str) -> None:
    before = decide(WHOLE, parse_limits(", ".join(some)), PRICES)
    after = decide(WHOLE, parse_limits(", ".join([*some, further])), PRICES)
    assert set(before.excluded) <= set(after.excluded)


@settings(max_examples=40, deadline=None)
@given(st.lists(LIMITS, max_size=5, unique=True), st.booleans())
def test_what_is_recommended_is_allowed(some: list[str], higher: bool) -> None:
    c = comparison(users=8, seeds=2, higher_is_better=higher)
    verdict = decide(c, parse_limits(", ".join(some)), PRICES)
    names = {row.name for row in c.rows}
    allowed = names - set(verdict.excluded)
    assert (verdict.choice in allowed) if allowed else (verdict.choice is None)
    assert verdict.runner_up is None or verdict.runner_up in allowed - {verdict.choice}
    assert (verdict.nearest in names) == (not allowed)
    assert set(verdict.tied) <= allowed
    assert all(b.value > b.limit.most for broken in verdict.excluded.values() for b in broken)
    sentences = [verdict.headline, *verdict.reasons, *verdict.changes]
    assert not any("nan" in s.split() or "inf" in s for s in sentences)


def test_a_clear_lead_wins_whatever_it_costs() -> None:
    good = row("good", [0.9, 0.8, 0.85, 0.95], cloud_calls=1.0)
    cheap = row("cheap", [0.5, 0.4, 0.45, 0.55])
    verdict = decide(of(good, cheap), Limits(), PRICES)
    assert (verdict.choice, verdict.runner_up, verdict.tied) == ("good", "cheap", ())


def test_the_cheapest_of_the_tied_wins() -> None:
    # Differences .3 -.2 .2 -.1: lead .05, standard error .12.
    good = row("good", [0.8, 0.5, 0.9, 0.6], cloud_calls=1.0)
    cheap = row("cheap", [0.5, 0.7, 0.7, 0.7])
    verdict = decide(of(good, cheap), Limits(), PRICES)
    assert (verdict.best, verdict.choice, verdict.tied) == ("good", "cheap", ("good", "cheap"))
    assert any("tied" in s and "($0 against $3.00 a month" in s for s in verdict.reasons)


def test_bytes_break_a_tie_of_dollars() -> None:
    heavy, light = row("heavy", [0.5, 0.6]), row("light", [0.5, 0.6])
    serving = replace(heavy.seeds[0].serving, up=traffic({"data.x": 10.0}))
    heavy = replace(heavy, seeds=[replace(heavy.seeds[0], serving=serving)])
    assert chosen(of(heavy, light)) == "light"


def test_lower_is_better() -> None:
    a, b = row("a", [9.0, 8.0, 9.5]), row("b", [4.0, 3.0, 4.5])
    assert chosen(of(a, b, higher=False)) == "b"
    assert chosen(of(a, b)) == "a"


def test_by_what_factor_a_limit_is_broken() -> None:
    slow = row("slow", [0.9, 0.9], latency_p95=0.2, cloud_calls=0.4)
    fast = row("fast", [0.5, 0.5], latency_p95=0.05)
    verdict = decide(of(slow, fast), parse_limits("50ms, 10% cloud"), PRICES)
    assert verdict.choice == "fast"
    assert [b.factor for b in verdict.excluded["slow"]] == pytest.approx([4.0, 4.0])
    (gain,) = [s for s in verdict.changes if "left out" in s]
    assert "would gain 40 points" in gain
    assert "4 times the limit of 50ms" in gain


def test_what_must_not_cross() -> None:
    verdict = decide(WHOLE, parse_limits("no data up"), PRICES)
    assert set(verdict.excluded) == {"cloud_only", "pooled", "splitnn", "fedgkt", "coda", "cascade"}
    (breach,) = verdict.excluded["pooled"]
    assert breach.value == pytest.approx(900_300 / 30)
    assert math.isinf(breach.factor)
    # What is sent down before the first request counts as parameters.
    down = decide(WHOLE, parse_limits("no parameters down"), PRICES)
    assert "shipped" in down.excluded
    assert "device_only" not in down.excluded


def test_nothing_is_left() -> None:
    one = row("one", [0.5, 0.6], latency_p95=0.3)
    two = row("two", [0.4, 0.5], latency_p95=0.2, cloud_calls=1.0)
    verdict = decide(of(one, two), parse_limits("100ms, 50% cloud"), PRICES)
    assert (verdict.choice, verdict.nearest) == (None, "one")
    assert "No row meets all limits" in verdict.headline
    assert "3 times the limit of 100ms" in verdict.headline


def test_nothing_was_measured() -> None:
    verdict = decide(of(), Limits(), PRICES)
    assert verdict.choice is None
    assert verdict.headline == "No row was measured."


def test_a_row_without_scores_is_not_chosen() -> None:
    assert chosen(of(row("none", [math.nan, math.nan]), row("some", [0.1, 0.2]))) == "some"


def test_p10_can_turn_the_choice() -> None:
    even = row("even", [0.6] * 20)
    uneven = row("uneven", [0.1] * 3 + [0.97] * 17)
    verdict = decide(of(even, uneven), Limits(), replace(PRICES, requests_per_day=0.0))
    assert verdict.choice == "uneven"
    assert any(
        s.startswith("If p10 were what counts, Even would be first") for s in verdict.changes
    )


def test_break_even_requests_by_hand() -> None:
    # A request costs 1e-6 dollars; 300 kB sent down every 30 days cost 9e-7 a day.
    asks = row("asks", [0.9, 0.8], cloud_calls=1.0)
    ships = row("ships", [0.5, 0.4], deploy_bytes=3e5)
    at = replace(PRICES, requests_per_day=0.5)
    verdict = decide(of(asks, ships), Limits(), at)
    assert (
        "At 0.5 requests per device and day, Asks is cheaper than Ships; above 0.9 requests per "
        "device and day, Ships is."
    ) in verdict.changes


def test_no_break_even_where_there_is_none() -> None:
    verdict = decide(of(row("a", [0.9, 0.8]), row("b", [0.5, 0.4])), Limits(), PRICES)
    assert not any("cheaper" in s for s in verdict.changes)


def test_break_even_price_by_hand() -> None:
    # 1.8e17 operations at 5e13 a second are one GPU-hour; the other row pays 1e-6 per request.
    computes = row("computes", [0.9, 0.8], cloud_flops=1.8e17 * 1e-6 / 4)
    asks = row("asks", [0.5, 0.4], cloud_calls=1.0)
    verdict = decide(of(computes, asks), Limits(), PRICES)
    assert (
        "At $2.00 per GPU-hour, Computes is cheaper than Asks; above $4.00 per GPU-hour, Asks is."
    ) in verdict.changes


def test_requests_that_would_break_a_limit() -> None:
    asks = row("asks", [0.9, 0.8], cloud_calls=1.0)
    serving = replace(asks.seeds[0].serving, up=traffic({"data.x": 500.0}))
    asks = replace(asks, seeds=[replace(asks.seeds[0], serving=serving)])
    verdict = decide(of(asks), parse_limits("1MB/day"), PRICES)
    assert (
        "Above 2,000 requests per device and day (now 100), Asks would break 1MB/day."
    ) in verdict.changes


def test_a_p10_that_is_the_same_for_all_decides_nothing() -> None:
    """One test row each: most users score 0 whatever the row, so p10 is 0 everywhere."""
    rows = [
        replace(r, seeds=[replace(s, scores=[0.0] * len(s.scores)) for s in r.seeds])
        for r in WHOLE.rows
    ]
    verdict = decide(replace(WHOLE, rows=rows), parse_limits(""), PRICES)
    assert any("p10 tells no two rows apart" in said for said in verdict.changes)
    assert not any("would be first" in said for said in verdict.changes)
