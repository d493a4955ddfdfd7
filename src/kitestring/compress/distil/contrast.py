"""Contrastive distillation: of many rows, which one did the other model see?

Tian, Krishnan, Isola 2020, "Contrastive Representation Distillation", arXiv 1910.10699, section 3:
representations of both models are projected to 128 numbers of length 1; a critic h tells a pair of
the same row from N pairs of two rows, which come from a memory. As in their code: temperature
0.07, momentum 0.5 of the memory, a weight of 0.8, negatives of other classes. The critic's
normaliser Z is estimated from the first batch and kept, as in Wu, Xiong, Yu, Lin 2018,
"Unsupervised Feature Learning via Non-Parametric Instance Discrimination", arXiv 1805.01978,
section 3.2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kitestring.compress.distil.objective import Objective, Seen, row_weights, vectors
from kitestring.compress.distil.taps import HIDDEN
from kitestring.errors import SettingError, TaskError


def nce(
    alike: Tensor, unlike: Tensor, log_z: Tensor, rows: int, apart: Tensor | None = None
) -> Tensor:
    """Noise-contrastive estimation -> [...], in nats.

    `alike` [...] and `unlike` [..., N] are similarities divided by the temperature, of the same row
    and of N others out of `rows`; `log_z` goes with `alike`. With p = exp(similarity) / Z and
    h = p / (p + N / rows) it is -log h of the one minus the sum of log (1 - h) over the others.
    Of the others only those count where `apart` [..., N] holds, N times their mean."""
    n = unlike.shape[-1]
    even = log_z + math.log(n / rows)  # a similarity of which h is a half
    each = F.softplus(unlike - even[..., None])
    if apart is None:
        total = each.sum(-1)
    else:
        total = (each * apart).sum(-1) * (n / apart.sum(-1).clamp(min=1))
    return F.softplus(even - alike) + total


class Contrast(Objective):
    """`weight` times the sum over two anchors, student and teacher, each against the memory of the
    other. The data have `rows` rows (`Batch.index` says which each is); `negatives` are drawn among
    the other rows, at most as many as there are. Where a row has one class, others that were seen
    to be of the same are left out. Projections are trained with the student. Maps are laid flat,
    sequences averaged over their positions. A term: add it to `Supervised` or `Response` by
    `Sum`."""

    memory: Tensor  # [2, rows, width]: the student's, the teacher's
    classes: Tensor  # [rows], of those that were seen; below 0: not known
    log_z: Tensor  # [2, 1]: of the student's against the teacher's memory, and the other way round

    def __init__(
        self,
        rows: int,
        weight: float = 0.8,
        negatives: int = 4096,
        temperature: float = 0.07,
        momentum: float = 0.5,
        width: int = 128,
        student: str = HIDDEN,
        teacher: str = HIDDEN,
    ) -> None:
        super().__init__()
        if rows < 2 or negatives < 1:
            what = f"{rows} rows, {negatives} negatives"
            raise SettingError(what, "Contrast", "Give 2 rows or more and 1 negative or more")
        if not (temperature > 0 and 0 <= momentum < 1):
            what = f"temperature {temperature}, momentum {momentum}"
            raise SettingError(what, "Contrast", "Give a temperature above 0, a momentum in [0, 1)")
        self.rows, self.weight, self.negatives = rows, weight, min(negatives, rows - 1)
        self.temperature, self.momentum, self.width = temperature, momentum, width
        self.student_taps, self.teacher_taps = (student,), (teacher,)
        self.heads = nn.ModuleList()

    def ready(self, seen: Seen) -> None:
        """Projections, memories of random directions, and Z: over the first batch and all of the
        memory, the mean of p is then 1 / rows."""
        some = row_weights(seen.batch, seen.student) > 0
        pair = [vectors(a, seen.batch)[some] for a in seen.pairs(self)[0]]
        self.heads.extend(nn.Linear(a.shape[1], self.width).to(a) for a in pair)
        drawn = torch.randn(2, self.rows, self.width)
        self.register_buffer("memory", F.normalize(drawn, dim=2).to(pair[0]))
        unknown = torch.full((self.rows,), -1, device=pair[0].device)
        self.register_buffer("classes", unknown)
        near = self._near(self._projected(pair)).flatten(1)
        log_mean = near.logsumexp(1, keepdim=True) - math.log(near.shape[1])
        self.register_buffer("log_z", log_mean + math.log(self.rows))

    def forward(self, seen: Seen) -> Tensor:
        weight = row_weights(seen.batch, seen.student)
        some = weight > 0
        index, weight = self._index(seen)[some], weight[some]
        found = self._projected([vectors(a, seen.batch)[some] for a in seen.pairs(self)[0]])
        near = self._near(found)
        alike = near.gather(2, index.expand(2, -1)[..., None])[..., 0]
        size = 2, len(index), self.negatives
        others = torch.randint(self.rows - 1, size, device=index.device)
        others = others + (others >= index[:, None])
        own = self._classes(seen, index, some)
        apart = (self.classes[others] != own[:, None]) | (own[:, None] < 0)
        each = nce(alike, near.gather(2, others), self.log_z, self.rows, apart).sum(0)
        if self.training:
            moved = torch.lerp(found.detach(), self.memory[:, index], self.momentum)
            # Not in place: the gradient needs the memory as it was.
            self.memory = self.memory.index_copy(1, index, F.normalize(moved, dim=2))
            self.classes[index] = own
        return self.weight * (weight * each).sum() / weight.sum().clamp(min=1e-12)

    def _classes(self, seen: Seen, index: Tensor, some: Tensor) -> Tensor:
        """Of a batch's rows, [n]; -1 where a row has no class, or one at each position."""
        y = seen.batch.y
        if y is None or y.ndim != 1 or y.is_floating_point():
            return torch.full_like(index, -1)
        return y[some].long()

    def _index(self, seen: Seen) -> Tensor:
        index = seen.batch.index
        if index is None:
            mend = "Make batches by rows(), or give them their index"
            raise TaskError("the batches do not say which rows they are", "Contrast", mend)
        if int(index.min()) < 0 or int(index.max()) >= self.rows:
            what = f"rows {int(index.min())} to {int(index.max())} of {self.rows}"
            raise TaskError(what, "Contrast", "Give it the number of rows of the data")
        return index

    def _projected(self, pair: list[Tensor]) -> Tensor:
        """Student and teacher, [2, n, width], of length 1."""
        return F.normalize(
            torch.stack([head(a) for head, a in zip(self.heads, pair, strict=True)]), dim=2
        )

    def _near(self, found: Tensor) -> Tensor:
        """[2, n, width] -> [2, n, rows]: similarities to the other's memory, by temperature."""
        return found @ self.memory.flip(0).transpose(1, 2) / self.temperature
