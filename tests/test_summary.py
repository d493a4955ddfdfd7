"""Quality per user: figures computed by hand, and what must hold for any scores."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kitestring.comparison import results
from kitestring.comparison.results import Comparison, Row
from kitestring.report import summary
from synthetic import comparison, seed_result

SCORES = st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=60)


def row(name: str, *scores: list[float]) -> Row:
    """A row with one seed per list of scores."""
    base = seed_result("device_only", 0, 1)
    seeds = [
        replace(base, seed=n, users=[f"u{u}" for u in range(len(values))], scores=values)
        for n, values in enumerate(scores)
    ]
    return Row(name, name, "baseline", "made up", "made up", seeds=seeds)


def of(*rows: Row, higher: bool = True) -> Comparison:
    return replace(comparison(only=(), higher_is_better=higher), rows=list(rows))


def test_figures_by_hand() -> None:
    alone = row("device_only", [0.1, 0.2, 0.3, 0.4], [0.2, 0.3, 0.4, 0.5])
    tried = row("x", [0.5, 0.2, 0.1, 0.6], [0.7, 0.4, 0.3, 0.8])
    q = summary.quality(tried, of(alone, tried))
    assert q.mean == pytest.approx((0.35 + 0.55) / 2)
    assert (q.low, q.high) == pytest.approx((0.35, 0.55))
    assert q.spread == pytest.approx(0.2 / math.sqrt(2))
    # Sorted: .1 .2 .5 .6 and .3 .4 .7 .8; the tenth percentile lies 0.3 of the way to the second.
    assert q.p10 == pytest.approx((0.13 + 0.33) / 2)
    assert q.worst10 == pytest.approx((0.1 + 0.3) / 2)
    # Better: users 0 and 3 at seed 0 (user 1 is equal); users 0, 1, 3 at seed 1.
    assert q.better_off == pytest.approx(5 / 8)
    assert (q.users, q.undefined, q.seeds) == (4, 0, 2)


def test_lower_is_better_turns_the_badly_served_end() -> None:
    alone, tried = row("device_only", [4.0, 5.0, 9.0]), row("x", [3.0, 6.0, 8.0])
    q = summary.quality(tried, of(alone, tried, higher=False))
    assert q.p10 == pytest.approx(7.6)  # 0.2 of the way from 8 back to 6
    assert q.worst10 == 8.0
    assert q.better_off == pytest.approx(2 / 3)


def test_undefined_scores_are_left_out_and_counted() -> None:
    tried = row("x", [math.nan, 0.5, 0.7], [math.nan, math.nan, 0.9])
    q = summary.quality(tried, of(tried))
    assert q.mean == pytest.approx((0.6 + 0.9) / 2)
    assert (q.users, q.undefined) == (2, 3)
    assert q.better_off is None  # device only did not run


def test_nothing_defined() -> None:
    q = summary.quality(row("x", [math.nan]), of(row("x", [math.nan])))
    assert math.isnan(q.mean)
    assert math.isnan(q.p10)
    assert q.spread is None
    assert q.users == 0


def test_the_reference_has_nobody_better_off() -> None:
    alone = row("device_only", [0.1])
    assert summary.quality(alone, of(alone)).better_off is None


def test_lead_by_hand() -> None:
    a, b = row("a", [0.5, 0.7, 0.9]), row("b", [0.4, 0.5, 0.6])
    lead = summary.lead(a, b, of(a, b))
    assert lead.mean == pytest.approx(0.2)
    assert lead.error == pytest.approx(0.1 / math.sqrt(3))
    assert lead.users == 3
    assert lead.clear
    assert summary.lead(b, a, of(a, b)).mean == pytest.approx(-0.2)
    assert summary.lead(b, a, of(a, b, higher=False)).mean == pytest.approx(0.2)


def test_lead_takes_the_larger_error() -> None:
    # Each user gains the same within a seed, but the seeds disagree: +0.3 and -0.1.
    a, b = row("a", [0.8, 0.7], [0.4, 0.3]), row("b", [0.5, 0.4], [0.5, 0.4])
    lead = summary.lead(a, b, of(a, b))
    assert lead.mean == pytest.approx(0.1)
    assert lead.error == pytest.approx(0.2)
    assert not lead.clear


def test_a_single_pair_never_leads() -> None:
    a, b = row("a", [0.9]), row("b", [0.1])
    assert not summary.lead(a, b, of(a, b)).clear


def test_seeds_that_do_not_meet_are_not_paired() -> None:
    a, b = row("a", [0.9, 0.8]), row("b", [0.1, 0.2])
    b = replace(b, seeds=[replace(b.seeds[0], seed=5)])
    lead = summary.lead(a, b, of(a, b))
    assert lead.mean == pytest.approx(0.7)
    assert (lead.users, lead.clear) == (0, False)


def test_users_are_paired_by_name() -> None:
    a, b = row("a", [0.9, 0.5]), row("b", [0.4, 0.8])
    turned = replace(b, seeds=[replace(b.seeds[0], users=["u1", "u0"])])
    assert summary.lead(a, turned, of(a, turned)).error == pytest.approx(0.0)


@given(SCORES)
def test_worst_is_no_better_than_p10(scores: list[float]) -> None:
    low = summary.p10(scores, True)
    assert min(scores) - 1e-9 <= summary.worst10(scores, True) <= low + 1e-9
    assert low <= max(scores) + 1e-9


@given(SCORES)
def test_direction_is_a_mirror(scores: list[float]) -> None:
    mirrored = [-s for s in scores]
    assert summary.p10(scores, True) == pytest.approx(-summary.p10(mirrored, False))
    assert summary.worst10(scores, True) == pytest.approx(-summary.worst10(mirrored, False))


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 6),
    st.booleans(),
    st.sets(st.sampled_from(["coda", "fedavg"])),
)
def test_json_round_trip(seeds: int, users: int, higher: bool, missing: set[str]) -> None:
    c = comparison(
        seeds=seeds, users=users, higher_is_better=higher, missing=tuple(sorted(missing))
    )
    assert results.from_json(json.loads(json.dumps(results.to_json(c)))) == c
