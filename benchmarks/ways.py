"""The ways to compute `fit`, on the workloads of the simulation benchmark.

    python benchmarks/ways.py          -> benchmarks/results/ways.md

Devices train for one epoch from the same weights: as compiled code, with the same code taken
through all of LLVM's -O2, mapped by torch.func.vmap, and one after the other. Processor time of one
thread, the ways in turn. The first fit of each compiles and tries; nothing is kept from an earlier
run. The difference is the largest of any weight from one after the other, as a share of the largest
change of a weight.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from llvmlite import binding

sys.path.append(str(Path(__file__).resolve().parent / "simulation"))

import kite
import run as simulation
import workloads

from kitestring.core import Recipe, Rows, Tree
from kitestring.devices.fit.compiled import build
from kitestring.devices.fit.compute import TorchCompute, thread_per_process
from kitestring.tasks.programs import programs

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "ways.md"
DEVICES = {"W1a": 64, "W1": 64, "W4": 64, "W2s": 8, "W2": 2, "W3": 8, "W3t": 8}
RUNS = 5
SHORT, PASSES = build._improve, build._PASSES


def everything(module: Any, machine: Any) -> None:
    options = binding.create_pipeline_tuning_options(speed_level=2)
    passes = binding.create_pass_builder(machine, options)
    passes.getModulePassManager().run(module, passes)


def improved_by(how: Any) -> None:
    """Code is kept under the names of its passes."""
    build._improve, build._PASSES = how, PASSES if how is SHORT else ("everything",)


def rows_of(name: str) -> dict[str, Rows]:
    parts = [workloads.rows(workloads.WORKLOADS[name], d) for d in range(DEVICES[name])]
    n = np.array([len(x) for x, _ in parts])
    start = np.cumsum(n) - n
    x, y = (np.concatenate(column) for column in zip(*parts, strict=True))
    return {"x": Rows.lying(x, start, n), "y": Rows.lying(y, start, n)}


def measure(name: str) -> list[list[str]]:
    w, count = workloads.WORKLOADS[name], DEVICES[name]
    rows, keys = rows_of(name), np.arange(count, dtype=np.uint64)
    made = programs(kite.task(w), 0, rows["x"].flat[0][:2])
    recipe = Recipe(w.lr, batch=w.batch)
    first = made["small"].initial()
    start = Tree({k: np.broadcast_to(a, (count, *a.shape)) for k, a in first.items()})
    ways: dict[str, tuple[TorchCompute, Any]] = {
        "one after the other": (TorchCompute(made, "sequential"), SHORT),
        "compiled": (TorchCompute(made, "compiled"), SHORT),
        "compiled, -O2": (TorchCompute(made, "compiled"), everything),
        "vmap": (TorchCompute(made, "vmap"), SHORT),
    }
    spent: dict[str, list[float]] = {way: [] for way in ways}
    found: dict[str, Tree] = {}
    for turn in range(1 + RUNS):
        for way, (compute, improve) in ways.items():
            why = compute.explain("small")
            if turn and not why.startswith(_word(way)):
                continue
            improved_by(improve)
            started = time.process_time()
            fit = compute.fit("small", start, rows, recipe, key=keys)
            spent[way].append(time.process_time() - started)
            found[way] = fit.parameters
    improved_by(SHORT)
    plain = found["one after the other"]
    moved = max(float(np.abs(plain[k] - start[k]).max()) for k in plain)
    table = []
    for way, (compute, _) in ways.items():
        why = compute.explain("small")
        if not why.startswith(_word(way)):
            table.append([name, way, why, "", ""])
            continue
        rate = [count / s for s in spent[way][1:]]
        off = max(float(np.abs(np.asarray(found[way][k]) - plain[k]).max()) for k in plain) / moved
        table.append([
            name, way,
            simulation.spread(rate, simulation.short), f"{spent[way][0]:.1f} s", f"{off:.0e}",
        ])  # fmt: skip
    return table


def _word(way: str) -> str:
    """What `explain` begins with where it was computed so."""
    return "sequential" if way == "one after the other" else way.partition(",")[0]


def main() -> None:
    warnings.simplefilter("ignore")
    thread_per_process()
    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True)
    lines = [
        "# Ways to compute `fit`",
        "",
        f"Commit {commit.strip()}; {simulation.machine()}; Python {sys.version.split()[0]}; "
        "`python benchmarks/ways.py`.",
        "",
        "One thread; median, least and most of five.",
        "",
        "| workload | way | client updates/s | first fit | difference |",
        "|---|---|---|---|---|",
    ]
    print("\n".join(lines))
    with tempfile.TemporaryDirectory() as folder:
        os.environ["KITESTRING_CACHE"] = folder
        for name in DEVICES:
            for cells in measure(name):
                lines.append(f"| {' | '.join(cells)} |")
                print(lines[-1], flush=True)
    RESULT.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
