"""Reverse KL of whole answers by policy gradient.

Gu, Dong, Wei, Huang 2024, "MiniLLM: Knowledge Distillation of Large Language Models", ICLR, arXiv
2306.08543, section 2.2: what one token does at its own step is differentiated exactly (equation
3), what it does to later ones by its log-ratios p / q to come; answers are drawn from teacher and
student mixed (equation 4), weighted by q over that mixture, step by step (equation 5), and what is
to come is a mean over the tokens to come, not a sum (equation 6).

Left out of the authors' training: several updates for each answer with PPO's clipped ratios,
whitened rewards, and the language-model loss on pretraining text. The weight of equation 5 is not
put before the exact part, as in their code: given what came before, its mean is 1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kitestring.compress.distil.batches import Batches, rows
from kitestring.compress.distil.objective import (
    Batch,
    Objective,
    Seen,
    mean,
    over_positions,
    same_shape,
)
from kitestring.compress.distil.pair import device_of
from kitestring.compress.distil.text.divergences import wide
from kitestring.compress.distil.text.generate import mixed
from kitestring.compress.distil.text.on_policy import dice, generated
from kitestring.errors import SettingError, TaskError


def teacher_mixed(
    teacher: nn.Module,
    prompts: Tensor,
    length: int,
    *,
    alpha: float = 0.2,
    batch: int = 32,
    seed: int = 0,
    context: int | None = None,
    end: int | None = None,
) -> Batches:
    """As `on_policy.own`, each token drawn from alpha p + (1 - alpha) q of teacher and student."""
    _share(alpha)
    chosen = rows(prompts, batch=batch, seed=seed)

    def at(step: int, student: nn.Module) -> Batch:
        given = chosen(step, student).x.to(device_of(student))
        models = ((student, 1 - alpha), (teacher, alpha)) if alpha else ((student, 1.0),)
        generator = dice(given, seed, step)
        drawn = mixed(models, given, length, context=context, end=end, generator=generator)
        return generated(drawn, prompts.shape[1], end)

    return at


class MiniLLM(Objective):
    """A loss whose gradient is the paper's (equation 7), a mean over an answer's tokens.

    Its value is the reverse KL of single steps plus what only serves the gradient. `alpha` is the
    one with which the answers were drawn: 0 where they are the student's own. Log-ratios are
    clipped to `clip` nats. Without `by_length` and clipping, the gradient's mean over own answers,
    times their length, is exactly that of the reverse KL of whole answers."""

    def __init__(self, alpha: float = 0.2, by_length: bool = True, clip: float = 10.0) -> None:
        super().__init__()
        _share(alpha)
        self.alpha, self.by_length, self.clip = alpha, by_length, clip

    def forward(self, seen: Seen) -> Tensor:
        y = seen.batch.y
        if y is None:
            raise TaskError("the batches have no drawn tokens", "MiniLLM", "Use `teacher_mixed`")
        same_shape(seen.student, seen.known(), "MiniLLM")
        drawn = y >= 0
        q = wide(seen.student).clamp(min=-1e9).log_softmax(-1)
        p = wide(seen.known()).clamp(min=-1e9).log_softmax(-1)
        step = (q.exp() * (q - p)).sum(-1)
        of_token = y.clamp(min=0).long()[..., None]
        own, teacher = q.gather(-1, of_token)[..., 0], p.gather(-1, of_token)[..., 0]
        with torch.no_grad():
            ratio = (teacher - own).clamp(-self.clip, self.clip) * drawn
            to_come = ratio.flip(1).cumsum(1).flip(1) - ratio
            if self.by_length:
                left = drawn.flip(1).cumsum(1).flip(1) - 1
                to_come = to_come / left.clamp(min=1)
            drawn_from = (1 - self.alpha) * own.exp() + self.alpha * teacher.exp()
            weight = own.exp() / drawn_from.clamp(min=torch.finfo(own.dtype).tiny)
        # d own = d q / q: the log-derivative of policy gradients.
        later = -weight * to_come * own
        return mean(over_positions(step + later, drawn), seen.batch)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, by_length={self.by_length}, clip={self.clip}"


def _share(alpha: float) -> None:
    if not 0 <= alpha < 1:
        raise SettingError(f"alpha is {alpha}", "MiniLLM", "Give a share of the teacher below 1")
