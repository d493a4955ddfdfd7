"""Hints: what the small model has inside is to foretell what the large one has.

Romero, Ballas, Kahou, Chassang, Gatta, Bengio 2015, "FitNets: Hints for Thin Deep Nets", arXiv
1412.6550, equation 3: the squared distance of the teacher's hint layer to a regressor on the
student's guided layer. There it is a stage of its own, before the truth is learnt; here a term
beside the loss on it, as Tian, Krishnan, Isola 2020, arXiv 1910.10699, compare it. So that one
weight fits models whose representations differ in size, the distance is taken in units of the
teacher's mean square.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kitestring.compress.distil.objective import (
    Objective,
    Seen,
    mean,
    over_positions,
    real_positions,
    same_shape,
)
from kitestring.compress.distil.taps import HIDDEN, beside
from kitestring.errors import TaskError


def hint(student: Tensor, teacher: Tensor, real: Tensor | None = None) -> Tensor:
    """The mean squared distance of representations [n, ...] -> [n]; of sequences [n, T, d] over
    the positions where `real` [n, T] holds."""
    same_shape(student, teacher, "hint")
    each = (student - teacher).square()
    return over_positions(each.mean(-1) if each.ndim == 3 else each, real)


def same_size(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Maps [n, C, H, W] of two sizes, averaged down to the smaller height and width."""
    size = (min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3]))
    return F.adaptive_avg_pool2d(student, size), F.adaptive_avg_pool2d(teacher, size)


class Hints(Objective):
    """`weight` times the sum over pairs of taps, each by the mean square of what the teacher has
    there in the first batch. The regressors, 1x1 convolutions between maps and linear layers else,
    are trained with the student. A term: add it to `Supervised` or `Response` by `Sum`."""

    sizes: Tensor  # [pairs]: mean squares

    def __init__(
        self,
        weight: float = 10.0,
        student: str | Sequence[str] = HIDDEN,
        teacher: str | Sequence[str] = HIDDEN,
    ) -> None:
        super().__init__()
        self.weight = weight
        self.student_taps, self.teacher_taps = beside(student, teacher, "Hints")
        self.regressors = nn.ModuleList()

    def ready(self, seen: Seen) -> None:
        for a, b in seen.pairs(self):
            if a.ndim != b.ndim:
                what = f"{list(a.shape)} cannot foretell {list(b.shape)}"
                raise TaskError(what, "Hints", "Choose taps of the same kind")
            if a.ndim == 4:
                self.regressors.append(nn.Conv2d(a.shape[1], b.shape[1], 1).to(a))
            else:
                self.regressors.append(nn.Linear(a.shape[-1], b.shape[-1]).to(a))
        sizes = [self._mean(torch.zeros_like(b), b, seen) for _, b in seen.pairs(self)]
        self.register_buffer("sizes", torch.stack(sizes).clamp(min=1e-12))

    def forward(self, seen: Seen) -> Tensor:
        total = seen.student.new_zeros(())
        parts = zip(seen.pairs(self), self.regressors, self.sizes, strict=True)
        for (a, b), regressor, size in parts:
            told, b = same_size(regressor(a), b) if a.ndim == 4 else (regressor(a), b)
            total = total + self._mean(told, b, seen) / size
        return self.weight * total

    def _mean(self, student: Tensor, teacher: Tensor, seen: Seen) -> Tensor:
        return mean(hint(student, teacher, real_positions(seen.batch, teacher)), seen.batch)
