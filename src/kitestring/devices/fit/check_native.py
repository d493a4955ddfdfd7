"""Compiled code on trial: before its first use it is compared with one device after the other.

Two devices are tried, one with half the rows of the other, so that padding shows if it is seen.
An empty answer means that they agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from kitestring.core import Array, Recipe, Rows, Tree
from kitestring.devices.fit import sequential
from kitestring.devices.fit.programs import Program
from kitestring.devices.fit.stopwatch import Stopwatch
from kitestring.devices.schedule import schedule

if TYPE_CHECKING:
    from kitestring.devices.fit.compiled.run import Code

BLOCK, _FEW = 32, 8  # rows evaluated at a time: few where there are no more than twice that
_OTHER = "compiled code gives other numbers"


def native(watch: Stopwatch) -> Code | None:
    """A place for compiled code; None without llvmlite."""
    if find_spec("llvmlite") is None:
        return None
    from kitestring.devices.fit.compiled.run import Code

    return Code(watch)


def batch(n: Array, most: int) -> int:
    """Rows of a step that code is compiled for: `most`, or the next power of two where devices have
    fewer."""
    return min(most, 1 << max(0, int(n.max(initial=1)) - 1).bit_length())


def block(n: Array, together: bool = False) -> int:
    """The same for an evaluation; `together`: all rows are one device's."""
    return _FEW if (n.sum() if together else n.max(initial=1)) <= 2 * _FEW else BLOCK


def shared(weights: Mapping[str, Array]) -> bool:
    """All devices have the same."""
    return all(len(a) == 1 or a.strides[0] == 0 for a in weights.values())


def _two(weights: Tree, rows: Mapping[str, Rows], most: int) -> tuple[Tree, dict[str, Rows]]:
    """Two devices with the first weights, and rows of the device that has most of them."""
    n = next(iter(rows.values())).n
    d = int(np.argmax(n))
    count = min(most, int(n[d]))
    few = np.array([count, (count + 1) // 2])
    heads = {}
    for name, r in rows.items():
        flat, start = r.flat
        heads[name] = Rows.lying(flat, np.array([start[d], start[d]]), few)
    own = Tree({k: np.broadcast_to(a[:1], (2, *a.shape[1:])) for k, a in weights.items()})
    return own, heads


def _alike(a: Mapping[str, Any], b: Mapping[str, Any], share: float = 1.0) -> bool:
    """At least that share of numbers agrees, in every array."""
    for name, expected in b.items():
        room = 1e-3 * np.abs(expected).max(initial=0) + 1e-5
        near = np.isclose(a[name], expected, rtol=1e-3, atol=room, equal_nan=True)
        if not near.mean() >= share and near.size:
            return False
    return True


def fit(
    code: Code | None, program: Program, weights: Tree, rows: Mapping[str, Rows], recipe: Recipe
) -> str:
    assert code is not None
    own, heads = _two(weights, rows, recipe.batch)
    n = next(iter(heads.values())).n
    if not n[0]:
        return ""
    once, seeds = replace(recipe, epochs=1), np.arange(2, dtype=np.uint64)
    a = code.fit(program, own, heads, once, seeds=seeds)
    plan = schedule(seeds, n, recipe.batch, 1, recipe.shuffle)
    b = sequential.fit(program, own, heads, plan, once, seeds=seeds)
    # Adam makes whole steps of a gradient that is rounding error only: some weights may differ.
    share = 0.8 if recipe.optimiser == "adam" else 1.0
    good = _alike(a.parameters, b.parameters, share)
    return "" if good and _alike({"loss": a.loss}, {"loss": b.loss}) else _OTHER


def predict(
    code: Code | None, program: Program, weights: Tree, rows: Mapping[str, Rows], block: int
) -> str:
    assert code is not None
    own, heads = _two(weights, rows, BLOCK)
    first = next(iter(heads.values()))
    if not first.n[0]:
        return ""
    a = code.predict(program, own, heads, block)
    b = sequential.predict(program, own, {k: _wide(r) for k, r in heads.items()})
    real = first.mask()
    one, other = ({k: v[real] for k, v in found.items()} for found in (a, b))
    return "" if _alike(one, other) else _OTHER


def backward(
    code: Code | None,
    program: Program,
    weights: Tree,
    rows: Mapping[str, Rows],
    cotangent: Mapping[str, Rows] | None,
    block: int,
) -> str:
    assert code is not None
    own, both = _two(
        weights, {**rows, **{f"by:{k}": r for k, r in (cotangent or {}).items()}}, BLOCK
    )
    heads = {k: r for k, r in both.items() if not k.startswith("by:")}
    cot = {k[3:]: r for k, r in both.items() if k.startswith("by:")} or None
    first = next(iter(heads.values()))
    if not first.n[0]:
        return ""
    real = first.mask()
    share = real.astype(np.float32)
    a = code.backward(program, own, heads, cot, Rows(share, first.n), block)
    zeroed = {k: r.values for k, r in cot.items()} if cot else None
    b = sequential.backward(program, own, {k: _wide(r) for k, r in heads.items()}, zeroed, share)
    one, other = ({k: v[real] for k, v in found[2].items()} for found in (a, b))
    return "" if _alike(a[1], b[1]) and _alike(one, other) else _OTHER


def _wide(rows: Rows) -> Array:
    """Values whose padding is the device's first row."""
    real = rows.mask()
    values = rows.values
    mask = real.reshape(real.shape + (1,) * (values.ndim - 2))
    return np.where(mask, values, values[:, :1])
