"""Sampling from language models: what is kept between tokens, what is drawn, what beams find."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from scipy.stats import chi2
from torch import Tensor, nn

from kitestring.compress.distil.text.generate import mixed, probabilities, sample
from kitestring.compress.distil.text.reading import Reader
from kitestring.compress.distil.text.sequence import answered, beam, taught
from kitestring.errors import SettingError
from kitestring.tasks.layers import Transformer
from kitestring.tasks.llama import Llama
from text_models import Table, llama, log_likelihood, sequences, stirred


def _calls(module: nn.Module) -> list[int]:
    """How many rows and tokens each call of the whole model gets, from now on."""
    seen: list[int] = []
    module.register_forward_pre_hook(lambda _, args: seen.append(args[0].numel()))
    return seen


def _whole(model: nn.Module, prompts: Tensor, length: int, context: int | None = None) -> Tensor:
    """Greedy, by nothing but the model itself."""
    ids = prompts
    with torch.no_grad():
        for _ in range(length):
            seen = ids if context is None else ids[:, -context:]
            ids = torch.cat([ids, model(seen)[:, -1:].argmax(-1)], 1)
    return ids


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("prompt", [1, 5])
def test_kept_keys_and_values_give_the_logits_of_the_whole_model(tied: bool, prompt: int) -> None:
    model = llama(tied=tied).eval()
    ids = torch.randint(0, 11, (3, 24), generator=torch.Generator().manual_seed(1))
    reader = Reader(model, ids[:, :prompt], 24 - prompt)
    calls = _calls(model)
    with torch.no_grad():
        for at in range(prompt, 24):
            torch.testing.assert_close(reader.next(), model(ids[:, :at])[:, -1])
            reader.add(ids[:, at])
    assert len(calls) == 24 - prompt  # this test's own: the reader asked for none


def test_rows_that_are_taken_take_their_keys_along() -> None:
    model = llama().eval()
    ids = torch.randint(0, 11, (3, 6), generator=torch.Generator().manual_seed(1))
    reader = Reader(model, ids, 4)
    reader.next()
    reader.take(torch.tensor([2, 0, 2, 1]))
    reader.add(torch.tensor([5, 6, 7, 8]))
    with torch.no_grad():
        torch.testing.assert_close(reader.next(), model(reader.ids)[:, -1])
    assert reader.ids[:, 0].tolist() == ids[[2, 0, 2, 1], 0].tolist()


def test_a_llama_is_asked_as_a_whole_once_and_for_one_row() -> None:
    model, prompts = llama(), torch.zeros(7, 3, dtype=torch.long)
    calls = _calls(model)
    sample(model, prompts, 10)
    assert calls == [13]


class Odd(Llama):
    """Has all names of a Llama, and computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return -super().forward(x)


class Experts(nn.Module):
    """What mixtures of experts give: their output, and what the router said."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.inner(x), x.sum()


def test_a_llama_whose_parts_give_something_else_is_read_as_a_whole() -> None:
    class Whole(Llama):
        def forward(self, x: Tensor) -> Tensor:
            return self.plain[0](x)

    plain = llama().eval()
    model = Whole(plain.config).eval()
    model.plain = [plain]
    for layer in model.model.layers:
        layer.mlp = Experts(layer.mlp)
    prompts = torch.zeros(2, 3, dtype=torch.long)
    found = sample(model, prompts, 5, temperature=0)
    assert found.equal(sample(plain, prompts, 5, temperature=0))


@pytest.mark.parametrize("kind", ["llama", "odd", "transformer"])
def test_greedy_is_the_likeliest_token_of_the_model_itself(kind: str) -> None:
    model: nn.Module = llama()
    if kind == "odd":
        model = stirred(Odd(llama().config))
    if kind == "transformer":
        model = stirred(Transformer(11, 24, 16, 2, 2, dropout=0.5))
    prompts = torch.randint(0, 11, (4, 5), generator=torch.Generator().manual_seed(0))
    found = sample(model.train(), prompts, 12, temperature=0)
    assert model.training
    assert found.tolist() == _whole(model.eval(), prompts, 12).tolist()
    assert len(set(found[:, 5:].flatten().tolist())) > 3  # it does not say one thing forever


@pytest.mark.parametrize("kind", ["llama", "transformer"])
@pytest.mark.parametrize("context", [9, None])
def test_beyond_its_context_a_model_sees_the_last_tokens(kind: str, context: int | None) -> None:
    model: nn.Module = llama(context=12).eval()
    if kind == "transformer":
        model, context = stirred(Transformer(11, 12, 16, 2, 2)).eval(), context or 12
    prompts = torch.randint(0, 11, (2, 5), generator=torch.Generator().manual_seed(0))
    found = sample(model, prompts, 20, temperature=0, context=context)
    assert found.tolist() == _whole(model, prompts, 20, context or 12).tolist()
    longer = sample(model, found, 2, temperature=0, context=context)  # prompts that are too long
    assert longer.tolist() == _whole(model, found, 2, context or 12).tolist()


def _fits(drawn: Tensor, likely: Tensor) -> bool:
    """Chi-square of counts of [n] against probabilities [k], at a chance of 1 in 10,000."""
    counts = torch.bincount(drawn, minlength=len(likely)).double()
    some = likely > 0
    assert counts[~some].sum() == 0
    wanted = likely[some] * len(drawn)
    value = ((counts[some] - wanted) ** 2 / wanted).sum().item()
    return bool(value < chi2.ppf(0.9999, int(some.sum()) - 1))


def test_sequences_are_drawn_as_often_as_the_model_says() -> None:
    model, every = Table(3, 3).eval(), sequences(3, 2)
    prompts = torch.zeros(20_000, 1, dtype=torch.long)
    drawn = sample(model, prompts, 2, generator=torch.Generator().manual_seed(0))
    code = drawn[:, 1] * 3 + drawn[:, 2]
    with torch.no_grad():
        assert _fits(code, log_likelihood(model, every).exp())
        assert not _fits(code, log_likelihood(Table(3, 3, seed=1), every).exp())


def test_models_are_mixed_token_by_token() -> None:
    """Not sequence by sequence: P(ab) is the product of the mixtures' P(a) and P(b | a)."""
    a, b, every = Table(3, 3, seed=1), Table(3, 3, seed=2), sequences(3, 2)
    prompts = torch.zeros(20_000, 1, dtype=torch.long)
    drawn = mixed(((a, 0.7), (b, 0.3)), prompts, 2, generator=torch.Generator().manual_seed(0))
    code = drawn[:, 1] * 3 + drawn[:, 2]
    with torch.no_grad():
        steps = 0.7 * a(every[:, :-1]).softmax(-1) + 0.3 * b(every[:, :-1]).softmax(-1)
        assert _fits(code, steps.gather(-1, every[:, 1:, None])[..., 0].prod(1))
        whole = 0.7 * log_likelihood(a, every).exp() + 0.3 * log_likelihood(b, every).exp()
        assert not _fits(code, whole)


def test_what_is_drawn_from_by_hand() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    torch.testing.assert_close(probabilities(logits), logits.exp())
    assert probabilities(logits, 0.0).tolist() == [1, 0, 0, 0]
    squares = torch.tensor([0.25, 0.09, 0.0225, 0.0025])
    torch.testing.assert_close(probabilities(logits, 0.5), squares / squares.sum())
    torch.testing.assert_close(probabilities(logits, top_k=2), torch.tensor([5, 3, 0, 0]) / 8)
    torch.testing.assert_close(probabilities(logits, top_k=9), logits.exp())
    # 0.5 is less than 0.6, 0.5 + 0.3 is not: two make up the nucleus.
    torch.testing.assert_close(probabilities(logits, top_p=0.6), torch.tensor([5, 3, 0, 0]) / 8)
    torch.testing.assert_close(probabilities(logits, top_p=1.0), logits.exp())
    mixed_up = probabilities(logits[[2, 0, 3, 1]], top_p=0.6)
    torch.testing.assert_close(mixed_up, torch.tensor([0, 5, 0, 3]) / 8)
    halves = probabilities(torch.zeros(4), top_p=0.5)  # two of four are exactly half
    assert halves.sort().values.tolist() == [0, 0, 0.5, 0.5]
    assert probabilities(logits, top_p=1e-9).tolist() == [1, 0, 0, 0]


def test_it_is_the_generator_that_decides() -> None:
    model, prompts = llama(), torch.zeros(8, 2, dtype=torch.long)
    before = torch.get_rng_state()
    one, same, other = (
        sample(model, prompts, 6, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    )
    assert one.equal(same)
    assert not one.equal(other)
    assert torch.get_rng_state().equal(before)
    torch.manual_seed(5)
    first = sample(model, prompts, 6)
    torch.manual_seed(5)
    assert first.equal(sample(model, prompts, 6))


def test_after_its_end_a_row_is_filled_up() -> None:
    model, prompts = llama(), torch.full((40, 1), 3)
    found = sample(model, prompts, 12, end=3, generator=torch.Generator().manual_seed(0))
    ends = (found[:, 1:] == 3).long()
    after = ends.cumsum(1) > 0
    assert (found[:, 1:][after] == 3).all()
    assert 0 < after[:, 5].float().mean() < 1


def test_nothing_is_drawn_where_nothing_is_asked_for() -> None:
    prompts = torch.zeros(2, 3, dtype=torch.long)
    assert sample(llama(), prompts, 0).equal(prompts)


@pytest.mark.parametrize(
    ("wrong", "what"),
    [({"temperature": -1.0}, "temperature"), ({"top_k": 0}, "top_k"), ({"top_p": 0.0}, "top_p"),
     ({"context": 0}, "context"), ({"length": -1}, "length")],
)  # fmt: skip
def test_settings_out_of_range_are_refused(wrong: dict[str, float], what: str) -> None:
    settings = cast(dict[str, int], {"length": 2, **wrong})
    with pytest.raises(SettingError, match=what):
        sample(llama(), torch.zeros(2, 3, dtype=torch.long), **settings)
    with pytest.raises(SettingError, match=r"prompts are \[2, 0\]"):
        sample(llama(), torch.zeros(2, 0, dtype=torch.long), 1)


@pytest.mark.parametrize("seed", range(4))
def test_as_many_beams_as_sequences_find_the_likeliest_of_all(seed: int) -> None:
    model, every = Table(3, 4, seed), sequences(3, 3)
    with torch.no_grad():
        best = every[log_likelihood(model, every).argmax()]
    assert beam(model, torch.zeros(2, 1, dtype=torch.long), 3, beams=9)[1].equal(best)


def test_beams_look_further_than_a_greedy_step() -> None:
    model, every = Table(2, 3), sequences(2, 2)
    with torch.no_grad():
        model.logits.zero_()
        model.logits[1] = torch.tensor([0.6, 0.4]).log()  # after 0: first 0, then 0 or 1 alike
        model.logits[1 * 3 + 2] = torch.tensor([0.01, 0.99]).log()  # after 0, 1: nearly always 1
        assert log_likelihood(model, every).exp().max().item() == pytest.approx(0.4 * 0.99)
    prompts = torch.zeros(1, 1, dtype=torch.long)
    assert beam(model, prompts, 2, beams=1)[0, 1].item() == 0
    assert beam(model, prompts, 2, beams=2)[0].tolist() == [0, 1, 1]


def test_one_beam_is_greedy_and_beams_do_not_mix_rows() -> None:
    model = llama()
    prompts = torch.randint(0, 11, (5, 4), generator=torch.Generator().manual_seed(0))
    assert beam(model, prompts, 10, beams=1).equal(sample(model, prompts, 10, temperature=0))
    wide = beam(model, prompts, 10, beams=3)
    assert all(wide[i].equal(beam(model, prompts[[i]], 10, beams=3)[0]) for i in range(5))
    with torch.no_grad():
        greedy = log_likelihood(model.eval(), sample(model, prompts, 10, temperature=0), 4)
        assert log_likelihood(model, wide, 4).sum() > greedy.sum()


def test_a_beam_that_has_ended_costs_nothing_more() -> None:
    model = Table(2, 4)
    with torch.no_grad():
        model.logits.zero_()
        model.logits[1] = torch.tensor([0.45, 0.55]).log()
        # 1 ends. Else each of the two later steps costs something: 0.45 * 0.9 * 0.9 is less.
        model.logits[1 * 3 + 1] = torch.tensor([0.9, 0.1]).log()
        model.logits[(1 * 3 + 1) * 3 + 1] = torch.tensor([0.9, 0.1]).log()
    prompts = torch.zeros(1, 1, dtype=torch.long)
    assert beam(model, prompts, 3, beams=4, end=1)[0].tolist() == [0, 1, 1, 1]
    assert beam(model, prompts, 3, beams=4)[0].tolist() == [0, 0, 0, 0]


def test_beams_with_an_end_find_the_likeliest_of_all() -> None:
    """A sequence is as likely as what it says up to its first 1, and is filled up after it."""
    every = sequences(3, 4)
    ends = (every[:, 1:] == 1).long()
    after = ends.cumsum(1) - ends > 0
    fine = (~after | (ends > 0)).all(1)
    for seed in range(20):
        model = Table(3, 5, seed)
        with torch.no_grad():
            model.logits *= 3
            logs = model(every[:, :-1]).log_softmax(-1).gather(-1, every[:, 1:, None])[..., 0]
        likely = logs.masked_fill(after, 0).sum(1).masked_fill(~fine, -torch.inf)
        found = beam(model, torch.zeros(1, 1, dtype=torch.long), 4, beams=27, end=1)
        assert found[0].equal(every[likely.argmax()])


def test_the_teachers_answers_are_what_is_learned() -> None:
    teacher = llama()
    prompts = torch.randint(0, 11, (7, 4), generator=torch.Generator().manual_seed(0))
    answers = taught(teacher, prompts, 5, beams=1, batch=3)
    assert answers.equal(sample(teacher, prompts, 5, temperature=0))
    assert taught(teacher, prompts, 5, beams=3).equal(beam(teacher, prompts, 5, beams=3))
    drawn = taught(teacher, prompts, 5, seed=1)
    assert drawn.equal(taught(teacher, prompts, 5, seed=1))
    assert not drawn.equal(taught(teacher, prompts, 5, seed=2))
    assert not drawn.equal(taught(teacher, prompts, 5, temperature=0.1, seed=1))
    batch = answered(answers, 4, batch=7)(0, teacher)
    assert batch.index is not None
    assert batch.y is not None
    assert batch.x.equal(answers[batch.index, :-1])
    assert (batch.y[:, :3] == -1).all()
    assert batch.y[:, 3:].equal(answers[batch.index, 4:])
    with pytest.raises(SettingError, match="beams is 0"):
        taught(teacher, prompts, 5, beams=0)
