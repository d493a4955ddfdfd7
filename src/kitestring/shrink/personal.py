"""The user's part of a shrunk model: trained on the device, by the step that its package holds.

The model stays as it was shrunk, quantised or not; low-rank adapters beside its linear layers are
the user's own (`kitestring.tasks.adapters`). `kitestring.collaborate.parameters.personal` says how
they are trained and when they are kept; here it is done for each device user in ONNX Runtime, from
the package, as a device would.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from kitestring.collaborate.parameters.personal import Personal, State
from kitestring.core import Array, Message, Tree
from kitestring.devices.runtime.load import Loaded
from kitestring.devices.session import DeviceSession, broadcast, frozen
from kitestring.errors import TaskError
from kitestring.pack.build import Source
from kitestring.shrink.answer import shipped
from kitestring.shrink.bench import Bench, Heard, Judging
from kitestring.shrink.candidates import Candidate
from kitestring.shrink.data import evenly
from kitestring.shrink.package import signed, weights
from kitestring.shrink.results import Scores
from kitestring.shrink.study import Study
from kitestring.shrink.workers import Listener
from kitestring.tasks.adapters import linears, low_rank
from kitestring.tasks.task import Task

How = Literal["last", "adapters"]
FILE = "personal.kite"
RANK = 4
TRIED = 64  # device users whose validation rows choose the learning rate
_RATES = (0.1, 1.0, 10.0)  # times the middle one of the task's plan


@dataclass(frozen=True)
class Gained:
    """Scores of the device users' test rows, by metric, before and after; `parameters`: how many
    are the user's own; `size`: bytes of the package as a whole.

    `tried`: the mean validation score of some users (`tried_on`: how many) by learning rate, and
    `untrained` that of the same users before. `kept`: how many of all users keep the model as it
    came, because no round answered the rows better that they hold out."""

    path: Path
    size: int
    how: How
    lr: float
    parameters: int
    tried: Mapping[float, float]
    untrained: float
    tried_on: int
    before: Mapping[str, Scores]
    after: Mapping[str, Scores]
    kept: int


@dataclass(frozen=True)
class Missing:
    """What was asked for and cannot be had."""

    how: How
    why: str


def personal(
    bench: Bench, candidate: Candidate, how: How, key: Path, path: Path, study: Study,
    listener: Listener | None = None,
) -> Gained:  # fmt: skip
    """Pack the choice with the step that trains a user's part, and train every user's. Scores that
    the study knows are not computed again; the package is made anew, at the chosen rate.

    Raises `TaskError` where the model has no linear layer, and what `build` and `load` raise."""
    module = adaptable(bench.model(candidate, 0), how)
    task = shipped(bench.task, module)
    middle = _settings(task, module)
    rates = [float(f"{middle.lr * factor:.6g}") for factor in _RATES]
    if listener:
        listener.total(len(rates) + 3)

    @lru_cache(1)
    def packed(settings: Personal) -> Loaded:
        return signed(Source(task, settings, State(0, weights(bench, task))), key, path)

    def served(lr: float, split: Judging, ids: Array, settings: Personal) -> dict[str, Any]:
        """At a rate of 0 nothing is trained."""
        at = f"trained at rate {lr:g}" if lr else "as the model came"
        title = f"{split} rows of {len(ids)} users, {at}"
        name = f"personal {how} {candidate.slug} {lr:g} {split}"

        def found() -> dict[str, Any]:
            heard = _telling(listener, name, title)
            heard(0.0)
            return _served(bench, packed(settings), replace(settings, lr=lr), split, ids, heard)

        known: dict[str, Any] = study.once(name, found)
        _telling(listener, name, title)(-1.0)
        return known

    every, metric = bench.judges.ids, bench.task.metric
    few = every[evenly(len(every), TRIED)]
    untrained, *scores = (
        _mean(served(lr, "validation", few, middle)["scores"][metric.name]) for lr in (0.0, *rates)
    )
    tried = dict(zip(rates, scores, strict=True))
    better = max if metric.higher_is_better else min
    known = {lr: score for lr, score in tried.items() if not math.isnan(score)} or tried
    settings = replace(middle, lr=better(known, key=lambda lr: known[lr]))
    before, after = (served(lr, "test", every, settings) for lr in (0.0, settings.lr))
    packed(settings)  # where all scores were known
    return Gained(
        path=path, size=path.stat().st_size, how=how, lr=settings.lr,
        parameters=sum(p.numel() for p in module.parameters() if p.requires_grad),
        tried=tried, untrained=untrained, tried_on=len(few),
        before=_of_one_seed(before["scores"]), after=_of_one_seed(after["scores"]),
        kept=after["kept"],
    )  # fmt: skip


def adaptable(model: nn.Module, how: How) -> nn.Module:
    """A copy in which only adapters train: beside every linear layer, or beside the last one and as
    wide as it, so that all of it may change. Always the same for the same model.

    Raises `TaskError` where it has no linear layer that could be adapted."""
    layers = list(linears(model))
    if not layers:
        mend = "Give it one, or leave --personal out"
        raise TaskError("the model has no linear layer to adapt", "", mend)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if how == "adapters":
            return low_rank(model, RANK)
        name, last = layers[-1]
        return low_rank(model, min(last.in_features, last.out_features), (name,))


def _settings(task: Task, module: nn.Module) -> Personal:
    """The task's plan; the user's part by name, as the program `small` calls it."""
    plan = task.plan
    rounds = min(plan.rounds, plan.local_epochs)
    own = [f"back.model.{name}" for name, p in module.named_parameters() if p.requires_grad]
    return Personal(
        rounds, max(1, plan.local_epochs // rounds), plan.batch, sorted(plan.lr)[len(plan.lr) // 2],
        plan.optimiser, ",".join(own), start="small",
    )  # fmt: skip


def _served(
    bench: Bench, found: Loaded, settings: Personal, split: Judging, ids: Array, heard: Heard
) -> dict[str, Any]:
    """Scores by metric, one for each user, of answers in ONNX Runtime, and how many users keep the
    model as it came. At a learning rate of 0 nothing is trained.

    The package's own half does what it holds; where the settings are not the package's, the same
    steps with another rate are asked of its graphs."""
    judges = bench.judges
    metrics = (bench.task.metric, *bench.task.others)
    scores: dict[str, list[float]] = {m.name: [] for m in metrics}
    packed = found.package.manifest["collaboration"]["settings"]
    half: Any = found.half if packed["lr"] == settings.lr else settings
    start, kept = broadcast(frozen(found.compute.initial("small")), 1), 0
    deployed = broadcast(found.deployed, 1)
    for i, user in enumerate(ids.tolist()):  # a package's half is that of one device
        heard(i / len(ids))
        alone = np.array([user])
        rows = judges.people.rows([user], "train")
        private = found.half.install(DeviceSession(found.compute, alone, 0, 0, rows, Tree()))
        for step in range(settings.rounds if settings.lr else 0):
            session = DeviceSession(found.compute, alone, 0, step + 1, rows, private)
            verb, down = ("again", Message()) if step else ("start", Message(parameters=start))
            with np.errstate(all="ignore"):  # too high a rate; a package's half says nothing too
                _, private = half.reply(verb, down, session)
        own = private.below("best.").pick(*settings.train.split(","))
        kept += all(np.array_equal(own[k], start[k]) for k in own)
        asked = judges.people.rows([user], split)
        session = DeviceSession(found.compute, alone, 0, 0, {"x": asked["x"]}, private)
        answer = found.half.decide(session, deployed).answer["answer"].values[0]
        truth = asked["y"].values[0, : int(asked["y"].n[0])]
        for m in metrics:
            scores[m.name].append(judges.score(m, answer[: len(truth)], truth))
    return {"scores": scores, "kept": kept}


def _mean(scores: list[float]) -> float:
    return math.nan if np.isnan(scores).all() else float(np.nanmean(scores))


def _of_one_seed(scores: Mapping[str, list[float]]) -> dict[str, Scores]:
    return {name: [each] for name, each in scores.items()}


def _telling(listener: Listener | None, name: str, title: str) -> Heard:
    """Tells the listener the share of a step that is done."""
    return lambda share: listener.said(name, title, share) if listener else None
