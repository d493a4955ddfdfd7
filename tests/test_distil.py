"""The loop of distillation: plain training, early stopping, checkpoints, what it leaves alone."""

from __future__ import annotations

import copy
import errno
import math
import os
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from kitestring.compress.distil.attention import Attention
from kitestring.compress.distil.batches import Batches, rows
from kitestring.compress.distil.contrast import Contrast
from kitestring.compress.distil.hints import Hints
from kitestring.compress.distil.objective import Batch, Objective, Seen, Sum, Supervised
from kitestring.compress.distil.relation import Relation
from kitestring.compress.distil.response import Response
from kitestring.compress.distil.taps import HIDDEN, MAPS, places
from kitestring.compress.distil.train import Distilled, Settings, distil
from kitestring.errors import DataError, RunError, SettingError, TaskError
from kitestring.tasks.layers import Transformer
from kitestring.tasks.llama import Llama, LlamaConfig

N = 40


def cnn(width: int, classes: int = 4) -> nn.Sequential:
    """With batch norm and dropout: both behave unlike in eval mode."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Dropout(0.3), nn.Linear(9 * width, 2 * width), nn.ReLU(),
        nn.Linear(2 * width, classes),
    )  # fmt: skip


def images() -> tuple[Tensor, Tensor]:
    dice = torch.Generator().manual_seed(0)
    return torch.randn(N, 1, 6, 6, generator=dice), torch.randint(4, (N,), generator=dice)


def sequence(width: int, tied: bool = False) -> Transformer:
    return Transformer(11, 5, width, 2, 1, dropout=0.1, tied=tied)


def tokens() -> tuple[Tensor, Tensor]:
    """Next tokens; the last positions of some rows are padding."""
    dice = torch.Generator().manual_seed(0)
    x = torch.randint(11, (N, 6), generator=dice)
    y = x[:, 1:].clone()
    y[::3, 3:] = -1
    return x[:, :-1], y


def seeded(make: Callable[..., nn.Module], *args: object, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make(*args)


def features(n: int = N) -> dict[str, Objective]:
    return {
        "hints": Hints(), "attention": Attention(), "relation": Relation(), "contrast": Contrast(n),
    }  # fmt: skip


def everything() -> dict[str, Objective]:
    found: dict[str, Objective] = {"response": Response()}
    return found | {k: Sum((1.0, Supervised()), (1.0, o)) for k, o in features().items()}


def image_batches(batch: int = 8, seed: int = 0) -> Batches:
    return rows(*images(), batch=batch, seed=seed)


def same(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(n == m and torch.equal(x, y) for (n, x), (m, y) in pairs)


# Training


def test_without_a_teacher_it_is_the_loop_that_one_would_write() -> None:
    """Dropout's dice too: neither choosing taps nor scoring throws any, nor moves batch norm."""
    student, (x, y) = seeded(cnn, 3), images()
    settings = Settings(
        steps=12, optimiser="sgd", lr=0.1, decay=0.01, clip=0.5, schedule="constant", seed=7,
        check_every=5, patience=None,
    )  # fmt: skip
    falling = iter(range(0, -9, -1))
    found = distil(
        student, None, image_batches(), Supervised(), settings, score=lambda _: next(falling)
    )
    wanted = copy.deepcopy(student).train()
    optimiser = torch.optim.SGD(wanted.parameters(), 0.1, momentum=0.9, weight_decay=0.01)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        for step in range(12):
            index = image_batches()(step, wanted).index
            optimiser.zero_grad()
            loss = F.cross_entropy(wanted(x[index]), y[index])
            loss.backward()
            nn.utils.clip_grad_norm_(wanted.parameters(), 0.5)
            optimiser.step()
            assert found.losses[step] == pytest.approx(loss.item(), abs=1e-5)
    for name, p in wanted.state_dict().items():
        torch.testing.assert_close(found.module.state_dict()[name], p, rtol=1e-4, atol=1e-5)
    assert not found.module.training


def test_a_share_of_zero_is_plain_training_to_the_bit() -> None:
    """And no teacher is run for it."""
    settings = Settings(steps=9, seed=3)
    plain = distil(seeded(cnn, 3), None, image_batches(), Supervised(), settings)
    none = distil(seeded(cnn, 3), Broken(), image_batches(), Response(share=0), settings)
    assert same(plain.module, none.module)
    assert plain.losses == none.losses
    some = distil(seeded(cnn, 3), seeded(cnn, 5), image_batches(), Response(share=0.1), settings)
    assert not same(plain.module, some.module)


class Broken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError("it is not to be run")


@pytest.mark.parametrize("way", everything())
def test_models_and_objective_are_left_as_they_were(way: str) -> None:
    student, teacher, objective = seeded(cnn, 3), seeded(cnn, 6), everything()[way]
    teacher.train()  # a mixed state: all of it is given back
    teacher[1].eval()
    teacher[0].weight.requires_grad_(False)
    before = copy.deepcopy((student, teacher, objective))
    dice = torch.get_rng_state()
    distil(student, teacher, image_batches(), objective, Settings(steps=3), score=lambda _: 0.0)
    assert torch.equal(torch.get_rng_state(), dice)
    for now, then in zip((student, teacher, objective), before, strict=True):
        assert same(now, then)
        assert [m.training for m in now.modules()] == [m.training for m in then.modules()]
        assert [p.requires_grad for p in now.parameters()] == [
            p.requires_grad for p in then.parameters()
        ]
        assert all(p.grad is None for p in now.parameters())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in now.modules())


def test_no_hooks_stay_where_a_model_fails() -> None:
    student = seeded(cnn, 3)
    batches = image_batches()

    def short(step: int, module: nn.Module) -> Batch:
        batch = batches(step, module)
        return Batch(batch.x[..., :3], batch.y) if step == 2 else batch

    seen: list[nn.Module] = []

    def remember(step: int, module: nn.Module) -> Batch:
        seen.append(module)
        return short(step, module)

    objective = Sum((1.0, Supervised()), (1.0, Hints()))
    with pytest.raises(RuntimeError, match="mat1"):
        distil(student, student, remember, objective, Settings(steps=5))
    for module in (student, *seen):
        assert not any(m._forward_hooks for m in module.modules())


@pytest.mark.parametrize("way", everything())
def test_equal_seeds_give_equal_models(way: str) -> None:
    def train(seed: int) -> Distilled:
        torch.rand(seed + 1)  # the global dice play no part
        settings = Settings(steps=4, seed=seed)
        return distil(seeded(cnn, 3), seeded(cnn, 6), image_batches(), everything()[way], settings)

    first, again, other = train(1), train(1), train(2)
    assert same(first.module, again.module)
    assert first.losses == again.losses
    assert not same(first.module, other.module)


@pytest.mark.parametrize("way", everything())
@pytest.mark.parametrize("kind", ["images", "sequences"])
def test_each_objective_trains_a_model_of_each_kind(way: str, kind: str) -> None:
    """Of other widths than its teacher's; the loss falls on the rows that it is trained on."""
    if kind == "images":
        student, teacher, batches = seeded(cnn, 3), seeded(cnn, 7), image_batches()
    else:
        student, teacher = seeded(sequence, 4), seeded(sequence, 8, True)
        batches = rows(*tokens(), batch=8, seed=0)
    taught = distil(teacher, None, batches, Supervised(), Settings(steps=30, lr=0.01)).module
    found = distil(student, taught, batches, everything()[way], Settings(steps=60, lr=0.01))
    assert sum(found.losses[-5:]) < 0.95 * sum(found.losses[:5])
    moved = [n for n, p in student.named_parameters()
             if not torch.equal(p, found.module.state_dict()[n])]  # fmt: skip
    assert len(moved) == len(list(student.parameters()))


@pytest.mark.parametrize("way", features())
def test_a_term_reaches_the_weights_below_its_tap(way: str) -> None:
    """All but the last layer's, which no feature depends on."""
    still = Settings(steps=1, decay=0.0, lr=0.01, clip=None)
    student = seeded(cnn, 3)
    found = distil(student, seeded(cnn, 7), image_batches(), features()[way], still)
    moved = {n for n, p in student.named_parameters()
             if not torch.equal(p, found.module.state_dict()[n])}  # fmt: skip
    above = {"8.weight", "8.bias"} | ({"6.weight", "6.bias"} if way == "attention" else set())
    assert moved == {n for n, _ in student.named_parameters()} - above


class Slope(Objective):
    """A gradient of 1 for every weight of `nn.Linear(1, 1)`, given x = 1."""

    needs_teacher = False

    def forward(self, seen: Seen) -> Tensor:
        return seen.student.mean()


def ones(step: int, student: nn.Module) -> Batch:
    return Batch(torch.ones(2, 1))


def test_the_learning_rate_rises_and_falls_as_told() -> None:
    """Adam's step is the learning rate where the gradient stays the same: the weight's moves are
    the schedule, here 1/2 and 1 of it, then (1 + cos(pi i / 4)) / 2 for i = 0 .. 3."""
    for schedule, shares in (
        ("cosine", [0.5, 1, 1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2]),
        ("constant", [0.5, 1, 1, 1, 1, 1]),
    ):
        seen: list[float] = []

        def watch(module: nn.Module, seen: list[float] = seen) -> float:
            seen.append(next(module.parameters()).item())
            return 0.0

        settings = Settings(
            steps=6, lr=0.1, warm=2, schedule=schedule, check_every=1, patience=None, clip=None
        )
        distil(seeded(nn.Linear, 1, 1), None, ones, Slope(), settings, score=watch)
        moves = [a - b for a, b in pairwise(seen)]
        assert moves == pytest.approx([0.1 * share for share in shares], abs=1e-5)


@pytest.mark.parametrize(("clip", "share"), [(None, 1.0), (100.0, 1.0), (0.5, 0.5 / 2**0.5)])
def test_the_gradient_is_clipped_over_all_that_is_trained(clip: float | None, share: float) -> None:
    """Weight and bias have a gradient of 1: a norm of the square root of 2."""
    start = seeded(nn.Linear, 1, 1)
    settings = Settings(steps=1, lr=0.1, optimiser="sgd", clip=clip, schedule="constant")
    found = distil(start, None, ones, Slope(), settings)
    for a, b in zip(start.parameters(), found.module.parameters(), strict=True):
        assert (a - b).item() == pytest.approx(0.1 * share, abs=1e-6)


def test_batches_may_be_made_by_the_student_as_it_is_used() -> None:
    """In eval mode, with the weights of that step; each step itself is in train mode."""
    seen: list[Tensor] = []

    class Watched(Supervised):
        def forward(self, seen: Seen) -> Tensor:
            assert self.training
            return super().forward(seen)

    def batches(step: int, student: nn.Module) -> Batch:
        assert not any(m.training for m in student.modules())
        seen.append(next(student.parameters()).detach().clone())
        return image_batches()(step, student)

    distil(seeded(cnn, 3), None, batches, Watched(), Settings(steps=3))
    first, *steps = seen  # the first batch is looked at beforehand
    assert torch.equal(first, steps[0])
    assert len({tuple(a.flatten().tolist()) for a in steps}) == 3


def test_a_teachers_known_outputs_are_as_good_as_the_teacher() -> None:
    student, teacher, (x, y) = seeded(cnn, 3), seeded(cnn, 6).eval(), images()
    with torch.no_grad():
        known = teacher(x)
    teacher.train()  # it answers in eval mode all the same
    settings = Settings(steps=5)
    asked = distil(student, teacher, rows(x, y, batch=8), Response(), settings)
    told = distil(student, Broken(), rows(x, y, batch=8, teacher=known), Response(), settings)
    for a, b in zip(asked.module.parameters(), told.module.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_frozen_weights_stay_and_shared_ones_stay_shared() -> None:
    student = seeded(sequence, 4, True)
    student.places.weight.requires_grad_(False)
    found = distil(student, None, rows(*tokens(), batch=8), Supervised(), Settings(steps=3)).module
    assert torch.equal(found.places.weight, student.places.weight)
    assert not found.places.weight.requires_grad
    shared = nn.Sequential(nn.Embedding(11, 4), nn.Linear(4, 11))
    shared[1].weight = shared[0].weight
    made = distil(shared, None, rows(*tokens(), batch=8), Supervised(), Settings(steps=3),
                  score=lambda _: 0.0)  # fmt: skip
    assert made.module[1].weight is made.module[0].weight


# Early stopping


def stopped(scores: Sequence[float], patience: int | None, steps: int = 20) -> Distilled:
    """Trained with those scores, one every second step."""
    told = iter(scores)
    settings = Settings(steps=steps, check_every=2, patience=patience, schedule="constant")
    return distil(
        seeded(cnn, 3), None, image_batches(), Supervised(), settings, score=lambda _: next(told)
    )


def test_the_best_weights_are_returned_and_training_ends_without_gain() -> None:
    found = stopped([5, 4, 3, 1, 2, 1, 3], patience=3)
    assert (found.steps, found.best_step, len(found.losses)) == (12, 6, 12)
    assert found.curve == ((0, 5), (2, 4), (4, 3), (6, 1), (8, 2), (10, 1), (12, 3))
    assert same(found.module, stopped([5, 4, 3, 1], patience=None, steps=6).module)


def test_what_only_gets_worse_is_returned_as_it_was() -> None:
    found = stopped(range(9), patience=2)
    assert (found.steps, found.best_step) == (4, 0)
    assert same(found.module, seeded(cnn, 3))


def test_without_patience_all_steps_are_done_and_the_last_is_scored_too() -> None:
    found = stopped([9, 1, 2, 3, 4], patience=None, steps=7)
    assert [step for step, _ in found.curve] == [0, 2, 4, 6, 7]
    assert (found.steps, found.best_step) == (7, 2)


def test_without_a_score_the_last_weights_are_returned() -> None:
    settings = Settings(steps=6, check_every=2, schedule="constant")
    found = distil(seeded(cnn, 3), None, image_batches(), Supervised(), settings)
    assert (found.steps, found.best_step, found.curve) == (6, 6, ())
    assert same(found.module, stopped([3, 2, 1, 0], patience=None, steps=6).module)


def test_a_score_sees_the_model_in_eval_mode_without_gradients() -> None:
    def score(module: nn.Module) -> float:
        assert not any(m.training for m in module.modules())
        assert not torch.is_grad_enabled()
        assert not any(m._forward_hooks for m in module.modules())
        return 0.0

    objective = Sum((1.0, Supervised()), (1.0, Hints()))
    distil(
        seeded(cnn, 3), seeded(cnn, 6), image_batches(), objective, Settings(steps=2), score=score
    )


# Checkpoints


class Killed(Exception):
    pass


def kill_at(step: int) -> Callable[[int, int, float], None]:
    def heard(done: int, of: int, loss: float) -> None:
        if done == step:
            raise Killed

    return heard


def kept(
    file: Path | None,
    way: str = "response",
    heard: Callable[[int, int, float], None] | None = None,
    lr: float = 0.01,
    teacher: int = 6,
    student: int = 0,
    data: int = 0,
    objective: Objective | None = None,
    scored: bool = True,
) -> Distilled:
    settings = Settings(steps=14, lr=lr, check_every=3, keep_every=4, patience=3, warm=2)
    x, y = images()

    def score(module: nn.Module) -> float:
        torch.rand(3)  # it may throw dice: they are part of what is kept
        return float(F.cross_entropy(module(x), y))

    return distil(
        seeded(cnn, 3, seed=student), seeded(cnn, teacher), image_batches(seed=data),
        objective or everything()[way], settings, score=score if scored else None, heard=heard,
        keep=file,
    )  # fmt: skip


def without_seconds(a: Distilled) -> tuple[object, ...]:
    return a.steps, a.best_step, a.curve, a.losses


@pytest.mark.parametrize("way", everything())
def test_a_killed_training_goes_on_to_the_same_bits(way: str, tmp_path: Path) -> None:
    """Killed before the first checkpoint, between two, at one, and twice: dropout's dice, batch
    norm, the optimiser's moments, contrast's memories and regressors are all kept."""
    whole = kept(None, way)
    for i, steps in enumerate([(1,), (4,), (5, 7)]):
        file = tmp_path / str(i)
        for step in steps:
            with pytest.raises(Killed):
                kept(file, way, kill_at(step))
        again = kept(file, way)
        assert same(again.module, whole.module)
        assert without_seconds(again) == without_seconds(whole)


def test_patience_and_the_best_weights_outlive_a_kill(tmp_path: Path) -> None:
    """Of the scores 5, 1, 2 it has seen when it is killed, and 3 and 4 then: no gain for 3."""

    def train(scores: Sequence[float], file: Path | None, step: int = 0) -> Distilled:
        told = iter(scores)
        settings = Settings(steps=20, check_every=2, keep_every=2, patience=3)
        return distil(
            seeded(cnn, 3), None, image_batches(), Supervised(), settings,
            score=lambda _: next(told), heard=kill_at(step), keep=file,
        )  # fmt: skip

    whole = train([5, 1, 2, 3, 4, 0], None)
    with pytest.raises(Killed):
        train([5, 1, 2], tmp_path / "a", 5)
    again = train([3, 4, 0], tmp_path / "a")
    assert (again.steps, again.best_step) == (8, 2)
    assert without_seconds(again) == without_seconds(whole)
    assert same(again.module, whole.module)


def test_a_finished_training_is_not_done_again(tmp_path: Path) -> None:
    first = kept(tmp_path / "a")
    again = kept(tmp_path / "a", heard=kill_at(1))
    assert same(first.module, again.module)
    assert without_seconds(first) == without_seconds(again)
    assert again.seconds == pytest.approx(first.seconds, abs=0.2)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"lr": 0.02}, "lr was 0.01 and is 0.02"),
        ({"teacher": 7}, "its teacher differs"),
        ({"student": 1}, "its student differs"),
        ({"data": 1}, "its rows differ"),
        ({"scored": False}, "score was True and is False"),
        ({"objective": Response(temperature=2.0)}, "its objective differs"),
        ({"objective": Response(loss=lambda out, y: out.sum(-1))}, "its objective differs"),
    ],
)
def test_a_checkpoint_of_another_training_is_refused(
    changed: dict[str, object], told: str, tmp_path: Path
) -> None:
    with pytest.raises(Killed):
        kept(tmp_path / "a", heard=kill_at(5))
    before = (tmp_path / "a").read_bytes()
    with pytest.raises(SettingError, match=told) as refused:
        kept(tmp_path / "a", **changed)  # type: ignore[arg-type]
    assert "Delete it to begin anew, or name another file" in str(refused.value)
    assert (tmp_path / "a").read_bytes() == before


def test_a_damaged_checkpoint_is_refused_wherever_the_damage_is(tmp_path: Path) -> None:
    file = tmp_path / "a"
    with pytest.raises(Killed):
        kept(file, heard=kill_at(5))
    whole = file.read_bytes()
    for damaged in (
        whole[:-1], whole[: len(whole) // 2], whole[:40], whole + b"x",
        *(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in
          (25, 60, len(whole) // 3, len(whole) // 2, len(whole) - 1)),
    ):  # fmt: skip
        file.write_bytes(damaged)
        with pytest.raises(SettingError, match=r"is damaged\. Delete it to begin anew"):
            kept(file)
    for other in (b"", b"PK something else"):
        file.write_bytes(other)
        with pytest.raises(SettingError, match="is no checkpoint"):
            kept(file)


def test_a_checkpoint_that_cannot_be_written_is_told_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot be written: No such file"):
        kept(tmp_path / "none" / "a", heard=kill_at(1))
    (tmp_path / "folder").mkdir()
    with pytest.raises(RunError, match="cannot be read: Is a directory"):
        kept(tmp_path / "folder", heard=kill_at(1))


def test_a_full_disk_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a"
    with pytest.raises(Killed):
        kept(file, heard=kill_at(5))
    before = file.read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match="cannot be written: No space left"):
        kept(file)
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["a"]
    assert file.read_bytes() == before
    assert same(kept(file).module, kept(None).module)


# Rows


@given(
    n=st.integers(1, 40), batch=st.integers(1, 12), seed=st.integers(0, 9), epoch=st.integers(0, 3)
)
def test_an_epoch_sees_no_row_twice_and_a_step_is_a_function_of_its_number(
    n: int, batch: int, seed: int, epoch: int
) -> None:
    x = torch.arange(n) * 10
    batches, student = rows(x, x + 1, batch=batch, seed=seed, teacher=x + 2), nn.Identity()
    steps = max(1, n // batch)
    epoch_of = [batches(epoch * steps + i, student) for i in range(steps)]
    index = torch.cat([b.index for b in epoch_of if b.index is not None])
    assert len(set(index.tolist())) == len(index) == steps * min(n, batch)
    assert all(len(b.x) == min(n, batch) for b in epoch_of)
    again = rows(x, x + 1, batch=batch, seed=seed, teacher=x + 2)
    alone, seen = again((epoch + 1) * steps - 1, student), epoch_of[-1]
    columns = ((seen.x, alone.x), (seen.y, alone.y), (seen.teacher, alone.teacher))
    for more, (a, b) in enumerate(columns):
        assert torch.equal(a, b)
        assert torch.equal(a, seen.index * 10 + more)


def test_epochs_and_seeds_shuffle_anew() -> None:
    x, student = torch.arange(30), nn.Identity()
    orders = [
        tuple(rows(x, batch=30, seed=seed)(epoch, student).x.tolist())
        for seed in range(3) for epoch in range(3)
    ]  # fmt: skip
    assert len(set(orders)) == 9


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: rows(torch.ones(3, 1), torch.ones(2)), "3 rows of x, 2 of y"),
        (lambda: rows(torch.ones(3), teacher=torch.ones(4)), "3 rows of x, 4 of teacher"),
        (lambda: rows(torch.ones(0, 1)), "no rows"),
        (lambda: rows(torch.ones(3), batch=0), "batch 0"),
    ],
)
def test_rows_that_do_not_fit_are_refused(make: Callable[[], Batches], told: str) -> None:
    with pytest.raises((DataError, SettingError), match=told):
        make()


def loss_of(objective: Objective, batch: Batch, student: nn.Module, teacher: nn.Module) -> float:
    """Of one batch, in eval mode, by a step of a learning rate near 0."""
    settings = Settings(steps=1, lr=1e-12)
    found = distil(student, teacher, lambda *_: batch, objective, settings)
    return found.losses[0]


@pytest.mark.parametrize("way", everything())
def test_rows_and_positions_of_padding_count_for_nothing(way: str) -> None:
    """Neither what is asked of them nor how many there are: the loss is that of the rows alone."""
    x, y = tokens()
    student = nn.Sequential(nn.Embedding(11, 4), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 11))
    teacher = nn.Sequential(nn.Embedding(11, 6), nn.Tanh(), nn.Linear(6, 11))  # each for itself
    index = torch.arange(6)
    few = Batch(x[:6], y[:6], index)
    nothing = torch.cat([y[:6], torch.full((3, 5), -1)])
    more = Batch(x[:9], nothing, torch.arange(9))
    other = Batch(torch.where(nothing < 0, 10, x[:9]), nothing, torch.arange(9))
    losses = [loss_of(everything()[way], b, student, teacher) for b in (more, other)]
    if way != "contrast":  # which draws as many negatives more
        losses.append(loss_of(everything()[way], few, student, teacher))
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-5)
    changed = Batch(x[:9], torch.where(nothing < 0, 1, nothing), torch.arange(9))
    assert loss_of(everything()[way], changed, student, teacher) != pytest.approx(
        losses[0], rel=1e-4
    )


@pytest.mark.parametrize("objective", [Supervised(), Response(), Response(share=1.0)])
def test_rows_count_by_their_weight(objective: Objective) -> None:
    """A weight of 2 is as the row twice, a weight of 0 as its absence."""
    (x, y), student, teacher = images(), seeded(plain, 3), seeded(plain, 5)
    twice = torch.tensor([0, 0, 1, 2, 2])
    by_weight = Batch(x[:4], y[:4], weight=torch.tensor([2.0, 1.0, 2.0, 0.0]))
    losses = [
        loss_of(objective, b, student, teacher) for b in (by_weight, Batch(x[twice], y[twice]))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def plain(width: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(36, width), nn.ReLU(), nn.Linear(width, 4))


# Taps


class Pooled(nn.Module):
    """The mean over places has no submodule of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU())
        self.head = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


CONFIG = LlamaConfig(11, 4, 8, 1, 2, 1, 5, 2, tie_word_embeddings=True)


@pytest.mark.parametrize(
    ("model", "x", "hidden", "maps"),
    [
        (cnn(3), images()[0], ("8", True), ("3", False)),
        (Pooled(), images()[0], ("head", True), ("body", False)),
        (sequence(4), tokens()[0], ("back", True), ("back", True)),
        (sequence(4, True), tokens()[0], ("norm", False), ("norm", False)),
        (Llama(CONFIG), tokens()[0], ("model.norm", False), ("model.norm", False)),
        (nn.Sequential(nn.Flatten(), nn.Linear(36, 4)), images()[0], ("1", True), None),
    ],
    ids=["cnn", "pooled", "sequence", "tied", "llama", "linear"],
)
def test_taps_that_need_no_name_are_found(
    model: nn.Module, x: Tensor, hidden: tuple[str, bool], maps: tuple[str, bool] | None
) -> None:
    """(submodule, whether it is its input): what goes into the last layer, and the last maps."""
    found = places(model, [HIDDEN], x, "it")[HIDDEN]
    assert (found.module, found.into) == hidden
    if maps is None:
        with pytest.raises(TaskError, match="it has no maps"):
            places(model, [MAPS], x, "it")
    else:
        found = places(model, [MAPS], x, "it")[MAPS]
        assert (found.module, found.into) == maps


# Errors


def nan_at(step: int) -> Batches:
    batches = image_batches()

    def at(i: int, student: nn.Module) -> Batch:
        batch = batches(i, student)
        return Batch(batch.x * math.nan, batch.y) if i == step else batch

    return at


def test_a_loss_that_is_not_finite_names_its_step() -> None:
    with pytest.raises(TaskError, match="at step 4 the loss is nan"):
        distil(seeded(cnn, 3), None, nan_at(3), Supervised(), Settings(steps=9))


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class Silent(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Rows(Objective):
    needs_teacher = False

    def forward(self, seen: Seen) -> Tensor:
        return seen.student.mean(1)


class Constant(Rows):
    def forward(self, seen: Seen) -> Tensor:
        return torch.zeros(())


@pytest.mark.parametrize(
    ("student", "teacher", "objective", "told"),
    [
        (cnn(3), cnn(3, 7), Response(), r"response: \[8, 4\] is compared with \[8, 7\]"),
        (cnn(3), cnn(3, 7), Response(loss="binary"), r"binary: \[8, 4\] is compared with \[8\]"),
        (cnn(3), cnn(3, 7), Response(loss="squared", share=1.0), r"squared: \[8, 4\] is compared"),
        (cnn(3), None, Response(), "compares with a teacher, and there is none"),
        (cnn(3), None, Hints(), "looks into a teacher, and there is none"),
        (cnn(3), cnn(3), Hints(student="9"), "student: no submodule '9'. Known: 0, 1, 2"),
        (cnn(3), cnn(3), Hints(student="0"), "cannot foretell"),
        (cnn(3), cnn(3), Attention(teacher="6"), "no places to attend to"),
        (cnn(3), plain(3), Attention(), "teacher: it has no maps"),
        (cnn(3), cnn(3), Contrast(20), r"rows \d+ to \d+ of 20"),
        (Pair(), None, Supervised(), "student: gives a tuple, not one tensor"),
        (Broken(), None, Supervised(), r"student: cannot compute rows .*: it is not to be run"),
        (Silent(), None, Supervised(), r"student: cannot compute rows .*: NotImplementedError"),
        (cnn(3), Pair(), Response(), "teacher: gives a tuple, not one tensor"),
        (nn.Linear(5, 2), None, Supervised(), r"cannot compute rows \[8, 1, 6, 6\]"),
        (cnn(3).requires_grad_(False), None, Supervised(), "nothing of the student is trained"),
        (cnn(3), None, Rows(), r"the objective gives a loss \[8\]"),
        (cnn(3), None, Constant(), "the objective gives a loss without a gradient"),
        (nn.Sequential(nn.Flatten(0)), None, Supervised(), "nothing of the student is trained"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told_in_one_line(
    student: nn.Module, teacher: nn.Module | None, objective: Objective, told: str
) -> None:
    with pytest.raises(TaskError, match=told) as refused:
        distil(student, teacher, image_batches(), objective, Settings(steps=2))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("objective", [Supervised(), Response()])
def test_truths_are_asked_for_where_they_are_needed(objective: Objective) -> None:
    batches = rows(images()[0], batch=8)
    with pytest.raises(TaskError, match="the batches have no truth"):
        distil(seeded(cnn, 3), seeded(cnn, 3), batches, objective, Settings(steps=1))
    distil(seeded(cnn, 3), seeded(cnn, 6), batches, Response(share=1.0), Settings(steps=1))


def test_contrast_asks_for_the_rows_numbers() -> None:
    x, y = images()
    with pytest.raises(TaskError, match="do not say which rows they are"):
        distil(cnn(3), cnn(3), lambda *_: Batch(x, y), Contrast(N), Settings(steps=1))


def test_a_score_that_is_no_number_is_refused() -> None:
    with pytest.raises(TaskError, match="the score is nan at step 0"):
        stopped([math.nan], patience=None)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Settings(steps=-1), "steps is -1"),
        (lambda: Settings(steps=1.5), "steps is 1.5"),  # type: ignore[arg-type]
        (lambda: Settings(lr=0.0), "lr is 0.0"),
        (lambda: Settings(lr=math.nan), "lr is nan"),
        (lambda: Settings(clip=0.0), "clip is 0.0"),
        (lambda: Settings(decay=-1.0), "decay is -1.0"),
        (lambda: Settings(patience=0), "patience is 0"),
        (lambda: Settings(optimiser="sdg"), "unknown optimiser 'sdg'. Did you mean 'sgd'"),
        (lambda: Settings(schedule="step"), "unknown schedule 'step'"),
        (lambda: Sum(), "a sum of nothing"),
        (lambda: Supervised("crossentropy"), "Did you mean 'cross_entropy'"),
        (lambda: Response(temperature=0.0), "temperature 0.0"),
        (lambda: Response(share=1.1), "share 1.1"),
        (lambda: Hints(student=("a", "b")), "2 taps of the student, 1 of the teacher"),
        (lambda: Contrast(1), "1 rows"),
        (lambda: Contrast(9, temperature=0.0), "temperature 0.0"),
    ],
)
def test_settings_without_sense_are_refused(make: Callable[[], object], told: str) -> None:
    with pytest.raises(SettingError, match=told) as refused:
        make()
    assert "\n" not in str(refused.value)
