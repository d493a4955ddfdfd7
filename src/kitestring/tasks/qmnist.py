"""MNIST by its real writers: each of the 836 people who wrote the digits is a user.

The images are MNIST (LeCun, Bottou, Bengio, Haffner 1998; commonly stated CC BY-SA 3.0), the
writers come from QMNIST's extended labels (Yadav and Bottou 2019; BSD licence): 539 writers of the
training set and 297 others of the test set.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, partial
from typing import TYPE_CHECKING

import numpy as np

from kitestring.errors import DataError
from kitestring.tasks.fetch import Source, read
from kitestring.tasks.metrics import accuracy
from kitestring.tasks.task import Array, Plan, Task
from kitestring.tasks.users import Columns, Split, Users, deal, split_rows

if TYPE_CHECKING:
    from torch import nn

POOL = 0.1
MIRROR = "https://ossci-datasets.s3.amazonaws.com/mnist/"
LABELS = "https://raw.githubusercontent.com/facebookresearch/qmnist/master/"
IMAGES = {
    "train": Source(
        "MNIST training images",
        MIRROR + "train-images-idx3-ubyte.gz",
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "mnist/train-images-idx3-ubyte.gz",
    ),
    "test": Source(
        "MNIST test images",
        MIRROR + "t10k-images-idx3-ubyte.gz",
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "mnist/t10k-images-idx3-ubyte.gz",
    ),
}
WRITERS = {
    "train": Source(
        "QMNIST training labels",
        LABELS + "qmnist-train-labels-idx2-int.gz",
        "bb1b6e1ec7b04fd5696f1ed50b5f58f8ef195118edd5c93c81783df9740b8ac5",
        "qmnist-writers/qmnist-train-labels-idx2-int.gz",
    ),
    "test": Source(
        "QMNIST test labels",
        LABELS + "qmnist-test-labels-idx2-int.gz",
        "92d0ccb8c25f9c6534270fb4be7e1d24a1c6d315edfc8a638bfbd31c70f362dd",
        "qmnist-writers/qmnist-test-labels-idx2-int.gz",
    ),
}


def task(users: int | None = None) -> Task:
    """The 836 writers (or the first `users` of a shuffle); x uint8 [n, 1, 28, 28], y int64 [n]."""
    writers = list(_rows())
    if users is not None:
        if not 2 <= users <= len(writers):
            raise DataError(f"{users} users", "qmnist", f"Give 2 to {len(writers)}")
        order = np.random.default_rng(0).permutation(len(writers))[:users]
        writers = [writers[i] for i in sorted(order)]
    pool, devices = deal(len(writers), POOL)
    names = [f"writer {number} ({half} set)" for half, number in writers]
    return Task(
        name="qmnist",
        users=Users(names, partial(_load, tuple(writers)), pool, devices),
        small=_small,
        large=_large,
        metric=accuracy,
        plan=Plan(
            local_epochs=6,
            rounds=3,
            lr=(0.05, 0.1, 0.2),
            cloud_epochs=5,
            cloud_lr=(0.0005, 0.001, 0.002),
        ),
        about="MNIST's handwritten digits, each of its 836 real writers a user (writers from "
        "QMNIST's labels). Which digit is it?",
        request="one image",
        notes=(
            "The writers are real. A writer's rows are shuffled into train, validation and test: "
            "the digits are about equally frequent for everybody, only the hands differ.",
        ),
    )


def _small() -> nn.Module:
    from torch import nn

    from kitestring.tasks.layers import Scale

    front = nn.Sequential(
        Scale(),
        nn.Conv2d(1, 8, 5, stride=2),
        nn.ReLU(),
        nn.Conv2d(8, 16, 5, stride=2),
        nn.ReLU(),
        nn.Flatten(),
    )
    model = nn.Sequential()
    model.add_module("front", front)
    model.add_module("back", nn.Linear(256, 10))
    return model


def _large() -> nn.Module:
    from torch import nn

    from kitestring.tasks.layers import Scale

    return nn.Sequential(
        Scale(),
        nn.Conv2d(1, 32, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.4),
        nn.Linear(64 * 7 * 7, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def _idx(raw: bytes) -> Array:
    """An IDX file: two zero bytes, the type, the number of axes, their sizes, the values."""
    kind, axes = raw[2], raw[3]
    shape = np.frombuffer(raw, ">i4", axes, 4)
    dtype = {0x08: "u1", 0x0C: ">i4"}[kind]
    return np.frombuffer(raw, dtype, offset=4 + 4 * axes).reshape(shape)


@cache
def _labels(half: str) -> Array:
    """[images, 8]: the class, the hsf series, the writer, ...; one row per MNIST image, in order.

    QMNIST's test set goes on after MNIST's 10,000; those further images are not in MNIST."""
    labels = _idx(read(WRITERS[half]))
    return labels[:60_000] if half == "train" else labels[:10_000]


@cache
def _images(half: str) -> Array:
    return _idx(read(IMAGES[half]))


@cache
def _rows() -> Mapping[tuple[str, int], Array]:
    """(half, writer) -> the numbers of their images in that half."""
    rows = {}
    for half in ("train", "test"):
        writer = _labels(half)[:, 2]
        order = np.argsort(writer, kind="stable")
        numbers, starts = np.unique(writer[order], return_index=True)
        for number, index in zip(numbers, np.split(order, starts[1:]), strict=True):
            rows[half, int(number)] = index
    return rows


def _load(writers: tuple[tuple[str, int], ...], user: int) -> Mapping[Split, Columns]:
    half, number = writers[user]
    index = _rows()[half, number]
    y = _labels(half)[index, 0].astype(np.int64)
    return split_rows({"x": _images(half)[index][:, None], "y": y}, seed=number)
