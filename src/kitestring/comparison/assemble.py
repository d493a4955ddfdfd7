"""From finished jobs to the figures that are kept."""

from __future__ import annotations

import math
import os
import platform
import re
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from kitestring import __version__
from kitestring.collaborate.about import Budget
from kitestring.comparison import shrunk
from kitestring.comparison.board import Board
from kitestring.comparison.jobs import Bench
from kitestring.comparison.methods import POOL_TRAINED, Method
from kitestring.comparison.order import Order, missing
from kitestring.comparison.results import (
    Comparison,
    Row,
    SeedResult,
    Spent,
    learning_from,
    serving_from,
)
from kitestring.tasks.task import Recorded, Task


def assemble(
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
    rows = [_row(m, task, names, shared, board, bench) for m in order.shown]
    said = [*task.notes, *notes, *_one_by_one(rows), *shrunk.note(order.shrunk)]
    if isinstance(task, Recorded):
        said.append(_RECORDED)
    elif order.precision == "bfloat16":
        said.append(_BFLOAT16)
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
_BFLOAT16 = (
    "Trained in bfloat16 (--precision): what goes into products was rounded to 8 bits, so the "
    "figures are not those of float32. Weights, averages and served answers are float32."
)
_REASON = re.compile(r"sequential: (.+?)(?=, (?:backward|fit|predict) |$)")


def _one_by_one(rows: list[Row]) -> list[str]:
    """Say where devices could not be computed all at once, and why."""
    parts = {part for row in rows for s in row.seeds for part in s.computed.split("; ")}
    reasons = sorted({reason for part in parts for reason in _REASON.findall(part)})
    return [f"Devices were trained one after the other: {reason}." for reason in reasons]


def _in_words(b: Budget, task: Task | Recorded) -> str:
    if isinstance(task, Recorded):
        return "nothing trains: answers are recorded"
    return (
        f"every collaboration that trains on devices: {b.local_epochs} passes over a device's own "
        f"rows in minibatches of {b.batch} ({b.steps} steps on the median device, {b.rows} rows), "
        f"spread over {b.rounds} exchanges (SplitNN: one for each step; CoDA: rows that it is "
        f"given come on top); "
        f"models trained in the cloud: {b.cloud_epochs} passes"
    )


def _machine() -> str:
    memory = ""
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = f", {os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
    python = f"Python {platform.python_version()}"
    return f"{platform.system()} {platform.machine()}, {cores()} cores{memory}, {python}"


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


def spent(order: Order, board: Board) -> list[Spent]:
    """Of every job: trials, seeds, and what was trained on the pool for others."""
    methods = order.methods
    return [
        Spent(methods[method].about.title, split == "validation", found["spent"])
        for (method, _, _, split), found in board.found.items()
    ]


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
