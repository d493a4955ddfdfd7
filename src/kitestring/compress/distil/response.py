"""Response distillation: the small model learns the large one's softened probabilities.

Hinton, Vinyals, Dean 2015, "Distilling the Knowledge in a Neural Network", arXiv 1503.02531,
section 2: the loss on the truth, and cross entropy with the teacher's probabilities, both models at
temperature T, times T^2. Here it is the divergence, which has the same gradient and is 0 at
equality. T = 4 and a = 0.9 are those of Tian, Krishnan, Isola 2020, arXiv 1910.10699.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from kitestring.compress.distil.objective import (
    LossName,
    Objective,
    RowLoss,
    Seen,
    asked,
    mean,
    over_positions,
    real,
    row_loss,
    same_shape,
)
from kitestring.errors import SettingError, TaskError


def response(
    student: Tensor, teacher: Tensor, temperature: float, real: Tensor | None = None
) -> Tensor:
    """T^2 KL(teacher || student) of logits [n, ..., C] at temperature T -> [n], in nats: a mean
    over each row's positions, those alone where `real` [n, ...] holds."""
    same_shape(student, teacher, "response")
    p = F.log_softmax(teacher / temperature, -1)
    q = F.log_softmax(student / temperature, -1)
    return temperature**2 * over_positions((p.exp() * (p - q)).sum(-1), real)


def binary_response(
    student: Tensor, teacher: Tensor, temperature: float, real: Tensor | None = None
) -> Tensor:
    """The same of the logits [n, ...] of yes against no -> [n]."""
    same_shape(student, teacher, "response")
    p, q = teacher / temperature, student / temperature
    yes = p.sigmoid() * (F.logsigmoid(p) - F.logsigmoid(q))
    no = (-p).sigmoid() * (F.logsigmoid(-p) - F.logsigmoid(-q))
    return temperature**2 * over_positions(yes + no, real)


def value_response(student: Tensor, teacher: Tensor, real: Tensor | None = None) -> Tensor:
    """The mean squared distance of values [n, ...] -> [n], at those positions alone where `real`,
    of as many axes or fewer, holds."""
    same_shape(student, teacher, "squared")
    each = (student - teacher).square()
    if real is None or each.shape[: real.ndim] != real.shape:
        return over_positions(each, None)
    return over_positions(each.flatten(real.ndim).mean(-1) if each.ndim > real.ndim else each, real)


class Response(Objective):
    """(1 - a) loss + a T^2 KL, with a = `share` of the teacher. `loss` as in `Supervised`; for
    "squared" and for a function of your own, the teacher's part is the squared distance to what it
    answers. Nothing is learnt where y is padding. With share 1 no truth is needed."""

    def __init__(
        self,
        temperature: float = 4.0,
        share: float = 0.9,
        loss: LossName | RowLoss = "cross_entropy",
    ) -> None:
        super().__init__()
        if not temperature > 0:
            raise SettingError(f"temperature {temperature}", "Response", "Give more than 0")
        if not 0 <= share <= 1:
            raise SettingError(f"share {share}", "Response", "Give 0 to 1")
        self.temperature, self.share = temperature, share
        self.loss, self.softened = row_loss(loss), _SOFTENED.get(str(loss))
        self.needs_teacher = share > 0

    def forward(self, seen: Seen) -> Tensor:
        batch = asked(seen.batch, self.loss)
        y, parts = batch.y, []
        if self.share < 1:
            if y is None:
                mend = "Give rows their y, or share=1 to learn from the teacher alone"
                raise TaskError("the batches have no truth", "Response", mend)
            parts.append((1 - self.share) * mean(self.loss(seen.student, y), batch))
        if self.share > 0:
            taught = self._taught(seen.student, seen.known(), real(y))
            parts.append(self.share * mean(taught, batch))
        return sum(parts[1:], parts[0])

    def _taught(self, student: Tensor, teacher: Tensor, real: Tensor | None) -> Tensor:
        if self.softened is None:
            return value_response(student, teacher, real)
        return self.softened(student, teacher, self.temperature, real)


_SOFTENED: dict[str, Callable[[Tensor, Tensor, float, Tensor | None], Tensor]] = {
    "cross_entropy": response, "binary": binary_response,
}  # fmt: skip
