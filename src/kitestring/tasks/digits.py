"""Handwritten digits of made-up writers: quick, and without a download.

The images are scikit-learn's bundled `load_digits`: 1,797 digits of 8 x 8 pixels from the UCI
"Optical Recognition of Handwritten Digits" data (Alpaydin and Kaynak 1998, CC BY 4.0). They carry
no writers, so the users are made up: each has a style (slant, size, stroke, noise) and favourite
digits.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kitestring.errors import DataError
from kitestring.tasks.metrics import accuracy
from kitestring.tasks.task import Array, Plan, Task
from kitestring.tasks.users import SPLITS, Columns, Split, Users, deal

if TYPE_CHECKING:
    from torch import nn

USERS = 120
POOL = 0.25
SIDE = 16  # twice the original: a rotation or a thicker stroke shows
CLASSES = 10
SHARES = {"train": 0.5, "validation": 0.2, "test": 0.3}  # of the originals, and of a user's rows


def task(users: int | None = None) -> Task:
    """120 made-up writers (or `users`); x uint8 [n, 1, 16, 16], y int64 [n]."""
    count = USERS if users is None else users
    if count < 2:
        raise DataError(f"{count} users", "digits", "Give 2 or more: one for the pool, one device")
    pool, devices = deal(count, POOL)
    load = partial(_load, frozenset(pool))
    names = [f"writer {i + 1}" for i in range(count)]
    return Task(
        name="digits",
        users=Users(names, load, pool, devices),
        small=_small,
        large=_large,
        metric=accuracy,
        plan=Plan(lr=(0.01, 0.03, 0.1), cloud_epochs=30, cloud_lr=(0.001, 0.002, 0.004)),
        about="Handwritten digits (UCI, bundled with scikit-learn), given to made-up writers who "
        "differ in handwriting and in which digits they write. Which digit is it?",
        request="one image",
        notes=(
            "The writers are made up: their rotation, shear, size, stroke width, noise and "
            "favourite digits are drawn at random. Only the original images are real.",
            "No original image is in two of train, validation and test, nor both in the pool and "
            "on a device; two devices may hold the same one in the same split, drawn differently.",
        ),
    )


def _small() -> nn.Module:
    from torch import nn

    from kitestring.tasks.layers import Scale

    model = nn.Sequential()
    front = nn.Sequential(Scale(), nn.Flatten(), nn.Linear(SIDE * SIDE, 16), nn.ReLU())
    model.add_module("front", front)
    model.add_module("back", nn.Linear(16, CLASSES))
    return model


def _large() -> nn.Module:
    from torch import nn

    from kitestring.tasks.layers import Scale

    return nn.Sequential(
        Scale(),
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(64 * (SIDE // 4) ** 2, 192),
        nn.ReLU(),
        nn.Linear(192, CLASSES),
    )


@cache
def _originals() -> tuple[Array, Array]:
    """Images [1797, 8, 8] in 0..1 and their classes [1797].

    Read from the file in scikit-learn, since importing it takes a second."""
    found = find_spec("sklearn")
    homes = found.submodule_search_locations if found else None
    file = Path(homes[0], "datasets", "data", "digits.csv.gz") if homes else None
    if file is not None and file.is_file():
        table = np.loadtxt(file, delimiter=",")
    else:
        from sklearn.datasets import load_digits

        bunch: Any = load_digits()
        table = np.column_stack([bunch.data, bunch.target])
    return table[:, :-1].reshape(-1, 8, 8) / 16.0, table[:, -1].astype(np.int64)


@cache
def originals(pooled: bool, split: Split) -> tuple[Array, ...]:
    """Numbers of the original images that this side may use for this split, by class.

    Every original belongs to one side and one split only, so nothing leaks through a copy."""
    _, y = _originals()
    order = np.random.default_rng(0).permutation(len(y))
    edge = round(POOL * len(y))
    mine = order[:edge] if pooled else order[edge:]
    cuts = np.rint(np.cumsum([SHARES[s] for s in SPLITS])[:-1] * len(mine)).astype(int)
    part = np.split(mine, cuts)[SPLITS.index(split)]
    return tuple(part[y[part] == c] for c in range(CLASSES))


def chosen(pooled: bool, user: int) -> dict[Split, Array]:
    """The originals that a user writes in their own way, by split."""
    rng = np.random.default_rng([1, user])
    rows = int(np.clip(rng.lognormal(np.log(36), 0.3), 20, 60))
    taste = rng.dirichlet(np.full(CLASSES, 0.5))
    result: dict[Split, Array] = {}
    for split in SPLITS:
        counts = rng.multinomial(max(1, round(SHARES[split] * rows)), taste)
        of_class = originals(pooled, split)
        picks = [
            rng.choice(mine, n, replace=n > len(mine))
            for mine, n in zip(of_class, counts, strict=True)
        ]
        result[split] = rng.permutation(np.concatenate(picks))
    return result


@lru_cache(maxsize=1000)  # some 15 MB: each split is asked for by itself
def _load(pool: frozenset[int], user: int) -> Mapping[Split, Columns]:
    images, y = _originals()
    rng = np.random.default_rng([2, user])
    draw = partial(_draw, _style(rng), rng)
    return {
        split: {"x": np.stack([draw(images[i]) for i in index])[:, None], "y": y[index]}
        for split, index in chosen(user in pool, user).items()
    }


def _style(rng: np.random.Generator) -> dict[str, float]:
    return {
        "angle": rng.normal(0, 0.35),  # radians
        "shear": rng.normal(0, 0.25),
        "size": rng.uniform(0.85, 1.15),
        "squeeze": rng.uniform(0.8, 1.2),
        "stroke": rng.uniform(-0.6, 1.0),  # below 0 thinner, above 0 thicker
        "noise": rng.uniform(0, 0.12),
    }


def _draw(style: Mapping[str, float], rng: np.random.Generator, image: Array) -> Array:
    """One original [8, 8] in 0..1 in a user's hand, never twice the same: uint8 [16, 16]."""
    from scipy import ndimage

    angle = style["angle"] + rng.normal(0, 0.06)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    slant = np.array([[1, 0], [style["shear"], 1]])
    stretch = np.diag([style["squeeze"], 1 / style["squeeze"]])
    back = turn @ slant @ stretch * (image.shape[0] / SIDE / style["size"])
    middle = (np.array(image.shape) - 1) / 2
    offset = middle - back @ (np.full(2, (SIDE - 1) / 2) + rng.normal(0, 0.5, 2))
    ink = ndimage.affine_transform(image, back, offset, (SIDE, SIDE), order=1)
    if style["stroke"] > 0:
        ink += style["stroke"] * (ndimage.grey_dilation(ink, (3, 3)) - ink)
    else:
        ink += style["stroke"] * (ink - ndimage.grey_erosion(ink, (2, 2)))
    ink += rng.normal(0, style["noise"], ink.shape)
    pixels: Array = np.rint(np.clip(ink, 0, 1) * 255).astype(np.uint8)
    return pixels
