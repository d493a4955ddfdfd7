"""A task from one CSV file: what its columns become, what runs, and what it refuses."""

from __future__ import annotations

import csv
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kitestring.collaborate.parameters.fedavg import FedAvg
from kitestring.comparison.jobs import Bench, Job, work
from kitestring.devices.profiles import profile
from kitestring.errors import DataError, SettingError
from kitestring.tasks.tables import task_from_csv
from kitestring.tasks.task import Task
from kitestring.tasks.users import SPLITS
from kitestring.tasks.validate import validate
from told import told

Cells = dict[str, Any]
USERS, ROWS = 8, 12


def write(path: Path, cell: Callable[[int, int], Cells], rows: int = ROWS, **options: Any) -> Path:
    """A CSV in which row r of user u has the cells `cell(u, r)`."""
    table = [{"who": f"u{u}", **cell(u, r)} for r in range(rows) for u in range(USERS)]
    with path.open("w", newline="", encoding=options.pop("encoding", "utf-8")) as file:
        writer = csv.DictWriter(file, list(table[0]), **options)
        writer.writeheader()
        writer.writerows(table)
    return path


def columns(task: Task, user: int) -> np.ndarray[Any, Any]:
    """A user's x, all splits, in some order."""
    rows = task.users.load(user)
    return np.concatenate([rows[s]["x"] for s in SPLITS])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "visits.csv"


# What a target is


@pytest.mark.parametrize(
    ("truth", "loss", "metrics", "said"),
    [
        (lambda v: "yes" if v > 0 else "no", "binary", ["accuracy", "AUC"], "1 is yes, 0 is no"),
        (lambda v: int(v > 0) + 1, "binary", ["accuracy", "AUC"], "1 is 2, 0 is 1"),
        (lambda v: ["low", "mid", "high"][int(v > -1) + int(v > 1)], "cross_entropy", ["accuracy"],
         "3 classes: high, low, mid"),
        (lambda v: 5 * (int(v > -1) + int(v > 1)), "cross_entropy", ["accuracy"],
         "3 classes: 0, 5, 10"),
        (lambda v: 100 + 7.5 * v, "squared", ["RMSE"], "the error is in goal's own unit"),
        (lambda v: round(1e4 * v), "squared", ["RMSE"], "standard deviation"),
    ],
    ids=["words", "two numbers", "texts", "whole numbers", "values", "many whole numbers"],
)  # fmt: skip
def test_every_kind_of_target_runs(
    path: Path, truth: Callable[[float], Any], loss: str, metrics: list[str], said: str
) -> None:
    rng = np.random.default_rng(0)

    def cell(user: int, row: int) -> Cells:
        a, b = rng.normal(size=2)
        return {"a": a, "b": 50 + 9 * b, "goal": truth(a + b)}

    task = task_from_csv(write(path, cell, rows=30), "who", "goal")
    assert (task.loss, [m.name for m in (task.metric, *task.others)]) == (loss, metrics)
    assert said in task.notes[0]
    assert not any("below 0" in note for note in validate(task))
    assert (len(task.users.pool), len(task.users.devices)) == (2, 6)
    assert pickle.loads(pickle.dumps(task)).name == "visits"
    bench = Bench(task, profile("phone"), "auto", 0.0)
    job = Job("fedavg", 0, 0, "test", path.with_name("job.sqlite"))
    learned = FedAvg(rounds=5, epochs=4, lr=0.01, optimiser="adam")
    result = work(bench, job, learned, lambda done: None)
    if loss == "squared":
        truths = [task.users.load(i)["test"]["y"] for i in task.users.devices]
        spread = np.concatenate([[truth(a)] for a in rng.normal(0, 2**0.5, 2000)]).std()
        assert 0 < result["score"] < 0.7 * spread  # in the target's unit, and better than the mean
        assert np.abs(np.concatenate(truths)).max() < 10  # trained on another scale
    else:
        assert result["score"] > 0.75


def test_the_loss_can_be_chosen(path: Path) -> None:
    write(path, lambda u, r: {"a": u * r, "n": r % 4, "t": "ab"[r % 2], "s": "pqr"[r % 3]})
    assert task_from_csv(path, "who", "n").loss == "cross_entropy"
    assert task_from_csv(path, "who", "n", loss="squared").loss == "squared"
    assert task_from_csv(path, "who", "t", loss="cross_entropy").loss == "cross_entropy"
    with told(DataError, "text, not numbers", where="column 's'"):
        task_from_csv(path, "who", "s", loss="squared")
    with told(DataError, "3 distinct values", where="column 's'"):
        task_from_csv(path, "who", "s", loss="binary")
    with told(SettingError, "unknown loss 'squard'", mend="Did you mean 'squared'?"):
        task_from_csv(path, "who", "s", loss="squard")  # type: ignore[arg-type]


def test_a_class_that_nobody_trains_on_is_never_right(path: Path) -> None:
    for row in range(ROWS):  # wherever the one odd row falls, training or not
        write(
            path, lambda u, r, odd=row: {"a": r, "s": "z" if (u, r) == (1, odd) else "pqr"[r % 3]}
        )
        task = task_from_csv(path, "who", "s")
        made = task.small()
        if "1 rows are of others" in task.notes[0]:
            assert made[-1].out_features == 3
            held = [task.users.load(i)[s]["y"] for i in task.users.devices for s in SPLITS[1:]]
            assert (np.concatenate(held) == -1).sum() == 1
            assert any("1 held-out truths are below 0" in note for note in validate(task))
            return
        assert made[-1].out_features == 4
        validate(task)
    pytest.fail("the odd row was always trained on")


# What columns become


def test_numbers_are_standardised_by_the_pool_alone(path: Path) -> None:
    def cell(user: int, row: int, far: float = 0.0) -> Cells:
        pooled = user in pool
        return {"a": row if pooled else far + row, "g": row % 2}

    pool: tuple[int, ...] = ()
    pool = tuple(task_from_csv(write(path, cell), "who", "g").users.pool)
    near = task_from_csv(write(path, cell), "who", "g")
    far = task_from_csv(write(path, lambda u, r: cell(u, r, 3.0)), "who", "g")
    assert np.std(np.concatenate([columns(near, i) for i in pool])) == pytest.approx(1)
    for i in pool:
        assert (columns(near, i) == columns(far, i)).all()  # whatever the devices hold
    device = near.users.devices[0]
    moved = columns(far, device) - columns(near, device)
    assert moved == pytest.approx(3 / np.std(np.arange(ROWS)))
    huge = task_from_csv(write(path, lambda u, r: cell(u, r, 1e9)), "who", "g")
    assert (columns(huge, device) == 10).all()


def test_without_a_pool_a_user_is_standardised_alone(path: Path) -> None:
    write(path, lambda u, r: {"a": 1000 * u + r, "b": u, "s": "xyz"[r % 3], "g": r % 2})
    task = task_from_csv(path, "who", "g", pool=0)
    assert not task.users.pool
    for i in range(USERS):
        train = task.users.load(i)["train"]["x"]
        assert train[:, 0].mean() == pytest.approx(0, abs=1e-6)
        assert train[:, 0].std() == pytest.approx(1)
        one = train[:, 1:9].sum(0)  # b has 8 whole numbers: categories
        assert sorted(one) == [0] * 7 + [len(train)]
    assert any("the user's own training rows, and the categories" in n for n in task.notes)


def test_without_a_pool_a_target_is_not_scaled(path: Path) -> None:
    write(path, lambda u, r: {"a": r, "g": r / 10 + u / 100})
    task = task_from_csv(path, "who", "g", pool=0)
    assert task.users.load(3)["test"]["y"].max() <= 1.18
    assert "left as it is" in task.notes[0]
    write(path, lambda u, r: {"a": r, "g": 100 * r + u})
    with told(DataError, "values beyond 10", where="column 'g'", mend="give a pool"):
        task_from_csv(path, "who", "g", pool=0)


def test_a_missing_number_is_zero_and_said(path: Path) -> None:
    gone = ["", "NA", "nan", "inf", "typo"]
    write(path, lambda u, r: {"a": gone[r] if u == 1 and r < 5 else r + u / 8, "g": r % 2})
    x = columns(task_from_csv(path, "who", "g"), 1)
    assert x.shape == (ROWS, 2)
    assert (x[x[:, 1] == 1, 0] == 0).all()
    assert x[:, 1].sum() == 5


def test_categories_are_those_of_the_pool(path: Path) -> None:
    def cell(user: int, row: int) -> Cells:
        return {"city": "ab"[row % 2] if user in pool else "c", "code": row % 3, "g": row % 2}

    pool: tuple[int, ...] = ()
    pool = tuple(task_from_csv(write(path, cell), "who", "g").users.pool)
    task = task_from_csv(write(path, cell), "who", "g")
    assert "Taken as categories: city, code." in task.notes
    x = columns(task, task.users.devices[0])
    assert x.shape == (ROWS, 3 + 4)  # a, b, other; 0, 1, 2, other
    assert (x[:, 2] == 1).all()
    assert (x.sum(1) == 2).all()


def test_many_texts_share_a_column(path: Path) -> None:
    write(path, lambda u, r: {"s": f"t{(u + r) % 40 if u > 2 else r % 40}", "g": r % 2}, rows=60)
    assert columns(task_from_csv(path, "who", "g"), 0).shape[1] == 32 + 1


def test_what_is_left_out_is_said(path: Path) -> None:
    def cell(user: int, row: int) -> Cells:
        return {
            "": 100 * user + row,
            "day": f"2024-03-{row + 1:02}",
            "time": f"{row + 1}.3.2024 10:00",
            "remark": f"text {user} {row}",
            "same": "one",
            "a": 1.5 * row,
            "g": row % 2,
        }

    task = task_from_csv(write(path, cell), "who", "g")
    assert columns(task, 0).shape[1] == 1
    said = " ".join(task.notes)
    assert "day, time (dates)" in said
    assert "remark (nearly every row another text)" in said
    assert "same (one value only)" in said
    assert "a column without a name" in said
    assert "Taken as numbers: a." in said
    write(path, lambda u, r: {"day": f"2024-03-{r + 1:02}", "g": r % 2})
    with told(DataError, "no column that can be used", where="visits.csv"):
        task_from_csv(path, "who", "g")


def test_small_users_are_left_out(path: Path) -> None:
    rows = [f"u{u},{r},{r % 2}" for u in range(4) for r in range(5)]
    path.write_text("who,a,g\n" + "\n".join([*rows, "v,1,0", "v,2,0", "w,1,third"]))
    task = task_from_csv(path, "who", "g", loss="binary")  # "third" is gone with its user
    assert "2 of 6 users have fewer than 5 rows and are left out." in task.notes
    assert list(task.users.names) == ["u0", "u1", "u2", "u3"]
    path.write_text("who,a,g\n" + "\n".join(rows[5:]))
    with told(DataError, "3 of 3 users have 5 rows", where="column 'who'", mend="at least 4"):
        task_from_csv(path, "who", "g")


# Files as programs write them


@pytest.mark.parametrize(
    "options",
    [
        {"encoding": "utf-8-sig"},
        {"lineterminator": "\r\n"},
        {"quoting": csv.QUOTE_ALL},
        {"delimiter": ";"},
        {"delimiter": "\t"},
    ],
    ids=str,
)
def test_dialects(path: Path, options: dict[str, Any]) -> None:
    def cell(user: int, row: int) -> Cells:
        return {"a": row / 4, "city": 'Ulm, "old"' if row % 3 else "Zürich\nHB", "g": row % 2}

    plain = columns(task_from_csv(write(path, cell), "who", "g"), 0)
    task = task_from_csv(write(path, cell, **options), "who", "g")
    assert (columns(task, 0) == plain).all()
    assert plain.shape[1] == 1 + 3


def test_decimal_commas_beside_semicolons(path: Path) -> None:
    write(path, lambda u, r: {"a": f"{r},{u}", "g": r % 2}, delimiter=";")
    comma = columns(task_from_csv(path, "who", "g"), 0)
    write(path, lambda u, r: {"a": f"{r}.{u}", "g": r % 2})
    assert (comma == columns(task_from_csv(path, "who", "g"), 0)).all()


def test_blank_lines_and_spaces_are_nothing(path: Path) -> None:
    rows = [f" u{u} , {r} ,{r % 2}\n\n" for u in range(4) for r in range(5)]
    path.write_text("who, a ,g\n\n" + "".join(rows) + "\n\n")
    assert list(task_from_csv(path, "who", "g").users.names) == ["u0", "u1", "u2", "u3"]


# What is refused


GOOD = "".join(f"u{u},{r},{r * 1.25 + u}\n" for u in range(5) for r in range(6))


@pytest.mark.parametrize(
    ("content", "what", "where"),
    [
        (b"", "the file is empty", ""),
        (b"\xef\xbb\xbf \n", "the file is empty", ""),
        (b"who,a,g\n", "a header, but no rows", ""),
        (b"who,a,g,a\nu,1,2,3\n", "two columns 'a'", ":1"),
        (b"who,a,g\nu,1,2\nu,1,2,3\n", "4 cells, the header has 3", ":3"),
        (b"who,a,g\nu,1\n", "2 cells, the header has 3", ":2"),
        (b"who,a,g\nu,caf\xe9,3\n", "not UTF-8", ":2"),
        ("who,a,g\n".encode("utf-16"), "not UTF-8", ":1"),
        (b"PK\x03\x04\x14\x00\xff\xfe", "not UTF-8", ":1"),
        (b'who,a,g\nu,"1,2\n', "not a CSV file", ""),
        (b"who,a,g\n,1,2\n", "column 'who' is empty", ":2"),
        (f"who,a,g\n{GOOD}u1,3,\n".encode(), "column 'g' is empty", ":32"),
        (f"who,a,g\n{GOOD}u1,3,NaN\n".encode(), "column 'g' is NaN", ":32"),
        (f"who,a,g\n{GOOD}u1,3,-inf\n".encode(), "column 'g' is -inf", ":32"),
        (f"who,a,g\n{GOOD}u1,3,n/a\n".encode(), "column 'g' is 'n/a' among 30 numbers", ":32"),
        (f"who,a,g\n{GOOD}u1,3,tall\n".encode(), "column 'g' is 'tall' among 30", ":32"),
        (f"who,a,g\n{GOOD.replace('.', '-')}".encode(), "30 distinct texts in 30 rows", "'g'"),
        (b"who,a,g\n" + b"".join(b"u%d,%d,1\n" % (i // 6, i) for i in range(30)),
         "only one value: 1", "'g'"),
    ],
)  # fmt: skip
def test_what_a_file_gets_wrong(path: Path, content: bytes, what: str, where: str) -> None:
    path.write_bytes(content)
    with told(DataError, what, "visits.csv", where=where):
        task_from_csv(path, "who", "g")


def test_what_the_flags_get_wrong(path: Path) -> None:
    with told(DataError, "No such file", where="visits.csv"):
        task_from_csv(path, "who", "g")
    with told(DataError, "cannot read the file", where=str(path.parent)):
        task_from_csv(path.parent, "who", "g")
    path.write_text("Customer,age,churned\n" + GOOD)
    with told(SettingError, "unknown column 'churn'", where="visits.csv", mend="'churned'"):
        task_from_csv(path, "Customer", "churn")
    with told(SettingError, "unknown column 'customer'", mend="Did you mean 'Customer'?"):
        task_from_csv(path, "customer", "churned")
    with told(SettingError, "column 'age' is user and target"):
        task_from_csv(path, "age", "age")
    with told(DataError, "a pool of 1 of the users", mend="[0, 1)"):
        task_from_csv(path, "Customer", "age", pool=1.0)
