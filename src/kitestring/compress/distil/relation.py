"""Relational distillation: what is near and what lies in which direction, among a batch's rows.

Park, Kim, Lu, Cho 2019, "Relational Knowledge Distillation", arXiv 1904.05068, sections 3.2.1 and
3.2.2: distances divided by their mean, and cosines of angles, both compared by the Huber loss. The
weights of 25 and 50 are theirs for classifying images.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kitestring.compress.distil.objective import Objective, Seen, row_weights, vectors
from kitestring.compress.distil.taps import HIDDEN


def distances(a: Tensor) -> Tensor:
    """Vectors [n, d] -> [n, n]: their distances, divided by the mean over pairs of two."""
    found = _length(a[:, None] - a[None])
    n = len(a)
    return found / _or_one(found.sum() / (n * (n - 1)))


def angles(a: Tensor) -> Tensor:
    """Vectors [n, d] -> [n, n, n]: at [j, i, k] the cosine of the angle at j between i and k."""
    way = a[None] - a[:, None]
    way = way / _or_one(_length(way))[..., None]
    return way @ way.transpose(1, 2)


def _or_one(a: Tensor) -> Tensor:
    """To divide by: what is 0 divided by next to nothing would have a gradient without bounds."""
    return torch.where(a > 0, a, 1.0)


def _length(a: Tensor) -> Tensor:
    """Over the last axis; with a gradient of 0, not infinite, where it is 0."""
    squared = a.square().sum(-1)
    some = squared > 0
    return torch.where(some, squared, 1.0).sqrt() * some


def distance_relation(student: Tensor, teacher: Tensor) -> Tensor:
    """Vectors [n, d] and [n, d'] -> a scalar: the mean over pairs of two. 0 below 2 rows."""
    n = len(student)
    if n < 2:
        return student.sum() * 0
    each = F.huber_loss(distances(student), distances(teacher), reduction="sum")
    return each / (n * (n - 1))


def angle_relation(student: Tensor, teacher: Tensor) -> Tensor:
    """Vectors [n, d] and [n, d'] -> a scalar: the mean over triples of three. 0 below 3 rows.

    Needs memory for n^3 numbers and for n^2 d."""
    n = len(student)
    if n < 3:
        return student.sum() * 0
    each = F.huber_loss(angles(student), angles(teacher), reduction="sum")  # 0 where i, k are one
    return each / (n * (n - 1) * (n - 2))


class Relation(Objective):
    """`distance` times the one and `angle` times the other, of one vector a row: maps are laid
    flat, sequences averaged over their positions. Rows of weight 0 and of padding are left out;
    other weights play no part. A term: add it to `Supervised` or `Response` by `Sum`."""

    def __init__(
        self,
        distance: float = 25.0,
        angle: float = 50.0,
        student: str = HIDDEN,
        teacher: str = HIDDEN,
    ) -> None:
        super().__init__()
        self.distance, self.angle = distance, angle
        self.student_taps, self.teacher_taps = (student,), (teacher,)

    def forward(self, seen: Seen) -> Tensor:
        ((a, b),) = seen.pairs(self)
        real = row_weights(seen.batch, a) > 0
        a, b = vectors(a, seen.batch)[real], vectors(b, seen.batch)[real]
        return self.distance * distance_relation(a, b) + self.angle * angle_relation(a, b)
