"""Contenders as their parent sees them: which script, which environment, and a pipe to each."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from types import TracebackType
from typing import Any

from cases import Case

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


@dataclass
class Peer:
    """A fresh process on one core, asleep until it is asked."""

    name: str
    case: Case
    folder: Path

    def __enter__(self) -> Peer:
        self._said = TemporaryFile("w+")
        script = str(HERE / NAMES[self.name])
        self._process = subprocess.Popen(
            [python(self.name, self.case), script, self.case.name, str(self.folder)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, text=True,
            env=variables(),
        )  # fmt: skip
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(self._process.pid, {max(os.sched_getaffinity(0))})
        return self

    def ask(self, what: str, **how: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": what, **how}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._process.wait()
            self._said.seek(0)
            raise Failed(reason(self._said.read()))
        found: dict[str, Any] = json.loads(line)
        return found

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.wait()
        self._said.close()
