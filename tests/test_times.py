"""Where the time goes: every second has one part, and a person can read which.

Expected seconds come from a clock of our own, which stands still but in the functions that a test
slows down.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

import tiny
from kitestring.collaborate.parameters.fedavg import FedAvg
from kitestring.comparison import clock
from kitestring.comparison.clock import Clock
from kitestring.comparison.jobs import Bench, Job, work
from kitestring.comparison.methods import METHODS
from kitestring.comparison.results import Comparison, Spent, Times
from kitestring.devices.fit import check_native, sequential, stopwatch
from kitestring.devices.fit.compiled import train
from kitestring.devices.fit.programs import Program
from kitestring.devices.fit.stopwatch import Stopwatch
from kitestring.devices.profiles import profile
from kitestring.exchange import store
from kitestring.report.times import profiled
from kitestring.tasks.metrics import accuracy
from kitestring.tasks.population import DeviceUsers
from synthetic import comparison


class Still:
    """A clock that stands still; `slows` makes a function of `where` take a second of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0
        self._patch = monkeypatch
        for module in (clock, stopwatch):
            monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def slows(self, where: Any, name: str) -> None:
        self._patch.setattr(where, name, self.slow(getattr(where, name)))

    def slow(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def slowed(*what: Any, **how: Any) -> Any:
            self.now += 1
            return function(*what, **how)

        return slowed


@pytest.fixture
def still(monkeypatch: pytest.MonkeyPatch) -> Still:
    return Still(monkeypatch)


def bench(how: Any = "auto", metric: Any = accuracy, lost: float = 0.0) -> Bench:
    return Bench(replace(tiny.task(), metric=metric), profile("phone"), how, lost)


def job(bench: Bench, method: str, folder: Path, seed: int = 0) -> dict[str, Any]:
    made = METHODS[method].trials(tiny.BUDGET)[0]
    path = folder / f"{method}-{seed}.sqlite"
    return work(bench, Job(method, 0, seed, "test", path), made, lambda done: None)


def spent(found: dict[str, Any]) -> dict[str, float]:
    return {part: seconds for part, seconds in found["spent"].items() if seconds}


def test_a_part_inside_of_another_is_counted_once(still: Still) -> None:
    parts = Clock()
    still.now += 1
    with parts.part("outer"):
        still.now += 2
        with parts.part("inner"):
            still.now += 4
        still.now += 8
        parts.move(3, "moved")
    still.now += 16
    assert parts.spent() == {"outer": 2 + 8 - 3, "inner": 4, "moved": 3, clock.REST: 1 + 16}


def test_a_part_ends_with_an_error_too(still: Still) -> None:
    parts = Clock()
    with pytest.raises(KeyError), parts.part("outer"):
        raise KeyError
    still.now += 1
    assert parts.spent() == {"outer": 0, clock.REST: 1}


def test_a_block_inside_of_a_block_is_counted_once(still: Still) -> None:
    watch = Stopwatch()
    with watch:
        still.now += 1
        with watch:
            still.now += 2
        still.now += 4
    still.now += 8
    with watch:
        still.now += 16
        there = threading.Thread(target=watch.__enter__)  # the other thread's is a block of its own
        there.start()
        there.join()
    assert watch.seconds == 1 + 2 + 4 + 16


@pytest.mark.parametrize(
    ("how", "where", "name", "part"),
    [
        ("auto", check_native, "fit", clock.COMPILING),
        ("auto", train, "trainer", clock.COMPILING),  # made inside of the trial
        ("sequential", sequential, "predict", "predict small.answer"),
        ("sequential", sequential, "fit", "fit small"),
        ("auto", Program, "flops", clock.MODELS),
        ("auto", Program, "initial", clock.MODELS),
        ("auto", DeviceUsers, "_load", clock.ROWS),
        ("auto", store, "pack_tree", clock.STATE),
        ("auto", store.Store, "find", clock.STATE),
        ("auto", FedAvg, "tell", clock.REST),
        ("auto", FedAvg, "reply", clock.REST),
    ],
)
def test_what_is_slow_is_found(
    still: Still, tmp_path: Path, how: Any, where: Any, name: str, part: str
) -> None:
    """Every second is in that part, and none is anywhere else."""
    still.slows(where, name)
    found = job(bench(how), "fedavg", tmp_path)
    assert still.now > 0
    assert spent(found) == {part: still.now}
    assert found["wall_s"] == still.now


def test_scoring_is_found(still: Still, tmp_path: Path) -> None:
    slow = replace(accuracy, score=still.slow(accuracy.score))
    found = job(bench(metric=slow), "fedavg", tmp_path)
    assert spent(found) == {clock.SCORES: still.now}
    assert still.now >= tiny.DEVICES


def test_all_at_once(still: Still, tmp_path: Path) -> None:
    for where, name in ((check_native, "fit"), (train, "trainer"), (DeviceUsers, "_load")):
        still.slows(where, name)
    found = spent(job(bench(), "fedavg", tmp_path))
    assert found.keys() == {clock.COMPILING, clock.ROWS}
    assert sum(found.values()) == still.now


def test_who_compiles_pays(still: Still, tmp_path: Path) -> None:
    """Seeds share what is compiled, whichever of them needed it first."""
    still.slows(train, "trainer")
    shared = bench()
    job(shared, "shipped", tmp_path)
    before = still.now
    new = job(shared, "device_only", tmp_path, seed=1)  # with other batches
    assert spent(new) == {clock.COMPILING: still.now - before}
    assert still.now > before
    assert spent(job(shared, "device_only", tmp_path, seed=2)) == {}


def test_a_job_that_fails_has_taken_time_too(still: Still, tmp_path: Path) -> None:
    still.slows(DeviceUsers, "_load")
    found = job(bench(lost=0.99), "fedavg", tmp_path)
    assert "were lost" in found["failed"]
    assert spent(found) == {clock.ROWS: still.now}
    assert still.now > 0


def test_a_job_that_is_found_done_says_what_it_took(still: Still, tmp_path: Path) -> None:
    still.slows(DeviceUsers, "_load")
    first = job(bench(), "fedavg", tmp_path)
    assert job(bench(), "fedavg", tmp_path)["spent"] == first["spent"] != {}


# The table


def made(factor: float = 1.0, wall_s: float | None = 30.0) -> Comparison:
    parts = {
        clock.COMPILING: 4.0, "fit small": 12.0, "backward front": 1.0, "predict large.answer": 2.0,
        clock.ROWS: 0.5, clock.SCORES: 0.5, clock.STATE: 0.25, clock.MODELS: 0.15, clock.REST: 0.6,
    }  # fmt: skip
    jobs = [
        Spent("Cloud only", True, {"fit large": 3.0 * factor, clock.REST: 1.0 * factor}),
        Spent("Device only", True, {k: s * factor for k, s in parts.items()}),
        Spent("Device only", False, {clock.REST: 4.0 * factor}),
        Spent("Joint", False, {"fit joint": 11.0 * factor}),
    ]
    times = Times(jobs, 2, wall_s and wall_s * factor)
    return replace(comparison(only=("cloud_only", "device_only")), times=times)


def shown(c: Comparison, width: int = 80) -> str:
    console = Console(record=True, width=width, file=io.StringIO())
    console.print(profiled(c))
    return console.export_text()


def test_the_table_by_hand() -> None:
    """21 s of trials and 4 of a seed by device only, 11 by joint, 4 by cloud only: 40 in all."""
    lines = [" ".join(line.split()) for line in shown(made()).splitlines()]
    assert [line for line in lines if line.startswith(("Device", "Joint", "Cloud", "All"))] == [
        "Device only 25.0 62% 4.2 13.0 2.0 1.0 0.2 4.6",
        "Joint 11.0 28% - 11.0 - - - -",
        "Cloud only 4.0 10% - 3.0 - - - 1.0",
        "All 40.0 100% 4.2 27.0 2.0 1.0 0.2 5.6",
    ]
    text = " ".join(shown(made()).split())
    assert "training small 12.0 30% ━" in text
    assert text.index("training small") < text.index("training joint") < text.index("compiling")
    assert "1 more 0.1 0.4%" in text  # 0.15 s: less than half a per cent of 40 s
    # Two workers for 30 s could have done 60 s of work; 25 s of 40 s were trials.
    assert "40.0 s of work by 2 workers in 30.0 s: 33% of their time" in text
    assert "62% of the work was in tuning trials" in text
    assert "held against it: Joint." in text


@pytest.mark.parametrize("width", [80, 100, 120])
@pytest.mark.parametrize("factor", [1e-4, 0.01, 1.0, 40.0, 1e4])
def test_the_table_fits(width: int, factor: float) -> None:
    text = shown(made(factor), width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    assert len([line for line in text.splitlines() if line.startswith("Device only")]) == 1


def test_long_times_are_minutes() -> None:
    assert "minutes of work" in shown(made(1e3))
    assert "Device only 417 62%" in " ".join(shown(made(1e3)).split())  # 25,000 s


def test_of_a_resumed_run_only_the_work_is_known() -> None:
    text = " ".join(shown(made(wall_s=None)).split())
    assert "how long it took in all is not known" in text
    assert "30.0 s" not in text


@pytest.mark.parametrize("times", [None, Times([], 2, 1.0)])
def test_times_that_were_not_kept(times: Times | None) -> None:
    assert "did not keep" in shown(replace(made(), times=times))
