"""Contenders as their parent sees them: which script, which environment, and a pipe to each."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from cases import Case

from kitestring.measure.answering import Answering, Gone

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
VENV = ROOT / ".bench" / "ort-training"
# Its last release, of 2024. It cannot read the optimiser graph that a newer onnx writes, and its
# Python package imports torch, which it does not name among what it needs.
PINS = ("onnxruntime-training==1.19.2", "onnx==1.17.0")
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
NAMES = {"torch": "by_torch.py", "kitestring": "by_kitestring.py", "runtime": "by_onnxruntime.py"}


def python(name: str, case: Case | None) -> str:
    """The peer's training has an environment of its own."""
    peer = name == "runtime" and case is not None and case.train
    return str(VENV / "bin" / "python") if peer else sys.executable


def environment() -> None:
    """Make the peer's, unless it is there as it is wanted."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [*PINS, *(x for x in lines if x.partition("==")[0] in ("torch", "numpy"))]
    mark = hashlib.sha256(json.dumps([sys.version, pins]).encode()).hexdigest()[:12]
    stamp = VENV / f"made-{mark}"
    if stamp.exists():
        return
    print(f"Making {VENV.relative_to(ROOT)} (a minute or two) ...", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(VENV)], check=True)
    pip = [str(VENV / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "-qq"]
    subprocess.run([*pip, "install", *pins], check=True)
    stamp.touch()


def variables() -> dict[str, str]:
    quiet = {"PYTHONWARNINGS": "ignore", "ORT_DISABLE_TELEMETRY": "1"}
    paths = {"PYTHONPATH": str(ROOT / "src")}
    return {**os.environ, **dict.fromkeys(THREADS, "1"), **quiet, **paths}


def told(command: list[str]) -> Any:
    """The JSON line that a script prints last."""
    done = subprocess.run(command, env=variables(), text=True, capture_output=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{reason(done.stderr)}")
    return json.loads(done.stdout.splitlines()[-1])


def reason(said: str) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    wrong = [line for line in lines if "Error" in line or "Exception" in line]
    return (wrong or lines or ["it said nothing"])[-1][:300]


class Failed(Exception):
    """What a contender said when it ended."""


class Peer(Answering):
    """A fresh process on one core, asleep until it is asked."""

    def __init__(self, name: str, case: Case, folder: Path) -> None:
        script = str(HERE / NAMES[name])
        super().__init__([python(name, case), script, case.name, str(folder)], variables())
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(self.id, {max(os.sched_getaffinity(0))})

    def ask(self, what: str, **how: Any) -> dict[str, Any]:
        try:
            return super().ask(what, **how)
        except Gone as gone:
            raise Failed(reason(gone.said)) from None
