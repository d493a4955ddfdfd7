"""A measured process as its parent sees it: asked one thing at a time, and gone at the end."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import kitestring
from kitestring import errors
from kitestring.errors import KitestringError, TaskError
from kitestring.measure.answering import Answering, Gone
from kitestring.measure.subject import Inputs, Subject

_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class Exhausted(Exception):
    """The process had no more memory: it said so, or was killed."""


class Process(Answering):
    """Fresh, and asleep until it is asked."""

    def __init__(self, subject: Subject, inputs: Inputs, threads: int, core: int | None) -> None:
        home = str(Path(kitestring.__file__).parents[1])
        paths = [home, *filter(None, [os.environ.get("PYTHONPATH")])]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        env |= dict.fromkeys(_THREADS, str(threads))
        super().__init__([sys.executable, "-m", "kitestring.measure.child"], env)
        self._subject = subject
        self._first = {
            "subject": asdict(subject), "inputs": asdict(inputs), "threads": threads, "core": core,
        }  # fmt: skip

    def begin(self) -> str:
        """The runtime's name, once it is imported."""
        return str(self.ask("begin", **self._first)["runtime"])

    def ask(self, what: str, **how: Any) -> dict[str, Any]:
        """Raises what went wrong there, or `Exhausted`."""
        try:
            answer = super().ask(what, **how)
        except Gone as gone:
            raise self._died(gone) from None
        if answer.get("exhausted"):
            raise Exhausted
        if "error" in answer:
            kind, said, where, mend = answer["error"]
            error: type[KitestringError] = getattr(errors, kind, TaskError)
            raise error(said, where or self._subject.source, mend or "Mend it there")
        return answer

    def _died(self, gone: Gone) -> Exception:
        status = gone.status
        if status in (-signal.SIGKILL, -signal.SIGABRT):
            return Exhausted()
        last = (gone.said.strip().splitlines() or [""])[-1][:200]
        how = signal.Signals(-status).name if status < 0 else f"status {status}"
        return TaskError(
            f"its process ended with {how}" + (f": {last}" if last else ""),
            self._subject.source, "Run the model by itself",
        )  # fmt: skip
