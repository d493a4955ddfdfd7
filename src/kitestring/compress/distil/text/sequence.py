"""Sequence-level distillation: the student learns the teacher's own answers by heart.

Kim and Rush 2016, "Sequence-Level Knowledge Distillation", EMNLP, arXiv 1606.07947, section 3.2:
the mode of the teacher's distribution over sequences, found by beam search, stands for all of it.

    answers = taught(teacher, prompts, 32, beams=4)
    distil(student, None, answered(answers, prompts.shape[1]), Supervised(), settings)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kitestring.compress.distil.batches import Batches, rows
from kitestring.compress.distil.pair import device_of
from kitestring.compress.distil.taps import evaluating
from kitestring.compress.distil.text.generate import sample
from kitestring.compress.distil.text.on_policy import dice, generated
from kitestring.compress.distil.text.reading import Reader
from kitestring.errors import SettingError


@torch.no_grad()
def beam(
    model: nn.Module,
    prompts: Tensor,
    length: int,
    *,
    beams: int = 4,
    context: int | None = None,
    end: int | None = None,
) -> Tensor:
    """Prompts [n, P] with the likeliest `length` tokens after each that a search `beams` wide
    finds: ids [n, P + length]. After a first `end` a row is filled up with it, at no cost."""
    if beams < 1:
        raise SettingError(f"beams is {beams}", "beam", "Give a whole number from 1")
    n = len(prompts)
    first = torch.arange(n, device=prompts.device)[:, None] * beams
    with evaluating(model):
        reader = Reader(model, prompts.repeat_interleave(beams, 0), length, context)
        # The beams of a row start alike: all but one are left out until they differ.
        score = torch.full((n, beams), -torch.inf, device=prompts.device)
        score[:, 0] = 0
        ended = torch.zeros(n * beams, dtype=torch.bool, device=prompts.device)
        for _ in range(length):
            logs = reader.next().log_softmax(-1)
            if end is not None:
                logs[ended] = -torch.inf
                logs[ended, end] = 0
            vocabulary = logs.shape[-1]
            all_of_row = (score[..., None] + logs.reshape(n, beams, -1)).reshape(n, -1)
            score, best = all_of_row.topk(beams, -1)
            of = (first + best // vocabulary).flatten()
            tokens = (best % vocabulary).flatten()
            reader.take(of)
            reader.add(tokens)
            ended = ended[of] | (tokens == end) if end is not None else ended
    return reader.ids[first[:, 0]]


def taught(
    teacher: nn.Module,
    prompts: Tensor,
    length: int,
    *,
    beams: int | None = None,
    temperature: float = 1.0,
    batch: int = 64,
    seed: int = 0,
    context: int | None = None,
    end: int | None = None,
) -> Tensor:
    """The teacher's answers to prompts [N, P], `batch` at a time: ids [N, P + length].

    With `beams` (1 is greedy) they are searched for, as the paper does where prompts have a right
    answer. Without, they are drawn at `temperature`: of open text the likeliest repeats itself, and
    a student learns just that."""
    found = []
    for i, part in enumerate(torch.split(prompts.to(device_of(teacher)), batch)):
        if beams is not None:
            found.append(beam(teacher, part, length, beams=beams, context=context, end=end))
        else:
            found.append(sample(
                teacher, part, length, temperature=temperature, context=context, end=end,
                generator=dice(part, seed, i),
            ))  # fmt: skip
    return torch.cat(found)


def answered(
    ids: Tensor, prompt: int, *, batch: int = 32, seed: int = 0, end: int | None = None
) -> Batches:
    """Answers [N, P + L] to prompts of P = `prompt` tokens as batches; only they have a truth."""
    every = generated(ids, prompt, end)
    return rows(every.x, every.y, batch=batch, seed=seed)
