"""What `auto` wins over one device after the other, on modules that nobody chose and in other uses.

    python benchmarks/random_modules.py        -> benchmarks/results/random_modules.md

First the modules of tests/drawn_modules.py beside the MLP of benchmarks/simulation; then, on that
MLP, a CNN and a recommender, what collaborations other than FedAvg ask of `fit`. 64 devices of some
40 rows, batches of 10; processor time of one thread, the two ways in turn.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.append(str(Path(__file__).resolve().parent / "simulation"))

import kite
import workloads

from drawn_modules import draw
from kitestring.core import Recipe, Rows, Tree
from kitestring.devices.fit.compute import TorchCompute, thread_per_process
from kitestring.devices.fit.programs import Program
from kitestring.tasks.programs import programs

ROOT = Path(__file__).resolve().parents[1]
DEVICES, ROWS, BATCH, SEEDS = 64, 40, 10, 20
WAYS = ("sequential", "auto")
PLAIN = Recipe(0.02, batch=BATCH, shuffle=False)


@dataclass(frozen=True)
class Case:
    """What is given to `fit`."""

    programs: Mapping[str, Program]
    program: str
    rows: Mapping[str, Rows]
    recipe: Recipe = PLAIN
    more: Mapping[str, Tree] = field(default_factory=dict)  # a centre, a linear term

    def weights(self) -> Tree:
        """The same for each device."""
        start = self.programs[self.program].initial()
        return Tree({k: np.broadcast_to(a, (DEVICES, *a.shape)) for k, a in start.items()})


@dataclass(frozen=True)
class Found:
    first: float  # seconds of auto's first fit, which may compile
    spent: float  # median of the fits after it
    ratios: list[float]  # how much longer the other way took, pair by pair
    path: str

    @property
    def ratio(self) -> float:
        return float(np.median(self.ratios))

    def cells(self) -> str:
        spread = f"{self.ratio:.2f} ({min(self.ratios):.2f} to {max(self.ratios):.2f})"
        updates = DEVICES / self.spent
        return f"{spread} | {updates:,.0f} | {self.first:.1f} s | {self.path}"


HEAD = "sequential / auto, median (min to max) | auto, client updates/s | auto's first fit | path"


def measure(case: Case, runs: int = 5) -> Found:
    weights, key = case.weights(), np.arange(DEVICES, dtype=np.uint64)
    ways = {how: TorchCompute(case.programs, how) for how in WAYS}
    spent: dict[str, list[float]] = {how: [] for how in WAYS}
    for _ in range(1 + runs):
        for how, way in ways.items():
            started = time.process_time()
            way.fit(case.program, weights, case.rows, case.recipe, key=key, **case.more)
            spent[how].append(time.process_time() - started)
    pairs = zip(spent["sequential"][1:], spent["auto"][1:], strict=True)
    ratios = [one / other for one, other in pairs]
    path = ways["auto"].explain(case.program)
    return Found(spent["auto"][0], float(np.median(spent["auto"][1:])), ratios, path)


def sizes() -> Any:
    drawn = np.random.default_rng(0).lognormal(np.log(ROWS) - 0.125, 0.5, DEVICES)
    return np.clip(np.rint(drawn), 8, 5 * ROWS).astype(np.int64)


def stacked(columns: Callable[[int], Mapping[str, Any]]) -> dict[str, Rows]:
    """Rows of all devices, drawn at once."""
    n = sizes()
    most = int(n.max())
    flat = columns(DEVICES * most)
    return {k: Rows(a.reshape(DEVICES, most, *a.shape[1:]), n) for k, a in flat.items()}


def random_module(seed: int) -> tuple[str, Case]:
    drawn = draw(seed)
    rows = stacked(lambda n: drawn.columns(n, np.random.default_rng(seed)))
    case = Case({"p": Program("p", drawn.module, drawn.loss)}, "p", rows)
    return f"{drawn.about}; {drawn.parameters:,} parameters", case


def workload(name: str) -> Case:
    """A module of the simulation benchmark, with its own learning rate."""
    w = workloads.WORKLOADS[name]
    x, y = workloads.pool(w)
    rows = stacked(lambda n: {"x": x[np.arange(n) % len(x)], "y": y[np.arange(n) % len(y)]})
    return Case(programs(kite.task(w), 0, x[:2]), "small", rows, replace(PLAIN, lr=w.lr))


# --- other uses


def uses(plain: Case, last: str) -> Iterator[tuple[str, Case]]:
    """What FedProx, SCAFFOLD, distillation, personal heads and so on ask for; `last` is the prefix
    of the last layer."""

    def other(name: str, **settings: Any) -> tuple[str, Case]:
        return name, replace(plain, recipe=replace(plain.recipe, **settings))

    dice, weights = np.random.default_rng(1), plain.weights()

    def noise(scale: float) -> Tree:
        return Tree(
            {k: scale * dice.standard_normal(a.shape, dtype=np.float32) for k, a in weights.items()}
        )

    yield "FedAvg", plain
    near = weights + noise(0.01)
    yield (
        "pulled to a centre",
        replace(plain, recipe=replace(plain.recipe, mu=0.1), more={"centre": near}),
    )
    yield "a linear term", replace(plain, more={"linear": noise(0.001)})
    yield "a teacher's outputs", taught(plain)
    yield other("the last layer alone", train=(last,))
    yield other("momentum", momentum=0.9)
    yield other("decay", decay=0.001)
    yield other("Adam", optimiser="adam", lr=0.001)
    yield other("clipped", clip=1.0)
    yield other("3 epochs", epochs=3)
    yield other("shuffled", shuffle=True)


def taught(plain: Case) -> Case:
    compute = TorchCompute(plain.programs)
    found = compute.predict("small", plain.weights(), {"x": plain.rows["x"]})
    return replace(plain, program="small.distill", rows={**plain.rows, "teacher": found["out"]})


# --- the report


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:  # nothing is kept from an earlier run
        os.environ["KITESTRING_CACHE"] = folder
        report()


def report() -> None:
    thread_per_process()
    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True)
    lines = [
        "# Random modules, and other uses of `fit`",
        "",
        f"Commit {commit.strip()}, {os.cpu_count()} cores, Python {sys.version.split()[0]}; "
        "`python benchmarks/random_modules.py`.",
        "",
        f"{DEVICES} devices of some {ROWS} rows, batches of {BATCH}, one thread.",
        "",
        f"| module | {HEAD} |",
        "|---|---|---|---|---|",
    ]

    def say(text: str) -> None:
        print(text, flush=True)
        lines.append(text)

    mlp = measure(workload("W1"))
    say(f"| **MLP 561-64-6** | {mlp.cells()} |")
    found = []
    for seed in range(SEEDS):
        about, case = random_module(seed)
        found.append(measure(case))
        say(f"| {seed}: {about} | {found[-1].cells()} |")
    ratios = [f.ratio for f in found]
    say("")
    say(
        f"Of {SEEDS} modules {sum(r > 1 for r in ratios)} are faster; the median is "
        f"{np.median(ratios):.2f} times as fast, the least {min(ratios):.2f}; the MLP "
        f"{mlp.ratio:.2f}."
    )
    for name, title, last in (
        ("W1", "MLP 561-64-6", "back.fc2"),
        ("W2s", "CNN, 0.22 M parameters", "back.fc2"),
        ("W4", "recommender 3000x32 and MLP", "back.fc3"),
    ):
        say("")
        say(f"| {title} | {HEAD} |")
        say("|---|---|---|---|---|")
        for use, case in uses(workload(name), last):
            say(f"| {use} | {measure(case, 3).cells()} |")
    text = "\n".join(lines) + "\n"
    (ROOT / "benchmarks" / "results" / "random_modules.md").write_text(text)


if __name__ == "__main__":
    main()
