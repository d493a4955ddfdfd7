"""What a task may say of its models, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from kitestring.comparison.methods import METHODS
from kitestring.comparison.order import missing
from kitestring.compress.distil.objective import cross_entropy
from kitestring.errors import TaskError
from kitestring.tasks.programs import programs
from kitestring.tasks.task import Task


def own(**changes: Any) -> Task:
    task = tiny.task()
    assert isinstance(task, Task)
    return replace(task, loss=lambda out, y: cross_entropy(out, y) * 2, **changes)


def test_a_loss_of_ones_own_needs_a_confidence_for_a_cascade() -> None:
    names = {"small", "large", "front"}
    about = METHODS["cascade"].about
    assert "confidence" in str(missing(own(), names, about))
    sure = own(confidence=lambda out: out.softmax(-1).amax(-1))
    assert missing(sure, names, about) is None


def test_a_confidence_of_ones_own_is_what_is_predicted() -> None:
    task = own(confidence=lambda out: out[:, 0].sigmoid())
    x = task.users.load(0)["train"]["x"][:2]
    program = programs(task, 0, x)["small.answer"]
    batch = {"x": torch.from_numpy(x)}
    found = program.predict(program.evaluating(batch), batch)
    torch.testing.assert_close(found["confidence"], found["answer"][:, 0].sigmoid())


@pytest.mark.parametrize("wrong", [lambda out: out.softmax(-1), lambda out: out.mean()])
def test_a_confidence_for_each_row(wrong: Any) -> None:
    task = own(confidence=wrong)
    with pytest.raises(TaskError, match="one number in"):
        programs(task, 0, task.users.load(0)["train"]["x"][:2])


def test_padding_counts_for_nothing_in_the_loss() -> None:
    """By hand: two classes, logits (0, log 3): -log p = log 4 for class 0, log(4/3) for class 1."""
    out = torch.tensor([1.0, 3.0]).log()
    logits = out.expand(1, 4, 2)
    y = torch.tensor([[0, -1, 1, -1]])
    expected = (torch.log(torch.tensor(4.0)) + torch.log(torch.tensor(4 / 3))) / 2
    found: Tensor = cross_entropy(logits, y)
    torch.testing.assert_close(found, expected[None])
