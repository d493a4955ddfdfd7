"""Next-character prediction for the roles of Shakespeare's plays: each role is a device.

The text is public domain; the 42 files are those of martin-gorner/tensorflow-rnn-shakespeare (the
repository: Apache-2.0). A role in one play with ten speeches or more is a user. This is not the
LEAF benchmark's Shakespeare, which cuts other texts into other roles.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from functools import cache, partial
from typing import TYPE_CHECKING

import numpy as np

from kitestring.errors import DataError
from kitestring.tasks.fetch import Source, read_all
from kitestring.tasks.metrics import accuracy, perplexity
from kitestring.tasks.task import Array, Plan, Task
from kitestring.tasks.users import Columns, Split, Users, deal

if TYPE_CHECKING:
    from torch import nn

POOL = 0.2
LENGTH = 40  # characters that a model sees
WINDOWS = 60  # of a role at most, over all splits
SCORED = 16  # windows of a role in validation, and in test, at most
SPEECHES = 10  # of a role at least
ALPHABET = "\n !&'(),-.:;?" + string.ascii_letters
IDS = len(ALPHABET) + 1  # the last is any other character
PLAYS = Source(
    "Shakespeare's plays",
    "https://github.com/martin-gorner/tensorflow-rnn-shakespeare/archive/refs/heads/master.tar.gz",
    "38a758ea83851e1e08a7b489890b551e6b150ca71e2eecc2a57677de986623f9",
    "shakespeare-plays/shakespeare.tar.gz",
    members="*shakespeare/*.txt",
)


def task(users: int | None = None) -> Task:
    """All roles with ten speeches or more (or the first `users` of a fixed shuffle).

    x int64 [n, 40]: character ids 0..65, 65 for a rare one; y int64 [n, 40]: the next character.
    A role's text is cut in time: the first 60 % trains, the next 20 % validates, the rest tests."""
    roles = list(_texts())
    if users is not None:
        if not 2 <= users <= len(roles):
            raise DataError(f"{users} users", "shakespeare", f"Give 2 to {len(roles)}")
        order = np.random.default_rng(0).permutation(len(roles))[:users]
        roles = [roles[i] for i in sorted(order)]
    pool, devices = deal(len(roles), POOL)
    return Task(
        name="shakespeare",
        users=Users(roles, partial(_load, tuple(roles), frozenset(pool)), pool, devices),
        small=_small,
        large=_large,
        server=_server,
        metric=accuracy,
        others=(perplexity,),
        asks="last",
        plan=Plan(
            local_epochs=6,
            rounds=3,
            optimiser="adam",
            lr=(0.0005, 0.0015, 0.005),
            cloud_epochs=5,
            cloud_batch=16,
            cloud_lr=(0.0005, 0.001, 0.002),
            gift=12,
        ),
        about="What the roles of Shakespeare's plays say, each role a device. Which character "
        "comes next?",
        request="one next character",
        notes=(
            "A role's last lines are the test: no text is in two splits.",
            "Test windows overlap, so that a short role has enough requests; a request is only the "
            "character after a window.",
            "Roles of one play share a story and its names, and may be on both sides of the pool.",
        ),
    )


def _small() -> nn.Module:
    from torch import nn

    from kitestring.tasks.layers import Past

    front = nn.Sequential(nn.Embedding(IDS, 16), Past(8), nn.Linear(8 * 16, 64), nn.ReLU())
    model = nn.Sequential()
    model.add_module("front", front)
    model.add_module("back", nn.Linear(64, IDS))
    return model


def _server() -> nn.Module:
    from torch import nn

    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, IDS))


def _large() -> nn.Module:
    from kitestring.tasks.layers import Transformer

    return Transformer(IDS, LENGTH, width=96, heads=4, blocks=2, dropout=0.1, past=8)


@cache
def _texts() -> Mapping[str, Array]:
    """\"play: ROLE\" -> the character ids of all its speeches, in order."""
    found = {}
    for file, content in sorted(read_all(PLAYS).items()):
        for role, speeches in _speeches(content.decode("ascii")).items():
            text = "\n".join(speeches)
            # A test part shorter than one window could not ask anything.
            if len(speeches) >= SPEECHES and 0.2 * len(text) > LENGTH + 1:
                found[f"{file.removesuffix('.txt')}: {role}"] = text[: WINDOWS * LENGTH + 1]
    code = {c: i for i, c in enumerate(ALPHABET)}
    return {r: np.array([code.get(c, IDS - 1) for c in t], np.int64) for r, t in found.items()}


def _speeches(play: str) -> Mapping[str, list[str]]:
    """Role -> its speeches. A speech is capitals, a tab, and lines until an empty one.

    The list of persons before the first act and the headings of scenes have the same form and are
    left out, as are stage directions in brackets."""
    roles: dict[str, list[str]] = {}
    start = re.search(r"^\s*ACT I\b", play, re.MULTILINE)
    body = re.sub(r"\[[^\]]*\]", "", play[start.start() :]) if start else ""
    for role, speech in re.findall(r"^([A-Z][A-Z ,.'-]+)\t((?:.+\n?)+)", body, re.MULTILINE):
        if role.startswith(("ACT ", "SCENE ")):
            continue
        lines = [line.strip() for line in speech.splitlines()]
        roles.setdefault(role.strip(), []).append("\n".join(line for line in lines if line))
    return roles


def _load(roles: tuple[str, ...], pool: frozenset[int], user: int) -> Mapping[Split, Columns]:
    """Nobody is served in the pool, so windows there do not overlap."""
    return _split(_texts()[roles[user]], LENGTH if user in pool else None)


def _split(text: Array, stride: int | None = None) -> Mapping[Split, Columns]:
    """Cut in time before windows are, so that no window reaches into another split."""
    train, check = round(0.6 * len(text)), round(0.8 * len(text))
    return {
        "train": _windows(text[:train], LENGTH),
        "validation": _windows(text[train:check], stride),
        "test": _windows(text[check:], stride),
    }


def _windows(text: Array, stride: int | None = None) -> dict[str, Array]:
    """Windows [n, 40] of x, and of y one character later; without a stride about 16 of them."""
    room = len(text) - LENGTH
    if stride is None:
        stride = -(-room // SCORED)
    index = np.arange(0, room, stride)[:, None] + np.arange(LENGTH)
    return {"x": text[index], "y": text[index + 1]}
