"""Which jobs of a comparison are done, which may start, which settings won."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kitestring.comparison.jobs import Job
from kitestring.comparison.methods import POOL_TRAINED, Method


@dataclass
class Board:
    """Trials come first, on validation rows with seed 0; then the winner, with every seed."""

    methods: list[Method]
    folder: Path
    seeds: int
    trials: int
    better: Callable[[float, float], bool]
    found: dict[tuple[str, int, int, str], dict[str, Any]] = field(default_factory=dict)
    won: dict[str, int] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)
    asked: set[tuple[str, int, int, str]] = field(default_factory=set)

    def total(self) -> int:
        return len(self.methods) * (self.trials + self.seeds)

    def _starts(self, method: Method, seed: int) -> tuple[tuple[str, Path], ...] | None:
        """The files that a job starts from; None where one is not there yet."""
        starts = []
        names = {m.name for m in self.methods}
        for program in method.after:
            source = POOL_TRAINED[program]
            if source not in names or source in self.lost:
                continue
            if source not in self.won or (source, self.won[source], seed, "test") not in self.found:
                return None
            starts.append((program, self._path(source, self.won[source], seed)))
        return tuple(starts)

    def _path(self, method: str, trial: int, seed: int) -> Path:
        return self.folder / f"{method}-{trial}-{seed}.sqlite"

    def ready(self) -> Iterator[Job]:
        """Each method's first before anyone's second: two workers with the same method would both
        compile what one could find done."""
        keys = [
            (place, (method.name, trial, seed, split), starts)
            for method in self.methods
            if method.name not in self.lost
            for place, (trial, seed, split) in enumerate(self._wanted(method.name))
            if (method.name, trial, seed, split) not in self.asked
            and (starts := self._starts(method, seed)) is not None
        ]
        for _, key, starts in sorted(keys, key=lambda k: k[0]):
            self.asked.add(key)
            name, trial, seed, split = key
            yield Job(name, trial, seed, split, self._path(name, trial, seed), starts)

    def _wanted(self, method: str) -> list[tuple[int, int, str]]:
        if method in self.won:
            return [(self.won[method], seed, "test") for seed in range(self.seeds)]
        return [(trial, 0, "validation") for trial in range(self.trials)]

    def done(self, job: Job, result: dict[str, Any]) -> None:
        self.found[job.method, job.trial, job.seed, job.split] = result
        if job.split == "test" and "failed" in result:
            self.lost[job.method] = f"failed with seed {job.seed}: {result['failed']}"
        tried = [self.found.get((job.method, t, 0, "validation")) for t in range(self.trials)]
        if job.split == "test" or None in tried:
            return
        results = [r for r in tried if r is not None]
        scores = [float(r.get("score", math.nan)) for r in results]
        best: int | None = None
        for trial, score in enumerate(scores):
            if not math.isnan(score) and (best is None or self.better(score, scores[best])):
                best = trial
        if best is None:
            told = next((r["failed"] for r in results if "failed" in r), "no user has a score")
            self.lost[job.method] = f"every trial failed: {told}"
        else:
            self.won[job.method] = best
