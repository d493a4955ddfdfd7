"""What training in bfloat16 does to the final accuracy, and to the speed.

    python benchmarks/precision.py     -> benchmarks/results/precision.md

Accuracy: FedAvg (the small model) and cloud only (the large one) on `digits`, one learning rate and
the same seeds in each way. Bfloat16 is held against float32 computed one device after the other, as
it is itself. `auto`, the usual way, differs from that by the order of its sums: how far that alone
takes it is beside it. Speed: FedAvg's rounds on the workloads of benchmarks/simulation, processor
time of one process with one thread, the ways in turn. And what all of it rests on: how fast torch
multiplies matrices of either kind here.
"""

from __future__ import annotations

import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.append(str(Path(__file__).resolve().parent / "simulation"))

import contender
import kite
import run as simulation
import workloads

from kitestring.collaborate.parameters.fedavg import FedAvg
from kitestring.comparison.compare import compare
from kitestring.comparison.order import Order
from kitestring.core import run
from kitestring.devices.fit.compute import TorchCompute, thread_per_process
from kitestring.devices.profiles import PROFILES
from kitestring.engines.local import LocalEngine, Setting
from kitestring.tasks.population import DeviceUsers
from kitestring.tasks.programs import programs

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "precision.md"
SEEDS, RUNS = 3, 3
METHODS = ("fedavg", "cloud_only")
WAYS: dict[str, dict[str, Any]] = {  # what is given to an Order; the others are held to the first
    "float32, one by one": {"compute": "sequential"},
    "float32": {},
    "bfloat16": {"precision": "bfloat16"},
}
DEVICES = {"W1a": 64, "W1": 64, "W4": 64, "W2s": 8, "W2": 4, "W3": 8, "W3t": 8}
FLAGS = ("avx512_bf16", "amx_bf16")


# --- accuracy


def accuracies(way: str) -> dict[str, list[float]]:
    """By collaboration: of each seed, the mean over users, in percent."""
    order = Order("digits", only=METHODS, seeds=SEEDS, trials=1, **WAYS[way])
    with tempfile.TemporaryDirectory() as folder:
        found = compare(order, Path(folder))
    return {row.title: [100 * float(np.nanmean(s.scores)) for s in row.seeds] for row in found.rows}


def spread(values: list[float], sign: str = "") -> str:
    """The values, their mean and their standard deviation."""
    each = ", ".join(f"{v:{sign}.2f}" for v in values)
    return f"{each} | {np.mean(values):{sign}.2f} ± {np.std(values, ddof=1):.2f}"


def accuracy() -> Iterator[str]:
    found = {way: accuracies(way) for way in WAYS}
    yield "|  |  | accuracy by seed, % | mean ± sd | difference by seed, points | mean ± sd |"
    yield "|---|---|---|---|---|---|"
    first, *_ = found.values()
    for title, base in first.items():
        for way in WAYS:
            ours = found[way][title]
            apart = [a - b for a, b in zip(ours, base, strict=True)]
            differs = spread(apart, "+") if any(apart) else "none | 0"
            yield f"| {title} | {way} | {spread(ours)} | {differs} |"


# --- speed


def rounds(w: workloads.Workload, compute: TorchCompute) -> Iterator[Any]:
    """FedAvg as the engine runs it with one thread; the same devices for every compute."""
    setting = Setting(DeviceUsers(kite.task(w).users), PROFILES["phone"], chunk=None, workers=1)
    averaging = FedAvg(
        rounds=10**9, epochs=1, batch=w.batch, lr=w.lr, cohort=DEVICES[w.name], shuffle=False
    )
    states = run(averaging, LocalEngine(setting, compute))
    next(states)
    return states


def timed(w: workloads.Workload) -> tuple[dict[str, list[float]], str]:
    """Seconds of each round in each way, and how `auto` computed float32."""
    made = programs(kite.task(w), 0, workloads.rows(w, 0)[0][:2])
    ways = {
        "float32": TorchCompute(made),
        "one by one": TorchCompute(made, "sequential"),
        "bfloat16": TorchCompute(made, precision="bfloat16"),
    }
    all_rounds = {way: rounds(w, compute) for way, compute in ways.items()}
    spent: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(1 + RUNS):  # the first one compiles
        for way, states in all_rounds.items():
            started = time.process_time()
            next(states)
            spent[way].append(time.process_time() - started)
    assert ways["bfloat16"].explain("small") == "sequential: bfloat16 products"
    return {way: times[1:] for way, times in spent.items()}, ways["float32"].explain("small")


def faster(ours: list[float], theirs: list[float]) -> str:
    """How many times as fast, round by round: the median, the least and the most."""
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    return f"{np.median(ratios):.3g} ({min(ratios):.3g} to {max(ratios):.3g})"


def speed() -> Iterator[str]:
    yield (
        "|  | float32, updates/s | computed | float32 one by one | bfloat16 "
        "| times as fast as float32 | as float32 one by one |"
    )
    yield "|---|---|---|---|---|---|---|"
    won = dict.fromkeys(("float32", "float32 one by one"), "")
    for name, count in DEVICES.items():
        w = workloads.WORKLOADS[name]
        spent, how = timed(w)
        exact, single, rounded = spent.values()
        for other, times in zip(won, (exact, single), strict=True):
            won[other] += f" {name}" if np.median(rounded) < np.median(times) else ""
        rates = [f"{count / np.median(times):,.1f}" for times in spent.values()]
        yield (
            f"| {name}: {w.about} | {rates[0]} | {how} | {rates[1]} | "
            f"{rates[2]} | {faster(rounded, exact)} | {faster(rounded, single)} |"
        )
    yield ""
    for other, names in won.items():
        yield f"bfloat16 is faster than {other} on: {', '.join(names.split()) or 'none'}."


def products(size: int, dtype: torch.dtype) -> float:
    """Operations a second, in billions, of square matrices; the best of some tries."""
    a = torch.randn(size, size, generator=torch.Generator().manual_seed(0)).to(dtype)
    times, many = [], max(1, 2**28 // size**3)
    for _ in range(20):
        started = time.perf_counter()
        for _ in range(many):
            a @ a
        times.append(time.perf_counter() - started)
    return many * 2 * size**3 / min(times) / 1e9


# --- the page


def about() -> str:
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.check_output(git, cwd=ROOT, text=True).strip()
    known = set(Path("/proc/cpuinfo").read_text().split())
    has = ", ".join(f"{flag}: {'yes' if flag in known else 'no'}" for flag in FLAGS)
    found = contender.versions(("llvmlite", "numpy", "torch")).items()
    versions = [f"Python {platform.python_version()}", *(f"{name} {v}" for name, v in found)]
    return f"Commit {commit}; {simulation.machine()}; {has}; {', '.join(versions)}."


def page() -> Iterator[str]:
    yield from ("# Training in bfloat16", "", about(), "", "## Accuracy", "")
    yield (
        f"`digits`, {SEEDS} seeds, one learning rate. Differences are from float32 one by one with "
        "the same seed: the same first weights, the same batches."
    )
    yield ""
    yield from accuracy()
    yield from ("", "## Speed", "")
    yield "Client updates a second in one process with one thread, each way"
    yield from ("on devices it meets for the first time: making their rows counts too.", "")
    yield from speed()
    yield from (
        "",
        "Matrix products, GFLOP/s:",
        "",
        "| size | float32 | bfloat16 |",
        "|---|---|---|",
    )
    for size in (64, 256, 1024):
        rates = [products(size, dtype) for dtype in (torch.float32, torch.bfloat16)]
        yield f"| {size} | {rates[0]:.0f} | {rates[1]:.0f} |"


def main() -> None:
    thread_per_process()
    lines = []
    for line in page():
        lines.append(line)
        print(line, flush=True)
    RESULT.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
