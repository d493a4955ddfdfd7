"""Trees, ragged rows and lanes: the small pieces that everything is made of."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kitestring.core import KINDS, Lane, Message, Rows, Tree

FLOATS = ("float16", "float32", "float64")


@pytest.mark.parametrize("dtype", FLOATS)
def test_arithmetic_keeps_each_leafs_dtype(dtype: str) -> None:
    """Dyadic numbers, exact in every dtype."""
    tree = Tree(a=np.array([[1, 2], [3, 4]], dtype), b=np.array([5, 6], np.float32))
    for other in (0.5, np.float64(0.5), np.array([0.5, 0.5]), Tree(a=np.float64(0.5), b=0.5)):
        for result, wanted in ((tree + other, 1.5), (tree - other, 0.5), (tree * other, 0.5)):
            assert result["a"].dtype == dtype
            assert result["b"].dtype == np.float32
            assert result["a"][0, 0] == wanted
    assert isinstance(tree + tree, Tree)
    assert (tree + tree)["a"].tolist() == [[2, 4], [6, 8]]


def test_one_number_for_each_device_is_spread_over_its_leaves() -> None:
    """Also where a leaf is as wide as there are devices: the first axis is the devices'."""
    tree = Tree(square=np.ones((2, 2)), deep=np.ones((2, 3, 1)), flat=np.ones(2))
    scaled = tree * np.array([1.0, 10.0])
    assert scaled["square"].tolist() == [[1, 1], [10, 10]]
    assert scaled["deep"][1].tolist() == [[10], [10], [10]]
    assert scaled["flat"].tolist() == [1, 10]


def test_picking_and_renaming() -> None:
    tree = Tree({"front.w": 1, "front.b": 2, "back.w": 3})
    assert tree.pick("front.") == {"front.w": 1, "front.b": 2}
    assert tree.pick("front.b", "back.") == {"front.b": 2, "back.w": 3}
    assert tree.pick("front.").below("front.") == {"w": 1, "b": 2}
    assert Tree(w=1).inside("front.") == {"front.w": 1}


# --- ragged rows against plain lists: device d's rows are model[d]

Model = list[list[int]]


@st.composite
def models(draw: Any, devices: int | None = None) -> Model:
    d = devices or draw(st.integers(1, 4))
    row = st.lists(st.integers(0, 999), max_size=5)
    return draw(st.lists(row, min_size=d, max_size=d))  # type: ignore[no-any-return]


def rows(model: Model, extra: int = 0, inner: tuple[int, ...] = (2,)) -> Rows:
    """Each number repeated in an inner axis; the padding is NaN."""
    n = np.array([len(r) for r in model])
    values = np.full((len(model), max(1, int(n.max())) + extra, *inner), np.nan)
    for d, r in enumerate(model):
        for i, number in enumerate(r):
            values[d, i] = number
    return Rows(values, n)


def model(rows: Rows) -> Model:
    return [[int(v.flat[0]) for v in rows.values[d, :n]] for d, n in enumerate(rows.n)]


@given(models(), st.integers(0, 3), st.sampled_from([(), (2,), (2, 3)]))
def test_rows_hold_what_a_list_holds(m: Model, extra: int, inner: tuple[int, ...]) -> None:
    made = rows(m, extra, inner)
    assert made.mask().sum(1).tolist() == [len(r) for r in m]
    if all(inner):
        assert np.isfinite(made.values[made.mask()]).all()


@given(models(), st.integers(0, 3), st.randoms())
def test_keep(m: Model, extra: int, dice: Any) -> None:
    """Where padding is chosen too: it is no row."""
    made = rows(m, extra)
    chosen = np.array([[dice.random() < 0.5 for _ in d] for d in made.values[..., 0]])
    kept = made.keep(chosen)
    assert model(kept) == [
        [v for v, c in zip(r, chosen[d], strict=False) if c] for d, r in enumerate(m)
    ]
    assert kept.values.shape[1] == max(1, kept.n.max())
    assert np.isfinite(kept.values[kept.mask()]).all()


@given(st.integers(1, 4).flatmap(lambda d: st.tuples(models(d), models(d))), st.integers(0, 3))
def test_concat(both: tuple[Model, Model], extra: int) -> None:
    a, b = both
    joined = rows(a, extra).concat(rows(b))
    assert model(joined) == [x + y for x, y in zip(a, b, strict=True)]
    assert np.isfinite(joined.values[joined.mask()]).all()


@given(models(), st.integers(0, 3), st.randoms())
def test_take(m: Model, extra: int, dice: Any) -> None:
    """Up to six rows of each device, with repetition; none of a device that has none."""
    n = np.array([dice.randint(0, 6) if r else 0 for r in m])
    index = np.array([[dice.randrange(len(r)) if r else 0 for _ in range(6)] for r in m])
    taken = rows(m, extra).take(index, n)
    assert model(taken) == [[r[i] for i in index[d, : n[d]]] for d, r in enumerate(m)]


@given(models())
def test_the_padding_never_matters(m: Model) -> None:
    a, b = rows(m, 3), rows(m, 3)
    b.values[~b.mask()] = 7
    odd = np.arange(a.values.shape[1])[None] % 2 == np.ones((len(m), 1))
    for one, other in ((a.keep(odd), b.keep(odd)), (a.concat(a), b.concat(b))):
        assert model(one) == model(other)


# --- what may cross


def test_a_lane_lets_through_what_it_names() -> None:
    lane = Lane(down={"features": ("h",)}, up={"scalars": ("n",), "data": ("x", "y")})
    assert lane.allows("down", "features", "h")
    assert not lane.allows("up", "features", "h")
    assert lane.allows("up", "data", "y")
    assert not lane.allows("up", "data", "z")
    assert not lane.allows("up", "parameters", "w")


@pytest.mark.parametrize("kind", KINDS)
def test_only_parameters_may_be_named_by_a_pattern(kind: Any) -> None:
    lane = Lane(up={kind: ("front.*", "*")})
    assert lane.allows("up", kind, "anything") == (kind == "parameters")
    lane = Lane(up={"parameters": ("front.*",)})
    assert lane.allows("up", "parameters", "front.w")
    assert not lane.allows("up", "parameters", "back.w")
    assert not lane.allows("up", "parameters", "Front.w")


def test_a_messages_leaves_in_order() -> None:
    message = Message(scalars=Tree(n=1), data=Tree(x=2), features=Tree(h=3))
    assert list(message.leaves()) == [("data", "x", 2), ("features", "h", 3), ("scalars", "n", 1)]
