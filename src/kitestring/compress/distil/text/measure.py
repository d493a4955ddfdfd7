"""How well a small language model stands in for a large one: perplexity, acceptance, exposure.

Acceptance: Leviathan, Kalman, Matias 2023, "Fast Inference from Transformers via Speculative
Decoding", ICML, arXiv 2211.17192, theorem 3.5 (beta = sum min(p, q)) and equation 1 (tokens per
call). Exposure bias: Arora, El Asri, Bahuleyan, Cheung 2022, "Why Exposure Bias Matters", Findings
of ACL, arXiv 2204.01171, section 3; as MiniLLM (arXiv 2306.08543, section 3.3) uses it.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from kitestring.compress.distil.taps import evaluating
from kitestring.compress.distil.text.divergences import forward_kl
from kitestring.compress.distil.text.generate import probabilities, sample
from kitestring.errors import SettingError

_MOST = math.log(sys.float_info.max)


@torch.no_grad()
def perplexity(model: nn.Module, rows: Tensor, batch: int = 64) -> float:
    """exp of the mean negative log-likelihood of each token of rows [n, T + 1] but the first;
    infinite where that is more than a float holds."""
    total = 0.0
    with evaluating(model):
        for part in torch.split(rows, batch):
            out, y = model(part[:, :-1]), part[:, 1:]
            total += float(functional.cross_entropy(out.flatten(0, 1), y.flatten())) * y.numel()
    nats = total / rows[:, 1:].numel()
    return math.inf if nats > _MOST else math.exp(nats)


@dataclass(frozen=True)
class Acceptance:
    """What a verifier accepts of a draft model's tokens (shares of 1).

    `tokens` a call are what one verification of k drafted tokens yields on average, with the one
    that the target adds itself; 1 at least, k + 1 at most."""

    text: float  # at the positions of the given text
    own: float  # at those of the draft's own continuations
    tokens: float
    k: int


@torch.no_grad()
def acceptance(
    draft: nn.Module,
    target: nn.Module,
    rows: Tensor,
    k: int = 4,
    *,
    prompt: int | None = None,
    temperature: float = 1.0,
    batch: int = 64,
    seed: int = 0,
) -> Acceptance:
    """How often `target` accepts what `draft` drafts, on rows [n, T + 1] of text.

    A drafted token is accepted with probability sum min(p, q), p of the target and q of the draft
    at `temperature` (0: where both have the same likeliest token). Own continuations start after
    the first `prompt` tokens of each row (half of them), and fill it up; `tokens` is from the first
    k of them, with nothing assumed about how one token's fate goes with the next one's."""
    width = rows.shape[1]
    prompt = width // 2 if prompt is None else prompt
    if k < 1 or not 0 < prompt <= width - k:
        what = f"{k} tokens after {prompt} of {width}"
        raise SettingError(what, "acceptance", "Give a prompt that leaves room for k, from 1")
    generator = torch.Generator(rows.device).manual_seed(seed)
    text, own, tokens, n = 0.0, 0.0, 0.0, len(rows)
    with evaluating(draft), evaluating(target):
        for part in torch.split(rows, batch):
            both = _likely(draft, target, part, temperature)
            text += float(torch.minimum(*both).sum(-1).mean(1).sum())
            drafted = sample(
                draft,
                part[:, :prompt],
                width - prompt,
                temperature=temperature,
                generator=generator,
            )
            q, p = (each[:, prompt - 1 :] for each in _likely(draft, target, drafted, temperature))
            own += float(torch.minimum(q, p).sum(-1).mean(1).sum())
            of_token = drafted[:, prompt:, None]
            # Of two tokens that are almost alike, `sample` may have taken the other one: q is 0.
            least = torch.finfo(q.dtype).tiny
            fate = p.gather(-1, of_token) / q.gather(-1, of_token).clamp(min=least)
            fate = fate[..., 0].clamp(max=1)
            tokens += float((1 + fate[:, :k].cumprod(1).sum(1)).sum())
    return Acceptance(text / n, own / n, tokens / n, k)


def tokens_per_call(share: float, k: int) -> float:
    """(1 - a^(k+1)) / (1 - a): tokens a call where each drafted one is accepted with chance a."""
    if not 0 <= share <= 1 or k < 0:
        raise SettingError(f"share {share}, k {k}", "tokens_per_call", "Give 0 to 1, and 0 or more")
    return sum(share**i for i in range(k + 1))


@dataclass(frozen=True)
class Exposure:
    """What a student's own text is to its teacher. Nats are per token.

    `excess` is the share by which its divergence from the teacher is greater after its own words
    than after the teacher's: 0 where its mistakes do not add up."""

    own: float  # the teacher's negative log-likelihood of text that the student drew
    teacher: float  # of text that it drew itself: what a student could reach
    apart_after_own: float  # KL(p || q) after the student's words
    apart_after_teacher: float

    @property
    def excess(self) -> float:
        more = self.apart_after_own - self.apart_after_teacher
        return more / max(self.apart_after_teacher, 1e-12)


@torch.no_grad()
def exposure(
    student: nn.Module,
    teacher: nn.Module,
    prompts: Tensor,
    length: int,
    *,
    context: int | None = None,
    batch: int = 64,
    seed: int = 0,
) -> Exposure:
    """Both draw `length` tokens after each of the prompts [n, P], and both judge both.

    P + length - 1 may be at most what the models can see at once."""
    if length < 1:
        raise SettingError(f"length is {length}", "exposure", "Give a whole number from 1")
    generator = torch.Generator(prompts.device).manual_seed(seed)
    found = {}
    with evaluating(student), evaluating(teacher):
        for name, writer in (("own", student), ("teacher", teacher)):
            nats = apart = 0.0
            for part in torch.split(prompts, batch):
                ids = sample(writer, part, length, context=context, generator=generator)
                after = slice(part.shape[1] - 1, None)
                said, p = ids[:, part.shape[1] :], teacher(ids[:, :-1])[:, after]
                q = student(ids[:, :-1])[:, after]
                nats += float(functional.cross_entropy(p.flatten(0, 1), said.flatten())) * len(part)
                apart += float(forward_kl(q, p).mean()) * len(part)
            found[name] = nats / len(prompts), apart / len(prompts)
    return Exposure(found["own"][0], found["teacher"][0], found["own"][1], found["teacher"][1])


def _likely(
    draft: nn.Module, target: nn.Module, ids: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Both models' probabilities of the tokens ids[:, 1:]: [n, T, V] each."""
    seen = ids[:, :-1]
    return probabilities(draft(seen), temperature), probabilities(target(seen), temperature)
