"""The jobs of a search: training one width, or judging one candidate. Each is done once."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from torch import nn

from kitestring.comparison.order import Order
from kitestring.errors import TaskError
from kitestring.shrink import data, models
from kitestring.shrink.answer import Answer, answer, running
from kitestring.shrink.candidates import LARGE, Candidate, Shape
from kitestring.shrink.data import Judges, Pool
from kitestring.shrink.make import compressed, fresh, slimmed
from kitestring.shrink.train import trained

Judging = Literal["validation", "test"]
Heard = Callable[[float], Any]
"""Told the share of a job that is done."""


@dataclass(frozen=True)
class Job:
    """Without a split: to train the candidate's width, in float32. With one: to judge it."""

    candidate: Candidate
    seed: int
    split: Judging | None = None

    @property
    def name(self) -> str:
        """In the study."""
        what = "trained" if self.split is None else self.split
        return f"{what} {self.candidate.slug} {self.seed}"

    @property
    def title(self) -> str:
        what = {None: "training", "validation": "judging", "test": "testing"}[self.split]
        return f"{what} {self.candidate.title}" + (f", seed {self.seed}" if self.seed else "")

    @property
    def after(self) -> tuple[Job, ...]:
        """What has to be done before."""
        if self.split is None:
            before = self.candidate.shape.after
            return tuple(Job(Candidate(shape), self.seed) for shape in before)
        if self.split == "validation":
            return (Job(self.candidate.plain, self.seed),)
        return (Job(self.candidate, self.seed, "validation"),)


@dataclass(frozen=True)
class Bench:
    """What all jobs share, read once in each process."""

    order: Order
    folder: Path

    @cached_property
    def task(self) -> Any:
        return data.checked(self.order.load())

    @cached_property
    def pool(self) -> Pool:
        return data.pool(self.task)

    @cached_property
    def judges(self) -> Judges:
        return Judges(self.task)

    def draft(self, shape: Shape) -> nn.Module:
        """A module of that width which has learnt nothing, to see what it takes of a device."""
        return slimmed(fresh(self.task, shape.base, 0), shape.keep, self.pool.some)

    def model(self, candidate: Candidate, seed: int) -> nn.Module:
        """What was kept of an earlier job."""
        return models.read(self.task, self.folder, candidate, seed, lambda: self.pool)

    def do(self, job: Job, heard: Heard) -> dict[str, Any]:
        started = time.perf_counter()
        found = self._train(job, heard) if job.split is None else self._judge(job, job.split)
        return {**found, "seconds": time.perf_counter() - started}

    def _train(self, job: Job, heard: Heard) -> dict[str, Any]:
        shape, seed = job.candidate.shape, job.seed
        teacher = self.model(Candidate(LARGE), seed) if shape.taught else None
        student = self._start(shape, seed, teacher)
        file = models.path(self.folder, job.candidate, seed)
        checkpoint = file.with_suffix(".checkpoint")
        done = trained(
            self.task, student, teacher, self.pool, seed, checkpoint,
            lambda step, of, loss: heard(step / of), begun=shape.keep != 1,
        )  # fmt: skip
        whole = None if shape.keep == 1 else fresh(self.task, shape.base, seed)
        models.keep(file, done.module, whole and models.widths(whole, done.module))
        checkpoint.unlink(missing_ok=True)
        return {"steps": done.steps}

    def _start(self, shape: Shape, seed: int, teacher: nn.Module | None) -> nn.Module:
        """What is trained: a slimmed model starts from the weights that were kept of the whole."""
        if shape.keep == 1 or teacher is None:
            return fresh(self.task, shape.base, seed)
        whole = teacher
        if shape.base == "small":
            whole = self.model(Candidate(Shape("small", taught=True)), seed)
        return slimmed(whole, shape.keep, self.pool.some)

    def _judge(self, job: Job, split: Judging) -> dict[str, Any]:
        """By the file that answers requests, which is made on the way and kept. "why" instead,
        where the candidate cannot be made after all."""
        file = models.path(self.folder, job.candidate, job.seed).with_suffix(".onnx")
        if split == "validation":
            try:
                models.write(file, self._made(job.candidate, job.seed).file)
            except TaskError as problem:
                if job.candidate == job.candidate.plain:
                    raise
                return {"why": problem.what}
        whole = file.read_bytes()
        return {"size": len(whole), "scores": self.judges.scores(running(whole), split)}

    def _made(self, candidate: Candidate, seed: int) -> Answer:
        if candidate.precision != "float32":
            plain = self.model(candidate.plain, seed)
            module = compressed(plain, candidate.precision, self.pool.some)
            widths = models.kept_widths(self.folder, candidate.plain, seed)
            models.keep(models.path(self.folder, candidate, seed), module, widths)
        return answer(self.task, self.model(candidate, seed), self.judges.example())
