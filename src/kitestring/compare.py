"""A comparison: every collaboration on one task, with the same budget, tuning and seeds.

Each collaboration gets the same number of trials, judged on the device users' validation rows
with the first seed; the best settings run with every seed, and only then are test rows served.
Jobs are independent once what they start from is trained, so worker processes take them as they
become ready.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import platform
import queue
import sqlite3
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from kitestring import __version__
from kitestring.collaborate.about import NEEDS, About, Budget
from kitestring.devices.fit.compute import How, thread_per_process
from kitestring.devices.profiles import profile
from kitestring.errors import KitestringError, NoReplies, RunError, SettingError, TaskError
from kitestring.jobs import Bench, Job, work
from kitestring.methods import METHODS, POOL_TRAINED, Method, shown
from kitestring.results import (
    Comparison,
    Row,
    SeedResult,
    from_json,
    learning_from,
    serving_from,
    to_json,
)
from kitestring.tasks.find import find, first_users
from kitestring.tasks.tables import task_from_csv
from kitestring.tasks.task import Recorded, Task
from kitestring.tasks.validate import fits, validate


class Listener(Protocol):
    """Who is told how far the work is."""

    def total(self, jobs: int) -> None: ...
    def said(self, job: str, what: str, share: float) -> None:
        """`share` of a job that is done; below 0: the job is finished."""


@dataclass(frozen=True)
class Order:
    """What to compare: plain values, kept with the run so that a resumed one is the same."""

    task: str = "digits"
    csv: str | None = None
    user: str = ""
    target: str = ""
    users: int | None = None
    only: tuple[str, ...] = ()
    seeds: int = 3
    trials: int = 3
    profile: str = "phone"
    compute: How = "auto"
    lost: float = 0.0

    def __post_init__(self) -> None:
        for name, least in (("seeds", 1), ("trials", 1), ("users", 4)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise SettingError(f"--{name} {value} is too small", mend=f"Give {least} or more")
        if not 0 <= self.lost < 1:
            raise SettingError(f"--lost {self.lost} is not a share", mend="Give a number in [0, 1)")
        shown(self.only)
        profile(self.profile)

    def load(self) -> Task | Recorded:
        if self.csv is not None:
            task = task_from_csv(Path(self.csv), self.user, self.target)
            return first_users(task, self.users) if self.users else task
        return find(self.task, self.users)

    @property
    def title(self) -> str:
        name = Path(self.csv).stem if self.csv else self.task
        return "".join(c if c.isalnum() else "-" for c in name).strip("-").lower()


def budget(bench: Bench, trials: int) -> Budget:
    """The task's plan, with the typical device's rows and as many learning rates as trials."""
    plan = bench.task.plan
    few = np.arange(min(200, bench.population.size))
    rows = int(np.median(bench.population.rows(few, "train")["y"].n)) if len(few) else 1
    return Budget(
        plan.local_epochs, min(plan.rounds, plan.local_epochs), plan.batch, plan.optimiser,
        _rates(plan.lr, trials), rows, plan.cloud_epochs, plan.cloud_batch, plan.cloud_optimiser,
        _rates(plan.cloud_lr, trials), plan.gift, plan.cloud_share,
    )  # fmt: skip


def _rates(given: tuple[float, ...], count: int) -> tuple[float, ...]:
    """`count` learning rates over the given range: those given, or evenly spaced in the
    logarithm."""
    if len(given) == count:
        return given
    if count == 1:
        return (given[len(given) // 2],)
    return tuple(float(f"{rate:.3g}") for rate in np.geomspace(min(given), max(given), count))


def missing(task: Task | Recorded, programs: set[str], about: About) -> str | None:
    """The need that a task does not meet, in words; None where it meets all."""
    has = {"pool", "confidence"}
    if isinstance(task, Task):
        has = {"models"}
        has |= {"pool"} if task.users.pool else set()
        has |= {"split"} if "front" in programs else set()
        has |= {"confidence"} if task.loss in ("cross_entropy", "binary") else set()
    for need in about.needs:
        if need not in has:
            return f"needs {NEEDS[need]}"
    return None


# --- workers: one process each, one thread each

_bench: Bench
_budget: Budget
_heard: Any


def _prepare(order: Order, heard: Any, parent: int, shared: Any) -> None:
    global _bench, _budget, _heard
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()
    thread_per_process()
    _bench = Bench(order.load(), profile(order.profile), order.compute, order.lost)
    _budget, _heard = shared, heard


def _leave_with(parent: int) -> None:
    """A worker whose parent was killed must not go on alone."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _do(job: Job) -> dict[str, Any]:
    collaboration = METHODS[job.method].trials(_budget)[job.trial]
    last = 0.0

    def progress(done: float) -> None:
        nonlocal last
        if done == 1 or time.monotonic() - last > 0.2:
            last = time.monotonic()
            _heard.put((job.path.stem, job.label, done))

    try:
        return work(_bench, job, collaboration, progress)
    except NoReplies as nobody:
        return {"failed": str(nobody)}
    except KitestringError:
        raise
    except Exception as problem:
        log = job.path.parent.parent / "errors.log"
        with log.open("a") as file:
            file.write(f"{job.label}\n{traceback.format_exc()}\n")
        line = (str(problem).strip().splitlines() or [type(problem).__name__])[0][:200]
        raise TaskError(f"{type(problem).__name__}: {line}", job.label, f"See {log}") from None


@dataclass
class Board:
    """Which jobs are done, which may start, which settings won."""

    methods: list[Method]
    folder: Path
    seeds: int
    trials: int
    better: Callable[[float, float], bool]
    found: dict[tuple[str, int, int, str], dict[str, Any]] = field(default_factory=dict)
    won: dict[str, int] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)
    asked: set[tuple[str, int, int, str]] = field(default_factory=set)

    def total(self) -> int:
        return len(self.methods) * (self.trials + self.seeds)

    def _starts(self, method: Method, seed: int) -> tuple[tuple[str, Path], ...] | None:
        """The files that a job starts from; None where one is not there yet."""
        starts = []
        names = {m.name for m in self.methods}
        for program in method.after:
            source = POOL_TRAINED[program]
            if source not in names or source in self.lost:
                continue
            if source not in self.won or (source, self.won[source], seed, "test") not in self.found:
                return None
            starts.append((program, self._path(source, self.won[source], seed)))
        return tuple(starts)

    def _path(self, method: str, trial: int, seed: int) -> Path:
        return self.folder / f"{method}-{trial}-{seed}.sqlite"

    def ready(self) -> Iterator[Job]:
        for method in self.methods:
            if method.name in self.lost:
                continue
            if method.name in self.won:
                wanted = [(self.won[method.name], seed, "test") for seed in range(self.seeds)]
            else:
                wanted = [(trial, 0, "validation") for trial in range(self.trials)]
            for trial, seed, split in wanted:
                key = (method.name, trial, seed, split)
                starts = None if key in self.asked else self._starts(method, seed)
                if starts is not None:
                    self.asked.add(key)
                    path = self._path(method.name, trial, seed)
                    yield Job(method.name, trial, seed, split, path, starts)

    def done(self, job: Job, result: dict[str, Any]) -> None:
        self.found[job.method, job.trial, job.seed, job.split] = result
        if job.split == "test" and "failed" in result:
            self.lost[job.method] = f"failed with seed {job.seed}: {result['failed']}"
        tried = [self.found.get((job.method, t, 0, "validation")) for t in range(self.trials)]
        if job.split == "test" or None in tried:
            return
        results = [r for r in tried if r is not None]
        scores = [float(r.get("score", math.nan)) for r in results]
        best: int | None = None
        for trial, score in enumerate(scores):
            if not math.isnan(score) and (best is None or self.better(score, scores[best])):
                best = trial
        if best is None:
            told = next((r["failed"] for r in results if "failed" in r), "no user has a score")
            self.lost[job.method] = f"every trial failed: {told}"
        else:
            self.won[job.method] = best


def compare(
    order: Order, folder: Path, *, resume: bool = False, fresh: bool = False,
    workers: int | None = None, heard: Listener | None = None,
) -> Comparison:  # fmt: skip
    """Run (or go on with) a comparison in `folder` and keep its figures in `comparison.json`
    there."""
    task = order.load()
    notes = validate(task)
    bench = Bench(task, profile(order.profile), order.compute, order.lost)
    programs = bench.compute(0).programs
    fits(task, programs, bench.profile)
    names = set(programs)
    chosen = [m for m in shown(order.only) if missing(task, names, m.about) is None]
    with _claimed(folder, order, resume, fresh):
        board = Board(
            _with_sources(chosen, task, names), folder / "jobs", order.seeds, order.trials,
            (lambda a, b: a > b) if task.metric.higher_is_better else (lambda a, b: a < b),
        )  # fmt: skip
        shared = budget(bench, order.trials)
        _work_off(board, order, shared, workers or _cores(), heard)
        result = _assemble(order, bench, shared, board, names, notes)
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


def _with_sources(chosen: list[Method], task: Task | Recorded, names: set[str]) -> list[Method]:
    """Add what the chosen methods start from, and device only, which all are held against."""
    wanted = {m.name for m in chosen} | {"device_only"}
    for method in chosen:
        programs = {*method.after, method.about.large} - {""}
        wanted |= {POOL_TRAINED[program] for program in programs}
    return [
        m for m in METHODS.values() if m.name in wanted and missing(task, names, m.about) is None
    ]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _claimed(folder: Path, order: Order, resume: bool, fresh: bool) -> Iterator[None]:
    """The run's folder, for one comparison at a time; a run that is not finished is not lost."""
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
        if not resume:
            for old in (folder / "jobs").iterdir():
                old.unlink()
            (folder / "comparison.json").unlink(missing_ok=True)
            write_whole(settings, json.dumps(wanted, indent=1))
        yield
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


def _work_off(
    board: Board, order: Order, shared: Budget, workers: int, listener: Listener | None
) -> None:
    context = multiprocessing.get_context("spawn")
    heard: Any = context.Queue()
    pool = ProcessPoolExecutor(
        workers, context, initializer=_prepare, initargs=(order, heard, os.getpid(), shared)
    )
    running: dict[Future[dict[str, Any]], Job] = {}
    if listener:
        listener.total(board.total())
    try:
        while True:
            for job in board.ready():
                running[pool.submit(_do, job)] = job
            if not running:
                return
            finished, _ = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
            _pass_on(heard, listener)
            for future in finished:
                job = running.pop(future)
                board.done(job, future.result())
                if listener:
                    listener.said(job.path.stem, job.label, -1.0)
    except BrokenProcessPool:
        raise RunError(
            "a worker process died, perhaps for want of memory", str(board.folder.parent),
            "Go on with --resume, with fewer --workers",
        ) from None  # fmt: skip
    finally:
        for future in running:
            future.cancel()
        for process in list((pool._processes or {}).values()):
            process.terminate()
        pool.shutdown(wait=True, cancel_futures=True)
        heard.close()


def _pass_on(heard: Any, listener: Listener | None) -> None:
    while True:
        try:
            news = heard.get_nowait()
        except queue.Empty:
            return
        if listener:
            listener.said(*news)


# --- from jobs to the figures that are kept


def _assemble(
    order: Order, bench: Bench, shared: Budget, board: Board, names: set[str], notes: list[str]
) -> Comparison:
    task = bench.task
    few = np.arange(bench.population.size)
    counts = np.concatenate(
        [
            bench.population.rows(few[at : at + 256], "train")["y"].n
            for at in range(0, len(few), 256)
        ]
    )
    sizes = [
        int(sum(p.numel() for p in bench.compute(0).program(which).module.parameters()))
        for which in ("small", "large")
    ]
    rows = [_row(m, task, names, shared, board, bench) for m in shown(order.only)]
    said = [*task.notes, *notes, *_one_by_one(rows)]
    if isinstance(task, Recorded):
        said.append(_RECORDED)
    return Comparison(
        task=task.name,
        about=task.about,
        metric=task.metric.name,
        higher_is_better=task.metric.higher_is_better,
        unit=task.metric.unit,
        pool_users=len(task.users.pool),
        device_users=bench.population.size,
        rows_per_device=(float(counts.min()), float(np.median(counts)), float(counts.max())),
        request=task.request,
        small_parameters=sizes[0],
        large_parameters=sizes[1],
        budget=_in_words(shared, task),
        trials=order.trials,
        profile=asdict(bench.profile),
        version=__version__,
        machine=_machine(),
        rows=rows,
        notes=said,
    )


_RECORDED = (
    "Answers are recorded: a request's bytes are those of its number and answer, not of its "
    "content, and neither time nor energy includes computing an answer."
)


def _one_by_one(rows: list[Row]) -> list[str]:
    """Say where devices could not be computed all at once, and why."""
    why = {s.computed for row in rows for s in row.seeds if "sequential: " in s.computed}
    reasons = sorted({part.split("sequential: ")[1] for how in why for part in how.split("; ")})
    return [f"Devices were trained one after the other: {reason}." for reason in reasons]


def _in_words(b: Budget, task: Task | Recorded) -> str:
    if isinstance(task, Recorded):
        return "nothing trains: answers are recorded"
    return (
        f"every collaboration that trains on devices: {b.local_epochs} passes over a device's own "
        f"rows in minibatches of {b.batch} ({b.steps} steps on the median device, {b.rows} rows), "
        f"spread over {b.rounds} exchanges (SplitNN: one exchange a step); "
        f"models trained in the cloud: {b.cloud_epochs} passes"
    )


def _machine() -> str:
    memory = ""
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = f", {os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
    python = f"Python {platform.python_version()}"
    return f"{platform.system()} {platform.machine()}, {_cores()} cores{memory}, {python}"


def _row(
    method: Method,
    task: Task | Recorded,
    names: set[str],
    shared: Budget,
    board: Board,
    bench: Bench,
) -> Row:
    about = method.about
    row = Row(method.name, about.title, about.family, about.paper, about.says)
    lack = missing(task, names, about) or board.lost.get(method.name)
    if lack:
        return replace(row, missing=lack)
    settings = [_plain(c) for c in method.trials(shared)]
    tried = [board.found[method.name, t, 0, "validation"] for t in range(board.trials)]
    trials = [
        {"settings": s, "score": r.get("score", math.nan), "failed": r.get("failed", "")}
        for s, r in zip(settings, tried, strict=True)
    ]
    won = board.won[method.name]
    seeds = [
        _seed(method, seed, board.found[method.name, won, seed, "test"], board, bench)
        for seed in range(board.seeds)
    ]
    return replace(row, settings=settings[won], trials=trials, seeds=seeds)


def _plain(collaboration: Any) -> dict[str, Any]:
    return {k: v for k, v in asdict(collaboration).items() if v is not None}


def _seed(
    method: Method, seed: int, found: dict[str, Any], board: Board, bench: Bench
) -> SeedResult:
    def large(program: str) -> float | None:
        source = POOL_TRAINED[program]
        if source not in board.won:
            return None
        return float(board.found[source, board.won[source], seed, "test"]["score"])

    before = large(method.about.large or "large")
    after = found["large_after"] if method.about.large else before
    return SeedResult(
        seed=seed,
        users=bench.population.names(),
        scores=found["scores"],
        others=found["others"],
        learning=learning_from(found["learning"]),
        serving=serving_from(found["serving"]),
        curve=[(int(at), float(mean), float(low)) for at, mean, low in found["curve"]],
        large_before=before,
        large_after=after,
        computed=found["computed"],
        wall_s=found["wall_s"],
    )
