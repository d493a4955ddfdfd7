"""Next-item recommendation on MovieLens-100K: one person is one device.

943 people, 1,682 films, 100,000 ratings in time order (Harper and Konstan 2015, ACM TiiS 5(4)).
Licence: research use; no redistribution and no commercial use without permission, so the file
comes from GroupLens and nothing of it is bundled.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, partial
from typing import TYPE_CHECKING

import numpy as np

from kitestring.errors import DataError
from kitestring.tasks.fetch import Source, read
from kitestring.tasks.metrics import hit_at_10, ndcg_at_10
from kitestring.tasks.task import Array, Plan, Task
from kitestring.tasks.users import Columns, Split, Users, deal

if TYPE_CHECKING:
    from torch import nn

POOL = 0.3
ITEMS = 1682
LENGTH = 20  # items that a model sees
RATINGS = Source(
    "MovieLens-100K",
    "https://files.grouplens.org/datasets/movielens/ml-100k.zip",
    "06416e597f82b7342361e41163890c81036900f418ad91315590814211dca490",
    "ml-100k/u.data",
    members="*/u.data",
)


def task(users: int | None = None) -> Task:
    """The 943 people (or the first `users` of a fixed shuffle).

    x int64 [n, 20]: item ids 1..1682 in time order, 0 for padding on the left.
    y int64 [n, 20]: the id of the next item, which is also its place in the logits; -1 is ignored.
    Leave one out: a person's last item is the test, the one before it the validation."""
    people = np.arange(1, len(_sequences()) + 1)
    if users is not None:
        if not 2 <= users <= len(people):
            raise DataError(f"{users} users", "movielens", f"Give 2 to {len(people)}")
        people = np.sort(np.random.default_rng(0).permutation(people)[:users])
    pool, devices = deal(len(people), POOL)
    names = [f"person {number}" for number in people]
    return Task(
        name="movielens",
        users=Users(names, partial(_load, tuple(people.tolist())), pool, devices),
        small=_small,
        large=_large,
        metric=ndcg_at_10,
        others=(hit_at_10,),
        asks="last",
        plan=Plan(
            local_epochs=6,
            rounds=3,
            batch=8,
            optimiser="adam",
            lr=(0.001, 0.003, 0.01),
            cloud_epochs=16,
            cloud_lr=(0.002, 0.004, 0.008),
            gift=6,
        ),
        about="MovieLens-100K, each of its 943 people a device. Which of the 1,682 films does a "
        "person rate next? Ranked among all films, leave one out.",
        request="one next film",
        notes=(
            "Full ranking: figures are not comparable with those ranked among 99 sampled items.",
            "Nobody rates a film twice, and a device alone knows no films but its own: alone it "
            "does no better than chance.",
            "Films already rated stay in the ranking. One test request per person: differences "
            "between two persons mean nothing, only means over persons do.",
        ),
    )


def _small() -> nn.Module:
    from torch import nn

    from kitestring.tasks.layers import Past

    model = nn.Sequential()
    front = nn.Sequential(nn.Embedding(ITEMS + 1, 16), Past(8), nn.Linear(8 * 16, 16), nn.Tanh())
    model.add_module("front", front)
    model.add_module("back", nn.Linear(16, ITEMS + 1))
    return model


def _large() -> nn.Module:
    from kitestring.tasks.layers import Transformer

    return Transformer(
        ITEMS + 1, LENGTH, width=64, heads=2, blocks=2, dropout=0.3, padding=True, tied=True
    )


@cache
def _sequences() -> Mapping[int, Array]:
    """Person -> item ids in time order, ties by id."""
    # Lines: person, item, stars, seconds. That a film was rated counts, not how many stars it got.
    table = np.array(read(RATINGS).split(), np.int64).reshape(-1, 4)
    table = table[np.lexsort((table[:, 1], table[:, 3], table[:, 0]))]
    people, starts = np.unique(table[:, 0], return_index=True)
    return dict(zip(people.tolist(), np.split(table[:, 1], starts[1:]), strict=True))


def _load(people: tuple[int, ...], user: int) -> Mapping[Split, Columns]:
    items = _sequences()[people[user]]
    return {
        "train": _windows(items[:-2]),
        "validation": _last(items[:-1]),
        "test": _last(items),
    }


def _windows(items: Array) -> dict[str, Array]:
    """Consecutive windows that hold each item but the first once as a truth, in time order."""
    rows = -(-(len(items) - 1) // LENGTH)
    x, y = np.zeros(rows * LENGTH, np.int64), np.full(rows * LENGTH, -1, np.int64)
    x[-(len(items) - 1) :], y[-(len(items) - 1) :] = items[:-1], items[1:]
    return {"x": x.reshape(rows, LENGTH), "y": y.reshape(rows, LENGTH)}


def _last(items: Array) -> dict[str, Array]:
    """One window whose only truth is the last item."""
    x, y = np.zeros((1, LENGTH), np.int64), np.full((1, LENGTH), -1, np.int64)
    seen = items[:-1][-LENGTH:]
    x[0, LENGTH - len(seen) :], y[0, -1] = seen, items[-1]
    return {"x": x, "y": y}
