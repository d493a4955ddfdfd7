"""Perplexity, acceptance and exposure, against enumeration and against drafting for real."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from kitestring.compress.distil.text.measure import (
    Exposure,
    acceptance,
    exposure,
    perplexity,
    tokens_per_call,
)
from kitestring.errors import SettingError
from text_models import Table, llama, log_likelihood, sequences


def test_perplexity() -> None:
    """A model that knows nothing has that of its vocabulary."""
    rows = torch.randint(0, 11, (7, 12), generator=torch.Generator().manual_seed(0))
    nothing = llama()
    with torch.no_grad():
        nothing.model.norm.weight.zero_()
    assert perplexity(nothing, rows) == pytest.approx(11, rel=1e-5)
    model = llama().train()
    with torch.no_grad():
        out = model(rows[:, :-1]).flatten(0, 1)
    nats = functional.cross_entropy(out, rows[:, 1:].flatten()).item()
    assert perplexity(model, rows, batch=3) == pytest.approx(math.exp(nats), rel=1e-5)
    assert model.training
    with torch.no_grad():
        nothing.model.norm.weight.fill_(1e6)  # sure of itself, and wrong
    assert perplexity(nothing, rows) == math.inf


class Wavering(nn.Module):
    """Another token for each length of what it sees, as one may be that takes two for alike."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        likely = functional.one_hot(torch.tensor(ids.shape[1] % 3), 3)
        return likely.float().expand(*ids.shape, 3)


def test_a_drafted_token_that_is_not_the_likeliest_now_is_judged_by_the_target() -> None:
    """At temperature 0 the share of the target is 0 or 1, and the draft's own may be 0 by now."""
    rows = torch.zeros(2, 6, dtype=torch.long)
    found = acceptance(Wavering(), Wavering(), rows, k=2, prompt=3, temperature=0)
    # Of rows of 5 tokens both say 2; drafted were 0 (of 3), 1 (of 4) and 2: the first is refused.
    assert found.tokens == 1
    with torch.no_grad():
        target = Table(3, 6)
        target.logits.zero_()
        target.logits[:, 0] = 1  # says 0 everywhere: the first is accepted, the second is not
    found = acceptance(Wavering(), target, rows, k=2, prompt=3, temperature=0)
    assert found.tokens == 2


def test_a_model_accepts_all_of_its_own() -> None:
    model, rows = llama(), torch.zeros(3, 9, dtype=torch.long)
    found = acceptance(model, model, rows, k=4)
    assert (found.text, found.own, found.tokens) == pytest.approx((1, 1, 5))


def test_tokens_per_call_by_hand() -> None:
    """1 + 0.8 + 0.64 + 0.512 + 0.4096; the paper's (1 - a^(k+1)) / (1 - a)."""
    assert tokens_per_call(0.8, 4) == pytest.approx(3.3616)
    assert tokens_per_call(0.8, 4) == pytest.approx((1 - 0.8**5) / (1 - 0.8))
    assert tokens_per_call(1.0, 4) == 5
    assert tokens_per_call(0.0, 4) == 1
    with pytest.raises(SettingError, match="share"):
        tokens_per_call(1.1, 4)


def _exactly(draft: Table, target: Table, k: int) -> tuple[float, float]:
    """Shares and tokens a call for k tokens after the prompt 0, over all that can be drafted."""
    every = sequences(3, k)
    with torch.no_grad():
        q, p = (model(every[:, :-1]).softmax(-1) for model in (draft, target))
        chance = log_likelihood(draft, every).exp()
        own = (chance * torch.minimum(p, q).sum(-1).mean(1)).sum().item()
        fate = (p / q).gather(-1, every[:, 1:, None])[..., 0].clamp(max=1).cumprod(1).sum(1)
        return own, 1 + (chance * fate).sum().item()


def test_acceptance_is_the_sum_of_minima() -> None:
    draft, target = Table(3, 4, seed=1), Table(3, 4, seed=2)
    rows = torch.zeros(6000, 4, dtype=torch.long)
    rows[:, 2] = 1
    found = acceptance(draft, target, rows, k=3, prompt=1)
    with torch.no_grad():
        both = [model(rows[:1, :-1]).softmax(-1) for model in (draft, target)]
    assert found.text == pytest.approx(torch.minimum(*both).sum(-1).mean().item())
    own, tokens = _exactly(draft, target, 3)
    # Standard deviations of a mean over 6000 rows are below 0.005.
    assert found.own == pytest.approx(own, abs=0.01)
    assert found.tokens == pytest.approx(tokens, abs=0.05)
    assert acceptance(draft, target, rows, k=3, prompt=1) == found


def test_drafting_for_real_accepts_as_often() -> None:
    """Leviathan et al., algorithm 1: keep each drafted token with chance p / q, stop at a no."""
    draft, target, n, k = Table(3, 4, seed=1), Table(3, 4, seed=2), 8000, 3
    generator = torch.Generator().manual_seed(0)
    ids = torch.zeros(n, 1, dtype=torch.long)
    going, tokens, first = torch.ones(n, dtype=torch.bool), torch.ones(n), None
    with torch.no_grad():
        for _ in range(k):
            q, p = (model(ids)[:, -1].softmax(-1) for model in (draft, target))
            token = torch.multinomial(q, 1, generator=generator)
            luck = torch.rand(n, 1, generator=generator, dtype=torch.float64)
            going &= (luck < p.gather(1, token) / q.gather(1, token))[:, 0]
            first = going.double().mean().item() if first is None else first
            tokens += going
            ids = torch.cat([ids, token], 1)
        minima = torch.minimum(draft(ids[:1, :1]).softmax(-1), target(ids[:1, :1]).softmax(-1))
    # Standard deviations: 0.5 / sqrt(8000) = 0.0056, and at most 1.5 / sqrt(8000) = 0.017.
    assert first == pytest.approx(minima.sum().item(), abs=0.02)
    assert tokens.mean().item() == pytest.approx(_exactly(draft, target, k)[1], abs=0.06)


def test_at_temperature_nought_it_is_agreement() -> None:
    draft, target = Table(3, 7, seed=1), Table(3, 7, seed=2)
    rows = torch.randint(0, 3, (50, 7), generator=torch.Generator().manual_seed(0))
    found = acceptance(draft, target, rows, k=2, temperature=0)
    with torch.no_grad():
        agree = draft(rows[:, :-1]).argmax(-1) == target(rows[:, :-1]).argmax(-1)
    assert found.text == pytest.approx(agree.double().mean().item())
    assert found.tokens in [1 + i / 50 for i in range(101)]
    hot = acceptance(draft, target, rows, k=2, temperature=50)
    assert hot.text > 0.97  # both know nothing then


@pytest.mark.parametrize(("k", "prompt"), [(0, 3), (4, 5), (1, 0)])
def test_there_must_be_room_to_draft(k: int, prompt: int) -> None:
    with pytest.raises(SettingError, match=f"{k} tokens after {prompt} of 8"):
        acceptance(llama(), llama(), torch.zeros(2, 8, dtype=torch.long), k, prompt=prompt)


def test_exposure_of_a_perfect_student_is_none() -> None:
    model, prompts = llama().train(), torch.zeros(5, 2, dtype=torch.long)
    found = exposure(model, model, prompts, 6)
    assert found.apart_after_own == found.apart_after_teacher == found.excess == 0
    assert model.training


def test_exposure_is_an_expectation_over_what_each_writes() -> None:
    student, teacher = Table(2, 3, seed=1), Table(2, 3, seed=2)
    every = sequences(2, 2)
    wanted = []
    with torch.no_grad():
        student.logits *= 2  # so that KL(p || q) is far from KL(q || p)
        q, p = (model(every[:, :-1]).log_softmax(-1) for model in (student, teacher))
        apart = (p.exp() * (p - q)).sum(-1).mean(1)
        nats = -log_likelihood(teacher, every) / 2
        for writer in (student, teacher):
            chance = log_likelihood(writer, every).exp()
            wanted.append(((chance * nats).sum().item(), (chance * apart).sum().item()))
    prompts = torch.zeros(10_000, 1, dtype=torch.long)
    found = exposure(student, teacher, prompts, 2)
    assert (found.own, found.teacher) == pytest.approx((wanted[0][0], wanted[1][0]), abs=0.02)
    parts = found.apart_after_own, found.apart_after_teacher
    assert parts == pytest.approx((wanted[0][1], wanted[1][1]), abs=0.02)
    assert Exposure(2.0, 1.0, 0.3, 0.2).excess == pytest.approx(0.5)


def test_exposure_needs_a_length() -> None:
    with pytest.raises(SettingError, match="length"):
        exposure(nn.Identity(), nn.Identity(), torch.zeros(2, 3, dtype=torch.long), 0)
