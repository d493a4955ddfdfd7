"""How far a student's next token is from its teacher's, token by token.

p is the teacher's distribution, q the student's, both softmax(logits / temperature). All are in
nats, 0 where p = q and above elsewhere, and finite where a logit is -1e9 or -inf.

Forward KL: Hinton, Vinyals, Dean 2015, "Distilling the Knowledge in a Neural Network", arXiv
1503.02531, section 2. Reverse KL: Gu, Dong, Wei, Huang 2024, "MiniLLM", arXiv 2306.08543, equation
1. Generalised JSD: Agarwal, Vieillard, Zhou, Stanczyk, Ramos, Geist, Bachem 2024, "On-Policy
Distillation of Language Models" (GKD), arXiv 2306.13649, section 2. Skew KL and its reverse: Ko,
Kim, Chen, Yun 2024, "DistiLLM", arXiv 2402.03898, section 3.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from kitestring.compress.distil.objective import (
    Objective,
    Seen,
    mean,
    over_positions,
    real,
    same_shape,
)
from kitestring.errors import SettingError

Between: TypeAlias = Callable[..., Tensor]
"""(student's logits [..., V], teacher's logits [..., V], temperature, ...) -> [...]"""


def forward_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(p || q) of logits [..., V]: [...]. Covers all that the teacher may say."""
    q, p = _logs(student, temperature), _logs(teacher, temperature)
    return _kl(p, q)


def reverse_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(q || p) of logits [..., V]: [...]. Avoids what the teacher would not say."""
    q, p = _logs(student, temperature), _logs(teacher, temperature)
    return _kl(q, p)


def jsd(student: Tensor, teacher: Tensor, temperature: float = 1.0, beta: float = 0.5) -> Tensor:
    """b KL(p || m) + (1 - b) KL(q || m) with m = b p + (1 - b) q, of logits [..., V]: [...].

    Divided by b it nears forward KL as b nears 0, and divided by 1 - b reverse KL as b nears 1. At
    0 and 1 themselves it would be nothing, and these limits are what is given."""
    _share("beta", beta)
    q, p = _logs(student, temperature), _logs(teacher, temperature)
    if beta in (0, 1):
        return _kl(p, q) if beta == 0 else _kl(q, p)
    middle = _mixed(p, q, beta)
    return beta * _kl(p, middle) + (1 - beta) * _kl(q, middle)


def skew_kl(
    student: Tensor, teacher: Tensor, temperature: float = 1.0, alpha: float = 0.1
) -> Tensor:
    """KL(p || a p + (1 - a) q) of logits [..., V]: [...]. At most log(1 / a); a = 0 is forward."""
    _share("alpha", alpha)
    q, p = _logs(student, temperature), _logs(teacher, temperature)
    return _kl(p, _mixed(p, q, alpha))


def skew_reverse_kl(
    student: Tensor, teacher: Tensor, temperature: float = 1.0, alpha: float = 0.1
) -> Tensor:
    """KL(q || (1 - a) p + a q) of logits [..., V]: [...]. At most log(1 / a); a = 0 is reverse."""
    _share("alpha", alpha)
    q, p = _logs(student, temperature), _logs(teacher, temperature)
    return _kl(q, _mixed(q, p, alpha))


def total_variation(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Half of sum |p - q| of logits [..., V]: [...], at most 1.

    It is the share of a student's drafts that its teacher refuses (`measure.acceptance`)."""
    q, p = _logs(student, temperature).exp(), _logs(teacher, temperature).exp()
    return (p - q).abs().sum(-1) / 2


class Divergence(Objective):
    """Any of these: the mean over each row's tokens that have a truth (all, if the batch has none),
    then over rows, by their weights.

    `Divergence(jsd, beta=0.1)` hands on what is particular to one of them. It is multiplied by the
    temperature's square, as in response distillation, so that gradients keep their size."""

    def __init__(self, of: Between = forward_kl, temperature: float = 1.0, **own: float) -> None:
        super().__init__()
        self.of, self.temperature, self.own = of, temperature, own

    def forward(self, seen: Seen) -> Tensor:
        teacher = seen.known()
        same_shape(seen.student, teacher, "Divergence")
        apart = self.of(seen.student, teacher, self.temperature, **self.own)
        losses = over_positions(apart, real(seen.batch.y)) * self.temperature**2
        return mean(losses, seen.batch)


def wide(logits: Tensor) -> Tensor:
    """float32 or wider: float16 holds no -1e9, and bfloat16 has too few bits for sums over V."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _logs(logits: Tensor, temperature: float) -> Tensor:
    if temperature <= 0:
        raise SettingError(f"temperature is {temperature}", "distillation", "Give more than 0")
    return (wide(logits).clamp(min=-1e9) / temperature).log_softmax(-1)


def _kl(a: Tensor, b: Tensor) -> Tensor:
    """Of log-probabilities [..., V]: [...]."""
    return (a.exp() * (a - b)).sum(-1)


def _mixed(a: Tensor, b: Tensor, share: float) -> Tensor:
    """log(share * a + (1 - share) * b) of log-probabilities."""
    if share in (0, 1):
        return a if share == 1 else b
    return torch.logaddexp(a + math.log(share), b + math.log1p(-share))


def _share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise SettingError(f"{name} is {value}", "distillation", "Give 0 to 1")
