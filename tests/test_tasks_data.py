"""The tasks that come with Kitestring, on their real data: sizes, splits, and nothing leaked."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kitestring.apps.assistant import routellm, shakespeare
from kitestring.apps.livestream import tvsum
from kitestring.apps.recommender import movielens
from kitestring.errors import DataError
from kitestring.tasks import digits, qmnist
from kitestring.tasks.metrics import auc, rmse
from kitestring.tasks.recorded import from_csv
from kitestring.tasks.task import Recorded, Task
from kitestring.tasks.users import SPLITS, Users

LEARNING: dict[str, Callable[..., Task]] = {
    "digits": digits.task,
    "qmnist": qmnist.task,
    "movielens": movielens.task,
    "shakespeare": shakespeare.task,
}
RECORDED: dict[str, Callable[..., Recorded]] = {"tvsum": tvsum.task, "routellm": routellm.task}


@pytest.fixture(params=[*LEARNING, *RECORDED])
def any_task(request: pytest.FixtureRequest) -> Task | Recorded:
    if request.param != "digits":  # the only one that needs no download
        request.getfixturevalue("data")
    return (LEARNING | RECORDED)[request.param]()


@pytest.fixture(params=list(LEARNING))
def learning(request: pytest.FixtureRequest) -> Task:
    if request.param != "digits":
        request.getfixturevalue("data")
    return LEARNING[request.param]()


def every(users: Users) -> list[Any]:
    return [users.load(i) for i in range(len(users.names))]


def test_pool_and_devices_share_nobody(any_task: Task | Recorded) -> None:
    users = any_task.users
    assert sorted([*users.pool, *users.devices]) == list(range(len(users.names)))
    assert len(set(users.names)) == len(users.names)


def test_rows_are_whole_and_the_same_every_time(any_task: Task | Recorded) -> None:
    users = any_task.users
    kinds = set()
    for i, splits in enumerate(every(users)):
        assert set(splits) == set(SPLITS)
        for split, columns in splits.items():
            assert len({len(a) for a in columns.values()}) == 1
            assert len(columns["y"]) > 0, (users.names[i], split)
            kinds.add(tuple((name, a.dtype.str, a.shape[1:]) for name, a in columns.items()))
            if i < 3:
                again = users.load(i)[split]
                assert all(np.array_equal(a, again[name]) for name, a in columns.items())
    assert len(kinds) == 1


@pytest.mark.parametrize("name", [*LEARNING, *RECORDED])
def test_fewer_users(name: str, request: pytest.FixtureRequest) -> None:
    if name != "digits":
        request.getfixturevalue("data")
    factory = (LEARNING | RECORDED)[name]
    assert len(factory(users=12).users.names) == 12
    for wrong in (0, -1):
        with pytest.raises(DataError, match="users"):
            factory(users=wrong)


def test_models_give_logits_and_can_be_split(learning: Task) -> None:
    import torch

    rows = learning.users.load(0)["train"]
    x = torch.from_numpy(rows["x"][:3])
    small, large = learning.small().eval(), learning.large().eval()
    front, back = small.get_submodule("front"), small.get_submodule("back")
    logits = small(x)
    assert logits.shape[:-1] == rows["y"][:3].shape
    assert large(x).shape == logits.shape
    assert rows["y"].max() < logits.shape[-1]
    torch.testing.assert_close(back(front(x)), logits)


def test_small_models_train_stacked(learning: Task) -> None:
    """Two devices at once under vmap have the gradients that each has alone."""
    import torch
    from torch.func import functional_call, grad, stack_module_state, vmap

    models = [learning.small() for _ in range(2)]
    weights, _ = stack_module_state(models)
    rows = [learning.users.load(i)["train"] for i in learning.users.devices[:2]]
    n = min(2, *(len(r["y"]) for r in rows))
    x, y = (torch.from_numpy(np.stack([r[c][:n] for r in rows])) for c in ("x", "y"))

    def loss(w: Any, x: Any, y: Any) -> Any:
        out = functional_call(models[0], w, (x,)).flatten(0, -2)
        return torch.nn.functional.cross_entropy(out, y.flatten(), ignore_index=-1)

    stacked = vmap(grad(loss))(weights, x, y)
    for d in range(2):
        alone = grad(loss)({k: v[d].detach() for k, v in weights.items()}, x[d], y[d])
        for name, g in alone.items():
            torch.testing.assert_close(stacked[name][d], g, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["movielens", "shakespeare"])
def test_later_positions_are_not_seen(name: str, data: Path) -> None:
    import torch

    learning = LEARNING[name]()
    assert learning.asks == "last"

    x = torch.from_numpy(learning.users.load(0)["train"]["x"][-1:]).clone()
    changed = x.clone()
    changed[:, -1] = changed[:, -1] % 60 + 1
    assert not torch.equal(x, changed)
    for model in (learning.small().eval(), learning.large().eval()):
        torch.testing.assert_close(model(x)[:, :-1], model(changed)[:, :-1])
        assert not torch.equal(model(x)[:, -1], model(changed)[:, -1])


def test_digits_leak_nothing() -> None:
    """No original image is in two splits, or on both sides of the pool; 1,797 is scikit-learn's."""
    parts = [np.concatenate(digits.originals(p, s)) for p in (True, False) for s in SPLITS]
    assert sorted(np.concatenate(parts).tolist()) == list(range(1797))
    users = digits.task().users
    used: dict[tuple[bool, str], set[int]] = {}
    for i in range(len(users.names)):
        pooled = i in users.pool
        for split, index in digits.chosen(pooled, i).items():
            assert set(index.tolist()) <= set(np.concatenate(digits.originals(pooled, split)))
            used.setdefault((pooled, split), set()).update(index.tolist())
    for a, b in itertools.combinations(used.values(), 2):
        assert not a & b


def test_digits_sizes() -> None:
    """120 users of 20 to 60 rows, 25 % of them in the pool: what the task's docstring promises."""
    users = digits.task().users
    assert (len(users.pool), len(users.devices)) == (30, 90)
    sizes = [sum(len(c["y"]) for c in splits.values()) for splits in every(users)]
    assert min(sizes) >= 19  # parts are rounded one by one
    assert max(sizes) <= 61
    x = users.load(0)["train"]["x"]
    assert x.shape[1:] == (1, 16, 16)
    assert x.dtype == np.uint8
    assert x.max() > 200


def test_qmnist_sizes(data: Path) -> None:
    """539 + 297 writers and 70,000 images: QMNIST's own labels; at least 8 images each: counted."""
    users = qmnist.task().users
    assert sum("train set" in name for name in users.names) == 539
    assert sum("test set" in name for name in users.names) == 297
    assert len(users.pool) == 84  # 10 % of 836
    loaded = every(users)
    sizes = [sum(len(c["y"]) for c in splits.values()) for splits in loaded]
    assert sum(sizes) == 70_000
    assert min(sizes) == 8
    truths = np.concatenate([c["y"] for splits in loaded for c in splits.values()])
    assert np.bincount(truths)[1] == 6742 + 1135  # the ones in MNIST's two halves


def test_movielens_sizes(data: Path) -> None:
    """943 people, 1,682 films, 100,000 ratings, 20 to 737 each: the dataset's README and u.info."""
    users = movielens.task().users
    assert (len(users.pool), len(users.devices)) == (283, 660)  # 30 % of 943
    sizes, items = [], set()
    for splits in every(users):
        train, check, test = (splits[s] for s in SPLITS)
        assert np.array_equal(train["y"] < 0, train["x"] == 0)
        items |= set(np.concatenate([train["x"], train["y"]]).ravel().tolist())
        items |= {int(check["y"][0, -1]), int(test["y"][0, -1])}
        # The first film is only ever asked from; the last two are the truths held out.
        sizes.append(1 + int((train["y"] > 0).sum()) + 2)
        held_out = {int(check["y"][0, -1]), int(test["y"][0, -1])}
        assert len(held_out) == 2
        assert not held_out & set(np.concatenate([train["x"], train["y"]]).ravel().tolist())
        assert int(test["y"][0, -1]) not in check["x"]
        assert test["x"][0, -1] == check["y"][0, -1]
        assert np.array_equal(test["x"][0, -2:0:-1], check["x"][0, :1:-1])
    assert sum(sizes) == 100_000
    assert (min(sizes), max(sizes)) == (20, 737)
    assert len(items - {0, -1}) == 1682


def test_shakespeare_sizes(data: Path) -> None:
    """513 roles: counted by this module's rule; another regular expression counts a few more."""
    task = shakespeare.task()
    users = task.users
    assert len(users.names) == 513
    assert len(users.pool) == 103  # 20 %
    assert len({name.split(":")[0] for name in users.names}) == 37  # plays; 5 files are poems
    assert not any("SCENE" in name or "ACT " in name for name in users.names)
    for splits in every(users):
        for split in ("validation", "test"):
            assert len(splits[split]["y"]) <= 100
        assert len(splits["train"]["y"]) <= 36  # 60 % of 60 windows
        for columns in splits.values():
            assert np.array_equal(columns["x"][:, 1:], columns["y"][:, :-1])


def test_shakespeare_splits_share_no_text(data: Path) -> None:
    """The windows' places in a role's text, recovered from where they were cut."""
    texts = shakespeare._texts()
    for name, text in itertools.islice(texts.items(), 0, None, 50):
        marked = np.arange(len(text))  # the place of a character instead of the character
        cut = shakespeare._split(marked)
        seen = [
            set(np.concatenate([c["x"].ravel(), c["y"].ravel()]).tolist()) for c in cut.values()
        ]
        assert not any(a & b for a, b in itertools.combinations(seen, 2)), name


def test_tvsum_sizes(data: Path) -> None:
    """50 videos of 20 raters, marks 1 to 5 (the dataset's README)."""
    marks = tvsum.marks()
    assert len(marks) == 50
    assert all(len(m) == 20 for m in marks.values())
    assert {float(v) for m in marks.values() for v in np.unique(m)} == {1, 2, 3, 4, 5}
    task = tvsum.task()
    truth = [np.concatenate([c["y"] for c in splits.values()]) for splits in every(task.users)]
    # The top 15 %: whole shots, and ties at the cut are all highlights.
    assert all(0.14 <= y.mean() < 0.22 for y in truth)
    assert len(task.cloud) == sum(len(y) for y in truth)


@pytest.mark.parametrize(("raters", "expected"), [(1, 0.70), (2, 0.76), (3, 0.80), (5, 0.83)])
def test_tvsum_more_raters_agree_more(data: Path, raters: int, expected: float) -> None:
    """The AUC of the cloud's raters alone: figures first measured by another script than this."""
    scores = []
    for seed in range(10):
        task = tvsum.task(raters=raters, seed=seed)
        for splits in every(task.users):
            x, y = (np.concatenate([splits[s][c] for s in SPLITS]) for c in ("x", "y"))
            scores.append(auc.score(task.cloud[x], y))
    assert np.mean(scores) == pytest.approx(expected, abs=0.02)


def test_routellm_shares(data: Path) -> None:
    """1,319 questions; weak .6384, strong .8567, either .9287: counted in the published file."""
    recorded = routellm.responses()
    assert len(recorded.questions) == 1319
    assert recorded.weak.mean() == pytest.approx(0.6384, abs=5e-5)
    assert recorded.strong.mean() == pytest.approx(0.8567, abs=5e-5)
    assert np.maximum(recorded.weak, recorded.strong).mean() == pytest.approx(0.9287, abs=5e-5)
    task = routellm.task()
    assert (len(task.users.pool), len(task.users.devices)) == (13, 31)  # 30 % of 44
    loaded = every(task.users)
    asked = np.concatenate([c["x"] for splits in loaded for c in splits.values()])
    assert sorted(asked.tolist()) == list(range(1319))
    rows = loaded[0]["test"]
    right = task.metric.score(task.cloud[rows["x"]], rows["y"])
    assert right == pytest.approx(recorded.strong[rows["x"]].mean())
    assert task.cost is not None
    assert 0 < task.cost.min() < task.cost.max() < 0.05  # dollars


def test_routellm_confidence_comes_from_the_pool(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the devices' weak models answered has no influence on their confidence."""
    recorded = routellm.responses()
    task = routellm.task()
    own = np.concatenate([c["x"] for i in task.users.devices for c in task.users.load(i).values()])
    weak = recorded.weak.copy()
    weak[own] = 1 - weak[own]
    changed = routellm.Responses(recorded.questions, weak, recorded.strong, recorded.cost)
    monkeypatch.setattr(routellm, "responses", lambda: changed)
    other = routellm.task()
    for i in task.users.devices:
        before, after = task.users.load(i)["test"], other.users.load(i)["test"]
        assert np.array_equal(before["confidence"], after["confidence"])
        assert np.array_equal(before["device"], 1 - after["device"])


HEADER = "sample,user,device,confidence,cloud,truth,cost\n"
LABELS = HEADER + "".join(
    f"q{i},{'ann' if i < 4 else 'bob'},{'cat' if i % 2 else 'dog'},0.{i},cat,dog,0.01\n"
    for i in range(8)
)


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "log.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_csv_of_labels(tmp_path: Path) -> None:
    task = from_csv(written(tmp_path, LABELS))
    assert task.name == "log"
    assert list(task.users.names) == ["ann", "bob"]
    assert list(task.users.devices) == [0, 1]
    rows = [c for i in range(2) for c in task.users.load(i).values()]
    device, x, y = (np.concatenate([r[c] for r in rows]) for c in ("device", "x", "y"))
    assert device.dtype == np.float32
    assert device.shape == (8, 2)
    assert sorted(x.tolist()) == list(range(8))
    assert task.metric.score(device, y) == 0.5
    assert task.metric.score(task.cloud[x], y) == 0
    assert task.cost is not None
    assert task.cost.shape == (8,)


def test_csv_of_digits_is_one_of_labels(tmp_path: Path) -> None:
    lines = "".join(f"{i},u,{i},1,3,3\n" for i in range(5))
    task = from_csv(written(tmp_path, "sample,user,device,confidence,cloud,truth\n" + lines))
    assert task.cloud.shape == (5, 5)
    assert task.cost is None


def test_csv_of_scores(tmp_path: Path) -> None:
    lines = "".join(f"{i},u,{i}.5,1,2,{i % 2},0\n" for i in range(6))
    task = from_csv(written(tmp_path, HEADER + lines), metric=auc, name="mine")
    assert task.name == "mine"
    assert task.cloud.tolist() == [2] * 6


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        (LABELS.replace(",truth,", ",truht,"), 1, "no column 'truth'.*Is it 'truht'"),
        (LABELS.replace("sample,", "user,"), 1, "no column 'sample'"),
        (LABELS.replace("0.2", "nan"), 4, "'confidence' is nan"),
        (LABELS.replace("0.2", "high"), 4, "'confidence' is not a number: 'high'"),
        (LABELS.replace("0.2", ""), 4, "'confidence' is empty"),
        (LABELS.replace("q3", "q1"), 5, "sample 'q1' is also on line 3"),
        (LABELS.replace("q7,bob", "q7,eve"), 9, "user 'eve' has 1 rows"),
        (LABELS.replace("q3,ann", "q3,ann,x"), 5, "not 7 cells"),
        (HEADER, None, "no rows"),
        ("", 1, "no column 'sample'"),
    ],
)
def test_csv_that_cannot_be_used(tmp_path: Path, text: str, line: int | None, what: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(DataError, match=what) as error:
        from_csv(path)
    assert error.value.where == (f"{path}:{line}" if line else str(path))
    assert "\n" not in str(error.value)


def test_csv_of_words_under_a_metric_of_numbers(tmp_path: Path) -> None:
    lines = "".join(f"{i},u,{'x' if i == 2 else i},1,2,{i},0\n" for i in range(6))
    with pytest.raises(DataError, match="'device' is not a number: 'x'"):
        from_csv(written(tmp_path, HEADER + lines), metric=rmse)


def test_csv_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read"):
        from_csv(tmp_path / "none.csv")
    (tmp_path / "latin.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="UTF-8"):
        from_csv(tmp_path / "latin.csv")
