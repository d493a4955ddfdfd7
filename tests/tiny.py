"""Tiny tasks for the tests: made-up rows, a second or less for each collaboration.

Every kind that a task can be: classes, binary, values, sequences of which the last position is
asked, recorded answers; with and without a pool, with and without a small model that can be split.
The same on every machine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import replace
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import nn

from kitestring.collaborate.about import Budget
from kitestring.comparison.methods import METHODS
from kitestring.core import Message, Rows, Tree, run, serve
from kitestring.devices.fit.compute import TorchCompute
from kitestring.devices.fit.programs import Program
from kitestring.devices.profiles import PROFILES
from kitestring.engines.local import LocalEngine, Setting
from kitestring.exchange.store import Store
from kitestring.tasks.metrics import accuracy
from kitestring.tasks.population import DeviceUsers, pool_rows
from kitestring.tasks.programs import programs as task_programs
from kitestring.tasks.programs import recorded_programs
from kitestring.tasks.task import Metric, Plan, Recorded, Task
from kitestring.tasks.users import SPLITS, Split, Users

DEVICES, POOL = 6, 2
WIDTH, CLASSES, LENGTH, TOKENS = 8, 3, 5, 7
PLAN = Plan(
    local_epochs=4, rounds=2, batch=4, lr=(0.1,), cloud_epochs=4, cloud_lr=(0.01,), gift=8
)  # fmt: skip
BUDGET = Budget(
    PLAN.local_epochs, PLAN.rounds, PLAN.batch, PLAN.optimiser, PLAN.lr, 6,
    PLAN.cloud_epochs, PLAN.cloud_batch, PLAN.cloud_optimiser, PLAN.cloud_lr,
    PLAN.gift, PLAN.cloud_share,
)  # fmt: skip
"""What a comparison of the tiny task would give each collaboration, but little of it."""

KINDS = ("classes", "binary", "values", "sequence", "recorded")

error = Metric("error", lambda a, y: float(np.mean((a - y) ** 2)), higher_is_better=False, unit="")


def _rows(kind: str, user: int) -> dict[Split, dict[str, Any]]:
    """Ragged: 2 to 7 rows to train on, 3 to validate and 4 to test; users differ by a shift."""
    out: dict[Split, dict[str, Any]] = {}
    shift = np.random.default_rng([7, user]).normal(0, 0.5, WIDTH)
    for i, split in enumerate(SPLITS):
        dice = np.random.default_rng([11, user, i])
        n = (2 + user * 5 % 6, 3, 4)[i]
        centres = np.random.default_rng(3).normal(0, 2, (CLASSES, WIDTH))
        y = dice.integers(0, CLASSES, n)
        x = (centres[y] + dice.normal(0, 1, (n, WIDTH)) + shift).astype(np.float32)
        if kind == "classes":
            out[split] = {"x": x, "y": y}
        elif kind == "binary":
            out[split] = {"x": x, "y": (y > 0).astype(np.float32)}
        elif kind == "values":
            out[split] = {"x": x, "y": x[:, 0] * 0.5 + y.astype(np.float32)}
        elif kind == "sequence":
            x = dice.integers(0, TOKENS, (n, LENGTH))
            y = (x + 1 + user % 2) % TOKENS
            y[dice.random((n, LENGTH)) < 0.2] = -1  # not asked
            y[:, -1] = np.abs(y[:, -1])
            out[split] = {"x": x, "y": y}
        else:
            number = user * 30 + i * 10 + np.arange(n)
            right = np.eye(CLASSES, dtype=np.float32)[y]
            sure = dice.random(n).astype(np.float32)
            wrong = np.roll(right, 1, axis=1)
            device = np.where((sure > 0.4)[:, None], right, wrong)
            out[split] = {"x": number, "y": y, "device": device, "confidence": sure}
    return out


def users(kind: str = "classes", pool: bool = True) -> Users:
    shared = POOL if pool and kind != "recorded" else 0
    count = DEVICES + shared
    names = [f"user {i}" for i in range(count)]
    return Users(names, partial(_rows, kind), list(range(DEVICES, count)), list(range(DEVICES)))


class Whole(nn.Module):
    """A small model that cannot be split."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)  # type: ignore[no-any-return]


def _small(kind: str, split: bool) -> nn.Module:
    layers: list[nn.Module]
    if kind == "sequence":
        layers = [nn.Embedding(TOKENS, 6), nn.Tanh(), nn.Linear(6, TOKENS)]
    elif kind == "classes":
        layers = [nn.Linear(WIDTH, 6), nn.ReLU(), nn.Linear(6, CLASSES)]
    else:
        layers = [nn.Linear(WIDTH, 6), nn.ReLU(), nn.Sequential(nn.Linear(6, 1), nn.Flatten(0))]
    whole = nn.Sequential(*layers)
    return whole if split else Whole(whole)


def _large(kind: str) -> nn.Module:
    if kind == "sequence":
        return nn.Sequential(
            nn.Embedding(TOKENS, 12), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, TOKENS)
        )
    outputs = CLASSES if kind == "classes" else 1
    layers: list[nn.Module] = [nn.Linear(WIDTH, 16), nn.ReLU(), nn.Linear(16, outputs)]
    return nn.Sequential(*layers, *([] if kind == "classes" else [nn.Flatten(0)]))


def _server(kind: str) -> nn.Module:
    """Smaller than the default of 128 to 512 wide, which would take most of the tests' time."""
    outputs = {"sequence": TOKENS, "classes": CLASSES}.get(kind, 1)
    layers: list[nn.Module] = [nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, outputs)]
    return nn.Sequential(*layers, *([nn.Flatten(0)] if kind in ("binary", "values") else []))


def task(kind: str = "classes", pool: bool = True, split: bool = True) -> Task | Recorded:
    who = users(kind, pool)
    if kind == "recorded":
        dice = np.random.default_rng(5)
        cloud = np.zeros((DEVICES * 30, CLASSES), np.float32)
        for user in range(DEVICES):
            for part in _rows(kind, user).values():
                cloud[part["x"], part["y"]] = 1
        cost = dice.random(len(cloud)).astype(np.float32)
        return Recorded("tiny", who, cloud, accuracy, cost, plan=PLAN)
    return Task(
        "tiny",
        who,
        partial(_small, kind, split),
        partial(_large, kind),
        error if kind == "values" else accuracy,
        {"binary": "binary", "values": "squared"}.get(kind, "cross_entropy"),  # type: ignore[arg-type]
        server=partial(_server, kind) if split else None,
        asks="last" if kind == "sequence" else "row",
        plan=PLAN,
    )


def programs(
    kind: str = "classes", seed: int = 0, pool: bool = True, split: bool = True
) -> dict[str, Program]:
    """The strict engine's other process calls this by name."""
    found = task(kind, pool, split)
    if isinstance(found, Recorded):
        return recorded_programs(found)
    first = found.users.load(0)["train"]["x"]
    return task_programs(found, seed, first[:2])


class Padded:
    """A population whose rows are padded wider than they need be, with what must not matter."""

    def __init__(self, population: Any, extra: int = 3) -> None:
        self._population, self._extra, self.size = population, extra, population.size

    def rows(self, ids: Any, split: str) -> dict[str, Rows]:
        return {k: self._wider(r) for k, r in self._population.rows(ids, split).items()}

    def _wider(self, rows: Rows) -> Rows:
        shape = (len(rows.n), rows.values.shape[1] + self._extra, *rows.values.shape[2:])
        rubbish = np.nan if rows.values.dtype.kind == "f" else -(10**6)
        values = np.full(shape, rubbish, rows.values.dtype)
        real = rows.mask()
        values[:, : real.shape[1]][real] = rows.values[real]
        return Rows(values, rows.n)


def stacked(columns: Mapping[str, list[Any]]) -> dict[str, Rows]:
    """Lists of one array [n, ...] per device as `Rows`, with rubbish in the padding."""
    out = {}
    for name, arrays in columns.items():
        first = np.asarray(arrays[0])
        n = np.array([len(a) for a in arrays])
        rubbish = np.nan if first.dtype.kind == "f" else -(10**6)
        values = np.full(
            (len(arrays), max(1, int(n.max())), *first.shape[1:]), rubbish, first.dtype
        )
        for d, a in enumerate(arrays):
            values[d, : n[d]] = a
        out[name] = Rows(values, n)
    return out


# --- engines on them


def has(kind: str, pool: bool = True, split: bool = True) -> set[str]:
    """What a tiny task has of what collaborations need."""
    if kind == "recorded":
        return {"pool", "confidence"}
    found = {"models"} | ({"pool"} if pool else set()) | ({"split"} if split else set())
    return found | (set() if kind == "values" else {"confidence", "entropy"})


def fits(name: str, kind: str, pool: bool = True, split: bool = True) -> bool:
    return set(METHODS[name].about.needs) <= has(kind, pool, split)


def collaboration(name: str, optimiser: str = "sgd") -> Any:
    """The only trial that the tiny budget gives a method."""
    return METHODS[name].trials(replace(BUDGET, optimiser=optimiser))[0]


def population(kind: str = "classes") -> DeviceUsers:
    return DeviceUsers(users(kind))


@cache
def compute(kind: str = "classes", how: Any = "auto") -> TorchCompute:
    return TorchCompute(programs(kind), how)


def engine(
    kind: str = "classes", chunk: int = 4, how: Any = "auto", lost: float = 0.0,
    padded: bool = False, store: Store | None = None, hands: Any = None,
) -> LocalEngine:  # fmt: skip
    """`hands(compute, population, store)` makes other hands than those in the process."""
    who: Any = Padded(population(kind)) if padded else population(kind)
    pool = None if kind == "recorded" else pool_rows(users(kind))
    if padded and pool is not None:
        pool = {k: Padded(who)._wider(r) for k, r in pool.items()}
    store = store or Store()
    made = hands(compute(kind, how), who, store) if hands else None
    return LocalEngine(
        Setting(who, PROFILES["phone"], chunk, lost, pool), compute(kind, how), store, made
    )


def learn(collaboration: Any, engine: Any, seed: int = 0) -> Any:
    """The last state."""
    state = None
    for now in run(collaboration, engine, seed):
        state = now
    return state


def answers(collaboration: Any, state: Any, engine: Any, split: str = "test") -> list[Any]:
    """Each device's answers to its held-out requests, and nothing billed as learning."""
    out: list[Any] = []
    for ids, found in serve(collaboration.serve(), state, engine, split):
        for d in range(len(ids)):
            out.append(found["answer"].values[d, : int(found["answer"].n[d])])
    return out


def private(engine: Any, device: int) -> Tree:
    """A device's private state, wherever it is kept; empty for none."""
    there = getattr(engine.hands, "private", None)
    return there(device) if there else engine.store.get("private", device) or Tree()


def apart(a: Any, b: Any) -> float:
    """How far two trees, messages, states or arrays are apart: the largest difference of all leaves
    in units of the leaf's largest value; infinity where they have another form."""
    if isinstance(a, Message):
        a, b = ({(k, n): v for k, n, v in m.leaves()} for m in (a, b))
    if dataclasses.is_dataclass(a) and not isinstance(a, Rows):
        a, b = vars(a), vars(b)
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return float("inf")
        return max((apart(a[k], b[k]) for k in a), default=0.0)
    if isinstance(a, Rows):
        if list(a.n) != list(b.n):
            return float("inf")
        a, b = (r.values[r.mask()] for r in (a, b))
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape or a.dtype != b.dtype:
        return float("inf")
    if a.size == 0:
        return 0.0
    one, other = a.astype(np.float64), b.astype(np.float64)
    there = np.isfinite(one) & np.isfinite(other)
    if not np.array_equal(one[~there], other[~there], equal_nan=True):
        return float("inf")
    size = max(1e-3, float(np.abs(other[there]).max(initial=0)))
    return float(np.abs(one[there] - other[there]).max(initial=0)) / size
