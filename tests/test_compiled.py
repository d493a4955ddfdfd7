"""Compiled code against plain `nn.Module` and `torch.optim`, one device after the other.

Float error: agreement within 1e-4 of a leaf's largest value after a few steps in float32; modules
drawn at random agreed within 5e-6 nearly always, and within 5e-5 where a LogSoftmax of convolutions
makes gradients of very different sizes.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tiny
from drawn_modules import draw
from kitestring.arrays import Touched
from kitestring.core import Recipe, Rows, Tree
from kitestring.devices.fit.compute import TorchCompute
from kitestring.devices.fit.programs import Program
from kitestring.errors import TaskError
from modules import devices, keys, program
from told import told

NEAR = 1e-4


def lying(columns: dict[str, Any], n: list[int]) -> dict[str, Rows]:
    """Rows of devices one after the other in one array."""
    start = np.cumsum([0, *n[:-1]])
    return {k: Rows.lying(np.ascontiguousarray(a), start, np.array(n)) for k, a in columns.items()}


def near(a: Any, b: Any, room: float = NEAR) -> bool:
    size = np.nanmax(np.abs(b), initial=0)
    return np.allclose(a, b, rtol=0, atol=room * size + 1e-6, equal_nan=True)


RAGGED = given(
    st.integers(0, 400),
    st.lists(st.integers(0, 25), min_size=2, max_size=4),
    st.sampled_from([Recipe(0.02, 1, 10), Recipe(0.02, 2, 4, shuffle=False)]),
)


@settings(max_examples=4)
@RAGGED
def test_random_modules_on_ragged_devices(seed: int, n: list[int], recipe: Recipe) -> None:
    held_against_torch(seed, n, recipe)


@pytest.mark.slow
@settings(max_examples=80)
@RAGGED
def test_many_random_modules(seed: int, n: list[int], recipe: Recipe) -> None:
    held_against_torch(seed, n, recipe)


def held_against_torch(seed: int, n: list[int], recipe: Recipe) -> None:
    drawn, draws = draw(seed), np.random.default_rng(seed)
    made = Program("p", drawn.module, drawn.loss)
    rows = lying(drawn.columns(max(1, sum(n)), draws), n)
    weights = Tree(
        {
            k: np.stack([a + draws.normal(0, 0.01, a.shape).astype(a.dtype) for _ in n])
            for k, a in made.initial().items()
        }
    )
    native, plain = TorchCompute({"p": made}, "compiled"), TorchCompute({"p": made}, "sequential")
    found, wanted = (c.fit("p", weights, rows, recipe, key=keys(len(n))) for c in (native, plain))
    assert all(near(found.parameters[k], a) for k, a in wanted.parameters.items()), drawn.about
    assert near(found.loss, wanted.loss)
    x = {"x": rows["x"]}
    real = rows["x"].mask()
    said, meant = (c.predict("p", wanted.parameters, x) for c in (native, plain))
    assert all(near(said[k].values[real], r.values[real]) for k, r in meant.items()), drawn.about
    assert "other numbers" not in native.explain("p")


@pytest.mark.parametrize("cut", [True, False])
@pytest.mark.parametrize("kind", ["mlp", "norm", "embedding", "attention"])
def test_gradients_of_weights_and_columns(kind: str, cut: bool) -> None:
    n = [5, 0, 33]
    made, weights, rows = devices(kind, n)
    native, plain = TorchCompute({"p": made}, "compiled"), TorchCompute({"p": made}, "sequential")
    draws = np.random.default_rng(1)
    more: dict[str, Any] = {"row_weights": draws.random((3, 33), np.float32)}
    if cut:
        values = draws.normal(0, 1, (3, 33, 3)).astype(np.float32)
        more = {"cotangent": {"out": Rows(values, np.array(n))}}
    (a, da, xa), (b, db, xb) = (c.backward("p", weights, rows, **more) for c in (native, plain))
    assert native.explain("p") == "compiled"
    assert near(a, b)
    assert all(near(da[k], g) for k, g in db.items())
    real = rows["x"].mask()
    assert all(near(xa[k].values[real], g.values[real]) for k, g in xb.items())


class Apply(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.weight = name, nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return getattr(torch, self.name)(x) + 0 * self.weight  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("exp", -100, 88), ("log", 1e-38, 1e38), ("log1p", -0.999, 50), ("expm1", -20, 80),
        ("tanh", -12, 12), ("sigmoid", -80, 80), ("erf", -5, 5), ("sqrt", 0, 1e30),
        ("rsqrt", 1e-30, 1e30),
    ],
)  # fmt: skip
def test_functions_are_as_exact_as_floats(name: str, least: float, most: float) -> None:
    """Within 4 units in the last place of float64's result (erf: 3e-7 absolute); NaN, infinity
    and zero as torch has them."""
    draws = np.random.default_rng(0)
    spread = np.concatenate(
        [draws.uniform(least, most, 4000), draws.normal(0, 0.1, 2000).clip(least, most)]
    )
    if least > 0:
        spread = np.exp(draws.uniform(np.log(least), np.log(most), 4000))
    odd = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, -1.0, 100.0, -110.0])
    x = np.concatenate([spread, odd]).astype(np.float32)[None, :, None]
    made = program(Apply(name))
    native = TorchCompute({"p": made}, "compiled")
    rows = {"x": Rows(x, np.array([x.shape[1]]))}
    found = native.predict("p", Tree({"inner.weight": np.zeros((1, 1), np.float32)}), rows)
    assert native.explain("p") == "compiled"
    said = found["out"].values[0, :, 0]
    wanted = getattr(torch, name)(torch.from_numpy(x[0, :, 0]).double()).float().numpy()
    real = np.isfinite(wanted)
    assert np.array_equal(np.isnan(said), np.isnan(wanted))
    assert np.array_equal(said[~real & ~np.isnan(wanted)], wanted[~real & ~np.isnan(wanted)])
    apart = np.abs(said[real] - wanted[real])
    room = 3e-7 if name == "erf" else 4 * np.spacing(np.abs(wanted[real]).clip(1e-37))
    assert (apart <= room).all(), (x[0, :, 0][real][apart > room][:5], apart.max())


def test_what_it_has_no_code_for_goes_to_what_has_and_says_so() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cells, self.out = nn.GRU(4, 5, batch_first=True), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.cells(x[:, None])[0][:, -1])  # type: ignore[no-any-return]

    made = program(Last())
    _, _, rows = devices("mlp", [3, 2])
    weights = Tree({k: np.repeat(a[None], 2, 0) for k, a in made.initial().items()})
    compute = TorchCompute({"p": made})
    compute.fit("p", weights, rows, Recipe(0.1), key=keys(2))
    assert "recurrent layers are unrolled" in compute.explain("p")
    assert compute.explain_all().startswith("p vmap: recurrent")


def test_without_llvmlite_all_is_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kitestring.devices.fit.compute.native", lambda watch: None)
    made, weights, rows = devices("mlp", [3, 2])
    compute = TorchCompute({"p": made})
    compute.fit("p", weights, rows, Recipe(0.1), key=keys(2))
    assert compute.explain("p") == "vmap: llvmlite is not installed"


def test_threads_share_code_and_nothing_else() -> None:
    made, weights, rows = devices("mlp", [5, 7])
    compute, recipe = TorchCompute({"p": made}, "compiled"), Recipe(0.05, 3, 4)
    alone = compute.fit("p", weights, rows, recipe, key=keys(2)).parameters
    with ThreadPoolExecutor(4) as pool:
        fits = [
            pool.submit(compute.fit, "p", weights, rows, recipe, key=keys(2)) for _ in range(40)
        ]
        assert all(tiny.apart(f.result().parameters, alone) == 0 for f in fits)


def test_programs_that_differ_only_in_weights_share_code() -> None:
    """And those that do not, do not: another activation, or tensors beside the weights."""
    torch.manual_seed(1)
    made = devices("mlp", [5, 7], seed=0)[0]
    other = devices("mlp", [5, 7], seed=1)[0]
    first = TorchCompute({"p": made}, "compiled")
    second = TorchCompute({"p": other}, "compiled", like=first)
    assert second.programs["p"] is made
    assert all(np.array_equal(second.initial("p")[k], a) for k, a in other.initial().items())
    bent = program(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)))
    assert TorchCompute({"p": bent}, "compiled", like=first).programs["p"] is bent
    odd = devices("mlp", [5, 7], seed=1)[0]
    odd.module.inner.shift = torch.ones(3)  # type: ignore[union-attr, assignment]
    assert TorchCompute({"p": odd}, "compiled", like=first).programs["p"] is odd


def test_weights_stay_where_they_came_from() -> None:
    """What is given is not written to, and what comes out is the caller's own."""
    made, weights, rows = devices("mlp", [5, 7])
    before = {k: a.copy() for k, a in weights.items()}
    compute = TorchCompute({"p": made}, "compiled")
    one = compute.fit("p", weights, rows, Recipe(0.05), key=keys(2)).parameters
    kept = {k: a.copy() for k, a in one.items()}
    compute.fit("p", weights, rows, Recipe(0.5), key=keys(2))
    assert all(np.array_equal(weights[k], a) for k, a in before.items())
    assert all(np.array_equal(one[k], a) for k, a in kept.items())


# --- embeddings of which a device sees little


class Lookup(nn.Module):
    def __init__(self, rows: int = 3000) -> None:
        super().__init__()
        self.items, self.out = nn.Embedding(rows, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.items(x).mean(1))  # type: ignore[no-any-return]


def looked_up(n: list[int]) -> tuple[Program, Tree, dict[str, Rows]]:
    torch.manual_seed(0)
    made, draws = program(Lookup()), np.random.default_rng(0)
    columns = {"x": draws.integers(0, 3000, (sum(n), 2)), "y": draws.integers(0, 3, sum(n))}
    start = Tree({k: np.broadcast_to(a, (len(n), *a.shape)) for k, a in made.initial().items()})
    return made, start, lying(columns, n)


def test_only_touched_rows_of_a_table_are_looked_at() -> None:
    """The table comes back as what differs from the start, and is the whole array to anyone."""
    n = [7, 0, 30, 12]
    made, start, rows = looked_up(n)
    table, recipe, key = "inner.items.weight", Recipe(0.5, 2, 10), keys(4)
    fit = TorchCompute({"p": made}, "compiled").fit("p", start, rows, recipe, key=key)
    plain = TorchCompute({"p": made}, "sequential").fit("p", start, rows, recipe, key=key)
    assert isinstance(fit.parameters[table], Touched)
    wanted = plain.parameters[table]
    assert near(np.asarray(fit.parameters[table]), wanted)
    assert np.array_equal(fit.parameters[table][1], start[table][1])
    weight = np.array(n, np.float32)
    change = (fit.parameters - start) * weight
    assert isinstance(change[table], Touched)
    dense = (plain.parameters - start) * weight
    assert near(np.asarray(change[table]), dense[table])
    total = np.add.reduce(change[table], 0, dtype=np.float64, keepdims=True)
    assert near(total, dense[table].sum(0, np.float64, keepdims=True))
    touched = {int(i) for d in range(4) for i in rows["x"].values[d, : n[d]].ravel()}
    assert set(np.flatnonzero(total[0].any(1))) <= touched


@pytest.mark.parametrize("way", ["momentum", "own starts", "used twice"])
def test_other_uses_of_a_table_are_computed_whole(way: str) -> None:
    n = [7, 12]
    made, start, rows = looked_up(n)
    recipe = Recipe(0.5, 1, 10, momentum=0.9 if way == "momentum" else 0.0)
    if way == "own starts":
        start = Tree(
            {k: a + np.arange(2).reshape(-1, *[1] * (a.ndim - 1)) for k, a in start.items()}
        )
        start = Tree({k: a.astype(np.float32) for k, a in start.items()})
    if way == "used twice":
        inner = made.module.inner
        inner.forward = lambda x: inner.out(inner.items(x).mean(1) + inner.items.weight[0])  # type: ignore
    fits = [
        TorchCompute({"p": made}, how).fit("p", start, rows, recipe, key=keys(2)).parameters  # type: ignore[arg-type]
        for how in ("compiled", "sequential")
    ]
    assert not isinstance(fits[0]["inner.items.weight"], Touched)
    assert all(near(fits[0][k], a) for k, a in fits[1].items())


@pytest.mark.parametrize("verb", ["fit", "predict"])
def test_a_number_out_of_range_is_told(verb: str) -> None:
    """Where torch raises an IndexError of its own."""
    made, start, rows = looked_up([7, 12])
    compute = TorchCompute({"p": made}, "compiled")
    compute.fit("p", start, rows, Recipe(0.1), key=keys(2))
    compute.predict("p", start, {"x": rows["x"]})
    flat, first = rows["x"].flat
    bad = Rows.lying(np.where(flat == flat.max(), 3000, flat), first, rows["x"].n)

    with told(TaskError, "beyond its table's rows"):
        if verb == "fit":
            compute.fit("p", start, {**rows, "x": bad}, Recipe(0.1), key=keys(2))
        else:
            compute.predict("p", start, {"x": bad})
    compute.fit("p", start, rows, Recipe(0.1), key=keys(2))


@pytest.mark.parametrize("order", ["relu first", "pool first", "twice"])
@pytest.mark.parametrize(("window", "size"), [(2, 8), (3, 9), (2, 7)])  # the last leaves a rim
def test_the_gradient_of_pooling_and_what_goes_with_it(order: str, window: int, size: int) -> None:
    """Where windows tile the image their gradient is written straight to where it is used."""

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 4, 1)
            self.pool = nn.MaxPool2d(window)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            h = self.pool(h).relu() if order == "pool first" else self.pool(h.relu())
            if order == "twice":
                h = h + self.pool(self.first(x).relu() * 2)
            return self.second(h).flatten(2).mean(-1)  # type: ignore[no-any-return]

    torch.manual_seed(0)
    made, n, draws = program(Pooled()), [5, 2], np.random.default_rng(0)
    x = draws.normal(0, 1, (7, 1, size, size)).astype(np.float32)
    rows = lying({"x": x, "y": draws.integers(0, 4, 7)}, n)
    start = Tree({k: np.stack([a, a]) for k, a in made.initial().items()})
    native, plain = TorchCompute({"p": made}, "compiled"), TorchCompute({"p": made}, "sequential")
    a, b = (c.fit("p", start, rows, Recipe(0.1, 2, 3), key=keys(2)) for c in (native, plain))
    assert all(near(a.parameters[k], w) for k, w in b.parameters.items())
    (_, da, xa), (_, db, xb) = (c.backward("p", start, rows) for c in (native, plain))
    assert native.explain("p") == "compiled"
    assert all(near(da[k], g) for k, g in db.items())
    mask = rows["x"].mask()
    assert near(xa["x"].values[mask], xb["x"].values[mask])
