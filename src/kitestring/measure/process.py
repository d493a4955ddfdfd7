"""A measured process as its parent sees it: asked one thing at a time, and gone at the end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import kitestring
from kitestring import errors
from kitestring.errors import KitestringError, TaskError
from kitestring.measure.subject import Inputs, Subject

_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class Exhausted(Exception):
    """The process had no more memory: it said so, or was killed."""


class Process:
    """Fresh, and asleep until it is asked."""

    def __init__(self, subject: Subject, inputs: Inputs, threads: int, core: int | None) -> None:
        home = str(Path(kitestring.__file__).parents[1])
        paths = [home, *filter(None, [os.environ.get("PYTHONPATH")])]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        env |= dict.fromkeys(_THREADS, str(threads))
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", "kitestring.measure.child"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, text=True, env=env,
            start_new_session=True,
        )  # fmt: skip
        self._subject = subject
        self._first = {
            "subject": asdict(subject), "inputs": asdict(inputs), "threads": threads, "core": core,
        }  # fmt: skip

    @property
    def id(self) -> int:
        return self._process.pid

    def begin(self) -> str:
        """The runtime's name, once it is imported."""
        return str(self.ask("begin", **self._first)["runtime"])

    def ask(self, what: str, **how: Any) -> dict[str, Any]:
        """Raises what went wrong there, or `Exhausted`."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": what, **how}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise self._died()
        answer: dict[str, Any] = json.loads(line)
        if answer.get("exhausted"):
            raise Exhausted
        if "error" in answer:
            kind, said, where, mend = answer["error"]
            error: type[KitestringError] = getattr(errors, kind, TaskError)
            raise error(said, where or self._subject.source, mend or "Mend it there")
        return answer

    def _died(self) -> Exception:
        status = self._process.wait()
        if status in (-signal.SIGKILL, -signal.SIGABRT):
            return Exhausted()
        self._said.seek(0)
        last = (self._said.read().strip().splitlines() or [""])[-1][:200]
        how = signal.Signals(-status).name if status < 0 else f"status {status}"
        return TaskError(
            f"its process ended with {how}" + (f": {last}" if last else ""),
            self._subject.source, "Run the model by itself",
        )  # fmt: skip

    def __enter__(self) -> Process:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._said):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:
                    continue
