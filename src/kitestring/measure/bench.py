"""Models measured one by one, each in a fresh process, run for run in turn with a baseline."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from kitestring import units
from kitestring.errors import SettingError
from kitestring.measure import energy, limits
from kitestring.measure.operations import Counted
from kitestring.measure.process import Exhausted, Process
from kitestring.measure.subject import Inputs, Subject

Heard = Callable[[str, int, int], None]
"""Told a model's name, how many runs are done, and of how many."""

_WARM_UP = 3  # runs that are not timed
_QUICK = (
    5e-3  # seconds: a run as short as this is timed after another, untimed, has woken the caches
)


@dataclass(frozen=True)
class Setting:
    """How to measure. `quota`: cores, shared with the baseline; `memory`: bytes above what the
    imports take."""

    inputs: Inputs = field(default_factory=Inputs)
    runs: int = 100
    threads: int = 1
    quota: float | None = None
    memory: int | None = None

    def __post_init__(self) -> None:
        least = {"runs": self.runs, "threads": self.threads, "rows": self.inputs.rows}
        for name, value in least.items():
            if value < 1:
                raise SettingError(f"--{name} {value} is too small", mend="Give 1 or more")
        if self.quota is not None and not 0.01 <= self.quota <= (os.cpu_count() or 1):
            mend = f"Give cores, from 0.01 to the {os.cpu_count()} that there are"
            raise SettingError(f"--cpu-quota {self.quota}", mend=mend)
        if self.memory is not None and self.memory < 2**20:
            raise SettingError(
                f"--memory {self.memory} bytes is too small", mend="Give 1MB or more"
            )


@dataclass(frozen=True)
class Spread:
    """Of many runs: the median, the 95th percentile and the mean, in seconds."""

    p50: float
    p95: float
    mean: float


@dataclass(frozen=True)
class Measured:
    """What one model took. Times are seconds, memory is bytes above what the imports take.

    `failed` says why there are no times. Operations and bytes moved were counted; joules are
    modelled, (low, high)."""

    name: str
    runtime: str
    size: int | None  # bytes on disk; of a module, which is no file, of its weights
    failed: str = ""
    load: float | None = None
    wall: Spread | None = None
    cpu: Spread | None = None
    peak: int | None = None
    flops: float | None = None
    moved: float | None = None
    joules: tuple[float, float] | None = None
    skipped: tuple[str, ...] = ()  # operators that were not counted
    walls: tuple[float, ...] = ()  # every run, in order
    cpus: tuple[float, ...] = ()

    @property
    def rate(self) -> float | None:
        """Operations a second at the median time."""
        return self.flops / self.wall.p50 if self.flops and self.wall else None


@dataclass(frozen=True)
class Ratio:
    """The model's time over the baseline's, run by run: the median and the middle eight tenths."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Pair:
    """A model, and what it was run in turn with."""

    subject: Measured
    baseline: Measured | None = None
    wall: Ratio | None = None
    cpu: Ratio | None = None


@dataclass(frozen=True)
class Report:
    """Everything that a measurement found, as plain values for JSON."""

    pairs: tuple[Pair, ...]
    setting: Setting
    notes: tuple[str, ...]  # what a reader must know: emulations, limits that could not be had
    machine: str
    date: str


def spread(times: Sequence[float]) -> Spread:
    """Percentiles between two runs are interpolated."""
    p50, p95 = np.quantile(times, (0.5, 0.95))
    return Spread(float(p50), float(p95), float(np.mean(times)))


def ratio(times: Sequence[float], others: Sequence[float]) -> Ratio:
    shares = np.asarray(times) / np.maximum(others, 1e-12)
    low, median, high = np.quantile(shares, (0.1, 0.5, 0.9))
    return Ratio(float(median), float(low), float(high))


def measure(
    subjects: Sequence[Subject], baselines: Sequence[Subject], setting: Setting,
    heard: Heard = lambda name, done, total: None,
) -> Report:  # fmt: skip
    """Each subject with the baseline of its name, or with the one baseline there is."""
    notes = dict.fromkeys([_PINNED] if setting.threads == 1 and _core(setting) is None else [])
    pairs = []
    for subject in subjects:
        same = [b for b in baselines if b.name == subject.name]
        same += baselines if len(baselines) == 1 else []
        against = same[0] if same else None
        pairs.append(_pair(subject, against, setting, heard, notes))
    return Report(tuple(pairs), setting, tuple(notes), machine(), date.today().isoformat())


_PINNED = "The process was not held to one core: this system cannot."
QUOTA = "CPU-quota emulation: not a slower core."


def _core(setting: Setting) -> int | None:
    """The core that one thread is held to."""
    if setting.threads > 1 or not hasattr(os, "sched_getaffinity"):
        return None
    return max(os.sched_getaffinity(0))


def _pair(
    subject: Subject, against: Subject | None, setting: Setting, heard: Heard,
    notes: dict[str, None],
) -> Pair:  # fmt: skip
    both = [subject, against] if against else [subject]
    counts = [_counted(one, setting) for one in both]
    with ExitStack() as stack:
        # The groups first: they go when the processes in them are gone.
        quota = _quota(setting, stack, notes)
        rooms = [_room(setting, stack, notes) for _ in both]
        workers = [_Worker(stack.enter_context(_process(one, setting)), one) for one in both]
        for worker, room in zip(workers, rooms, strict=True):
            worker.label = worker.process.begin()
            _limit(worker.process, setting, quota, room)
        _turns(workers, setting, heard)
    found = [w.measured(c, setting) for w, c in zip(workers, counts, strict=True)]
    if len(found) == 1:
        return Pair(found[0])
    first, second = found
    if first.failed or second.failed:
        return Pair(first, second)
    walls, cpus = ratio(first.walls, second.walls), ratio(first.cpus, second.cpus)
    return Pair(first, second, walls, cpus)


def _process(subject: Subject, setting: Setting) -> Process:
    return Process(subject, setting.inputs, setting.threads, _core(setting))


def _counted(subject: Subject, setting: Setting) -> Counted:
    """In a process of its own, under no limit: counting takes memory."""
    with _process(subject, setting) as process:
        process.begin()
        try:
            found = process.ask("count")
        except Exhausted:
            return Counted(None, None)
    return Counted(**{**found, "skipped": tuple(found["skipped"])})


class _Worker:
    """One of the processes that take turns."""

    def __init__(self, process: Process, subject: Subject) -> None:
        self.process, self.subject = process, subject
        self.label, self.failed = "", ""
        self.load: float | None = None
        self.peak: int | None = None
        self.walls: list[float] = []
        self.cpus: list[float] = []

    def ready(self) -> None:
        self.load = float(self.process.ask("load")["seconds"])
        for _ in range(_WARM_UP):
            self.process.ask("run")

    def turn(self) -> None:
        quick = bool(self.walls) and self.walls[-1] < _QUICK
        done = self.process.ask("run", untimed=int(quick))
        self.walls.append(float(done["wall"]))
        self.cpus.append(float(done["cpu"]))

    def end(self) -> None:
        self.peak = int(self.process.ask("peak")["bytes"])

    def measured(self, counted: Counted, setting: Setting) -> Measured:
        flops, moved = counted.flops, counted.moved
        size = self.subject.size if self.subject.size is not None else counted.weights
        modelled = None if flops is None or moved is None else energy.joules(flops, moved)
        if self.failed:
            return Measured(
                self.subject.name, self.label, size, self.failed, flops=flops, moved=moved,
                joules=modelled, skipped=counted.skipped,
            )  # fmt: skip
        return Measured(
            self.subject.name, self.label, size, "", self.load, spread(self.walls),
            spread(self.cpus), self.peak, flops, moved, modelled, counted.skipped,
            tuple(self.walls), tuple(self.cpus),
        )  # fmt: skip


def _turns(workers: list[_Worker], setting: Setting, heard: Heard) -> None:
    """Run for run in alternation, each first as often as the other; one at a time is awake."""

    def each(todo: Callable[[_Worker], None], order: list[_Worker]) -> None:
        for worker in order:
            if worker.failed:
                continue
            try:
                todo(worker)
            except Exhausted:
                if setting.memory is None:
                    worker.failed = "ran out of memory"
                else:
                    worker.failed = f"needs more than the limit of {units.size(setting.memory)}"

    each(_Worker.ready, workers)
    name = workers[0].subject.name
    for run in range(setting.runs):
        if all(w.failed for w in workers):
            return
        each(_Worker.turn, workers[:: -1 if run % 2 else 1])
        heard(name, run + 1, setting.runs)
    each(_Worker.end, workers)


def _quota(setting: Setting, stack: ExitStack, notes: dict[str, None]) -> limits.Group | None:
    if setting.quota is None:
        return None
    try:
        group = stack.enter_context(limits.quota(setting.quota))
    except limits.Unavailable as problem:
        raise SettingError(
            f"--cpu-quota needs a control group: {problem}",
            mend="Run it as root on Linux, or leave --cpu-quota out",
        ) from None
    notes[QUOTA] = None
    return group


def _room(setting: Setting, stack: ExitStack, notes: dict[str, None]) -> limits.Group | None:
    if setting.memory is None:
        return None
    try:
        return stack.enter_context(limits.room(setting.memory))
    except limits.Unavailable as problem:
        notes[f"--memory limits the address space, not what is resident: {problem}."] = None
        return None


def _limit(
    process: Process, setting: Setting, quota: limits.Group | None, room: limits.Group | None
) -> None:
    """Once the imports are done: what they take is none of the model's."""
    try:
        for group in (quota, room):
            if group is not None:
                group.add(process.id)
    except limits.Unavailable as problem:
        raise SettingError(
            f"the limits cannot be set: {problem}", mend="Leave --cpu-quota and --memory out"
        ) from None
    if setting.memory is not None and room is None:
        process.ask("limit", bytes=setting.memory)


def machine() -> str:
    """The processor, the system and Python, as words."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    processor = names[0] if names else platform.processor() or platform.machine()
    return (
        f"{processor}, {platform.system()} {platform.machine()}, Python {platform.python_version()}"
    )


def plain(report: Report) -> dict[str, Any]:
    """The report as JSON holds it."""
    return asdict(report)
