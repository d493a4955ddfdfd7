"""Attention transfer: the small model is to look where the large one looks.

Zagoruyko, Komodakis 2017, "Paying More Attention to Attention: Improving the Performance of
Convolutional Neural Networks via Attention Transfer", arXiv 1612.03928, section 3.1: the attention
map is the sum of |A|^2 over channels, laid flat and divided by its L2 norm; the loss is the squared
distance of two such maps, a mean over the map, with a weight of 1000.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from kitestring.compress.distil.objective import (
    Objective,
    Seen,
    mean,
    over_positions,
    real_positions,
)
from kitestring.compress.distil.taps import MAPS, beside
from kitestring.errors import TaskError


def attention(student: Tensor, teacher: Tensor, real: Tensor | None = None) -> Tensor:
    """The mean squared distance of attention maps -> [n]: of maps [n, C, H, W], or of sequences
    [n, T, d] over the positions where `real` [n, T] holds. Numbers of channels may differ, and
    heights and widths: the larger maps are averaged down."""
    a, b = _energy(student), _energy(teacher)
    if a.ndim != b.ndim or (a.ndim == 2 and a.shape != b.shape):
        what = f"{list(student.shape)} and {list(teacher.shape)} have no places in common"
        raise TaskError(what, "attention", "Choose taps of the same kind")
    if a.ndim == 3:
        size = (min(a.shape[1], b.shape[1]), min(a.shape[2], b.shape[2]))
        a, b = (F.adaptive_avg_pool2d(e, size).flatten(1) for e in (a, b))
    if real is not None:
        a, b = a * real, b * real
    return over_positions((F.normalize(a) - F.normalize(b)).square(), real)


def _energy(a: Tensor) -> Tensor:
    """Maps [n, C, H, W] -> [n, H, W]; sequences [n, T, d] -> [n, T]."""
    if a.ndim not in (3, 4):
        what = f"{list(a.shape)} has no places to attend to"
        raise TaskError(what, "attention", "Choose taps that give [n, C, H, W] or [n, T, d]")
    return a.square().sum(1 if a.ndim == 4 else 2)


class Attention(Objective):
    """`weight` times the sum over pairs of taps. A term: add it to `Supervised` or `Response` by
    `Sum`."""

    def __init__(
        self,
        weight: float = 1000.0,
        student: str | Sequence[str] = MAPS,
        teacher: str | Sequence[str] = MAPS,
    ) -> None:
        super().__init__()
        self.weight = weight
        self.student_taps, self.teacher_taps = beside(student, teacher, "Attention")

    def forward(self, seen: Seen) -> Tensor:
        total = seen.student.new_zeros(())
        for a, b in seen.pairs(self):
            each = attention(a, b, real_positions(seen.batch, a))
            total = total + mean(each, seen.batch)
        return self.weight * total
