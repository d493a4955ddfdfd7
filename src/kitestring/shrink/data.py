"""What a search learns from and is judged by: the pool's rows, and device users' held-out ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kitestring.core import Array
from kitestring.errors import TaskError
from kitestring.tasks.population import DeviceUsers, pool_rows
from kitestring.tasks.task import Metric, Recorded, Task
from kitestring.tasks.users import Split

HELD = 10  # one row in so many of the pool's is held out
MOST = 1000  # device users that quality is judged by
_CALIBRATED = 256  # pool rows that ranges of activations are taken from
_CHUNK = 64  # users at a time


@dataclass(frozen=True)
class Pool:
    """The cloud's rows: `x`, `y` [n, ...] to train on, `held_x`, `held_y` to tune by."""

    x: Tensor
    y: Tensor
    held_x: Tensor
    held_y: Tensor

    @property
    def some(self) -> list[Tensor]:
        """Inputs of the model, for what is calibrated: of one batch each."""
        return parts(self.x[:_CALIBRATED], 32)


def checked(task: Task | Recorded) -> Task:
    """Raises `TaskError` for a task whose models nothing can be made of."""
    where = f"task {task.name}"
    if isinstance(task, Recorded):
        mend = "Choose one with models, as digits"
        raise TaskError("its answers are recorded: there is no model to shrink", where, mend)
    if not task.users.pool:
        mend = "Give users whose rows the cloud has: Users(..., pool=...)"
        raise TaskError("it has no pool to train on", where, mend)
    return task


def pool(task: Task) -> Pool:
    """All rows of the pool users, in an order drawn once; every tenth is held out."""
    found = pool_rows(task.users)
    assert found is not None
    x, y = (found[name].values[0] for name in ("x", "y"))
    if len(y) < 2:
        raise TaskError(f"its pool has {len(y)} rows", f"task {task.name}", "Give the pool more")
    order = np.random.default_rng(0).permutation(len(y))
    held = order[:: min(HELD, len(y))]
    kept = np.setdiff1d(order, held)
    each = (torch.from_numpy(np.ascontiguousarray(a[i])) for i in (kept, held) for a in (x, y))
    return Pool(*each)


def parts(x: Tensor, rows: int) -> list[Tensor]:
    """So many rows at a time."""
    return [x[at : at + rows] for at in range(0, len(x), rows)]


def evenly(count: int, most: int) -> Array:
    """Indices below `count`, at most `most` of them, from the first to the last."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(np.int64))


class Judges:
    """Device users, each of whose held-out rows a model is judged by; of many, evenly chosen."""

    def __init__(self, task: Task) -> None:
        self.task, self.people = task, DeviceUsers(task.users)
        self.ids = evenly(self.people.size, MOST)
        self.names = [task.users.names[task.users.devices[i]] for i in self.ids.tolist()]

    def example(self) -> Array:
        """Two rows of x, or one: for their shape and type."""
        first: Array = self.people.rows(self.ids[:1], "train")["x"].values[0]
        return first[:2]

    def rows(self, split: Split) -> list[int]:
        """How many each user is judged by."""
        return [int(n) for ids in self._chunks() for n in self.people.rows(ids, split)["y"].n]

    def scores(self, model: Callable[[Array], Array], split: Split) -> dict[str, list[float]]:
        """Of a model of rows [n, ...]: by the name of each of the task's metrics, one for each
        user, NaN where it is undefined."""
        metrics = (self.task.metric, *self.task.others)
        found: dict[str, list[float]] = {m.name: [] for m in metrics}
        for ids in self._chunks():
            rows = self.people.rows(ids, split)
            mask = rows["x"].mask()
            ends = np.cumsum(rows["x"].n)[:-1]
            answers = np.split(model(rows["x"].values[mask]), ends)
            truths = np.split(rows["y"].values[mask], ends)
            for answer, truth in zip(answers, truths, strict=True):
                for m in metrics:
                    found[m.name].append(self.score(m, answer, truth))
        return found

    def score(self, metric: Metric, answer: Array, y: Array) -> float:
        """Of one user's answers and the column y; NaN without rows."""
        truth = y[:, -1] if self.task.asks == "last" and y.ndim > 1 else y
        return float(metric.score(answer, truth)) if len(truth) else float("nan")

    def _chunks(self) -> list[Array]:
        return [self.ids[at : at + _CHUNK] for at in range(0, len(self.ids), _CHUNK)]
