"""Text from a language model: samples, greedy, or of several models mixed token by token.

Nucleus: Holtzman, Buys, Du, Forbes, Choi 2020, "The Curious Case of Neural Text Degeneration",
arXiv 1904.09751, section 3.1. The k most likely: Fan, Lewis, Dauphin 2018, "Hierarchical Neural
Story Generation", arXiv 1805.04833, section 5.4.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.nn import functional

from kitestring.compress.distil.taps import evaluating
from kitestring.compress.distil.text.reading import Reader
from kitestring.errors import SettingError


def probabilities(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """Logits [..., V] -> what is drawn from, [..., V]; all on the likeliest at temperature 0."""
    if temperature < 0:
        raise SettingError(f"temperature is {temperature}", "sampling", "Give 0 or more")
    if temperature == 0:
        return functional.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)
    logits = logits / temperature
    if top_k is not None:
        if top_k < 1:
            raise SettingError(f"top_k is {top_k}", "sampling", "Give a whole number from 1")
        least = logits.topk(min(top_k, logits.shape[-1]), -1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p is not None:
        if not 0 < top_p <= 1:
            raise SettingError(f"top_p is {top_p}", "sampling", "Give more than 0, at most 1")
        likeliest, order = logits.softmax(-1).sort(-1, descending=True)
        # The smallest set whose probability is at least top_p: one stays while those before it
        # have less.
        left_out = likeliest.cumsum(-1) - likeliest >= top_p
        logits = logits.masked_fill(left_out.scatter(-1, order, left_out), -torch.inf)
    return logits.softmax(-1)


def sample(
    model: nn.Module,
    prompts: Tensor,
    length: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    context: int | None = None,
    end: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Prompts [n, P], all equally long, with `length` tokens drawn after each: ids [n, P + length].

    `model` is ids [n, T] -> logits [n, T, V] of the next token. It is run in eval mode without
    gradients, on the last `context` tokens at most, and left in the mode in which it came. At
    temperature 0 the likeliest token is taken. After a first token `end` a row is filled up with
    it. Without a generator torch's global one is used."""
    return mixed(
        ((model, 1.0),), prompts, length, temperature=temperature, top_k=top_k, top_p=top_p,
        context=context, end=end, generator=generator,
    )  # fmt: skip


@torch.no_grad()
def mixed(
    models: Sequence[tuple[nn.Module, float]],
    prompts: Tensor,
    length: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    context: int | None = None,
    end: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """As `sample`, each token drawn from the models' probabilities, mixed by their shares."""
    if length < 0:
        raise SettingError(f"length is {length}", "sampling", "Give 0 or more")
    with ExitStack() as modes:
        for model, _ in models:
            modes.enter_context(evaluating(model))
        readers = [Reader(model, prompts, length, context) for model, _ in models]
        ended = torch.zeros(len(prompts), dtype=torch.bool, device=prompts.device)
        for _ in range(length):
            parts = [
                share * probabilities(reader.next(), temperature, top_k, top_p)
                for reader, (_, share) in zip(readers, models, strict=True)
            ]
            likely = torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]
            if temperature == 0:
                tokens = likely.argmax(-1)
            else:
                tokens = torch.multinomial(likely, 1, generator=generator)[:, 0]
            if end is not None:
                tokens = torch.where(ended, end, tokens)
                ended = ended | (tokens == end)
            for reader in readers:
                reader.add(tokens)
    return readers[0].ids
