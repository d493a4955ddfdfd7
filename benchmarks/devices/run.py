"""Kitestring's device runtime beside plain torch and ONNX Runtime's own example code.

    python benchmarks/devices/run.py [--models cnn] [--seconds 5] [--write]

Every contender is a fresh process with one thread on one core; they take turns, run for run, in
alternating order. A training run is eight steps of plain SGD, with what draws and gathers the
batches. Before anything is timed, predictions and the weights after three steps are held against
torch's. onnxruntime-training gets a virtual environment in .bench on first use. --write keeps the
tables in benchmarks/results/devices.md and devices.json.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cases
import numpy as np
import peers
from cases import Case
from pages import Results, show, write

TOLERANCE = 1e-3  # of the largest change of a weight, or of the largest output
QUICK = 5e-3  # seconds: runs as short as this are timed after another, untimed one
LEAST, MOST = 5, 200  # timed runs of each contender in a pass


@dataclass
class Measured:
    """One contender on one case. Seconds are those of a step or of a prediction."""

    name: str
    case: str
    label: str = ""
    failed: str = ""
    off: float = 0.0  # how far it is from torch, at most
    ready: list[float] = field(default_factory=list)  # s until the first run is done, by pass
    net: list[int] = field(default_factory=list)  # peak bytes above the imports, by pass
    all: list[int] = field(default_factory=list)
    walls: list[list[float]] = field(default_factory=list)  # by pass
    cpus: list[list[float]] = field(default_factory=list)


def off(found: Any, wanted: Any) -> float:
    """The largest difference, as a share of the largest output or change of a weight."""
    names = [k for k in wanted.files if not k.startswith("first ")]
    start = {k: wanted.get(f"first {k}", 0) for k in names}
    moved = max(float(np.abs(wanted[k] - start[k]).max()) for k in names)
    return max(float(np.abs(found[k] - wanted[k]).max()) for k in names) / moved


def check(workers: list[tuple[peers.Peer, Measured]], folder: Path) -> None:
    """The first is torch."""
    plain = folder / f"{workers[0][1].name}.npz"
    for peer, measured in workers:
        path = folder / f"{measured.name}.npz"
        try:
            peer.ask("check", into=str(path))
        except peers.Failed as problem:
            measured.failed = str(problem)
            continue
        with np.load(path) as found, np.load(plain) as wanted:
            measured.off = off(found, wanted)
        if not measured.off < TOLERANCE:
            what = f"{measured.case}: {measured.name} is {measured.off:.1g} away from torch"
            raise SystemExit(f"{what}: not the same computation")


def turns(workers: list[tuple[peers.Peer, Measured]], case: Case, seconds: float) -> None:
    share = 1 / cases.STEPS if case.train else 1.0
    for peer, measured in workers:
        measured.ready.append(peer.ask("load")["seconds"])
        peer.ask("run")
        measured.walls.append([])
        measured.cpus.append([])
    last = dict.fromkeys((m.name for _, m in workers), QUICK)
    ends = time.monotonic() + seconds
    for turn in range(MOST):
        if turn >= LEAST and time.monotonic() > ends:
            break
        for peer, measured in workers[:: -1 if turn % 2 else 1]:
            done = peer.ask("run", untimed=int(last[measured.name] < QUICK))
            last[measured.name] = done["wall"]
            measured.walls[-1].append(done["wall"] * share)
            measured.cpus[-1].append(done["cpu"] * share)
    for peer, measured in workers:
        found = peer.ask("peak")
        measured.net.append(found["net"])
        measured.all.append(found["all"])


def one(case: Case, found: list[Measured], folder: Path, seconds: float, first: bool) -> None:
    """A pass over one case. Checks, in the first, are made by processes of their own: they take
    memory."""
    if first:
        with ExitStack() as stack:
            check(_began(stack, case, found, folder), folder)
    with ExitStack() as stack:
        turns(_began(stack, case, [m for m in found if not m.failed], folder), case, seconds)


def _began(
    stack: ExitStack, case: Case, found: list[Measured], folder: Path
) -> list[tuple[peers.Peer, Measured]]:
    workers = []
    for measured in found:
        peer = stack.enter_context(peers.Peer(measured.name, case, folder))
        try:
            measured.label = peer.ask("label")["label"]
        except peers.Failed as problem:
            raise SystemExit(f"{case.name}, {measured.name}: {problem}") from None
        workers.append((peer, measured))
    return workers


def exported(models: list[str], folder: Path) -> list[dict[str, Any]]:
    """Everything that contenders load, in `folder`; how long each export took."""
    found = []
    for model in models:
        print(f"Exporting {model} ...", flush=True)
        script = str(peers.HERE / "prepare.py")
        done = peers.told([sys.executable, script, model, str(folder)])
        for case in cases.CASES:
            if case.model == model and case.train:
                script = str(peers.HERE / "artifacts.py")
                command = [peers.python("runtime", case), script, model, case.train, str(folder)]
                done.append(peers.told(command))
        found += [{"model": model, **d} for d in done]
    return found


def sizes(models: list[str], folder: Path) -> dict[str, dict[str, int]]:
    """Bytes of what an app would bring along, by case's export and contender."""

    def bytes_of(name: str) -> int:
        path = folder / name
        inside = path.iterdir() if path.is_dir() else [path]
        return sum(p.stat().st_size for p in inside)

    found = {}
    for model in models:
        found[f"{model}-predict"] = {
            "kitestring": bytes_of(f"{model}-predict.kite"),
            "runtime": bytes_of(f"{model}-predict.onnx"),
        }
        for train in dict.fromkeys(c.train for c in cases.CASES if c.model == model and c.train):
            found[f"{model}-{train}"] = {
                "torch": bytes_of(f"{model}-{train}.pt"),
                "kitestring": bytes_of(f"{model}-{train}.kite"),
                "runtime": bytes_of(f"{model}-{train}-artifacts"),
            }
    return found


def installed() -> dict[str, Any]:
    """Bytes of what must be installed, in turn with all that it needs."""
    script = str(peers.HERE / "installed.py")
    own = "numpy+onnxruntime+cryptography+safetensors"
    found = peers.told([sys.executable, script, "torch+numpy", own, "onnxruntime"])
    code = sum(p.stat().st_size for p in (peers.ROOT / "src" / "kitestring").rglob("*.py"))
    found[own]["bytes"] += code
    peer = str(peers.VENV / "bin" / "python")
    return {**found, **peers.told([peer, script, "onnxruntime-training+torch"])}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--models", nargs="+", choices=cases.MODELS, default=list(cases.MODELS), metavar="NAME",
        help=", ".join(cases.MODELS),
    )  # fmt: skip
    parser.add_argument("--passes", type=int, default=2, help="%(default)s by default")
    parser.add_argument("--seconds", type=float, default=5, help="a case and pass (%(default)s)")
    parser.add_argument("--write", action="store_true", help="keep the tables as results")
    given = parser.parse_args()
    if given.write and len(given.models) < len(cases.MODELS):
        parser.error("--write keeps all models: leave --models out")
    return given


def main() -> None:
    given, started = arguments(), time.monotonic()
    peers.environment()
    chosen = [c for c in cases.CASES if c.model in given.models]
    found = {c.name: [Measured(name, c.name) for name in peers.NAMES] for c in chosen}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        exports = exported(given.models, folder)
        weights = sizes(given.models, folder)
        for turn in range(given.passes):
            for case in chosen:
                print(f"Pass {turn + 1}: {case.model}, {case.title} ...", flush=True)
                one(case, found[case.name], folder, given.seconds, turn == 0)
    results = Results(chosen, found, exports, weights, installed(), given.passes)
    print(show(results))
    print(f"{time.monotonic() - started:.0f} s")
    if given.write:
        write(results)


if __name__ == "__main__":
    main()
