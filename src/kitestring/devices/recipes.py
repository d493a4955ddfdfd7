"""What `fit` refuses: settings and trees that make no sense, told before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite

import numpy as np

from kitestring.core import Array, Recipe, Rows, Tree
from kitestring.errors import TaskError, unknown

OPTIMISERS = ("sgd", "adam")


def check(
    program: str,
    trainable: Sequence[str],
    weights: Tree,
    rows: Mapping[str, Rows],
    recipe: Recipe,
    centre: Tree | None,
    linear: Tree | None,
) -> tuple[str, ...]:
    """Once for a fit, at its edge; what computes it may rely on it. `trainable`: the program's
    weights that gradients may change. Gives those that this recipe trains."""
    where = f"fit of program {program!r}"
    if recipe.optimiser not in OPTIMISERS:
        raise unknown("optimiser", recipe.optimiser, OPTIMISERS)
    for name, fine, mend in _numbers(recipe):
        if not fine:
            raise TaskError(f"{name} is {getattr(recipe, name)!r}", where, mend)
    _prefixes(trainable, recipe.train, where)
    trained = tuple(name for name in trainable if name.startswith(tuple(recipe.train)))
    shapes = {name: weights[name].shape for name in trained}
    _shapes(shapes, "centre", centre or {}, where)
    _shapes(shapes, "linear", linear or {}, where)
    _lengths(rows, where)
    return trained


def _numbers(recipe: Recipe) -> list[tuple[str, bool, str]]:
    """Setting, whether it is fine, and what would be."""
    r = recipe
    slow = r.momentum == 0 or r.optimiser == "sgd"
    return [
        ("lr", isfinite(r.lr) and r.lr > 0, "Give a number above 0"),
        ("epochs", r.epochs >= 1 and r.epochs == int(r.epochs), "Give a whole number from 1"),
        ("batch", r.batch >= 1 and r.batch == int(r.batch), "Give a whole number from 1"),
        ("momentum", 0 <= r.momentum < 1, "Give a number from 0 to below 1"),
        ("momentum", slow, f"Leave it at 0: {r.optimiser} has its own; or take sgd"),
        ("decay", isfinite(r.decay) and r.decay >= 0, "Give 0 or a number above"),
        ("clip", r.clip is None or r.clip > 0, "Give a number above 0, or None"),
        ("mu", isfinite(r.mu) and r.mu >= 0, "Give 0 or a number above"),
    ]


def _prefixes(trainable: Sequence[str], train: Sequence[str], where: str) -> None:
    if isinstance(train, str) or not train:
        mend = 'Give a tuple of prefixes, ("",) for all weights'
        raise TaskError(f"train is {train!r}", where, mend)
    for prefix in train:
        if not any(name.startswith(prefix) for name in trainable):
            what = f"train names {prefix!r}, and no trainable weight begins so"
            raise TaskError(what, where, f"Trainable: {', '.join(trainable) or 'none'}")


def _shapes(
    wanted: Mapping[str, tuple[int, ...]], what: str, tree: Mapping[str, Array], where: str
) -> None:
    for name, leaf in tree.items():
        if name not in wanted:
            mend = f"Trained: {', '.join(wanted)}"
            raise TaskError(f"{what} names {name!r}, which is not trained", where, mend)
        if np.shape(leaf) != wanted[name]:
            mend = f"Give {wanted[name]}, as its weight"
            raise TaskError(f"{what} {name!r} is {np.shape(leaf)}", where, mend)


def _lengths(rows: Mapping[str, Rows], where: str) -> None:
    """Else a device would train on what lies behind its own rows."""
    (first, column), *others = rows.items()
    for name, other in others:
        if not np.array_equal(other.n, column.n):
            what = f"columns {first!r} and {name!r} have different numbers of rows"
            raise TaskError(what, where, "Give every device as many rows of each column")
