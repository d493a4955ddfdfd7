"""How a simulated round grows: with the population not at all, with the cohort in proportion.

    python benchmarks/scale.py     -> benchmarks/results/scale.md and docs/scale.svg

FedAvg on made-up users of a logistic task, through the public interface. Each line of the table is
a process of its own. It runs the rounds three times: once with few rows kept, for the memory and
the start-up; once more to have made all rows that are asked for; and once to time the rounds alone.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator
from torch import nn

from kitestring.collaborate.parameters.fedavg import FedAvg
from kitestring.core import run
from kitestring.devices.fit.compute import TorchCompute
from kitestring.devices.profiles import PROFILES
from kitestring.engines.local import LocalEngine, Setting
from kitestring.tasks.metrics import accuracy
from kitestring.tasks.population import DeviceUsers
from kitestring.tasks.programs import programs
from kitestring.tasks.task import Task
from kitestring.tasks.users import SPLITS, Numbered, Users

ROOT = Path(__file__).parents[1]
INPUTS, CLASSES, ROWS = 60, 10, 20
POPULATIONS = [(10**3, 100), (10**4, 100), (10**5, 100), (10**6, 100)]  # and how many are asked
COHORTS = [(10**5, 100), (10**5, 1000), (10**5, 10_000)]
ROUNDS = {100: 30, 1000: 10, 10_000: 4}
TRIES = 3  # processes: others may be at work on the machine, and the least is told
WORKERS = os.cpu_count() or 1
_TABLE = np.random.default_rng(0).normal(0, 1, (2**16, INPUTS)).astype(np.float32)
_TRUTH = (_TABLE @ np.random.default_rng(1).normal(0, 1, (INPUTS, CLASSES))).argmax(1)


def load(user: int) -> Any:
    """Twenty rows of the table, from a place of the user's own: cheap, and each time the same."""
    start = user * 40_503 % (len(_TABLE) - ROWS)
    rows = {"x": _TABLE[start : start + ROWS], "y": _TRUTH[start : start + ROWS]}
    return dict.fromkeys(SPLITS, rows)


def model() -> nn.Module:
    return nn.Linear(INPUTS, CLASSES)


def start(population: int, cohort: int, rows: DeviceUsers | None = None, **kept: int) -> Any:
    """The users' rows, and the states of a run of which the first is there."""
    users = Users(Numbered(population), load, range(0), range(population))
    task = Task("logistic", users, model, model, accuracy)
    compute = TorchCompute(programs(task, 0, load(0)["train"]["x"][:2]))
    rows = rows or DeviceUsers(users, **kept)
    engine = LocalEngine(Setting(rows, PROFILES["phone"], workers=WORKERS), compute)
    states = run(FedAvg(ROUNDS[cohort], epochs=1, cohort=cohort), engine)
    next(states)
    return rows, states


def rounds(states: Any) -> list[float]:
    """Seconds of each round but the first two, which warm up."""
    times, before = [], time.perf_counter()
    for _ in states:
        now = time.perf_counter()
        times.append(now - before)
        before = now
    return times[2:]


def peak() -> float:
    """Megabytes that this process has had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(population: int, cohort: int) -> dict[str, float]:
    libraries, before = peak(), time.perf_counter()
    _, states = start(population, cohort, most=2**24)
    begun = time.perf_counter() - before
    anew = rounds(states)
    memory = peak()
    rows, states = start(population, cohort)
    rounds(states)
    _, states = start(population, cohort, rows)
    return {
        "population": population, "cohort": cohort, "start": begun,
        "round": float(np.median(rounds(states))), "anew": float(np.median(anew)),
        "memory": memory, "libraries": libraries,
    }  # fmt: skip


def table(found: list[dict[str, float]]) -> list[str]:
    lines = [
        "| population | asked in a round | start-up | a round | and to make its rows anew "
        "| peak memory | of it libraries |",
        "|---|---|---|---|---|---|---|",
    ]
    for f in found:
        cells = (
            f"{f['population']:,.0f}", f"{f['cohort']:,.0f}", f"{f['start'] * 1e3:.0f} ms",
            f"{f['round'] * 1e3:.2f} ms", f"{f['anew'] * 1e3:.2f} ms",
            f"{f['memory']:.0f} MB", f"{f['libraries']:.0f} MB",
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def draw(found: dict[tuple[int, int], dict[str, float]], path: Path) -> None:
    ink, line = "#7a7a7b", "#0072b2"  # which light and dark backgrounds both carry
    style = {
        "svg.fonttype": "none", "svg.hashsalt": "scale", "font.family": "DejaVu Sans",
        "font.size": 10, "text.color": ink, "axes.edgecolor": ink, "axes.labelcolor": ink,
        "axes.spines.top": False, "axes.spines.right": False, "xtick.color": ink,
        "ytick.color": ink, "grid.color": ink, "grid.linewidth": 0.5, "grid.alpha": 0.4,
    }  # fmt: skip
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(8.6, 3.6), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for axes, configs, which, title, label in (
            (panels[0], POPULATIONS, 0, "100 asked in a round, of more and more", "users"),
            (panels[1], COHORTS, 1, "More and more asked, of 100,000", "users asked in a round"),
        ):
            at = [config[which] for config in configs]
            times = [found[config]["round"] * 1e3 for config in configs]
            axes.plot(at, times, color=line, marker="o", markersize=5, linewidth=1.8)
            for config, x, y in zip(configs, at, times, strict=True):
                text = f"{found[config]['memory']:.0f} MB"
                axes.annotate(text, (x, y), xytext=(3, -15), textcoords="offset points")
            if which:
                straight = [times[0] * x / at[0] for x in at]
                axes.plot(at, straight, color=ink, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
                axes.annotate(
                    "in proportion", (at[1], straight[1]), xytext=(-9, 3),
                    textcoords="offset points", ha="right",
                )  # fmt: skip
            axes.set(xscale="log", yscale="log", xlabel=label)
            axes.set_title(title, loc="left", fontsize=10, color=ink)
            axes.grid(True)
            axes.margins(x=0.17, y=0.12)
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_formatter(
                    FuncFormatter(lambda v, _: f"{v:,.0f}" if v >= 1 else f"{v:g}")
                )
                axis.set_minor_locator(NullLocator())
        panels[0].set_ylabel("time of a round, ms (and peak memory)")
        low, high = panels[0].get_ylim()
        panels[0].set_ylim(10 ** np.floor(np.log10(low)), high)
        figure.savefig(path, transparent=True, metadata={"Date": None})


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(measure(*map(int, sys.argv[1:]))))
        return
    found: dict[tuple[int, int], dict[str, float]] = {}
    for config in dict.fromkeys([*POPULATIONS, *COHORTS]):
        command = [sys.executable, __file__, *map(str, config)]
        tries = [json.loads(subprocess.check_output(command, text=True)) for _ in range(TRIES)]
        found[config] = {what: min(found[what] for found in tries) for what in tries[0]}
        print(*table([found[config]])[2:], flush=True)
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.check_output(git, cwd=ROOT, text=True).strip()
    lines = [
        "# A round, as population and cohort grow",
        "",
        f"After commit {commit}, {os.cpu_count()} cores ({platform.machine()}), {WORKERS} threads, "
        f"Python {platform.python_version()}, numpy {np.__version__}, torch {torch.__version__}; "
        "`python benchmarks/scale.py`.",
        "",
        f"FedAvg with a logistic model of {INPUTS * CLASSES + CLASSES} parameters; made-up users "
        f"of {ROWS} rows, one pass over them in batches of 10. A round is the median of those "
        "after the first two, with its users' rows at hand; then with rows made anew where they "
        "are not among the 16 MiB that were kept. Start-up is from the task to the first state. "
        f"Of {TRIES} processes each, the least.",
        "",
        *table([found[c] for c in POPULATIONS]),
        "",
        *table([found[c] for c in COHORTS]),
    ]
    (ROOT / "benchmarks" / "results" / "scale.md").write_text("\n".join(lines) + "\n")
    draw(found, ROOT / "docs" / "scale.svg")


if __name__ == "__main__":
    main()
