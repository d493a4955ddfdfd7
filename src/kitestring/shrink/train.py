"""Training on the cloud's pool: by the truth, or by what the large model says of the same rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kitestring.compress.distil.batches import rows
from kitestring.compress.distil.objective import Batch, Objective, Seen, Supervised
from kitestring.compress.distil.response import Response
from kitestring.compress.distil.train import Distilled, Settings, distil
from kitestring.errors import TaskError
from kitestring.shrink.data import Pool, parts
from kitestring.tasks.task import Task

_ROWS = 256  # at a time, where nothing is learnt
_AT_ONCE = 2**27  # numbers of a teacher's outputs that are kept
_TRIAL = 10  # of its steps, a training has one in so many to try a learning rate
_LONGER = 2  # times as many steps, where one learns from a teacher alone (see `trained`)
_MOMENTUM = 0.9  # of `distil`'s SGD; a task's has none


def trained(
    task: Task, student: nn.Module, teacher: nn.Module | None, pool: Pool, seed: int,
    keep: Path | None = None, heard: Callable[[int, int, float], Any] | None = None, *,
    begun: bool = False,
) -> Distilled:  # fmt: skip
    """On the pool's rows, as the task plans it for the cloud, to the end: weights from before the
    learning rate has fallen answer less well, also where the held-out loss is least there. Of the
    plan's rates it is the one with which a short trial comes furthest on the held-out rows.

    `begun`: the student knows something already. Otherwise what is taught takes more passes over
    the same rows, and gains by them: Beyer, Zhai, Royer, Markeeva, Anil, Kolesnikov 2022,
    "Knowledge distillation: A good teacher is patient and consistent", arXiv 2106.05237."""
    how = _settings(task, len(pool.x), seed)
    said = None if teacher is None else outputs(teacher, pool.x)
    batches = rows(pool.x, pool.y, batch=how.batch, seed=seed, teacher=said)
    objective: Objective = Supervised(task.loss)
    if teacher is not None:
        objective = Response(loss=task.loss)
        how = how if begun else replace(how, steps=_LONGER * how.steps)
    run = partial(distil, student, teacher, batches, objective)
    score = _held(objective, teacher, pool)

    def trial(rate: float) -> float:
        try:
            tried = run(replace(how, lr=rate, steps=max(1, how.steps // _TRIAL)))
        except TaskError:  # too high a rate; what is wrong with all, the training itself tells
            return math.inf
        held = score(tried.module)
        return held if math.isfinite(held) else math.inf

    rates = _rates(task)
    best = min(rates, key=trial) if len(rates) > 1 else rates[0]
    return run(replace(how, lr=best), heard=heard, keep=keep)


def _rates(task: Task) -> list[float]:
    plan = task.plan
    by = 1 - _MOMENTUM if plan.cloud_optimiser == "sgd" else 1.0  # a step goes so much further
    return [rate * by for rate in sorted({*plan.cloud_lr})]


def _settings(task: Task, count: int, seed: int) -> Settings:
    """The task's own plan for the cloud."""
    plan = task.plan
    steps = max(1, count // plan.cloud_batch) * plan.cloud_epochs
    return Settings(
        steps, plan.cloud_batch, optimiser=plan.cloud_optimiser, seed=seed,
        keep_every=max(1, steps // 20),
    )  # fmt: skip


def _held(
    objective: Objective, teacher: nn.Module | None, pool: Pool
) -> Callable[[nn.Module], float]:
    """The objective on the held-out rows."""
    xs, ys = parts(pool.held_x, _ROWS), parts(pool.held_y, _ROWS)
    if teacher is None:
        said: list[Tensor | None] = [None] * len(xs)
    else:
        with torch.no_grad():
            said = [teacher(x) for x in xs]

    @torch.no_grad()
    def score(module: nn.Module) -> float:
        total = 0.0
        for x, y, t in zip(xs, ys, said, strict=True):
            total += float(objective(Seen(Batch(x, y), module(x), t, {}, {}))) * len(x)
        return total / len(pool.held_x)

    return score


@torch.no_grad()
def outputs(module: nn.Module, x: Tensor) -> Tensor | None:
    """Of all rows; None where they are too many numbers to keep."""
    first = module(x[:1])
    if len(x) * first.numel() > _AT_ONCE:
        return None
    return torch.cat([module(part) for part in parts(x, _ROWS)])
