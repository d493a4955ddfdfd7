"""Prices files and what a device costs per day, computed by hand."""

from __future__ import annotations

from dataclasses import replace
from importlib import resources
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kitestring.comparison.results import SeedResult
from kitestring.errors import SettingError
from kitestring.report import prices
from kitestring.report.prices import Prices
from synthetic import comparison, seed_result, traffic

BY_HAND = Prices(
    gpu_hour=3.6,
    gpu_flops=1e12,  # so an operation costs 1e-15 dollars
    gb_in=0.01,
    gb_out=0.1,
    million_requests=2.0,
    requests_per_day=10.0,
    learn_every_days=5.0,
)


def packaged() -> str:
    return resources.files("kitestring.report").joinpath("prices.toml").read_text(encoding="utf-8")


def by_hand() -> SeedResult:
    base = seed_result("device_only", 0, 4)
    return replace(
        base,
        learning=replace(
            base.learning,
            up=traffic({"features.h": 900.0, "scalars.n": 100.0}),
            down=traffic({"parameters.w": 2000.0}),
            joules=(5.0, 10.0),
            cloud_flops=4e12,
            rounds=15,
        ),
        serving=replace(
            base.serving,
            up=traffic({"data.x": 30.0}),
            down=traffic({"data.answer": 4.0}),
            deploy_bytes=500.0,
            cloud_calls=0.5,
            cloud_flops=1e10,
            joules=(0.1, 0.3),
        ),
    )


def test_a_day_by_hand() -> None:
    day = prices.daily(by_hand(), BY_HAND, device_users=4)
    assert day.up.kinds == pytest.approx({"features": 180.0, "scalars": 20.0, "data": 300.0})
    assert day.down.kinds == pytest.approx({"parameters": 500.0, "data": 40.0})
    assert day.down.leaves["parameters (deploy)"] == pytest.approx(100.0)
    assert day.bytes == pytest.approx(1040.0)
    # Learning: 4e12 operations, 4 devices, 5 days: 2e11. Serving: 10 requests of 1e10.
    assert day.compute == pytest.approx((2e11 + 1e11) * 1e-15)
    assert day.traffic == pytest.approx((500 * 0.01 + 540 * 0.1) / 1e9)
    assert day.requests == pytest.approx((5 + 3) * 2e-6)  # 15 rounds in 5 days
    assert day.joules == pytest.approx((1 + 1, 2 + 3))
    assert day.cloud_calls == pytest.approx(5.0)
    assert day.fleet_month == pytest.approx(day.dollars * 30_000)


def test_a_recorded_cost_stands_for_the_clouds_answers() -> None:
    seed = by_hand()
    seed = replace(seed, serving=replace(seed.serving, recorded_cost=0.002))
    day = prices.daily(seed, BY_HAND, device_users=4)
    assert day.compute == pytest.approx(2e11 * 1e-15 + 0.02)


def test_rounds_in_which_nothing_crosses_are_no_requests() -> None:
    seed = seed_result("device_only", 0, 4)
    assert prices.daily(seed, BY_HAND, 4).requests == 0.0


def test_mean_over_seeds() -> None:
    row = comparison(seeds=2, users=4, only=("fedavg",)).rows[0]
    one, two = row.seeds
    two = replace(two, learning=replace(two.learning, up=traffic({"scalars.n": 50.0})))
    day = prices.mean_daily(replace(row, seeds=[one, two]), BY_HAND, 4)
    assert day.up.kinds["parameters"] == pytest.approx(1.6e7 / 5 / 2)
    assert day.up.kinds["scalars"] == pytest.approx((160 + 50) / 5 / 2)


@settings(max_examples=30)
@given(st.floats(0, 1e4), st.floats(0, 1e4))
def test_dollars_are_linear_in_requests(a: float, b: float) -> None:
    def at(asked: float) -> float:
        return prices.daily(by_hand(), replace(BY_HAND, requests_per_day=asked), 4).dollars

    assert at(a) + at(b) == pytest.approx(at(0) + at(a + b))


def test_packaged_prices() -> None:
    loaded = prices.load()
    figures = [name for section in prices.FIGURES.values() for name in section]
    assert set(loaded.sources) == set(figures)
    assert all(loaded.sources.values())
    assert "assumption" in loaded.sources["gpu_flops"]


def test_a_changed_figure_loses_the_packaged_words(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    text = (
        packaged()
        .replace("gpu_hour = 2.00", "gpu_hour = 1.25")
        .replace(
            'gb_out = "list price, check yours: AWS, first 10 TB a month"',
            'gb_out = "our contract"',
        )
    )
    file.write_text(text)
    loaded = prices.load(file)
    assert loaded.gpu_hour == 1.25
    assert loaded.sources["gpu_hour"] == "from mine.toml"
    assert loaded.sources["gb_out"] == "our contract"
    assert loaded.sources["requests_per_day"] == "an assumption"


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("gb_out = 0.09", "gb_ot = 0.09", "Did you mean 'gb_out'?"),
        ("gb_out = 0.09", "", "'gb_out' is missing"),
        ("gb_out = 0.09", "gb_out = -1", "must be 0 or more"),
        ("gb_out = 0.09", "gb_out = nan", "must be 0 or more"),
        ("gb_out = 0.09", "gb_out = true", "not a number"),
        ("gb_out = 0.09", 'gb_out = "9 cents"', "not a number"),
        ("gpu_flops = 5e13", "gpu_flops = 0", "must be more than 0"),
        ("learn_every_days = 30", "learn_every_days = 0", "must be more than 0"),
        ("[use]", "[usage]", "Did you mean 'use'?"),
        ("[use]", "[use", "not TOML"),
    ],
)
def test_a_wrong_file_is_named_and_mended(tmp_path: Path, old: str, new: str, says: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(packaged().replace(old, new, 1))
    with pytest.raises(SettingError) as error:
        prices.load(file)
    assert says in str(error.value)
    assert "mine.toml" in str(error.value)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="cannot read it"):
        prices.load(tmp_path / "none.toml")
