"""Golden inputs and outputs: what each graph gave where it was made, it must give here.

A runtime that is silently wrong on some device is found before it answers anybody. Inputs are drawn
rows, nobody's own, with the weights that the package brings; of large outputs a spread of numbers
is kept. Of training it is the *change* of a weight that is held against the maker's: it is small
beside the weight, and a wrong gradient would hide in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from kitestring import dice
from kitestring.core import Array, Recipe, Rows, Tree
from kitestring.devices.runtime.graph import About
from kitestring.devices.session import Primitives, broadcast, frozen
from kitestring.errors import PackageError

TOLERANCE = 1e-3
"""Of a leaf's largest value; float32 on other hardware stays some hundred times below."""
CHANGE = 1e-2
"""The same, of the largest change of a weight by training."""
ROUNDED, ROUNDED_CHANGE = 2e-2, 1e-1
"""The same two where activations are rounded to 8 bits. One that lies between two steps goes to the
one here and to the other elsewhere, which is 1/127 of the largest number of its row at most, and
what comes after it may be off by a step or two for that. Wrong sums are off by far more. The change
of a weight in training is of few rows, and so is off by more."""
_FLOOR = 1e-5  # of a weight: changes below are float error
_MOST = 1024  # numbers kept of an output


@dataclass(frozen=True)
class Golden:
    """One call of a primitive on the package's own weights. `rows` and `out` are by name."""

    primitive: str
    program: str
    rows: Mapping[str, Array]
    recipe: Recipe | None = None
    centre: tuple[str, ...] = ()
    linear: tuple[str, ...] = ()
    cotangents: Mapping[str, Array] = field(default_factory=dict)
    out: Mapping[str, Array] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return f"{self.primitive} of {self.program}"


@dataclass(frozen=True)
class Checked:
    """How far a call was from what it should give: the worst output, relative to its tolerance."""

    label: str
    output: str
    error: float
    tolerance: float


def outputs(golden: Golden, compute: Primitives, weights: Tree) -> dict[str, Array]:
    """What `compute` makes of the inputs with the program's first `weights` [1, ...], thinned
    out."""
    rows = {k: _one(a) for k, a in golden.rows.items()}
    if golden.primitive == "predict":
        predicted = compute.predict(golden.program, weights, rows)
        return {k: _thin(v.values[0]) for k, v in predicted.items()}
    if golden.primitive == "fit":
        assert golden.recipe is not None
        centre = Tree({k: weights[k] * np.float32(0.9) for k in golden.centre}) or None
        linear = Tree({k: np.tanh(weights[k]) * np.float32(0.1) for k in golden.linear}) or None
        key = dice.keys(0, np.zeros(1, np.int64), 0, "golden")
        fit = compute.fit(
            golden.program, weights, rows, golden.recipe, centre=centre, linear=linear, key=key
        )
        changes = {k: np.asarray(a)[0] - weights[k][0] for k, a in fit.parameters.items()}
        return {"loss": fit.loss, **{f"change {k}": _thin(a) for k, a in changes.items()}}
    by = {k: _one(a) for k, a in golden.cotangents.items()} or None
    loss, slope, back = compute.backward(golden.program, weights, rows, cotangent=by)
    found = {"loss": loss, **{f"slope {k}": _thin(a[0]) for k, a in slope.items()}}
    return {**found, **{f"column {k}": _thin(r.values[0]) for k, r in back.items()}}


def first(compute: Primitives, program: str) -> Tree:
    """A program's first weights as one device has them, and nobody can write to."""
    return broadcast(frozen(compute.initial(program)), 1)


def _one(a: Array) -> Rows:
    return Rows(a[None], np.array([len(a)]))


def _thin(a: Array) -> Array:
    flat = np.asarray(a).reshape(-1)
    return flat[:: max(1, -(-len(flat) // _MOST))].copy()


def check(
    goldens: Sequence[Golden], compute: Primitives, abouts: Sequence[About] = ()
) -> list[Checked]:
    """The worst output of each. Raises `PackageError` for the one that is furthest off, if any is
    further than it may be. `abouts`: of the graphs, which say whether they round activations."""
    rounding = {(about.call, about.program) for about in abouts if about.rounds}
    found = [_worst(g, compute, (g.primitive, g.program) in rounding) for g in goldens]
    bad = [c for c in found if not c.error <= c.tolerance]
    if bad:
        worst = max(bad, key=_share)
        what = (
            f"{worst.label} does not give its golden outputs here: {worst.output} is off by "
            f"{worst.error:.1e} of its largest value, and {worst.tolerance:g} is allowed"
        )
        mend = "This runtime computes something else than the package's maker: do not use it"
        raise PackageError(what, "golden outputs", mend)
    return found


def _worst(golden: Golden, compute: Primitives, rounds: bool) -> Checked:
    weights = first(compute, golden.program)
    # The second time a runtime may have built the weights into its graph.
    times = 2 if golden.primitive == "predict" else 1
    return max(
        (_off(golden, outputs(golden, compute, weights), weights, rounds) for _ in range(times)),
        key=_share,
    )


def _off(golden: Golden, have: Mapping[str, Array], weights: Tree, rounds: bool) -> Checked:
    if have.keys() != golden.out.keys():
        odd = sorted(have.keys() ^ golden.out.keys())
        raise PackageError(f"{golden.label} differs in outputs: {odd[0]}", "golden outputs")
    errors, (value, change) = [], (ROUNDED, ROUNDED_CHANGE) if rounds else (TOLERANCE, CHANGE)
    for name, wanted in golden.out.items():
        changed = name.startswith("change ")
        floor = _FLOOR * _largest(weights[name.removeprefix("change ")]) if changed else 0.0
        allowed = change if changed else value
        errors.append(Checked(golden.label, name, _far(have[name], wanted, floor), allowed))
    return max(errors, key=_share)


def _share(c: Checked) -> float:
    return np.inf if np.isnan(c.error) else c.error / c.tolerance


def _largest(a: Array) -> float:
    return float(np.abs(a).max(initial=0.0))


def _far(a: Array, b: Array, floor: float) -> float:
    if a.shape != b.shape:
        return float("inf")
    if not np.issubdtype(b.dtype, np.floating):
        return float(np.any(a != b))
    scale = _largest(b) + floor
    return float(np.abs(a - b).max(initial=0.0)) / (scale or 1.0)


def pack(goldens: Sequence[Golden]) -> tuple[list[dict[str, Any]], dict[str, Array]]:
    """As JSON, and as named arrays."""
    listed, arrays = [], dict[str, Array]()
    for i, g in enumerate(goldens):
        recipe = None if g.recipe is None else asdict(g.recipe)
        listed.append(
            {"primitive": g.primitive, "program": g.program, "recipe": recipe,
             "centre": list(g.centre), "linear": list(g.linear)}
        )  # fmt: skip
        for part in ("rows", "cotangents", "out"):
            arrays |= {
                f"{i}.{part}.{k}": np.ascontiguousarray(a) for k, a in getattr(g, part).items()
            }
    return listed, arrays


def unpack(listed: Sequence[Mapping[str, Any]], arrays: Mapping[str, Array]) -> list[Golden]:
    """The inverse of `pack`. Raises `ValueError`, among others, for what is not its like."""
    found = []
    for i, one in enumerate(listed):
        parts = {
            part: {
                k.removeprefix(f"{i}.{part}."): a
                for k, a in arrays.items()
                if k.startswith(f"{i}.{part}.")
            }
            for part in ("rows", "cotangents", "out")
        }
        recipe = one["recipe"]
        if recipe is None and one["primitive"] == "fit":
            raise ValueError(f"golden {i} is a fit without a recipe")
        if recipe is not None:
            recipe = Recipe(**{**recipe, "train": tuple(recipe["train"])})
        found.append(
            Golden(
                one["primitive"],
                one["program"],
                parts["rows"],
                recipe,
                tuple(one["centre"]),
                tuple(one["linear"]),
                parts["cotangents"],
                parts["out"],
            )
        )
    return found
