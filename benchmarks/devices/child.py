"""The process of one contender: asked one thing at a time over pipes, asleep in between.

Its script imports what the contender needs and then calls `serve`: what is resident at that moment
are the imports.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import cases
import numpy as np

from kitestring.measure.child import forget, memory


class Contender(Protocol):
    label: str

    def load(self) -> None: ...
    def run(self) -> None:
        """One prediction, or `cases.STEPS` steps of training on batches in a random order."""

    def after(self) -> dict[str, Any]:
        """What it predicts, or its trained weights after `cases.CHECKED` steps, rows in order."""


class Answers:
    def __init__(self, make: Callable[[cases.Case, Path], Contender]) -> None:
        named = {c.name: c for c in cases.CASES}
        self.folder, self.name = Path(sys.argv[2]), sys.argv[1]
        self.contender = make(named[self.name], self.folder)
        forget()
        self.before = memory()[0]

    def label(self) -> dict[str, Any]:
        return {"label": self.contender.label}

    def load(self) -> dict[str, Any]:
        """Seconds until the first run is done."""
        started = time.perf_counter()
        self.contender.load()
        self.contender.run()
        return {"seconds": time.perf_counter() - started}

    def run(self, untimed: int = 0) -> dict[str, Any]:
        for _ in range(untimed):
            self.contender.run()
        wall, cpu = time.perf_counter(), time.process_time()
        self.contender.run()
        spent = time.process_time() - cpu
        return {"wall": time.perf_counter() - wall, "cpu": spent}

    def peak(self) -> dict[str, Any]:
        most = memory()[1]
        return {"all": most, "net": max(0, most - self.before)}

    def check(self, into: str) -> dict[str, Any]:
        np.savez(into, **self.contender.after())
        return {}


def serve(make: Callable[[cases.Case, Path], Contender]) -> None:
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not come between the answers
    answers = Answers(make)
    for line in sys.stdin:
        request = json.loads(line)
        found = getattr(answers, request.pop("do"))(**request)
        channel.write(json.dumps(found) + "\n")
        channel.flush()
