"""What a step of training is made of, what an objective sees of it, and objectives as such."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kitestring.errors import SettingError, TaskError, unknown

RowLoss: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(output [n, ...], truth [n, ...]) -> one loss a row, [n]."""
LossName: TypeAlias = Literal["cross_entropy", "binary", "squared"]


@dataclass(frozen=True)
class Batch:
    """n rows. `index` says which rows of the data they are, `weight` how much each counts.

    `teacher` is the teacher's output where it is known already: then it is not computed. Whole
    numbers below 0 in `y` are padding, but where the loss is "squared": what was answered there
    counts for nothing."""

    x: Tensor  # [n, ...], input of both models
    y: Tensor | None = None  # [n, ...]
    index: Tensor | None = None  # [n]
    teacher: Tensor | None = None  # [n, ...]
    weight: Tensor | None = None  # [n]


@dataclass(frozen=True)
class Seen:
    """A batch, both models' outputs for it, and what their submodules gave, by tap."""

    batch: Batch
    student: Tensor
    teacher: Tensor | None
    student_at: Mapping[str, Tensor]
    teacher_at: Mapping[str, Tensor]

    def pairs(self, objective: Objective) -> list[tuple[Tensor, Tensor]]:
        """What is at the first tap of student and teacher, at the second, and so on."""
        taps = zip(objective.student_taps, objective.teacher_taps, strict=True)
        return [(self.student_at[a], self.teacher_at[b]) for a, b in taps]

    def known(self) -> Tensor:
        """The teacher's output. Raises `TaskError` without one."""
        if self.teacher is None:
            raise TaskError(
                "the objective compares with a teacher, and there is none", "distil",
                "Give a teacher, or its outputs in the batches",
            )  # fmt: skip
        return self.teacher


class Objective(nn.Module):
    """`forward(seen: Seen)` gives a scalar to minimise. Its parameters, such as regressors, are
    trained with the student; its buffers, such as memories, are kept with it.

    A tap is a submodule's dotted name, and stands for its output (for a tuple, its first tensor;
    of a submodule that is called more than once, the last). `taps.HIDDEN` and `taps.MAPS` are taps
    that need no name. Without `needs_teacher` the teacher is never run."""

    student_taps: tuple[str, ...] = ()
    teacher_taps: tuple[str, ...] = ()
    needs_teacher: bool = True

    def ready(self, seen: Seen) -> None:
        """Called once, with a first batch: make parameters of the right shapes."""


class Sum(Objective):
    """`Sum((1.0, Supervised()), (100.0, Hints()))`: a weighted sum."""

    def __init__(self, *terms: tuple[float, Objective]) -> None:
        super().__init__()
        if not terms:
            raise SettingError("a sum of nothing", "Sum", "Give (weight, objective) pairs")
        self.weights = tuple(weight for weight, _ in terms)
        self.terms = nn.ModuleList(objective for _, objective in terms)
        own = [objective for _, objective in terms]
        self.student_taps = tuple(dict.fromkeys(t for o in own for t in o.student_taps))
        self.teacher_taps = tuple(dict.fromkeys(t for o in own for t in o.teacher_taps))
        self.needs_teacher = any(o.needs_teacher for o in own)

    def forward(self, seen: Seen) -> Tensor:
        each = [w * term(seen) for w, term in zip(self.weights, self.terms, strict=True)]
        return cast(Tensor, sum(each[1:], each[0]))

    def ready(self, seen: Seen) -> None:
        for term in self.terms:
            cast(Objective, term).ready(seen)


class Supervised(Objective):
    """Plain training on the truth. `loss` maps output and truth to one loss a row, [n], or is the
    name of one: "cross_entropy" over the last axis, "binary", "squared"."""

    needs_teacher = False

    def __init__(self, loss: LossName | RowLoss = "cross_entropy") -> None:
        super().__init__()
        self.loss = row_loss(loss)

    def forward(self, seen: Seen) -> Tensor:
        batch = asked(seen.batch, self.loss)
        if batch.y is None:
            raise TaskError("the batches have no truth", "Supervised", "Give rows their y")
        return mean(self.loss(seen.student, batch.y), batch)


def cross_entropy(out: Tensor, y: Tensor) -> Tensor:
    """Logits [n, ..., C] and classes [n, ...], below 0 ignored -> [n], a mean within each row."""
    if out.shape[:-1] != y.shape:
        what = f"truths {list(y.shape)} do not fit logits {list(out.shape)}"
        raise TaskError(what, "cross_entropy", "Give one class for each position")
    own = F.log_softmax(out, -1).gather(-1, y.clamp(min=0).long().unsqueeze(-1)).squeeze(-1)
    return over_positions(-own, real(y))


def binary(out: Tensor, y: Tensor) -> Tensor:
    """Logits [n, ...] and 0 or 1 [n, ...], whole numbers below 0 ignored -> [n]."""
    same_shape(out, y, "binary")
    return over_positions(F.softplus(out) - out * y.to(out.dtype), real(y))


def squared(out: Tensor, y: Tensor) -> Tensor:
    """Values [n, ...] and [n, ...] -> [n]."""
    same_shape(out, y, "squared")
    return over_positions((out - y) ** 2, None)


LOSSES: dict[str, RowLoss] = {
    "cross_entropy": cross_entropy, "binary": binary, "squared": squared,
}  # fmt: skip


def row_loss(loss: str | RowLoss) -> RowLoss:
    """The loss of that name. Raises `SettingError` for a name that nobody knows."""
    if not isinstance(loss, str):
        return loss
    if loss not in LOSSES:
        raise unknown("loss", loss, LOSSES)
    return LOSSES[loss]


def asked(batch: Batch, loss: RowLoss) -> Batch:
    """The batch as that loss takes it: "squared" has values for truths, and no padding."""
    if loss is not squared or batch.y is None:
        return batch
    return replace(batch, y=batch.y if batch.y.is_floating_point() else batch.y.float())


def real(y: Tensor | None) -> Tensor | None:
    """Which truths are no padding: bool, of y's shape. None: all are."""
    return None if y is None or y.is_floating_point() else y >= 0


def real_positions(batch: Batch, a: Tensor) -> Tensor | None:
    """Of what a submodule gives, [n, T, d]: which of its positions are no padding, bool [n, T].
    None: all are, or `a` has no positions that the truths are for."""
    mask = real(batch.y)
    return mask if mask is not None and a.ndim == 3 and mask.shape == a.shape[:2] else None


def vectors(a: Tensor, batch: Batch) -> Tensor:
    """One vector a row, [n, d]: of [n, T, d] the mean over real positions; maps are laid flat."""
    if a.ndim != 3:
        return a.flatten(1)
    mask = real_positions(batch, a)
    if mask is None:
        return a.mean(1)
    return (a * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


def over_positions(each: Tensor, real: Tensor | None) -> Tensor:
    """[n, ...] -> [n]: the mean over each row's real positions; 0 where there are none."""
    if each.ndim == 1:
        return each if real is None else each * real
    each = each.flatten(1)
    if real is None:
        return each.mean(1)
    real = real.flatten(1)
    return (each * real).sum(1) / real.sum(1).clamp(min=1)


def row_weights(batch: Batch, like: Tensor) -> Tensor:
    """[n], of the dtype and device of `like`: how much each row counts. Rows of padding do not."""
    weight = like.new_ones(len(batch.x)) if batch.weight is None else batch.weight.to(like)
    mask = real(batch.y)
    return weight if mask is None else weight * mask.reshape(len(mask), -1).any(1)


def mean(losses: Tensor, batch: Batch) -> Tensor:
    """Losses [n] -> their mean by the batch's weights; 0 where no row counts."""
    if losses.shape != batch.x.shape[:1]:
        what = f"{list(losses.shape)} losses for {len(batch.x)} rows"
        raise TaskError(what, "distil", "Give a loss with one number for each row")
    weight = row_weights(batch, losses)
    return (weight * losses).sum() / weight.sum().clamp(min=torch.finfo(losses.dtype).tiny)


def same_shape(a: Tensor, b: Tensor, where: str) -> None:
    """Raises `TaskError` where two tensors that are compared number by number differ in shape."""
    if a.shape != b.shape:
        what = f"{list(a.shape)} is compared with {list(b.shape)}"
        raise TaskError(what, where, "Give models with outputs of the same shape")
