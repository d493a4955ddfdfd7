"""Kitestring, used as its users do: a task, the local engine, `run`.

    python benchmarks/simulation/kite.py WORKLOAD [--seconds 6] [--rounds 3] [--check N]

Nothing is set for a workload: the engine chooses how many devices it computes at a time, and how.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import models
import numpy as np
import torch
from contender import arguments, finish
from workloads import WORKLOADS, Workload, rows

from kitestring.collaborate.parameters.fedavg import FedAvg
from kitestring.core import Ask, run
from kitestring.devices.fit.compute import TorchCompute
from kitestring.devices.profiles import PROFILES
from kitestring.engines.local import LocalEngine, Setting
from kitestring.tasks.metrics import accuracy
from kitestring.tasks.population import DeviceUsers
from kitestring.tasks.programs import programs
from kitestring.tasks.task import Task
from kitestring.tasks.users import Columns, Split, Users


def load(workload: str, device: int) -> Mapping[Split, Columns]:
    """All rows are trained on: this is about speed."""
    x, y = rows(WORKLOADS[workload], device)
    return {
        "train": {"x": x, "y": y},
        "validation": {"x": x[:1], "y": y[:1]},
        "test": {"x": x[:1], "y": y[:1]},
    }


def task(w: Workload) -> Task:
    names = [f"device {i}" for i in range(w.devices)]
    return Task(
        name=w.name,
        users=Users(names, partial(load, w.name), pool=[], devices=range(w.devices)),
        small=partial(models.make, w.name),
        large=partial(models.make, w.name),  # FedAvg has no use for it
        metric=accuracy,
        loss="cross_entropy" if w.classes else "binary",
    )


class Noted(LocalEngine):
    """Remembers whom the cloud asked, so that --check can ask the same."""

    def exchange(self, asks: Sequence[Ask]) -> Any:
        self.cohorts = [*getattr(self, "cohorts", []), *(ask.to for ask in asks)]
        return super().exchange(asks)


def main() -> None:
    w, clock = arguments(__doc__)
    mine = task(w)
    some_x, _ = rows(w, 0)
    compute = TorchCompute(programs(mine, 0, some_x[:2]))
    devices = DeviceUsers(mine.users)
    engine = Noted(Setting(devices, PROFILES["phone"], chunk=None, workers=2), compute)
    averaging = FedAvg(
        rounds=10**9, epochs=1, batch=w.batch, lr=w.lr, cohort=w.cohort, shuffle=False
    )
    states = run(averaging, engine)
    next(states)
    clock.start()
    state = next(states)
    while clock.lap():
        state = next(states)
    found = state.weights.below("back.")
    finish(
        w,
        clock,
        lambda: {k: torch.from_numpy(np.asarray(a)) for k, a in found.items()},
        ["llvmlite"],
        engine.cohorts,
        compute.explain("small"),
    )


if __name__ == "__main__":
    main()
