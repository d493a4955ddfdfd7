"""What a task gets wrong is told before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from torch import Tensor, nn
from torch.nn import functional as F

import tiny
from kitestring.devices.profiles import profile
from kitestring.errors import DataError, TaskError
from kitestring.tasks.metrics import accuracy, rmse
from kitestring.tasks.sources import users_from_dict
from kitestring.tasks.task import Metric, Plan, Recorded, Task
from kitestring.tasks.users import Users
from kitestring.tasks.validate import fits, validate
from told import told

Rows = dict[str, dict[str, Any]]


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


def one(*end: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 1), *end)


def row(user: int) -> Rows:
    rng = np.random.default_rng(user)
    return {
        split: {"x": rng.normal(size=(n, 4)).astype(np.float32), "y": np.arange(n) % 3}
        for split, n in (("train", 6), ("validation", 5), ("test", 7))
    }


def made(change: Callable[[Rows], Any] | None = None, **other: Any) -> Task:
    """Twelve users, of whom "mia" and "tom" are the pool; `change` spoils eve's rows."""
    names = ["ann", "bob", "eve", *(f"user {i}" for i in range(7)), "mia", "tom"]

    def load(user: int) -> Any:
        rows = row(user)
        return (change(rows) or rows) if change and names[user] == "eve" else rows

    users = Users(names, load, [10, 11], range(10))
    given = {"users": users, "small": small, "large": small, "metric": accuracy, **other}
    return Task("trial", **given)


def cells(split: str, column: str, change: Callable[[Any], Any]) -> Callable[[Rows], None]:
    def spoil(rows: Rows) -> None:
        rows[split][column] = change(rows[split][column])

    return spoil


def put(value: Any) -> Callable[[Any], Any]:
    def change(array: Any) -> Any:
        array = array.copy()
        array[1] = value
        return array

    return change


def everybody(change: Callable[[Any], Any], task: Task | None = None) -> Users:
    """All y changed."""
    users = (task or made()).users

    def load(user: int) -> Any:
        return {s: {"x": c["x"], "y": change(c["y"])} for s, c in users.load(user).items()}

    return replace(users, load=load)


def test_a_good_task_has_nothing_to_say() -> None:
    assert validate(made()) == []


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("split", [False, True])
def test_the_tiny_tasks_are_good(kind: str, pool: bool, split: bool) -> None:
    notes = validate(tiny.task(kind, pool, split))
    assert any("No pool" in note for note in notes) is (not pool and kind != "recorded")


def test_users_are_walked_once_one_at_a_time() -> None:
    task, asked = made(), []

    def load(user: int) -> Any:
        asked.append(user)
        return row(user)

    validate(replace(task, users=replace(task.users, load=load)))
    assert asked == [0, *range(12)]  # the first one's rows are tried on the models before


def test_notes() -> None:
    few = users_from_dict({f"u{i}": (np.ones((9, 4)), np.arange(9) % 3) for i in range(6)}, pool=0)
    notes = " ".join(validate(made(users=replace(few, notes=("1 of 7 users ...",)))))
    assert "1 of 7 users ..." in notes
    assert "No pool" in notes
    assert "Only 6 device users" in notes
    assert "fewer than 5 test rows" in notes
    notes = validate(made(cells("test", "y", put(-1))))
    assert notes == ["1 held-out truths are below 0 and are never answered right."]


# Who is there


def test_who_is_there() -> None:
    users = made().users
    with told(DataError, "no device users", where="task trial", mend="smaller pool"):
        validate(made(users=replace(users, devices=[])))
    with told(DataError, "user number 12 of 12 users"):
        validate(made(users=replace(users, pool=[12])))
    with told(DataError, "1 users twice", mend="leak"):
        validate(made(users=replace(users, pool=[9, 10])))


def test_pool_users_are_checked_too() -> None:
    users = made().users

    def load(user: int) -> Any:
        rows = row(user)
        if user == 11:
            rows["test"]["x"][2, 0] = np.inf
        return rows

    with told(DataError, "1 values are NaN or infinite", where="user 'tom', test, column 'x'"):
        validate(made(users=replace(users, load=load)))
    empty = {s: {k: v[:0] for k, v in c.items()} for s, c in row(0).items()}
    partly = {**row(11), "test": empty["test"]}
    validate(made(users=replace(users, load=lambda i: partly if i == 11 else row(i))))
    with told(DataError, "no rows", where="user 'tom'"):
        validate(made(users=replace(users, load=lambda i: empty if i == 11 else row(i))))


# Rows


@pytest.mark.parametrize(
    ("spoil", "what", "where", "mend"),
    [
        (lambda rows: rows.pop("test") and None, "no test rows", "", "load() gives train"),
        (lambda rows: {**rows, "test": {"x": rows["test"]["x"]}}, "no column 'y' (but x)", "test",
         "Columns: x, y"),
        (lambda rows: {**rows, "train": {k: v[:0] for k, v in rows["train"].items()}},
         "no rows in train", "", "Leave the user out"),
        (lambda rows: {**rows, "test": {k: v[:0] for k, v in rows["test"].items()}},
         "no rows in test", "", "Leave the user out"),
        (cells("validation", "x", lambda x: x[1:]), "x has 4 rows and y has 5", "validation",
         "one y per row"),
        (cells("test", "x", lambda x: x[:, :3]),
         "rows of shape (3,), those of user 'ann' have (4,)", "test, column 'x'", "Pad or crop"),
        (cells("train", "x", lambda x: x.astype(np.float64)), "float64, and float32 for user 'ann'",
         "train, column 'x'", "astype(np.float32)"),
        (cells("test", "x", put(np.nan)), "4 values are NaN or infinite", "test, column 'x'",
         "leave the rows out"),
        (cells("test", "x", lambda x: x.tolist()), "not an array but list", "test, column 'x'",
         "np.asarray"),
        (cells("test", "x", lambda x: x.astype(str)), "holds <U", "test, column 'x'", "numbers"),
        (cells("test", "y", put(3)), "class 3, and the models tell 0 to 2 apart",
         "test, column 'y'", "from 0"),
        (lambda rows: {s: {**c, "z": c["y"]} for s, c in rows.items()},
         "not everybody has the columns z", "train", "the same columns"),
    ],
)  # fmt: skip
def test_what_rows_get_wrong(spoil: Any, what: str, where: str, mend: str) -> None:
    def change(rows: Rows) -> Any:
        return spoil(rows)

    with told(DataError, what, where="user 'eve'", mend=mend):
        validate(made(change))
    with told(DataError, what, where=where):
        validate(made(change))


def test_the_first_user_is_checked_like_the_others() -> None:
    for change, what in (
        (lambda c: {**c, "y": c["y"][1:]}, "x has 6 rows and y has 5"),
        (lambda c: {"x": c["x"]}, "no column 'y'"),
        (lambda c: {k: v[:0] for k, v in c.items()}, "no rows in train"),
        (lambda c: {**c, "x": c["x"] * np.nan}, "24 values are NaN"),
        (lambda c: {**c, "y": c["y"] + 5}, "class 7"),
    ):
        users = replace(made().users, load=lambda i, f=change: {s: f(c) for s, c in row(i).items()})
        with told(DataError, what, where="user 'ann'"):
            validate(made(users=users))


def test_what_load_raises_is_told_of_the_user() -> None:
    def broken(rows: Rows) -> None:
        raise KeyError("no such file")

    with told(DataError, "load() failed with KeyError: 'no such file'", where="user 'eve'"):
        validate(made(broken))

    def known(rows: Rows) -> None:
        raise DataError("two rows", "eve.csv:3", "Bring more")

    with told(DataError, "two rows", where="eve.csv:3"):
        validate(made(known))


# Truths


def test_truths_of_classes() -> None:
    with told(DataError, "float32, and cross_entropy needs int64", mend="astype(np.int64)"):
        validate(made(users=everybody(lambda y: y.astype(np.float32))))
    with told(DataError, "int32, and cross_entropy needs int64"):
        validate(made(users=everybody(lambda y: y.astype(np.int32))))
    with told(DataError, "nobody has training rows of class 0, of the models' 3", mend="from 0"):
        validate(made(users=everybody(lambda y: np.maximum(y, 1))))
    with told(DataError, "training rows of class 0, 1, of"):
        validate(made(users=everybody(lambda y: y * 0 + 2)))


def test_truths_of_a_binary_target() -> None:
    flat = {"small": one(nn.Flatten(0)), "large": one(nn.Flatten(0)), "loss": "binary"}
    validate(made(users=everybody(lambda y: y % 2), **flat))
    validate(made(users=everybody(lambda y: (y % 2).astype(np.float32)), **flat))
    with told(DataError, "holds -1, and binary needs 0 or 1", where="column 'y'"):
        validate(made(users=everybody(lambda y: y - 1), **flat))


# Models


def test_shapes_that_would_broadcast() -> None:
    for loss, change in (("squared", np.float32), ("binary", lambda y: y % 2)):
        wide = {"small": one(), "large": one(), "loss": loss, "metric": rmse}
        flat = {**wide, "small": one(nn.Flatten(0)), "large": one(nn.Flatten(0))}
        users = everybody(change)
        with told(TaskError, f"gives [n, 1] for y [n], {loss}", where="task trial", mend="Squeeze"):
            validate(made(users=users, **wide))
        column = everybody(lambda y, f=change: f(y)[:, None])
        with told(TaskError, "gives [n] for y [n, 1]", mend="y[:, 0]"):
            validate(made(users=column, **flat))
        validate(made(users=users, **flat))
    with told(TaskError, "gives [n, 3] for y [n], squared", mend="one output for each y"):
        validate(made(users=everybody(np.float32), loss="squared"))


def test_shapes_of_classes() -> None:
    with told(TaskError, "the small model gives [n] for y [n]", mend="logits [n, classes]"):
        validate(made(small=one(nn.Flatten(0))))
    with told(TaskError, "gives [n, 3] for y [n, 1]", mend="Squeeze y"):
        validate(made(users=everybody(lambda y: y[:, None])))
    with told(TaskError, "the large output is [n, 5] and the small [n, 3]", mend="the same"):
        validate(made(large=lambda: nn.Linear(4, 5)))
    with told(TaskError, 'asks="last", but the small model gives [n, 3]', mend="each position"):
        validate(made(asks="last"))
    with told(TaskError, "the server's output is [n, 5]"):
        validate(made(server=lambda: nn.Linear(6, 5)))
    with told(TaskError, "the server fails on features [n, 6]", mend="where front ends"):
        validate(made(server=lambda: nn.Linear(7, 3)))


def test_models_that_fail() -> None:
    with told(
        TaskError, "the small model fails on x (12, 4) torch.float32", mend="fit the column x"
    ):
        validate(made(small=lambda: nn.Linear(5, 3)))
    with told(TaskError, "large() gave int, not an nn.Module"):
        validate(made(large=lambda: 3))


def test_halves_that_are_not_the_whole() -> None:
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.front, self.back = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.back(self.front(x).relu())  # type: ignore[no-any-return]

    with told(TaskError, "the small model is not back(front(x))", mend="two children"):
        validate(made(small=Skips))


# Losses and metrics


def test_losses_of_ones_own() -> None:
    def per_row(out: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(out, y, reduction="none")

    validate(made(loss=per_row))
    for loss, got in (
        (F.cross_entropy, "one value"),
        (lambda out, y: (out - F.one_hot(y, 3)) ** 2, "[n, 3]"),
        (lambda out, y: out.argmax(1), "[n] torch.int64"),
        (lambda out, y: 3.0, "float"),
    ):
        with told(TaskError, f"the loss gives {got}", "for 12 rows", mend='reduction="none"'):
            validate(made(loss=loss))
    with told(TaskError, "the loss fails on outputs [n, 3] and y [n]", mend="one loss per row"):
        validate(made(loss=lambda out, y: (out - y).sum(1)))


def test_metrics_of_ones_own() -> None:
    def bad(answer: Any, truth: Any) -> float:
        raise ValueError("I want one-hot truths")

    with told(TaskError, "metric bad fails", "I want one-hot truths", mend="returns a number"):
        validate(made(others=(Metric("bad", bad),)))
    with told(TaskError, "metric bad fails on answers [n, 3] and y [n]"):
        validate(made(metric=Metric("bad", lambda answer, truth: answer)))  # type: ignore[arg-type, return-value]


# Recorded answers


def recorded(change: Callable[[Rows], Any] | None = None, **other: Any) -> Recorded:
    task = tiny.task("recorded")
    assert isinstance(task, Recorded)

    def load(user: int) -> Any:
        rows = {s: dict(c) for s, c in tiny._rows("recorded", user).items()}
        return (change(rows) or rows) if change and user == 2 else rows

    return replace(task, users=replace(task.users, load=load), **other)


@pytest.mark.parametrize(
    ("spoil", "what", "column"),
    [
        (cells("test", "x", put(180)), "sample 180, and the cloud has answers to 0 to 179", "x"),
        (cells("test", "x", put(-1)), "sample -1", "x"),
        (
            cells("test", "confidence", put(1.5)),
            "a confidence of 1.5 is not in [0, 1]",
            "confidence",
        ),
        (cells("test", "confidence", put(-0.1)), "a confidence of -0.1", "confidence"),
        (cells("test", "confidence", put(np.nan)), "1 values are NaN", "confidence"),
    ],
)
def test_what_recorded_rows_get_wrong(spoil: Any, what: str, column: str) -> None:
    with told(DataError, what, where=f"user 'user 2', test, column {column!r}"):
        validate(recorded(spoil))


def test_recorded_rows_may_be_none_to_train() -> None:
    def untrained(rows: Rows) -> Mapping[str, Any]:
        return {**rows, "train": {k: v[:0] for k, v in rows["train"].items()}}

    validate(recorded(untrained))
    with told(DataError, "no rows in test", where="user 2"):
        validate(recorded(lambda rows: {**rows, "test": untrained(rows)["train"]}))


def test_what_recorded_answers_get_wrong() -> None:
    cloud = recorded().cloud
    with told(DataError, "answers of shape (3,), the cloud's have ()", where="column 'device'"):
        validate(recorded(cloud=cloud[:, 0]))
    with told(DataError, "float32, and float64 for the cloud", where="column 'device'"):
        validate(recorded(cloud=cloud.astype(np.float64)))
    with told(DataError, "in the cloud's answers", where="task tiny"):
        validate(recorded(cloud=cloud * np.nan))
    with told(DataError, "5 costs of 180 answers"):
        validate(recorded(cost=np.ones(5)))
    with told(DataError, "costs below 0"):
        validate(recorded(cost=-np.ones(180)))
    with told(TaskError, "metric RMSE fails"):
        validate(recorded(metric=rmse))
    task = recorded()
    for column, change, what in (
        ("x", lambda v: v.astype(np.float32), "float32 [n], not sample numbers"),
        ("confidence", lambda v: (v > 0.5).astype(np.int64), "int64 [n]"),
    ):

        def load(user: int, column: str = column, change: Any = change) -> Any:
            rows = task.users.load(user)
            return {s: {**c, column: change(c[column])} for s, c in rows.items()}

        with told(DataError, what, where=f"column {column!r}"):
            validate(replace(task, users=replace(task.users, load=load)))


# Memory


def test_what_a_device_can_hold() -> None:
    def task(width: int, optimiser: str = "sgd") -> Task:
        module = lambda: nn.Sequential(nn.Linear(4, width), nn.Linear(width, 3))  # noqa: E731
        return made(small=module, plan=Plan(optimiser=optimiser))  # type: ignore[arg-type]

    def try_it(task: Task, name: str) -> None:
        from kitestring.tasks.programs import programs

        fits(task, programs(task, 0, np.zeros((2, 4), np.float32)), profile(name))

    try_it(task(8000), "microcontroller")  # 8000 * 8 * 4 B * 2 = 512 kB, of 524
    with told(TaskError, "1.0 MB", "4 times 256 kB", "microcontroller has 524 kB", mend="smaller"):
        try_it(task(8000, "adam"), "microcontroller")
    try_it(task(8000, "adam"), "phone")
    fits(recorded(), {}, profile("microcontroller"))
