"""One job of a comparison: a collaboration with its settings and a seed, learned and evaluated.

A job lives in one SQLite file and can be killed at any moment: what it had committed is found
again, and the rest is computed anew to the same figures.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kitestring.collaborate.baselines.pool_trained import State
from kitestring.comparison import shrunk
from kitestring.comparison.clock import MODELS, SCORES, STATE, Clock
from kitestring.comparison.results import Learning, Serving, Traffic
from kitestring.core import Rows, Tree, run, serve
from kitestring.devices.fit.compute import How, TorchCompute
from kitestring.devices.fit.programs import Precision, size_in_bytes
from kitestring.devices.profiles import Profile
from kitestring.engines.local import LocalEngine, Setting
from kitestring.errors import NoReplies, TaskError
from kitestring.exchange.ledger import Ledger
from kitestring.exchange.store import Store, load_state
from kitestring.tasks.population import DeviceUsers, pool_rows
from kitestring.tasks.programs import programs, recorded_programs
from kitestring.tasks.task import Metric, Recorded, Task

_POINTS = 4  # of the curve over rounds


@dataclass(frozen=True)
class Job:
    """`starts`: program -> the file of the job that trained it on the pool."""

    method: str
    trial: int
    seed: int
    split: str  # "validation" or "test"
    path: Path
    starts: tuple[tuple[str, Path], ...] = ()

    @property
    def label(self) -> str:
        what = f"trial {self.trial + 1}" if self.split == "validation" else f"seed {self.seed}"
        return f"{self.method}, {what}"


@dataclass(frozen=True)
class Bench:
    """What all jobs of a comparison share, built once in each worker."""

    task: Task | Recorded
    profile: Profile
    how: How
    lost: float
    device: str = "cpu"
    precision: Precision = "float32"
    shrunk: str = ""  # the folder of a search, whose models are programs too

    def __post_init__(self) -> None:
        users = self.task.users
        object.__setattr__(self, "population", DeviceUsers(users))
        pool = pool_rows(users) if isinstance(self.task, Task) else None
        object.__setattr__(self, "pool", pool)
        object.__setattr__(self, "_computes", {})

    population: DeviceUsers = None  # type: ignore[assignment]
    pool: Mapping[str, Rows] | None = None

    def compute(self, seed: int) -> TorchCompute:
        """Programs with the initial weights of that seed."""
        made: dict[int, TorchCompute] = self._computes  # type: ignore[attr-defined]
        if seed not in made:
            first = next(iter(made.values()), None)
            made[seed] = TorchCompute(
                self._programs(seed), self.how, first, self.device, self.precision
            )
        return made[seed]

    def _programs(self, seed: int) -> Any:
        if isinstance(self.task, Recorded):
            return recorded_programs(self.task)
        first = self.task.users.load(self.task.users.devices[0])["train"]["x"]
        some = np.asarray(first[:2])
        more = shrunk.programs(self.task, self.shrunk, seed, some)
        return {**programs(self.task, seed, some), **more}

    def chunk(self) -> int:
        """Devices at a time: enough to spread the cost of a step, few enough to fit the caches.
        A GPU is busy with more of them; how many more was not measured on one."""
        size = size_in_bytes(self.compute(0).initial("small"))
        if self.compute(0).device.type != "cpu":
            return int(np.clip(256 * 2**20 // max(1, size), 64, 512))
        return int(np.clip(16 * 2**20 // max(1, size), 8, 64))


def asked(task: Task | Recorded, y: Any) -> Any:
    """The truths that are asked: of sequences the last position, if that is what is served."""
    return y[:, -1] if isinstance(task, Task) and task.asks == "last" and y.ndim > 1 else y


@contextmanager
def booked(engine: LocalEngine) -> Iterator[Ledger]:
    """A ledger of its own for what is done inside, so that evaluation is not billed as learning."""
    before, engine.ledger, engine.latencies = engine.ledger, Ledger(), []
    try:
        yield engine.ledger
    finally:
        engine.ledger = before


@dataclass(frozen=True)
class Score:
    scores: list[float]
    others: dict[str, list[float]]
    serving: Serving

    def mean(self) -> float:
        known = np.array(self.scores)[~np.isnan(self.scores)]
        return float(known.mean()) if len(known) else float("nan")


def evaluate(
    bench: Bench, engine: LocalEngine, clock: Clock, service: Any, state: Any, split: str
) -> Score:
    """Evaluation is serving: every device user's held-out requests, labels hidden from the
    device."""
    task = bench.task
    metrics = (task.metric, *task.others)
    found: dict[str, list[float]] = {m.name: [] for m in metrics}
    cost = 0.0
    with booked(engine) as ledger:
        for ids, answers in serve(service, state, engine, split):
            rows = engine.setting.population.rows(ids, split)
            with clock.part(SCORES):
                for m in metrics:
                    found[m.name] += _scores(task, m, answers["answer"], rows["y"])
        cost = engine.recorded_cost
        serving = _serving(ledger, engine, bench, cost)
    others = {m.name: found[m.name] for m in task.others}
    return Score(found[task.metric.name], others, serving)


def _scores(task: Task | Recorded, metric: Metric, answer: Rows, y: Rows) -> list[float]:
    """By device; NaN where it has no row."""
    found = []
    for d, n in enumerate(y.n):
        truth = asked(task, y.values[d, :n])
        found.append(float(metric.score(answer.values[d, :n], truth)) if n else float("nan"))
    return found


def _serving(ledger: Ledger, engine: LocalEngine, bench: Bench, cost: float) -> Serving:
    purpose = engine.purpose
    amount = {what: v for (p, what), v in ledger.amounts.items() if p == purpose}
    requests = max(1, int(amount.get("requests", 0)))
    late = np.concatenate(engine.latencies) if engine.latencies else np.zeros(1)
    deploy = sum(ledger.kinds(f"{purpose}.deploy", "down").values())
    recorded = isinstance(bench.task, Recorded) and bench.task.cost is not None
    return Serving(
        up=_traffic(ledger, purpose, "up", requests),
        down=_traffic(ledger, purpose, "down", requests),
        deploy_bytes=deploy / bench.population.size,
        requests=requests,
        cloud_calls=amount.get("calls", 0) / requests,
        cloud_flops=amount.get("cloud_flops", 0) / requests,
        flops=amount.get("flops", 0) / requests,
        latency_p50=float(np.quantile(late, 0.5)),
        latency_p95=float(np.quantile(late, 0.95)),
        joules=(amount.get("joules_low", 0) / requests, amount.get("joules_high", 0) / requests),
        recorded_cost=cost / requests if recorded else None,
    )


def _traffic(ledger: Ledger, purpose: str, way: Any, share: float) -> Traffic:
    return Traffic(
        {k: v / share for k, v in ledger.kinds(purpose, way).items()},
        {k: v / share for k, v in ledger.leaves(purpose, way).items()},
    )


def _learning(ledger: Ledger, devices: int) -> Learning:
    amount = {what: v for (p, what), v in ledger.amounts.items() if p == "learn"}
    return Learning(
        up=_traffic(ledger, "learn", "up", devices),
        down=_traffic(ledger, "learn", "down", devices),
        seconds=amount.get("seconds", 0) / devices,
        clock=amount.get("clock", 0),
        flops=amount.get("flops", 0) / devices,
        joules=(amount.get("joules_low", 0) / devices, amount.get("joules_high", 0) / devices),
        cloud_flops=amount.get("cloud_flops", 0),
        rounds=int(amount.get("rounds", 0)),
        lost=int(amount.get("lost", 0)),
        refused=int(amount.get("refused", 0)),
    )


def work(
    bench: Bench, job: Job, collaboration: Any, progress: Callable[[float], None]
) -> dict[str, Any]:
    """Learn (or go on, or find it done), then evaluate on the job's split; plain values."""
    clock = Clock()
    with clock.part(STATE):
        store = Store(job.path)
    try:
        done = store.load(f"result.{job.split}")
        if done is not None:
            return dict(json.loads(done))
        with clock.part(MODELS):
            bench.compute(job.seed).used.clear()
            engine = _engine(bench, clock, job, store)
        state = _learn(bench, engine, clock, collaboration, job, progress)
        result = _measure(bench, engine, clock, collaboration, state, job)
        result["spent"] = clock.spent()
        result["wall_s"] = sum(result["spent"].values())
        store.save(f"result.{job.split}", json.dumps(result).encode())
        store.commit()
        return result
    except NoReplies as nobody:
        return {"failed": str(nobody), "spent": clock.spent()}
    finally:
        store.close()


def _engine(bench: Bench, clock: Clock, job: Job, store: Store) -> LocalEngine:
    compute = clock.compute(bench.compute(job.seed))
    starts = dict(job.starts)

    def pretrained(program: str) -> Tree:
        if program not in starts:
            return compute.initial(program)
        with clock.part(STATE):
            found = Store(starts[program])
            try:
                state = load_state(found, State)
            finally:
                found.close()
        if state is None:
            raise TaskError(f"no pool-trained {program} in {starts[program]}")
        return state.large if program == "large" else state.weights

    population: Any = clock.population(bench.population)
    setting = Setting(population, bench.profile, bench.chunk(), bench.lost, bench.pool)
    engine = LocalEngine(setting, compute, clock.store(store), pretrained=pretrained)
    if isinstance(bench.task, Recorded):
        engine.costs = bench.task.cost
    return engine


def _learn(
    bench: Bench, engine: LocalEngine, clock: Clock, collaboration: Any, job: Job,
    progress: Callable[[float], None],
) -> Any:  # fmt: skip
    """Run to the end; every quarter of the way, the metric on validation rows joins the curve."""
    total = max(1, getattr(collaboration, "rounds", getattr(collaboration, "steps", 1)))
    curve: dict[str, list[float]] = json.loads(engine.store.load("curve") or b"{}")
    state = None
    for state in run(collaboration, engine, job.seed):
        at = max(0, getattr(state, "round", getattr(state, "step", 0)))
        progress(min(1.0, at / total))
        point = str(100 * at // total)
        due = at * _POINTS // total != (at - 1) * _POINTS // total
        if due and at <= total and point not in curve:
            score = evaluate(bench, engine, clock, collaboration.serve(), state, "validation")
            known = np.array(score.scores)[~np.isnan(score.scores)]
            low = 0.1 if bench.task.metric.higher_is_better else 0.9
            curve[point] = [score.mean(), float(np.quantile(known, low)) if len(known) else np.nan]
            engine.store.save("curve", json.dumps(curve).encode())
            engine.store.commit()
    return state


def _measure(
    bench: Bench, engine: LocalEngine, clock: Clock, collaboration: Any, state: Any, job: Job
) -> dict[str, Any]:
    score = evaluate(bench, engine, clock, collaboration.serve(), state, job.split)
    curve = json.loads(engine.store.load("curve") or b"{}")
    large = getattr(collaboration, "large", None)
    after = evaluate(bench, engine, clock, large(), state, job.split).mean() if large else None
    return {
        "score": score.mean(),
        "scores": score.scores,
        "others": score.others,
        "serving": asdict(score.serving),
        "learning": asdict(_learning(engine.ledger, bench.population.size)),
        "curve": [[int(at), mean, low] for at, (mean, low) in curve.items()],
        "large_after": after,
        "computed": bench.compute(job.seed).explain_all(),
    }
