"""The process in which one model is measured: it does one thing at a time, as it is told.

A request and its answer are one line of JSON each, on what were standard input and output. Between
requests the process sleeps. It is started afresh for every model."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from kitestring.errors import KitestringError

_STATUS, _FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def memory() -> tuple[int, int]:
    """Bytes that are resident now, and the most that were: on Linux since `forget`."""
    if not _STATUS.exists():
        scale = 1 if sys.platform == "darwin" else 1024
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
        return most, most
    found = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    now, most = (int(found[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    return now, most


def forget() -> None:
    """From here on, the most that is resident is counted anew. Where the kernel does not do that,
    what an import took for a moment stays part of the most."""
    try:
        _FORGET.write_text("5")
    except OSError:
        return


class Work:
    """What can be asked of a measured process, by name."""

    def __init__(self) -> None:
        self._before = 0

    def begin(self, subject: Mapping[str, Any], inputs: Mapping[str, Any], threads: int,
              core: int | None) -> dict[str, Any]:  # fmt: skip
        """Import the runtime, and note what is resident after that."""
        if core is not None and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {core})
        from kitestring.measure.runtimes import runner
        from kitestring.measure.subject import Inputs, Subject

        given = Inputs(**{**inputs, "shapes": tuple(inputs["shapes"])})
        self._runner = runner(Subject(**subject), given, threads)
        forget()
        self._before = memory()[0]
        return {"runtime": self._runner.label}

    def limit(self, bytes: int) -> dict[str, Any]:
        """Let the process take no more than so much address space on top of what it has."""
        found = Path("/proc/self/statm")
        has = int(found.read_text().split()[0]) * resource.getpagesize() if found.exists() else 0
        resource.setrlimit(resource.RLIMIT_AS, (has + bytes, has + bytes))
        return {}

    def load(self) -> dict[str, Any]:
        start = time.perf_counter()
        self._runner.load()
        return {"seconds": time.perf_counter() - start}

    def run(self, untimed: int = 0) -> dict[str, Any]:
        """One run, after some that are not timed: seconds on the wall and of the processor."""
        for _ in range(untimed):
            self._runner.run()
        wall, cpu = time.perf_counter(), time.process_time()
        self._runner.run()
        spent = time.process_time() - cpu
        return {"wall": time.perf_counter() - wall, "cpu": spent}

    def peak(self) -> dict[str, Any]:
        """The most that was resident since the imports, less what was resident then: bytes."""
        return {"bytes": max(0, memory()[1] - self._before)}

    def count(self) -> dict[str, Any]:
        return asdict(self._runner.count())


def answer(work: Work, request: dict[str, Any]) -> dict[str, Any]:
    try:
        done: dict[str, Any] = getattr(work, request.pop("do"))(**request)
        return done
    except KitestringError as error:
        return {"error": [type(error).__name__, error.what, error.where, error.mend]}
    except Exception as problem:
        from kitestring.measure.runtimes import starved

        if starved(problem):
            return {"exhausted": True}
        said = (str(problem).strip().splitlines() or [""])[0][:200]
        return {"error": ["TaskError", f"it fails with {type(problem).__name__}: {said}", "", ""]}


def serve(requests: TextIO, answers: TextIO) -> None:
    work = Work()
    for line in requests:
        answers.write(json.dumps(answer(work, json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not come between the answers
    serve(sys.stdin, channel)
