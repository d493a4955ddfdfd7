"""Budgets in words, fronts, what is nearest, whom a smaller model hurts, which one is chosen."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from kitestring.devices.profiles import PROFILES
from kitestring.errors import SettingError
from kitestring.shrink import page, picture, show
from kitestring.shrink.budget import Budget, Figures, Limit, What, dominates, front, nearest, parse
from kitestring.shrink.candidates import CANDIDATES, LARGE, SHAPES, SMALL, Candidate, Shape
from kitestring.shrink.kept import plain
from kitestring.shrink.results import Entry, Found, change, quality
from kitestring.shrink.search import limited, skipped, worthwhile
from kitestring.shrink.taking import Scale, Taken
from kitestring.tasks.metrics import accuracy, rmse

FIGURES = st.builds(
    Figures,
    st.floats(1, 1e12), st.floats(1e-7, 1e3), st.floats(1e-7, 1e3), st.floats(1, 1e12),
)  # fmt: skip
KINDS: tuple[What, ...] = ("size", "p50", "p95", "memory")


@st.composite
def budgets(draw: st.DrawFn, near: Figures | None = None) -> Budget:
    """Some limits, around what `near` takes."""
    kinds = draw(st.lists(st.sampled_from(KINDS), unique=True))
    of = near or Figures(1e6, 1e-3, 2e-3, 1e7)
    by = {kind: draw(st.floats(0.01, 100)) for kind in kinds}
    return Budget(tuple(Limit(kind, getattr(of, kind) * by[kind]) for kind in kinds))


# Budgets


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", []),
        ("1MB, 5ms", [("size", 1e6), ("p50", 5e-3)]),
        ("256 kB", [("size", 256e3)]),
        ("5ms,64MB memory", [("p50", 5e-3), ("memory", 64e6)]),
        ("memory 64MiB", [("memory", 64 * 2**20)]),
        ("p95 5ms", [("p95", 5e-3)]),
        ("5ms p95, p50 .5ms", [("p95", 5e-3), ("p50", 5e-4)]),
        (" 20  µs ,, 1GB", [("p50", 20e-6), ("size", 1e9)]),
        ("1.5s", [("p50", 1.5)]),
    ],
)
def test_a_budget_in_words(text: str, wanted: list[tuple[str, float]]) -> None:
    found = [(x.what, x.most) for x in parse(text).each]
    assert [what for what, _ in found] == [what for what, _ in wanted]
    assert [most for _, most in found] == pytest.approx([most for _, most in wanted])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("small", "1MB, 5ms"),
        ("1MB/day", "such as"),
        ("1Mb", "Bits or bytes"),
        ("5", "Of what"),
        ("5ms memory", "such as"),
        ("p95 1MB", "such as"),
        ("p50 5ms p95", "such as"),
        ("0kB", "nothing is as small"),
        ("1MB, 2kB", "two limits on file"),
        ("5ms, p50 2ms", "two limits on p50"),
        ("-5ms", "such as"),
        ("5 furlongs", "such as"),
    ],
)
def test_what_is_no_budget_is_told_in_one_line(text: str, said: str) -> None:
    with pytest.raises(SettingError) as found:
        parse(text)
    assert said in str(found.value)
    assert "\n" not in str(found.value)


@given(st.data(), FIGURES)
def test_the_wider_budget_admits_and_widens_only_what_is_broken(
    data: st.DataObject, figures: Figures
) -> None:
    budget = data.draw(budgets(figures))
    wider = parse(budget.admitting(figures))
    assert wider.meets(figures)
    assert [x.what for x in wider.each] == [x.what for x in budget.each]
    for old, new in zip(budget.each, wider.each, strict=True):
        takes = getattr(figures, old.what)
        # Three digits, and six where nothing had to give way.
        assert new.most == pytest.approx(
            max(old.most, takes), rel=1e-2 if takes > old.most else 1e-5
        )
        assert new.most >= old.most * (1 - 1e-12)


@given(FIGURES, st.data())
def test_a_budget_is_met_where_every_limit_is(figures: Figures, data: st.DataObject) -> None:
    budget = data.draw(budgets(figures))
    held = [getattr(figures, x.what) <= x.most for x in budget.each]
    assert budget.meets(figures) is all(held)
    assert len(budget.broken(figures)) == held.count(False)


def test_the_profile_s_memory_is_a_limit_where_the_budget_names_none() -> None:
    device = PROFILES["microcontroller"]
    found = limited(parse("1MB"), device.name, device.memory)
    assert found.of("memory") == 512 * 2**10
    assert str(found) == "1.0 MB"  # of what was asked for
    assert limited(parse("1MB memory"), device.name, device.memory).of("memory") == 1e6
    takes = Figures(1e3, 1e-3, 1e-3, 3e6)
    assert not found.meets(takes)
    assert found.admitting(takes) == "1MB, 3MB memory"
    assert found.admitting(replace(takes, memory=1e3)) == "1MB"


# Fronts


@given(st.lists(st.tuples(*[st.integers(0, 5)] * 3), max_size=40))
def test_a_front_is_what_nothing_dominates(points: list[tuple[int, int, int]]) -> None:
    inside = front(points)
    assert inside == sorted(inside)
    for i, p in enumerate(points):
        assert any(dominates(q, p) for q in points) is (i not in inside)
        if i not in inside:  # by one that is a member itself
            assert any(dominates(points[j], p) for j in inside)


@given(st.tuples(*[st.integers(0, 3)] * 3), st.tuples(*[st.integers(0, 3)] * 3))
def test_to_dominate_is_to_be_nowhere_worse_and_somewhere_better(
    p: tuple[int, ...], q: tuple[int, ...]
) -> None:
    nowhere_worse = sum(a > b for a, b in zip(p, q, strict=True)) == 0
    assert dominates(p, q) is (nowhere_worse and p != q)
    assert not (dominates(p, q) and dominates(q, p))


@given(st.lists(FIGURES, min_size=1, max_size=8), st.data())
def test_the_nearest_overshoots_least(figures: list[Figures], data: st.DataObject) -> None:
    budget = data.draw(budgets(figures[0]))
    them = dict(enumerate(figures))
    best = nearest(them, budget)
    assert all(budget.share(them[best]) <= budget.share(f) for f in figures)
    if any(budget.meets(f) for f in figures):
        assert budget.meets(them[best])


# Candidates


def test_names_can_be_read() -> None:
    half = Shape("large", 0.5, taught=True)
    assert Candidate(half, "int8").title == "large, half, distilled, 8 bits"
    assert Candidate(half, "weights4").slug == "large-half-distilled-4-bit-weights"
    assert Candidate(LARGE).title == "large"
    assert len({c.title for c in CANDIDATES.values()}) == len(CANDIDATES) == 4 * len(SHAPES)
    assert all(c.slug == name for name, c in CANDIDATES.items())


def test_a_teacher_and_what_is_slimmed_come_first() -> None:
    assert SMALL.after == LARGE.after == ()
    assert Shape("small", taught=True).after == (LARGE,)
    assert Shape("large", 0.25, taught=True).after == (LARGE,)
    assert Shape("small", 0.5, taught=True).after == (LARGE, Shape("small", taught=True))


# What was found, made up: (bytes, ratio to the large model's time, scores of two seeds)

MADE_UP: dict[str, tuple[int, float, Sequence[Sequence[float]]]] = {
    "large": (1000, 1.0, [[1.0, 0.8, 0.6, 0.9], [1.0, 0.8, 0.7, 0.9]]),
    "large-8-bits": (250, 1.2, [[1.0, 0.8, 0.6, 0.9], [1.0, 0.8, 0.7, 0.9]]),
    "large-half-distilled": (300, 0.5, [[1.0, 0.8, 0.6, 0.87], [1.0, 0.8, 0.7, 0.87]]),
    "small": (100, 0.2, [[0.5, 0.8, 0.6, 0.9], [0.5, 0.8, 0.7, 0.9]]),
    "small-8-bits": (110, 0.3, [[0.5, 0.7, 0.6, 0.9], [0.5, 0.7, 0.7, 0.9]]),
}


def taken(size: int, ratio: float = 1.0) -> Taken:
    return Taken(size, 0.01, ratio * 1e-4, ratio * 2e-4, 10**6, 1e6, ratio, "made up")


def found(budget: str = "", metric: object = accuracy, **skip: str) -> Found:
    entries = {name: Entry(c, None, "made up: cannot be made") for name, c in CANDIDATES.items()}
    for name, (size, ratio, scores) in MADE_UP.items():
        own = {metric.name: scores}  # type: ignore[attr-defined]
        entries[name] = Entry(CANDIDATES[name], taken(size, ratio), "", size, own, own)
    return Found(
        "made-up", "", metric, parse(budget), Scale(taken(1000), PROFILES["phone"]), entries,  # type: ignore[arg-type]
        ["a", "b", "c", "d"], {"validation": [10] * 4, "test": [10] * 4}, 2,
    )  # fmt: skip


def test_times_are_scaled_by_what_the_large_model_reaches() -> None:
    """1e6 operations on a phone of 5e9 a second are 200 µs, and half the ratio is half of that."""
    scale = Scale(taken(1000), PROFILES["phone"])
    assert scale(taken(1000)).p50 == pytest.approx(2e-4)
    assert scale(taken(300, 0.5)) == Figures(300, pytest.approx(1e-4), pytest.approx(2e-4), 1e6)
    assert scale.times == pytest.approx(2.0)  # 100 µs here
    uncounted = Scale(replace(taken(1000), flops=None), PROFILES["phone"])
    assert uncounted(taken(300, 0.5)).p50 == pytest.approx(5e-5)
    assert "not scaled to phone" in show.basis(uncounted)[0]


def test_the_front_of_quality_size_and_time() -> None:
    """Of the small one in 8 bits everything is worse; the others each are best at something."""
    assert [e.name for e in found().front] == [
        "small", "large-8-bits", "large-half-distilled", "large"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("budget", "choice"),
    [
        ("", "large-8-bits"),  # as good as the best, and a quarter of its size
        ("1kB", "large-8-bits"),  # of equals the smaller
        ("1kB, 200us", "large"),
        ("1kB, 150us", "large-half-distilled"),
        ("p95 250us", "large-half-distilled"),
        ("200B", "small"),
        ("99B", None),
        ("1kB, 1MB memory", "large-8-bits"),
        ("1kB, 900kB memory", None),
    ],
)
def test_the_choice(budget: str, choice: str | None) -> None:
    chosen = found(budget).choice
    assert (chosen.name if chosen else None) == choice


def test_where_less_is_better() -> None:
    """The smallest errors are those of the small model in 8 bits."""
    them = found(metric=rmse)
    assert them.choice is not None
    assert them.choice.name == "small-8-bits"
    now = change([[0.4, 0.5]], [[0.5, 0.5]], [10, 10], rmse)
    assert now.mean == pytest.approx(0.05)
    assert (now.worse, now.better) == (0.0, 0.5)
    assert show.gap(them, now.mean) == "−0.05"  # the figure sinks, and that is good


def test_what_cannot_be_met_names_the_nearest() -> None:
    them = found("50B, 150us")
    said = show.headline(them)
    # The small one takes twice the bytes; the others more than five times.
    assert them.nearest.name == "small"
    assert said.startswith("Nothing meets 50 B, 150 µs. Nearest: small (100 B of 50 B)")
    assert "met by '100B, 150us'" in said.replace("µ", "u")


def test_only_widths_that_can_meet_the_size_are_trained() -> None:
    them = found()
    widths = worthwhile(them.entries, parse("260B"), them.scale)
    # In 8 bits the large one fits, so it is worth training; half of it does not.
    assert widths == [SMALL, LARGE]
    assert worthwhile(them.entries, parse("300B"), them.scale) == [
        SMALL, Shape("large", 0.5, taught=True), LARGE
    ]  # fmt: skip
    # Where nothing fits: what comes nearest, beside the references.
    assert worthwhile(them.entries, parse("10B"), them.scale) == [SMALL, LARGE]
    left = {
        e.name: replace(e, scores={}) for e in them.entries.values() if e.name == "small-8-bits"
    }
    why = dict((e.name, w) for e, w in skipped(replace(them, entries=left)))
    assert why == {"small-8-bits": "too large for the budget in every precision"}


def test_what_cannot_be_made_after_all_is_not_the_nearest() -> None:
    them = found("50B")
    small = replace(them.entries["small"], why="made up: no", scores={}, test={})
    entries = {**them.entries, "small": small}
    assert replace(them, entries=entries).nearest.name == "small-8-bits"
    assert (
        plain(replace(them, entries=entries), None, None, "")["candidates"]["small"]["why_not"]
        == "made up: no"
    )


def test_no_figure_is_cut_in_the_terminal() -> None:
    them = found()
    best = {"accuracy": [[1.0] * 4] * 2}
    entries = {n: replace(e, test=best) if e.test else e for n, e in them.entries.items()}
    console = Console(width=80)
    with console.capture() as capture:
        console.print(show.table(replace(them, entries=entries)))
    lines = [line for line in capture.get().splitlines() if "100.0%" in line]
    assert len(lines) == len(MADE_UP)
    assert all(line.count("100.0%") == 3 for line in lines)


@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_scores_that_are_no_numbers_are_neither_drawn_nor_json(odd: float, tmp_path: Path) -> None:
    """Be it of one model or of all."""
    them = found("1kB", rmse)
    for names in (["large"], list(MADE_UP)):
        scores = {rmse.name: [[odd] * 4] * 2}
        entries = {
            n: replace(e, scores=scores, test=scores) if n in names else e
            for n, e in them.entries.items()
        }
        odd_one = replace(them, entries=entries)
        picture.draw(odd_one, "made up", tmp_path)
        assert "<svg" in page.page(odd_one, None, None, "")
        json.dumps(plain(odd_one, None, None, ""), allow_nan=False)


def test_quality_over_users_and_seeds() -> None:
    """By hand: p10 of four users lies three tenths of the way from the lowest to the second."""
    q = quality([[1.0, 0.8, 0.6, 0.9], [1.0, 0.8, math.nan, 0.9]], accuracy)
    assert q.mean == pytest.approx((0.825 + 0.9) / 2)
    assert q.p10 == pytest.approx(((0.6 + 0.3 * 0.2) + (0.8 + 0.2 * 0.1)) / 2)
    assert q.worst10 == pytest.approx((0.6 + 0.8) / 2)
    assert q.spread == pytest.approx(np.std([0.825, 0.9], ddof=1))
    assert math.isnan(quality([[math.nan]], accuracy).mean)


def test_whom_it_hurts() -> None:
    """Users of 10 rows: a row is worth 0.1, so who loses 0.1 is not counted and who loses 0.2 is.
    Ranked by both models together: a, b, c, d."""
    before, now = [[0.2, 0.5, 0.7, 0.9]], [[0.0, 0.4, 0.7, 1.0]]
    c = change(now, before, [10] * 4, accuracy)
    assert c.each == pytest.approx([-0.2, -0.1, 0.0, 0.1])
    assert c.mean == pytest.approx(-0.05)
    assert (c.worse, c.better) == (0.25, 0.0)
    assert c.quarters == pytest.approx([-0.2, -0.1, 0.0, 0.1])
    assert c.error == pytest.approx(np.std(c.each, ddof=1) / 2)


@given(st.lists(st.floats(0, 1), min_size=4, max_size=30), st.randoms(use_true_random=False))
def test_luck_alone_favours_no_quarter(scores: list[float], dice: object) -> None:
    """What one model gains on the other, the other loses on it, quarter by quarter."""
    other = list(scores)
    dice.shuffle(other)  # type: ignore[attr-defined]
    one, back = (
        change([a], [b], [10] * len(a), accuracy) for a, b in ((scores, other), (other, scores))
    )
    assert one.quarters == pytest.approx([-x for x in back.quarters])
    assert one.worse == back.better


def test_users_without_a_score_are_left_out() -> None:
    c = change([[0.5, math.nan]], [[0.4, 0.3]], [2, 2], accuracy)
    assert c.mean == pytest.approx(0.1)
    assert math.isnan(c.each[1])
    assert math.isnan(change([[math.nan]], [[0.3]], [2], accuracy).mean)


def test_fewer_users_than_quarters_have_none() -> None:
    few = change([[0.5, 0.4, 0.3]], [[0.4, 0.4, 0.4]], [10] * 3, accuracy)
    assert "quarter" not in page._quarters(found(), [("against large", few)])
    four = change([[0.5, 0.4, 0.3, 1]], [[0.4] * 4], [10] * 4, accuracy)
    assert "best served quarter" in page._quarters(found(), [("against large", four)])


def test_what_was_left_out_is_said_once_for_a_width() -> None:
    said = show.left_out(found())
    assert len(said) == 1
    assert said[0].startswith("Left out, made up: cannot be made: ")
    titles = said[0].removeprefix("Left out, made up: cannot be made: ").rstrip(".").split("; ")
    assert "large, quarter, distilled" in titles  # in no precision
    assert "large, half, distilled, 8 bits" in titles  # but it was made in float32
    assert "large, quarter, distilled, 8 bits" not in titles
