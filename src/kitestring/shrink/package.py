"""The choice as a signed package, and what that gives and takes in a device's runtime."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kitestring.collaborate.baselines.pool_trained import PoolTrained, State
from kitestring.core import Array, Rows, Tree
from kitestring.devices.fit.compute import TorchCompute
from kitestring.devices.runtime.load import Loaded, load
from kitestring.devices.session import DeviceSession, broadcast
from kitestring.pack.build import Source, build
from kitestring.package import archive, keys
from kitestring.shrink.answer import Answer, answer, shipped
from kitestring.shrink.bench import Bench
from kitestring.shrink.candidates import LARGE, Candidate
from kitestring.shrink.taking import Taken, take
from kitestring.tasks.programs import programs
from kitestring.tasks.task import Task

FILE, KEY = "choice.kite", "kitestring.key"


@dataclass(frozen=True)
class Packed:
    """What was found of the package. `size`: bytes of it as a whole, which is what is downloaded;
    `taken`: of its graph with its weights, alone in a fresh process. `scores`: of validation rows,
    answered by the package's own half of the collaboration."""

    path: Path
    size: int
    taken: Taken
    scores: list[float]


def packed(bench: Bench, candidate: Candidate, reference: Taken, key: Path, path: Path) -> Packed:
    """Build, sign, write, load again and measure; `reference` is what the large model took. Raises
    what `build` and `load` raise."""
    task = shipped(bench.task, bench.model(candidate, 0))
    once = PoolTrained("small", rounds=0)  # sent down once, it learns nothing on the device
    found = signed(Source(task, once, State(0, weights(bench, task))), key, path)
    example = bench.judges.example()
    large = answer(bench.task, bench.model(Candidate(LARGE), 0), example)
    return Packed(
        path, path.stat().st_size, take(_answer(found), example, large, reference.p50),
        bench.judges.scores(answering(found), "validation")[bench.task.metric.name],
    )  # fmt: skip


def signed(source: Source, key: Path, path: Path) -> Loaded:
    """Built, signed and written, and loaded again as on a device that knows the key."""
    made, own = build(source), keys.load(key)
    archive.write(path, made.manifest, made.files, own)
    return load(path, frozenset({keys.sign(own, b"")["key"]}))


def weights(bench: Bench, task: Task) -> Tree:
    """Of a task's small model."""
    return TorchCompute(programs(task, 0, bench.judges.example()), "sequential").initial("small")


def _answer(found: Loaded) -> Answer:
    """The package's graph with the weights that it deploys."""
    (graph,) = (b for n, b in found.package.files.items() if n.startswith("graphs/"))
    return Answer(graph, found.deployed)


def answering(found: Loaded) -> Callable[[Array], Array]:
    """Rows [n, ...] -> what a device that was given this package answers, [n, ...]."""

    def answered(x: Array) -> Array:
        rows = {"x": Rows(x[None], np.array([len(x)]))}
        session = DeviceSession(found.compute, np.zeros(1, np.int64), 0, 0, rows, Tree())
        decision = found.half.decide(session, broadcast(found.deployed, 1))
        answer: Array = decision.answer["answer"].values[0]
        return answer

    return answered
