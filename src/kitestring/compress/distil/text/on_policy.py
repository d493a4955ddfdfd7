"""Batches of the student's own text, so that it is taught where it goes itself.

Agarwal, Vieillard, Zhou, Stanczyk, Ramos, Geist, Bachem 2024, "On-Policy Distillation of Language
Models: Learning from Self-Generated Mistakes" (GKD), ICLR, arXiv 2306.13649, algorithm 1: with
probability lambda a step takes the student's answers to its prompts instead of given ones; nothing
is differentiated through the sampling. The divergence is `divergences.Divergence`'s.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from kitestring.compress.distil.batches import Batches, rows
from kitestring.compress.distil.objective import Batch
from kitestring.compress.distil.pair import device_of
from kitestring.compress.distil.text.generate import sample
from kitestring.errors import SettingError


def text(ids: Tensor, *, batch: int = 32, seed: int = 0) -> Batches:
    """Given rows [N, T + 1] as batches: T tokens, and after each the next one as its truth."""
    if ids.dim() != 2 or ids.shape[1] < 2:
        raise SettingError(f"rows are {list(ids.shape)}", "text", "Give ids [N, T + 1], T > 0")
    return rows(ids[:, :-1], ids[:, 1:], batch=batch, seed=seed)


def own(
    prompts: Tensor,
    length: int,
    *,
    batch: int = 32,
    seed: int = 0,
    temperature: float = 1.0,
    context: int | None = None,
    end: int | None = None,
) -> Batches:
    """Prompts [N, P], shuffled as `rows` does, with `length` tokens that the student draws after
    each. Only these have a truth: a loss counts nothing else."""
    chosen = rows(prompts, batch=batch, seed=seed)

    def at(step: int, student: nn.Module) -> Batch:
        given = chosen(step, student).x.to(device_of(student))
        drawn = sample(
            student, given, length, temperature=temperature, context=context, end=end,
            generator=dice(given, seed, step),
        )  # fmt: skip
        return generated(drawn, prompts.shape[1], end)

    return at


def mixture(data: Batches, own: Batches, share: float = 0.5, *, seed: int = 0) -> Batches:
    """GKD: each step takes `own` with probability `share`, else `data`."""
    if not 0 <= share <= 1:
        raise SettingError(f"the share of own text is {share}", "mixture", "Give 0 to 1")

    def at(step: int, student: nn.Module) -> Batch:
        luck = np.random.default_rng([seed, step]).random()
        return (own if luck < share else data)(step, student)

    return at


def generated(ids: Tensor, prompt: int, end: int | None = None) -> Batch:
    """Ids [n, P + L] of which the first P = `prompt` were given -> x and y [n, P + L - 1].

    `y` is -1 where the next token was given, and after a first drawn `end`."""
    if not 0 < prompt < ids.shape[1]:
        what = f"{prompt} of {ids.shape[1]} tokens were given"
        raise SettingError(what, "generated", "Leave one that was given, and one that was drawn")
    y = ids[:, 1:].clone()
    y[:, : prompt - 1] = -1
    if end is not None:
        ends = (y[:, prompt - 1 :] == end).long()
        y[:, prompt - 1 :][(ends.cumsum(1) - ends) > 0] = -1
    return Batch(ids[:, :-1], y)


def dice(like: Tensor, seed: int, step: int) -> torch.Generator:
    """A step's own generator, on the device of `like`, whatever was drawn before."""
    word = np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)
    return torch.Generator(like.device).manual_seed(int(word[0]))
