"""A comparison: every collaboration on one task, with the same budget, tuning and seeds.

Each collaboration gets the same number of trials, judged on the device users' validation rows
with the first seed; the best settings run with every seed, and only then are test rows served.
Jobs are independent once what they start from is trained, so worker processes take them as they
become ready.
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from kitestring.comparison import shrunk
from kitestring.comparison.assemble import assemble, cores, spent
from kitestring.comparison.board import Board
from kitestring.comparison.methods import POOL_TRAINED, Method
from kitestring.comparison.order import Order, budget, missing
from kitestring.comparison.results import Comparison, Times, from_json, to_json
from kitestring.comparison.workers import Listener, Workers
from kitestring.errors import RunError
from kitestring.tasks.task import Recorded, Task
from kitestring.tasks.validate import fits, validate


def compare(
    order: Order, folder: Path, *, resume: bool = False, fresh: bool = False,
    workers: int | None = None, heard: Listener | None = None,
) -> Comparison:  # fmt: skip
    """Run (or go on with) a comparison in `folder` and keep its figures in `comparison.json`
    there."""
    started, workers = time.perf_counter(), workers or cores()
    task = order.load()
    notes = validate(task)
    with _claimed(folder, order, resume, fresh) as begin, Workers(order, workers) as hands:
        shrunk.of_task(order.shrunk, task.name)
        bench = order.bench(task)
        programs = bench.compute(0).programs
        fits(task, programs, bench.profile)
        names = set(programs)
        chosen = [m for m in order.shown if missing(task, names, m.about) is None]
        begin()
        board = Board(
            _with_sources(order.methods, chosen, task, names), folder / "jobs",
            order.seeds, order.trials,
            (lambda a, b: a > b) if task.metric.higher_is_better else (lambda a, b: a < b),
        )  # fmt: skip
        shared = budget(bench, order.trials)
        hands.work_off(board, shared, heard)
        wall_s = None if resume else time.perf_counter() - started
        result = assemble(order, bench, shared, board, names, notes)
        result = replace(result, times=Times(spent(order, board), workers, wall_s))
        write_whole(folder / "comparison.json", json.dumps(to_json(result)))
    return result


def load(folder: Path) -> Comparison:
    """The figures of a finished comparison."""
    path = folder / "comparison.json"
    try:
        return from_json(json.loads(path.read_text()))
    except FileNotFoundError:
        raise RunError("no finished comparison here", str(folder), "Run compare first") from None
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise RunError(f"cannot be read: {problem}", str(path), "Run compare again") from None


def _with_sources(
    methods: Mapping[str, Method], chosen: list[Method], task: Task | Recorded, names: set[str]
) -> list[Method]:
    """Add what the chosen methods start from, and device only, which all are held against."""
    wanted, new = set[str](), {m.name for m in chosen} | {"device_only"}
    while new:
        wanted |= new
        programs = {p for name in new for p in (*methods[name].after, methods[name].about.large)}
        new = {POOL_TRAINED[program] for program in programs if program} - wanted
    return [
        m for m in methods.values() if m.name in wanted and missing(task, names, m.about) is None
    ]


@contextmanager
def _claimed(folder: Path, order: Order, resume: bool, fresh: bool) -> Iterator[Callable[[], None]]:
    """The run's folder, for one comparison at a time; a run that is not finished is not lost. What
    is given clears it, unless the run goes on."""
    settings = folder / "settings.json"
    try:
        (folder / "jobs").mkdir(parents=True, exist_ok=True)
        lock = sqlite3.connect(folder / "lock.sqlite", isolation_level=None, timeout=2)
        lock.execute("BEGIN EXCLUSIVE")
    except sqlite3.OperationalError:
        raise RunError(
            "another comparison is running here", str(folder), "Wait for it, or give another --out"
        ) from None
    except OSError as problem:
        raise RunError(
            f"cannot be used: {problem.strerror}", str(folder), "Give another --out"
        ) from None
    try:
        wanted = json.loads(json.dumps(asdict(order)))
        try:
            there = json.loads(settings.read_text()) if settings.exists() else None
        except ValueError:
            there = None
        if resume and there is None:
            raise RunError("nothing to resume", str(folder), "Run it without --resume")
        if resume and there != wanted:
            other = ", ".join(k for k in wanted if (there or {}).get(k) != wanted[k])
            raise RunError(
                f"the run there differs in {other}", str(folder),
                "Resume with its settings, or give --fresh",
            )  # fmt: skip
        if (
            there is not None
            and not resume
            and not fresh
            and not (folder / "comparison.json").exists()
        ):
            raise RunError(
                "an unfinished comparison is here", str(folder),
                "Go on with --resume, or start over with --fresh",
            )  # fmt: skip

        def begin() -> None:
            if not resume:
                for old in (folder / "jobs").iterdir():
                    old.unlink()
                (folder / "comparison.json").unlink(missing_ok=True)
                write_whole(settings, json.dumps(wanted, indent=1))

        yield begin
    finally:
        lock.close()


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all. Raises `RunError` where there is no room or no right."""
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    except OSError as problem:
        part.unlink(missing_ok=True)
        raise RunError(
            f"cannot be written: {problem.strerror}", str(path),
            "Free some space or give another --out; --resume loses nothing",
        ) from None  # fmt: skip
