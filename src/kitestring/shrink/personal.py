"""The user's part of a shrunk model: trained on the device, by the step that its package holds.

The model stays as it was shrunk, quantised or not; low-rank adapters beside its linear layers are
the user's own (`kitestring.tasks.adapters`). `kitestring.collaborate.parameters.personal` says how
they are trained and when they are kept; here it is done for each device user in ONNX Runtime, from
the package, as a device would.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import nn

from kitestring.collaborate.parameters.personal import Personal, State
from kitestring.compress.quantise.layers import DynamicLinear, StaticLinear, WeightOnlyLinear
from kitestring.core import Array, Message, Tree
from kitestring.devices.fit.compute import TorchCompute
from kitestring.devices.runtime.load import Loaded, load
from kitestring.devices.session import DeviceSession, broadcast, frozen
from kitestring.errors import TaskError
from kitestring.pack.build import Source, build
from kitestring.package import archive, keys
from kitestring.shrink.answer import shipped
from kitestring.shrink.bench import Bench
from kitestring.shrink.candidates import Candidate
from kitestring.shrink.results import Scores
from kitestring.tasks.adapters import low_rank
from kitestring.tasks.programs import programs
from kitestring.tasks.task import Task

How = Literal["last", "adapters"]
FILE = "personal.kite"
RANK = 4
TRIED = 64  # device users whose validation rows choose the learning rate
_RATES = (0.1, 1.0, 10.0)  # times the middle one of the task's plan
_LINEAR = (nn.Linear, DynamicLinear, StaticLinear, WeightOnlyLinear)


@dataclass(frozen=True)
class Gained:
    """Scores of the device users' test rows, by metric, before and after; `parameters`: how many
    are the user's own; `size`: bytes of the package as a whole."""

    path: Path
    size: int
    how: How
    lr: float
    parameters: int
    before: Mapping[str, Scores]
    after: Mapping[str, Scores]


def personal(bench: Bench, candidate: Candidate, how: How, key: Path, path: Path) -> Gained:
    """Pack the choice with the step that trains a user's part, and train every user's.

    Raises `TaskError` where the model has no linear layer, and what `build` and `load` raise."""
    module = adaptable(bench.model(candidate, 0), how)
    task = shipped(bench.task, module)
    settings = _settings(task, module)
    own = keys.load(key)

    def packed(settings: Personal) -> Loaded:
        weights = TorchCompute(_programs(bench, task), "sequential").initial("small")
        made = build(Source(task, settings, State(0, weights)))
        archive.write(path, made.manifest, made.files, own)
        return load(path, frozenset({keys.sign(own, b"")["key"]}))

    found = packed(settings)
    ids = bench.judges.ids[: min(TRIED, len(bench.judges.ids))]
    better = max if bench.task.metric.higher_is_better else min
    name, tried = bench.task.metric.name, {}
    for factor in _RATES:
        at = replace(settings, lr=settings.lr * factor)
        scores = _trained(bench, found, at, "validation", ids)[name]
        tried[at.lr] = float(np.nanmean(scores)) if not np.isnan(scores).all() else np.nan
    known = {lr: score for lr, score in tried.items() if not np.isnan(score)} or tried
    settings = replace(settings, lr=better(known, key=lambda lr: known[lr]))
    found = packed(settings)
    every = bench.judges.ids
    before = _trained(bench, found, None, "test", every)
    after = _trained(bench, found, settings, "test", every)
    count = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return Gained(path, path.stat().st_size, how, settings.lr, count, before, after)


def adaptable(model: nn.Module, how: How) -> nn.Module:
    """A copy in which only adapters train: beside every linear layer, or beside the last one and as
    wide as it, so that all of it may change."""
    layers = [(n, m) for n, m in model.named_modules() if type(m) in _LINEAR]
    if not layers:
        mend = "Give it one, or leave --personal out"
        raise TaskError("the model has no linear layer to adapt", "personal", mend)
    if how == "adapters":
        return low_rank(model, RANK)
    name, last = layers[-1]
    wide = min(int(last.in_features), int(last.out_features))
    return low_rank(model, wide, (name,) if name else ("*",))


def _programs(bench: Bench, task: Task) -> Any:
    return programs(task, 0, bench.judges.example())


def _settings(task: Task, module: nn.Module) -> Personal:
    """The task's plan; the user's part by name, as the program `small` calls it."""
    plan = task.plan
    rounds = min(plan.rounds, plan.local_epochs)
    own = [f"back.model.{name}" for name, p in module.named_parameters() if p.requires_grad]
    return Personal(
        rounds, max(1, plan.local_epochs // rounds), plan.batch, sorted(plan.lr)[len(plan.lr) // 2],
        plan.optimiser, ",".join(own), start="small",
    )  # fmt: skip


def _trained(
    bench: Bench, found: Loaded, settings: Personal | None, split: Any, ids: Sequence[int] | Array
) -> dict[str, list[list[float]]]:
    """Scores by metric of one seed, by user, in ONNX Runtime; without settings as it was sent.

    The package's own half does what it holds; where the settings are not the package's, the same
    steps with another rate are asked of its graphs."""
    metrics = (bench.task.metric, *bench.task.others)
    scores: dict[str, list[float]] = {m.name: [] for m in metrics}
    start = frozen(found.compute.initial("small"))
    packed = found.package.manifest["collaboration"]["settings"]
    half: Any = found.half if settings is None or packed["lr"] == settings.lr else settings
    for user in np.asarray(ids).tolist():
        weights = broadcast(start, 1)
        if settings is not None:
            weights = _best(bench, found, half, settings, user, weights)
        rows = bench.judges.people.rows([user], split)
        out = found.compute.predict("small.answer", weights, {"x": rows["x"]})["answer"]
        n = int(rows["y"].n[0])
        for m in metrics:
            scores[m.name].append(bench.judges.score(m, out.values[0, :n], rows["y"].values[0, :n]))
    return {name: [each] for name, each in scores.items()}


def _best(
    bench: Bench, found: Loaded, half: Any, settings: Personal, user: int, start: Tree
) -> Tree:
    """What a device would answer with, once it has trained."""
    rows, private = bench.judges.people.rows([user], "train"), Tree()
    for step in range(settings.rounds):
        session = DeviceSession(found.compute, np.array([user]), 0, step + 1, rows, private)
        verb = "again" if step else "start"
        message = Message() if step else Message(parameters=start)
        _, private = half.reply(verb, message, session)
    return private.below("best.")
