"""A student beside its teacher, and where an objective looks into both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kitestring.compress.distil.objective import Batch, Objective, Seen
from kitestring.compress.distil.taps import Place, evaluating, look, places
from kitestring.errors import KitestringError, TaskError


@dataclass(frozen=True)
class Pair:
    """Two models, and where an objective looks into them."""

    student: nn.Module
    teacher: nn.Module | None
    objective: Objective
    student_places: Mapping[str, Place]
    teacher_places: Mapping[str, Place]

    def see(self, batch: Batch) -> Seen:
        known = batch.teacher
        taught: dict[str, Tensor] = {}
        if self.teacher is not None and _asked(self.objective, batch):
            with torch.no_grad():
                x = batch.x.to(device_of(self.teacher, batch.x.device))
                found, taught = look(self.teacher, self.teacher_places, x, "teacher")
            taught = {tap: a.to(batch.x.device) for tap, a in taught.items()}
            known = found.to(batch.x.device) if known is None else known
        out, own = look(self.student, self.student_places, batch.x, "student")
        return Seen(batch, out, known, own, taught)


def paired(
    student: nn.Module, teacher: nn.Module | None, objective: Objective, first: Batch
) -> Pair:
    """Raises `TaskError` where a model lacks what is looked at, or cannot compute a batch."""
    if objective.teacher_taps and teacher is None:
        what = "the objective looks into a teacher, and there is none"
        raise TaskError(what, "distil", "Give the teacher, not its outputs alone")
    _tried(student, first.x, "student")
    own = places(student, objective.student_taps, first.x, "student")
    if teacher is None or not _asked(objective, first):
        return Pair(student, teacher, objective, own, {})
    x = first.x.to(device_of(teacher, first.x.device))
    _tried(teacher, x, "teacher")
    return Pair(
        student, teacher, objective, own, places(teacher, objective.teacher_taps, x, "teacher")
    )


def _asked(objective: Objective, batch: Batch) -> bool:
    """Whether the teacher is to be run, and what it answers is not known already."""
    return objective.needs_teacher and (batch.teacher is None or bool(objective.teacher_taps))


def _tried(module: nn.Module, x: Tensor, where: str) -> None:
    try:
        with evaluating(module), torch.no_grad():
            look(module, {}, x, where)
    except KitestringError:
        raise
    except Exception as problem:  # anything can be wrong with somebody's model
        said = (str(problem).strip().splitlines() or [type(problem).__name__])[0][:120]
        what = f"cannot compute rows {list(x.shape)} of {x.dtype}: {said}"
        raise TaskError(what, where, "Give the rows that it is made for") from problem


def device_of(module: nn.Module, default: torch.device | None = None) -> torch.device:
    return next((p.device for p in module.parameters()), default or torch.device("cpu"))


def moved(batch: Batch, device: torch.device) -> Batch:
    def to(a: Tensor | None) -> Tensor | None:
        return None if a is None else a.to(device)

    rest = map(to, (batch.y, batch.index, batch.teacher, batch.weight))
    return Batch(batch.x.to(device), *rest)
