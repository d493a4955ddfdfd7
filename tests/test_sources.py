"""Users from arrays, dicts, folders and tables; dealing users and cutting rows."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kitestring.collaborate.parameters.fedavg import FedAvg
from kitestring.comparison.jobs import Bench, Job, work
from kitestring.devices.profiles import profile
from kitestring.errors import DataError, SettingError
from kitestring.tasks.metrics import hit_at_10, ndcg_at_10, perplexity
from kitestring.tasks.sources import (
    users_from_arrays,
    users_from_dict,
    users_from_folder,
    users_from_table,
)
from kitestring.tasks.task import Task
from kitestring.tasks.users import SPLITS, Users, deal, split_rows
from kitestring.tasks.validate import validate
from told import told


def pair(rows: int, start: int = 0) -> tuple[Any, Any]:
    """x [rows, 2], in which every number is another, and y [rows]."""
    x = np.arange(2 * rows, dtype=np.float64).reshape(rows, 2) + start
    return x, np.arange(rows) % 3


def whole(users: Users, i: int) -> np.ndarray[Any, Any]:
    """All of a user's x, sorted."""
    rows = users.load(i)
    return np.sort(np.concatenate([rows[s]["x"] for s in SPLITS]).ravel())


# Dealing and cutting


@given(st.integers(3, 200), st.integers(0, 9), st.floats(0, 1), st.floats(0, 1))
def test_rows_are_cut_completely_and_once(n: int, seed: int, train: float, check: float) -> None:
    columns = {"x": np.arange(n), "y": np.arange(n) * 10}
    parts = split_rows(columns, seed, (train, check * (1 - train)))
    assert tuple(parts) == SPLITS
    assert all(len(part["x"]) for part in parts.values())
    assert all((part["y"] == part["x"] * 10).all() for part in parts.values())
    assert sorted(np.concatenate([part["x"] for part in parts.values()])) == list(range(n))


@given(st.integers(2, 200), st.floats(0, 0.9), st.integers(0, 9))
def test_users_are_dealt_completely_and_once(count: int, share: float, seed: int) -> None:
    pool, devices = deal(count, share, seed)
    assert sorted(pool + devices) == list(range(count))
    assert len(pool) == (max(1, round(share * count)) if share else 0)
    assert (pool, devices) == deal(count, share, seed)


def test_dealing_refuses_what_is_no_share() -> None:
    with told(DataError, "a pool of 1 of the users", mend="[0, 1)"):
        deal(3, 1.0)


# Arrays and dicts


def test_arrays_row_by_row() -> None:
    x = np.arange(24, dtype=np.float64).reshape(12, 2)
    who = [7, 30, 7, 30, 7, 30, 7, 30, 7, 30, 7, 30]
    users = users_from_arrays(x, [True, False] * 6, who, pool=0.5)
    assert users.names == ["7", "30"]  # as numbers, not as texts
    assert sorted([*users.pool, *users.devices]) == [0, 1]
    assert whole(users, 0).tolist() == sorted(x[::2].ravel())
    rows = users.load(0)["train"]
    assert (rows["x"].dtype, rows["y"].dtype) == (np.float32, np.int64)
    assert rows["y"].all()


def test_number_types() -> None:
    for given_type, kept in [
        (np.float16, np.float32), (np.float64, np.float32), (np.int8, np.int64),
        (np.uint16, np.int64), (bool, np.int64), (np.uint8, np.uint8),
    ]:  # fmt: skip
        users = users_from_dict({"a": (np.ones((4, 2), given_type), np.ones(4, np.uint8))})
        row = users.load(0)["test"]
        assert (row["x"].dtype, row["y"].dtype) == (kept, np.int64)


def test_a_user_keeps_its_rows_when_others_come_or_go() -> None:
    few = users_from_dict({"b": pair(9)})
    more = users_from_dict({"a": pair(9), "b": pair(9)})
    for split in SPLITS:
        assert (few.load(0)[split]["x"] == more.load(1)[split]["x"]).all()
    first, other = (more.load(i)["train"]["x"] for i in (0, 1))
    assert not (first == other).all()
    again = users_from_dict({"b": pair(9)}, seed=1).load(0)["train"]["x"]
    assert not (few.load(0)["train"]["x"] == again).all()


def test_users_travel_to_other_processes() -> None:
    for users in (
        users_from_dict({"a": pair(9), "b": pair(9)}),
        users_from_arrays(*pair(8), ["a", "b"] * 4),
    ):
        copied = pickle.loads(pickle.dumps(users))
        assert (whole(copied, 1) == whole(users, 1)).all()


def test_small_users() -> None:
    rows = {"ann": pair(2), "bob": pair(5), "eve": pair(3)}
    with told(DataError, "2 rows", where="user 'ann'", mend="min_rows=3"):
        users_from_dict(rows)
    users = users_from_dict(rows, min_rows=4)
    assert users.names == ["bob"]
    assert users.notes == ("2 of 3 users have fewer than 4 rows and are left out.",)
    with told(DataError, "no user has 9 rows"):
        users_from_dict(rows, min_rows=9)
    with told(SettingError, "min_rows is 2", mend="3 or more"):
        users_from_dict(rows, min_rows=2)
    users = users_from_arrays(*pair(8), ["a"] * 6 + ["b"] * 2, min_rows=3)
    assert users.names == ["a"]
    assert whole(users, 0).tolist() == list(range(12))


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ({"a": 3}, "not a pair (x, y)"),
        ({"a": (np.ones((3, 1)), np.ones(4))}, "x has 3 rows and y has 4"),
        ({"a": ([[1], [2, 3], [4]], [1, 2, 3])}, "x is ragged"),
        ({"a": (["p", "q", "r"], [1, 2, 3])}, "x holds <U1, not numbers"),
        ({"a": (np.ones(3), [None, 1, 2])}, "y holds object, not numbers"),
        ({"a": (np.ones(3), 1)}, "y is one value"),
    ],
)
def test_what_a_pair_gets_wrong(rows: Any, said: str) -> None:
    with told(DataError, said, where="user 'a'"):
        users_from_dict(rows)


def test_what_user_ids_get_wrong() -> None:
    with told(DataError, "user has shape (3,) for 4 rows", mend="one id per row"):
        users_from_arrays(*pair(4), [1, 2, 3])
    for ids in ([1.0, np.nan, 1.0, 1.0], ["a", None, "a", "a"]):
        with told(DataError, "1 rows have no user"):
            users_from_arrays(*pair(4), np.array(ids, object if None in ids else None))


# Folders


def test_a_folder_is_read_when_asked(tmp_path: Path) -> None:
    for name in ("ann", "bob"):
        x, y = pair(5)
        np.savez(tmp_path / f"{name}.npz", x=x, y=y, more=y)
    (tmp_path / "zoe.csv").write_text("a,b,y\n" + "1,2.5,0\n3,4,1\n" * 3)
    (tmp_path / "readme.txt").write_text("not a user")
    users = users_from_folder(tmp_path, target="y", pool=0)
    assert users.names == ["ann", "bob", "zoe"]
    assert whole(users, 0).tolist() == list(range(10))
    assert users.load(2)["train"]["x"].shape == (4, 2)
    assert users.load(2)["train"]["y"].dtype == np.int64
    assert pickle.loads(pickle.dumps(users)).load(2)
    (tmp_path / "bob.npz").write_bytes(b"rubbish")
    with told(DataError, "cannot read the file", where="bob.npz", mend="np.savez"):
        users.load(1)
    (tmp_path / "bob.npz").unlink()
    with told(DataError, "No such file", where="bob.npz"):
        users.load(1)


def test_small_users_of_a_folder(tmp_path: Path) -> None:
    for name, rows in (("ann", 2), ("bob", 4)):
        np.savez(tmp_path / f"{name}.npz", **dict(zip("xy", pair(rows), strict=True)))
    users = users_from_folder(tmp_path)
    with told(DataError, "2 rows", where="user 'ann'", mend="min_rows"):
        users.load(0)
    users = users_from_folder(tmp_path, min_rows=3)
    assert users.names == ["bob"]
    assert users.notes
    assert len(whole(users, 0)) == 8


def test_what_a_folder_gets_wrong(tmp_path: Path) -> None:
    with told(DataError, "no such folder", where="nowhere"):
        users_from_folder(tmp_path / "nowhere")
    with told(DataError, "no .npz and no .csv files", where=str(tmp_path)):
        users_from_folder(tmp_path)
    (tmp_path / "a.csv").write_text("x,y\n")
    with told(DataError, "not a folder", where="a.csv"):
        users_from_folder(tmp_path / "a.csv")
    with told(SettingError, "no target column", mend="target=NAME"):
        users_from_folder(tmp_path)
    with told(DataError, "no rows", where="a.csv"):
        users_from_folder(tmp_path, target="y").load(0)
    (tmp_path / "a.npz").write_bytes(b"")
    with told(DataError, "two files of user 'a'"):
        users_from_folder(tmp_path, target="y")


def test_what_an_archive_gets_wrong(tmp_path: Path) -> None:
    def load(**arrays: Any) -> None:
        np.savez(tmp_path / "a.npz", **arrays)
        users_from_folder(tmp_path).load(0)

    with told(DataError, "no array 'y', it holds x, z", where="a.npz"):
        load(x=np.ones(3), z=np.ones(3))
    with told(DataError, "allow_pickle", where="a.npz", mend="numbers only"):
        load(x=np.ones(3), y=np.array([1, "a", None], object))
    with told(DataError, "x has 3 rows and y has 4", where="a.npz"):
        load(x=np.ones(3), y=np.ones(4))
    np.save(tmp_path / "b.npy", np.ones(3))
    (tmp_path / "b.npy").rename(tmp_path / "a.npz")
    with told(DataError, "one array, not an archive"):
        users_from_folder(tmp_path).load(0)
    (tmp_path / "a.npz").write_bytes(b"")
    with told(DataError, "cannot read the file"):
        users_from_folder(tmp_path).load(0)


# Tables of numbers


def test_a_table(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    lines = [f"{'ab'[i % 2]},{i},{i / 2},{i % 3}" for i in range(12)]
    path.write_text("who,p,q,goal\n" + "\n".join(lines))
    users = users_from_table(path, "who", "goal")
    assert users.names == ["a", "b"]
    train = users.load(0)["train"]
    assert (train["x"].shape, train["y"].dtype) == ((4, 2), np.int64)
    assert (train["x"][:, 0] == 2 * train["x"][:, 1]).all()
    users = users_from_table(path, "who", "q", columns=["p"], classes=False)
    assert users.load(0)["train"]["x"].shape == (4, 1)
    assert users.load(0)["train"]["y"].dtype == np.float32
    with told(DataError, "column 'q' is 0.5, not a class number", where="t.csv:3", mend="classes="):
        users_from_table(path, "who", "q")
    with told(SettingError, "unknown column 'gaol'", "Did you mean 'goal'?", where="t.csv"):
        users_from_table(path, "who", "gaol")
    with told(SettingError, "user and target"):
        users_from_table(path, "who", "who")
    with told(DataError, "column 'who' is a, not a number", where="t.csv:2", mend="columns="):
        users_from_table(path, "p", "goal")
    with told(DataError, "no columns for x"):
        users_from_table(path, "who", "goal", columns=[])
    path.write_text("who,p,y\na,1,0\n,1,0\n")
    with told(DataError, "column 'who' is empty", where="t.csv:3"):
        users_from_table(path, "who", "y")
    for cell in ("", "nan", "inf", "1e99"):
        path.write_text(f"who,p,y\na,{cell},0\n")
        with told(DataError, f"column 'p' is {cell or 'empty'}", where="t.csv:2"):
            users_from_table(path, "who", "y")


# One interface: ranking and the next token


def _items() -> Any:
    from torch import nn

    return nn.Sequential(nn.Embedding(13, 8), nn.Linear(8, 13))


def _served(task: Task, tmp_path: Path) -> dict[str, Any]:
    bench = Bench(task, profile("phone"), "auto", 0.0)
    job = Job("fedavg", 0, 0, "test", tmp_path / "job.sqlite")
    return work(bench, job, FedAvg(rounds=4, epochs=4, batch=4, lr=1.0), lambda done: None)


def test_ranking_and_next_token_fit_the_interface(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = {}
    for user in range(6):
        starts = rng.integers(1, 13, 10)[:, None]
        line = (starts + np.arange(7)) % 12 + 1  # the next item is always one more
        rows[f"user {user}"] = (line[:, :-1], line[:, 1:])
    metrics = (hit_at_10, perplexity)
    users = users_from_dict(rows)
    task = Task("next", users, _items, _items, ndcg_at_10, others=metrics, asks="last")
    assert validate(task)[0].startswith("Only 5 device users")
    result = _served(task, tmp_path)
    assert result["score"] > 0.9
    assert np.mean(result["others"]["HR@10"]) > 0.9
    assert np.mean(result["others"]["perplexity"]) < 4
