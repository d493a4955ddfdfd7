"""Long work in pieces: each row of a table is a job, done once, kept as JSON, and found again.

A job is a function of this folder by name with plain arguments. What it returned is in
`.bench/shrink/`, under a digest of its name, its arguments and the sources that it is made of: a
benchmark that is stopped goes on where it was.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
KEPT = ROOT / ".bench" / "shrink"


@dataclass(frozen=True)
class Job:
    """`function` is "module:name" in this folder; equal jobs have equal results."""

    function: str
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        module, name = self.function.split(":")
        source = (HERE / f"{module}.py").read_bytes()
        said = json.dumps([self.function, self.arguments], sort_keys=True).encode()
        digest = hashlib.sha256(said + hashlib.sha256(source).digest()).hexdigest()[:16]
        return KEPT / f"{module}-{name}-{digest}.json"

    @property
    def label(self) -> str:
        return f"{self.function}({', '.join(f'{k}={v}' for k, v in self.arguments.items())})"


def found(job: Job) -> dict[str, Any] | None:
    return json.loads(job.path.read_text()) if job.path.is_file() else None


def work_off(jobs: Sequence[Job], workers: int | None = None) -> list[dict[str, Any]]:
    """The results, in order. One thread to a worker; more than one must not be used for timings."""
    missing = [job for job in jobs if found(job) is None]
    count = workers or len(os.sched_getaffinity(0))
    started = time.perf_counter()
    with ProcessPoolExecutor(count, get_context("spawn"), initializer=_ready) as pool:
        running = {pool.submit(_do, job): job for job in missing}
        for done, future in enumerate(as_completed(running), 1):
            future.result()
            seconds = time.perf_counter() - started
            told = f"[{done}/{len(missing)}, {seconds / 60:.0f} min] {running[future].label}"
            print(told, file=sys.stderr, flush=True)
    return [found(job) or {} for job in jobs]


def _ready() -> None:
    import torch

    torch.set_num_threads(1)
    sys.path.insert(0, str(HERE))


def _do(job: Job) -> None:
    module, name = job.function.split(":")
    before = time.process_time()
    result = getattr(importlib.import_module(module), name)(**job.arguments)
    result = {**result, "cpu_s": time.process_time() - before}
    job.path.parent.mkdir(parents=True, exist_ok=True)
    part = job.path.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(result))
    part.replace(job.path)
