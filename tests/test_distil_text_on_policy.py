"""Batches of own text and what is learned from them: GKD, MiniLLM, DistiLLM."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from kitestring.compress.distil.batches import Batches
from kitestring.compress.distil.objective import Batch, Objective, Seen, Supervised
from kitestring.compress.distil.text.divergences import (
    Divergence,
    forward_kl,
    jsd,
    reverse_kl,
    skew_kl,
    skew_reverse_kl,
)
from kitestring.compress.distil.text.generate import mixed, sample
from kitestring.compress.distil.text.minillm import MiniLLM, teacher_mixed
from kitestring.compress.distil.text.on_policy import dice, generated, mixture, own, text
from kitestring.compress.distil.text.replay import Replay
from kitestring.compress.distil.text.sequence import answered, taught
from kitestring.compress.distil.train import Distilled, Settings, distil
from kitestring.errors import SettingError, TaskError
from text_models import Table, chain, llama, log_likelihood, sequences

PROMPTS = chain(40, 4, seed=5)


def test_text_is_a_token_and_the_next_one() -> None:
    ids = chain(10, 6)
    batch = text(ids, batch=4, seed=1)(0, nn.Identity())
    assert batch.index is not None
    assert batch.y is not None
    assert torch.cat([batch.x[:, :1], batch.y], 1).equal(ids[batch.index])
    assert batch.x[:, 1:].equal(batch.y[:, :-1])
    with pytest.raises(SettingError, match=r"rows are \[3, 1\]"):
        text(ids[:3, :1])


def test_only_what_was_drawn_has_a_truth() -> None:
    ids = torch.tensor([[7, 7, 3, 4, 7, 5, 5], [1, 2, 7, 7, 7, 7, 7]])
    batch = generated(ids, 2)
    assert batch.x.equal(ids[:, :-1])
    assert batch.y is not None
    assert batch.y.tolist() == [[-1, 3, 4, 7, 5, 5], [-1, 7, 7, 7, 7, 7]]
    ended = generated(ids, 2, end=7)  # a 7 that was given ends nothing
    assert ended.y is not None
    assert ended.y.tolist() == [[-1, 3, 4, 7, -1, -1], [-1, 7, -1, -1, -1, -1]]
    for prompt in (0, 7):
        with pytest.raises(SettingError, match=f"{prompt} of 7 tokens were given"):
            generated(ids, prompt)


def test_own_text_is_the_students_own() -> None:
    student, other = llama(), llama(seed=1)
    batches = own(PROMPTS, 5, batch=8, seed=3)
    batch = batches(2, student)
    assert batch.y is not None
    assert {tuple(row) for row in batch.x[:, :4].tolist()} <= {
        tuple(row) for row in PROMPTS.tolist()
    }
    drawn = sample(student, batch.x[:, :4], 5, generator=dice(PROMPTS, 3, 2))
    assert batch.x.equal(drawn[:, :-1])
    assert batch.y[:, 3:].equal(drawn[:, 4:])
    assert (batch.y[:, :3] == -1).all()
    batches(0, student)  # another step in between changes nothing
    assert batches(2, student).x.equal(batch.x)
    assert not batches(2, other).x.equal(batch.x)
    assert not batches(3, student).x.equal(batch.x)


def test_a_mixture_takes_own_text_as_often_as_it_should() -> None:
    here, there = Batch(torch.zeros(1)), Batch(torch.ones(1))
    data: Batches = lambda step, student: here  # noqa: E731
    drawn: Batches = lambda step, student: there  # noqa: E731
    model = nn.Identity()
    for share, least, most in ((0.0, 0, 0), (0.3, 520, 680), (1.0, 2000, 2000)):
        batches = mixture(data, drawn, share, seed=4)  # 600 of 2000, standard deviation 20.5
        count = sum(batches(step, model) is there for step in range(2000))
        assert least <= count <= most
    assert batches(5, model) is batches(5, model)
    with pytest.raises(SettingError, match="share"):
        mixture(data, drawn, 1.2)


def _gradient(model: nn.Module, loss: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(loss, [next(model.parameters())])
    return found


def _seen(batch: Batch, student: nn.Module, teacher: nn.Module) -> Seen:
    return Seen(batch, student(batch.x), teacher(batch.x).detach(), {}, {})


@pytest.mark.parametrize("length", [1, 2, 3])
def test_the_policy_gradient_is_that_of_reverse_kl(length: int) -> None:
    """Over all sequences of two tokens, each with the student's probability for it."""
    student, teacher = Table(2, 4, seed=1), Table(2, 4, seed=2)
    every = sequences(2, length)
    q = log_likelihood(student, every)
    whole = (q.exp() * (q - log_likelihood(teacher, every).detach())).sum()
    wanted = _gradient(student, whole)
    batch = generated(every, 1)
    weighed = Batch(batch.x, batch.y, weight=q.exp().detach())
    objective = MiniLLM(alpha=0.0, by_length=False, clip=math.inf)
    found = _gradient(student, objective(_seen(weighed, student, teacher))) * length
    torch.testing.assert_close(found, wanted)
    # One step alone, which reverse KL on own text is, is another gradient.
    alone = _gradient(student, Divergence(reverse_kl)(_seen(weighed, student, teacher))) * length
    assert (length == 1) == torch.allclose(alone, wanted)


def test_weights_and_lengths_by_hand() -> None:
    """Equations 5 to 7, one number at a time, prompts of different lengths."""
    student, teacher = Table(3, 4, seed=1), Table(3, 4, seed=2)
    ids, alpha, total = sequences(3, 3)[:20], 0.3, torch.zeros((), dtype=torch.float64)
    y = ids[:, 1:].clone()
    y[10:, 0] = -1
    for row, truth in zip(ids, y.tolist(), strict=True):
        logs = student(row[None, :-1])[0].log_softmax(-1)
        theirs = teacher(row[None, :-1])[0].log_softmax(-1).detach()
        drawn = [t for t in range(3) if truth[t] >= 0]
        loss = torch.zeros((), dtype=torch.float64)
        for t in drawn:
            loss = loss + (logs[t].exp() * (logs[t] - theirs[t])).sum()
            later = [(theirs - logs).detach()[i, truth[i]].item() for i in drawn if i > t]
            reward = sum(max(-0.5, min(0.5, r)) for r in later) / max(1, len(later))
            q, p = logs[t, truth[t]].exp(), theirs[t, truth[t]].exp()
            weight = (q / ((1 - alpha) * q + alpha * p)).item()
            loss = loss - weight * reward * logs[t, truth[t]]
        total = total + loss / len(drawn) / len(ids)
    objective = MiniLLM(alpha=alpha, clip=0.5)
    found = objective(_seen(Batch(ids[:, :-1], y), student, teacher))
    torch.testing.assert_close(found, total)
    torch.testing.assert_close(_gradient(student, found), _gradient(student, total))


def test_answers_are_drawn_from_teacher_and_student() -> None:
    student, teacher = llama(), llama(seed=1)
    batch = teacher_mixed(teacher, PROMPTS, 5, alpha=0.4, batch=8, seed=3)(2, student)
    drawn = mixed(
        ((student, 0.6), (teacher, 0.4)), batch.x[:, :4], 5, generator=dice(PROMPTS, 3, 2)
    )
    assert batch.x.equal(drawn[:, :-1])
    alone = teacher_mixed(teacher, PROMPTS, 5, alpha=0.0, batch=8, seed=3)(2, student)
    assert alone.x.equal(own(PROMPTS, 5, batch=8, seed=3)(2, student).x)
    for wrong in (-0.1, 1.0):
        with pytest.raises(SettingError, match="alpha"):
            MiniLLM(alpha=wrong)


def test_minillm_needs_what_was_drawn() -> None:
    student = Table(2, 4)
    with pytest.raises(TaskError, match="no drawn tokens"):
        MiniLLM()(_seen(Batch(sequences(2, 2)), student, student))


class Told:
    """A validation loss as it is told, one after another."""

    def __init__(self, *losses: float) -> None:
        self.losses = list(losses)

    def __call__(self, student: nn.Module) -> float:
        return self.losses.pop(0)


def _replay(score: Callable[[nn.Module], float], **settings: float) -> Replay:
    given = {"steps": 100, "every": 10, "room": 16, "rise": 0.5, "seed": 0, **settings}
    data, drawn = text(chain(40, 9, seed=1), batch=8), own(PROMPTS, 5, batch=8)
    return Replay(data, drawn, score, **given)  # type: ignore[arg-type]


def test_own_text_comes_only_when_the_loss_rises() -> None:
    model = llama()
    falling = _replay(Told(*range(10, 0, -1)))
    batches = [falling(step, model) for step in range(100)]
    assert falling.share == 0
    assert all(batch.y is not None and (batch.y >= 0).all() for batch in batches)
    rising = _replay(Told(5, 4, 4.5, 4.4, 4.9, 6, 5, 5, 5, 5))
    shares = []
    for step in range(100):
        rising(step, model)
        shares.append(rising.share)
    assert shares[::10] == [0, 0, 0.5, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    patient = _replay(Told(5, 4, 4.5, 4.4, 4.9, 6, 5, 5, 5, 5), slack=0.5)
    for step in range(100):
        patient(step, model)
    assert patient.share == 0.5  # 4.9 to 6 alone is more than 0.5


def test_own_text_is_used_again_and_more_and_more_so() -> None:
    """At a share of 1 a step t of T draws anew with probability 1 - t / T, once memory is full."""
    model = llama()
    replay = _replay(Told(*range(60)), steps=60, every=1, rise=1.0)
    drawn, seen, again = 0, set(), []
    for step in range(60):
        before = replay.drawn
        batch = replay(step, model)
        assert replay.memory() <= 16
        anew = replay.drawn - before
        drawn += anew
        rows = {tuple(row) for row in batch.x.tolist()}
        if step == 0:  # the share is 0 until a loss has risen
            continue
        assert len(rows) == 8
        if not anew:
            assert rows <= seen
            again.append(step)
        seen |= rows
    # 2 steps to fill it; then sum (1 - t / 60) = 27.5 of 57, standard deviation 3.0.
    assert 18 <= drawn <= 40
    assert sum(step >= 30 for step in again) > 2 * sum(step < 30 for step in again)


def test_replay_goes_on_from_its_state_and_from_nothing_else() -> None:
    model, losses = llama(), [float((i + 1) % 3) for i in range(40)]
    one, other = (_replay(Told(*losses), every=2, steps=60, rise=0.04) for _ in range(2))
    for step in range(30):
        one(step, model)
    other(0, model)
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    other.score = Told(*losses[15:])
    for step in range(30, 60):
        a, b = one(step, model), other(step, model)
        assert a.x.equal(b.x)
        assert a.y is not None
        assert b.y is not None
        assert a.y.equal(b.y)
    assert one.share == other.share == pytest.approx(19 * 0.04)
    assert one.drawn == other.drawn > 0
    with pytest.raises(SettingError, match="step 65 is asked for after 60 steps"):
        one(65, model)
    begun = _replay(Told(3, 3))
    first = begun(0, model)
    assert begun(0, model).x.equal(first.x)


# A student of one narrow layer and a teacher of two wider ones, both trained for a moment.
STEPS = Settings(steps=30, lr=2e-2)
WORDS, STARTS = chain(256, 13, seed=1), chain(256, 4, seed=6)


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    start = llama(width=24, seed=3, stir=1)
    return distil(start, None, text(WORDS), Supervised(), replace(STEPS, steps=60)).module


def _student() -> nn.Module:
    return llama(width=16, layers=1, seed=4, stir=1)


def _apart(student: nn.Module, teacher: nn.Module) -> float:
    x = chain(64, 12, seed=2)
    with torch.no_grad():
        return float(forward_kl(student(x), teacher(x)).mean())


DATA, OWN = text(WORDS, batch=16), own(STARTS, 8, batch=16)
RECIPES: dict[str, tuple[Batches, Objective]] = {
    "forward": (DATA, Divergence()),
    "reverse": (DATA, Divergence(reverse_kl)),
    "skew": (DATA, Divergence(skew_kl)),
    "skew reverse": (DATA, Divergence(skew_reverse_kl)),
    "gkd": (mixture(DATA, OWN, 0.5), Divergence(jsd, beta=0.5)),
    "on policy": (OWN, Divergence(reverse_kl)),
}


@pytest.mark.parametrize("name", [*RECIPES, "minillm", "replay", "sequence"])
def test_a_small_student_learns(name: str, teacher: nn.Module) -> None:
    taken: nn.Module | None = teacher
    if name == "minillm":
        batches, objective = teacher_mixed(teacher, STARTS, 8, batch=16), MiniLLM()
    elif name == "replay":
        batches = Replay(DATA, OWN, Told(*range(9)), steps=30, every=5, room=32, rise=0.5)
        objective = Divergence(skew_reverse_kl)
    elif name == "sequence":
        answers = taught(teacher, STARTS, 8)
        batches, objective, taken = answered(answers, 4), Supervised(), None
    else:
        batches, objective = RECIPES[name]
    student = _student()
    found = distil(student, taken, batches, objective, STEPS)
    before, after = _apart(student, teacher), _apart(found.module, teacher)
    assert after < 0.8 * before
    if name == "replay":
        assert isinstance(batches, Replay)
        assert 2 < batches.drawn < 24
    if name != "minillm":  # its loss serves the gradient alone
        assert sum(found.losses[-5:]) < 0.8 * sum(found.losses[:5])


def test_gkd_without_own_text_is_plain_distillation(teacher: nn.Module) -> None:
    settings = Settings(steps=6)
    plain = distil(_student(), teacher, DATA, Divergence(), settings)
    none = distil(_student(), teacher, mixture(DATA, OWN, 0.0), Divergence(), settings)
    assert none.losses == plain.losses
    _same(none.module, plain.module)


def _same(a: nn.Module, b: nn.Module) -> None:
    for one, other in zip(a.parameters(), b.parameters(), strict=True):
        assert one.equal(other)


class Killed(Exception): ...


@pytest.mark.parametrize("name", ["gkd", "minillm"])
def test_own_text_survives_an_interruption_to_the_bit(
    name: str, teacher: nn.Module, tmp_path: Path
) -> None:
    def run(keep: Path | None = None, until: int | None = None) -> Distilled:
        batches, objective = RECIPES["gkd"]
        if name == "minillm":
            batches, objective = teacher_mixed(teacher, STARTS, 8, batch=16), MiniLLM()

        def heard(step: int, of: int, loss: float) -> None:
            if step == until:
                raise Killed

        settings = replace(STEPS, steps=8, keep_every=3)
        return distil(_student(), teacher, batches, objective, settings, heard=heard, keep=keep)

    whole, file = run(), tmp_path / "kept"
    for until in (2, 5):
        with pytest.raises(Killed):
            run(file, until)
    resumed = run(file)
    assert resumed.losses == whole.losses
    _same(resumed.module, whole.module)


def test_a_memory_goes_on_where_it_was(teacher: nn.Module, tmp_path: Path) -> None:
    """Killed after five steps with a checkpoint of three, it ends as one that was not, to the
    bit."""

    def heard(step: int, of: int, loss: float) -> None:
        if step == 5:
            raise Killed

    def batches() -> Replay:
        return Replay(DATA, OWN, Told(*range(9)), steps=8, every=1, rise=1.0)

    settings, file = replace(STEPS, steps=8, keep_every=3), tmp_path / "kept"
    whole = distil(_student(), teacher, batches(), Divergence(), settings)
    with pytest.raises(Killed):
        distil(_student(), teacher, batches(), Divergence(), settings, heard=heard, keep=file)
    again = distil(_student(), teacher, batches(), Divergence(), settings, keep=file)
    assert again.losses == whole.losses
    for a, b in zip(again.module.parameters(), whole.module.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_memory_out_of_a_file_goes_to_where_own_text_is_drawn() -> None:
    """A file's tensors are on the CPU; "meta" stands for a GPU."""
    there = Batch(torch.ones(8, 8, device="meta"), torch.ones(8, 8, device="meta"))
    replay = Replay(DATA, lambda step, student: there, Told(1, 2), steps=9, every=1, rise=1.0)
    student = _student()
    replay(0, student)
    replay.load_state_dict({**replay.state_dict(), "x": torch.ones(8, 8), "y": torch.ones(8, 8)})
    replay(1, student)
    assert replay.x is not None
    assert (replay.x.device.type, len(replay.x)) == ("meta", 16)


def test_a_step_out_of_turn_is_told() -> None:
    batches = Replay(DATA, OWN, Told(*range(9)), steps=8)
    batches(0, _student())
    with pytest.raises(SettingError, match="step 3 is asked for after 1 steps"):
        batches(3, _student())
