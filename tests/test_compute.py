"""The three primitives: the plain loop is the reference, and every way to compute is the same.

Float error: one after the other is bit for bit the plain loop. Stacked (vmap) sums in another
order: float32, at most 10 steps here, measured at most 1e-6 of a leaf's largest value, under SGD
and Adam. Adam is held to less: it divides by the gradient's own size, and keeps its relative error.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tiny
from kitestring.core import Recipe, Rows, Tree
from kitestring.devices.fit.compute import TorchCompute
from kitestring.devices.fit.programs import Program
from kitestring.devices.schedule import schedule
from kitestring.errors import SettingError, TaskError
from modules import FLOATING, MODULES, both, device, devices, keys, program

SGD, ADAM = 1e-5, 1e-4
TOLERANCE = {"sgd": SGD, "adam": ADAM}


# --- the reference


@pytest.mark.parametrize("optimiser", ["sgd", "adam"])
@pytest.mark.parametrize("kind", MODULES)
def test_one_after_the_other_is_the_plain_loop(kind: str, optimiser: str) -> None:
    n, lr, epochs, batch = [5, 1, 0, 7], 0.05, 2, 3
    made, weights, rows = devices(kind, n)
    compute = TorchCompute({"p": made}, "sequential")
    fit = compute.fit("p", weights, rows, Recipe(lr, epochs, batch, optimiser), key=keys(4))
    plan = schedule(keys(4), np.array(n), batch, epochs)
    for d in range(4):
        module = made.module
        module.load_state_dict({k: torch.from_numpy(a[d]) for k, a in weights.items()})
        kind_of = torch.optim.SGD if optimiser == "sgd" else torch.optim.Adam
        step = kind_of(module.parameters(), lr)  # type: ignore[operator]
        losses = []
        for t in range(epochs * -(-n[d] // batch)):
            index = plan.index[d, t][plan.real[d, t]]
            x, y = (torch.from_numpy(rows[k].values[d][index]) for k in ("x", "y"))
            step.zero_grad()
            value = nn.functional.cross_entropy(module({"x": x})["out"], y)
            value.backward()  # type: ignore[no-untyped-call]
            step.step()
            losses.append(value.item())
        for k, a in module.state_dict().items():
            assert np.array_equal(fit.parameters[k][d], a.numpy())
        assert fit.steps[d] == len(losses)
        assert fit.loss[d] == pytest.approx(np.mean(losses) if losses else 0, rel=1e-5)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.integers(1, 4), st.integers(1, 3))
def test_every_epoch_is_every_row_once(n: list[int], batch: int, epochs: int) -> None:
    plan = schedule(keys(len(n)), np.array(n), batch, epochs)
    for d, m in enumerate(n):
        per = -(-m // batch)
        assert plan.steps[d] == per * epochs
        for e in range(epochs):
            at = slice(e * per, (e + 1) * per)
            used = plan.index[d, at][plan.real[d, at]]
            assert sorted(used) == list(range(m))
            assert (plan.real[d, at].sum(-1)[:-1] == batch).all()
        alone = schedule(keys(len(n))[d : d + 1], np.array([m]), batch, epochs)
        t = plan.steps[d]
        assert np.array_equal(alone.index[0, :t], plan.index[d, :t])
        assert not plan.real[d, t:].any()


# --- the same numbers every way

SIZES = st.lists(st.integers(0, 5), min_size=2, max_size=4)


@settings(max_examples=40)
@given(
    st.sampled_from(sorted(MODULES)), SIZES, st.sampled_from(["sgd", "adam"]),
    st.integers(1, 4), st.integers(1, 2), st.integers(0, 99), st.integers(4, 7),
)  # fmt: skip
def test_stacked_as_one_after_the_other(
    kind: str, n: list[int], optimiser: str, batch: int, epochs: int, seed: int, width: int
) -> None:
    """From width 4: the norm of 2 numbers is 1 and -1, with a gradient that is noise to Adam."""
    made, weights, rows = devices(kind, n, seed, width)
    one, other = both(made)
    recipe = Recipe(0.02, epochs, batch, optimiser)
    a, b = (c.fit("p", weights, rows, recipe, key=keys(len(n))) for c in (one, other))
    assert one.explain("p") == "vmap"
    assert tiny.apart(a.parameters, b.parameters) < TOLERANCE[optimiser]
    assert tiny.apart(a.loss, b.loss) < TOLERANCE[optimiser]
    assert a.steps.tolist() == b.steps.tolist()
    unmoved = [d for d, m in enumerate(n) if m == 0]
    for k in weights:
        assert np.array_equal(a.parameters[k][unmoved], weights[k][unmoved])


@settings(max_examples=25)
@given(st.sampled_from(sorted(MODULES)), SIZES, st.integers(0, 99), st.booleans())
def test_predict_and_backward_too(kind: str, n: list[int], seed: int, cut: bool) -> None:
    """`cut`: with a given cotangent, no wider than its rows need; else of a weighted loss."""
    made, weights, rows = devices(kind, n, seed)
    one, other = both(made)
    x = {"x": rows["x"]}
    a, b = (c.predict("p", weights, x) for c in (one, other))
    assert tiny.apart(a, b) < SGD
    draw = np.random.default_rng(seed)
    if cut:
        slope = tiny.stacked({"out": [draw.normal(0, 1, (m, 3)).astype(np.float32) for m in n]})
        wider = {"x": tiny.Padded(Nobody())._wider(rows["x"])}
        found = [
            c.backward("p", weights, r, cotangent=slope) for c in (one, other) for r in (x, wider)
        ]
    else:
        share = draw.random(rows["x"].values.shape[:2]).astype(np.float32)
        found = [c.backward("p", weights, rows, row_weights=share) for c in (one, other)]
    first = found[0]
    for loss, d_weights, d_columns in found[1:]:
        assert tiny.apart(loss, first[0]) < SGD
        assert tiny.apart(d_weights, first[1]) < SGD
        assert tiny.apart(d_columns, first[2]) < SGD
    assert set(first[2]) == ({"x"} if kind in FLOATING else set())


class Nobody:
    size = 0


@pytest.mark.parametrize("how", ["sequential", "vmap"])
@pytest.mark.parametrize("kind", MODULES)
def test_chunks_and_padding_do_not_matter(kind: str, how: Any) -> None:
    """All four devices, side by side, and each alone: and rubbish beyond their rows."""
    n = [5, 1, 0, 7]
    made, weights, rows = devices(kind, n)
    compute = TorchCompute({"p": made}, how)
    share = np.ones(rows["x"].values.shape[:2], np.float32)

    def everything(weights: Tree, rows: Any, key: Any) -> list[Any]:
        fit = compute.fit("p", weights, rows, Recipe(0.1, 2, 3), key=key)
        found = compute.predict("p", fit.parameters, {"x": rows["x"]})
        wide = share[: len(key), : rows["x"].values.shape[1]]
        loss, d_weights, d_columns = compute.backward("p", weights, rows, row_weights=wide)
        return [fit.parameters, Tree(loss=fit.loss, total=loss), found, d_weights, d_columns]

    whole = everything(weights, rows, keys(4))
    for d in range(4):
        alone = everything(device(weights, d), device(rows, d), keys(4)[d : d + 1])
        for a, b in zip(whole, alone, strict=True):
            assert tiny.apart(device(a, d), b) < SGD


def test_one_model_for_all_is_the_same_as_each_its_own() -> None:
    """A shared model is predicted in one go over the real rows."""
    made, weights, rows = devices("mlp", [3, 0, 2])
    shared = Tree({k: np.broadcast_to(a[:1], a.shape) for k, a in weights.items()})
    own = Tree({k: a.copy() for k, a in shared.items()})
    compute = TorchCompute({"p": made})
    x = {"x": rows["x"]}
    assert tiny.apart(compute.predict("p", shared, x), compute.predict("p", own, x)) < SGD


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("kind", MODULES)
def test_devices_without_rows(kind: str, shared: bool) -> None:
    made, weights, rows = devices(kind, [0, 0])
    if shared:
        weights = Tree({k: np.broadcast_to(a[:1], a.shape) for k, a in weights.items()})
    compute = TorchCompute({"p": made})
    out = compute.predict("p", weights, {"x": rows["x"]})["out"]
    assert out.n.tolist() == [0, 0]
    assert out.values.shape[2:] == (3,)
    fit = compute.fit("p", weights, rows, Recipe(0.1, 1, 2), key=keys(2))
    assert fit.steps.tolist() == [0, 0]
    assert fit.loss.tolist() == [0, 0]
    assert tiny.apart(fit.parameters, weights) == 0
    loss, d_weights, _ = compute.backward("p", weights, rows)
    assert loss.tolist() == [0, 0]
    assert all((g == 0).all() for g in d_weights.values())


# --- modules that cannot be stacked


class Centred(nn.Module):
    """A row depends on the others of its batch."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


@pytest.mark.parametrize(
    ("middle", "why"),
    [
        (nn.BatchNorm1d(6), "batch statistics change in training"),
        (nn.BatchNorm1d(6, momentum=None), "batch statistics change in training"),
        (nn.RReLU(), "vmap cannot map it"),
        (Centred(), "vmap gives other numbers"),
    ],
)
@pytest.mark.parametrize("how", ["auto", "vmap"])
def test_what_cannot_be_stacked_is_not_and_says_why(middle: Any, why: str, how: Any) -> None:
    """Chunks do not matter then either: not even to dropout, nor to a count of batches."""
    n = [4, 6, 2]
    _, _, rows = devices("mlp", n)
    made = program(nn.Sequential(nn.Linear(4, 6), middle, nn.Linear(6, 3)))
    compute = TorchCompute({"p": made}, how)
    weights = Tree({k: np.repeat(a[None], 3, 0) for k, a in made.initial().items()})
    recipe = Recipe(0.1, 2, 3)
    whole = compute.fit("p", weights, rows, recipe, key=keys(3))
    told = compute.explain("p")
    assert told.startswith("sequential: ")
    assert told.endswith(why) or f"and {why}" in told or f": {why}" in told
    for d in (2, 0, 1):
        key = keys(3)[d : d + 1]
        alone = compute.fit("p", device(weights, d), device(rows, d), recipe, key=key)
        # Two rows are a whole batch alone, which is compiled: nothing is padded there.
        room = SGD if isinstance(middle, Centred) else 0
        assert tiny.apart(device(whole.parameters, d), alone.parameters) <= room
    if isinstance(middle, Centred):
        return  # its predictions depend on the others in any case
    found = compute.predict("p", whole.parameters, {"x": rows["x"]})
    slopes = compute.backward("p", whole.parameters, rows)
    for d in (2, 0, 1):
        own, mine = device(whole.parameters, d), device(rows, d)
        assert tiny.apart(device(found, d), compute.predict("p", own, {"x": mine["x"]})) < SGD
        assert tiny.apart(device(slopes[1], d), compute.backward("p", own, mine)[1]) < SGD


def test_a_batch_of_one_row_is_normed_by_what_was_seen_before() -> None:
    """It has no variance of its own, and torch refuses it: two rows, then one, or one alone."""
    inner = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    made = program(inner)
    _, _, rows = devices("mlp", [3, 1])
    weights = Tree({k: np.repeat(a[None], 2, 0) for k, a in made.initial().items()})
    compute = TorchCompute({"p": made})
    fit = compute.fit("p", weights, rows, Recipe(0.1, 1, 2), key=keys(2))
    assert all(np.isfinite(a).all() for a in fit.parameters.values())
    mean = fit.parameters["inner.1.running_mean"]
    assert (mean[0] != 0).any()
    assert (mean[1] == 0).all()


def test_convolutions_are_left_one_by_one_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without compiled code, and from a million operations a row: the last layer has
    2 x 256 x width."""
    monkeypatch.setattr("kitestring.devices.fit.compute.native", lambda watch: None)
    for width, how, why in (
        (2048, "auto", "sequential: llvmlite is not installed, and layers of this size"),
        (2048, "vmap", "vmap"), (2, "auto", "vmap: llvmlite"),
    ):  # fmt: skip
        inner = nn.Sequential(
            nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 64, 1), nn.Flatten(),
            nn.Linear(256, width), nn.Linear(width, 3),
        )  # fmt: skip
        made = program(inner)
        _, _, rows = devices("mlp", [2, 3])
        weights = Tree({k: np.repeat(a[None], 2, 0) for k, a in made.initial().items()})
        compute = TorchCompute({"p": made}, how)  # type: ignore[arg-type]
        compute.fit("p", weights, rows, Recipe(0.1, 1, 2), key=keys(2))
        assert compute.explain("p").startswith(why)


def test_frozen_weights_stay_and_have_no_gradient() -> None:
    made, weights, rows = devices("mlp", [2, 3])
    made.module.inner[0].weight.requires_grad_(False)  # type: ignore[index, union-attr]
    frozen = "inner.0.weight"
    ends = []
    for compute in both(made):
        fit = compute.fit("p", weights, rows, Recipe(0.1, 1, 2), key=keys(2))
        assert np.array_equal(fit.parameters[frozen], weights[frozen])
        assert not np.array_equal(fit.parameters["inner.2.weight"], weights["inner.2.weight"])
        assert frozen not in compute.backward("p", weights, rows)[1]
        ends.append(fit.parameters)
    assert tiny.apart(*ends) < SGD


# --- another device than the CPU


@pytest.mark.parametrize("how", ["sequential", "vmap", "auto"])
def test_the_cpu_by_name_is_what_is_computed_on_anyhow(how: Any) -> None:
    made, weights, rows = devices("mlp", [5, 1, 0, 7])
    recipe, first = Recipe(0.05, 2, 3, "adam"), TorchCompute({"p": made}, how)
    named = TorchCompute({"p": made}, how, device="cpu")
    assert named.program("p") is made
    a, b = (c.fit("p", weights, rows, recipe, key=keys(4)) for c in (first, named))
    assert all(np.array_equal(a.parameters[k], b.parameters[k]) for k in weights)
    assert np.array_equal(a.loss, b.loss)
    a, b = (c.predict("p", weights, {"x": rows["x"]}) for c in (first, named))
    assert np.array_equal(a["out"].values, b["out"].values)


@pytest.mark.parametrize("name", ["gpu", "", "meta", "xla", "cuda:99"])
def test_a_device_that_torch_does_not_have(name: str) -> None:
    made, _, _ = devices("mlp", [1])
    with pytest.raises(SettingError, match=f"device '{name}': torch has no .* --device"):
        TorchCompute({"p": made}, device=name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_without_cuda() -> None:
    made, _, _ = devices("mlp", [1])
    with pytest.raises(SettingError, match=r"no CUDA device here.* install a CUDA build of torch"):
        TorchCompute({"p": made}, device="cuda")


def test_rows_that_lie_elsewhere_are_moved_once_and_are_the_same_batches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Told that the CPU is another device, which it then is to itself."""
    made, weights, rows = devices("mlp", [5, 1, 0, 7])
    lying = {}
    for name, r in rows.items():  # in another order, with rows of others between
        real = [r.values[d, :m] for d, m in enumerate(r.n)]
        flat = np.concatenate([real[3], real[3][:2], real[1], real[0]])
        lying[name] = Rows.lying(flat, np.array([10, 9, 0, 0]), r.n)
    recipe = Recipe(0.05, 2, 3)
    compute = TorchCompute({"p": made}, "vmap")
    a = compute.fit("p", weights, lying, recipe, key=keys(4))
    monkeypatch.setattr("kitestring.devices.fit.vmapped.CPU", torch.device("meta"))
    b = compute.fit("p", weights, lying, recipe, key=keys(4))
    assert compute.explain("p") == "vmap"
    assert all(np.array_equal(a.parameters[k], b.parameters[k]) for k in weights)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is none")
@pytest.mark.parametrize("how", ["sequential", "vmap", "auto"])
@pytest.mark.parametrize("kind", MODULES)
def test_cuda_computes_what_the_cpu_does(kind: str, how: Any) -> None:
    made, weights, rows = devices(kind, [5, 1, 0, 7])
    here = TorchCompute({"p": made}, "sequential")
    there = TorchCompute({"p": made}, how, device="cuda")
    for recipe in (
        Recipe(0.05, 2, 3, momentum=0.5, mu=0.1, clip=1.0), Recipe(0.05, 2, 3, shuffle=False),
    ):  # fmt: skip
        a, b = (c.fit("p", weights, rows, recipe, key=keys(4)) for c in (here, there))
        assert tiny.apart(a.parameters, b.parameters) < 1e-3
        assert np.allclose(a.loss, b.loss, rtol=1e-3)
    assert "compiled code is for the CPU" in there.explain("p") or how != "auto"
    found, other = (c.predict("p", weights, {"x": rows["x"]}) for c in (here, there))
    assert tiny.apart(found, other) < 1e-3
    for one, two in zip(*(c.backward("p", weights, rows)[1:] for c in (here, there)), strict=True):
        assert tiny.apart(one, two) < 1e-3


# --- counting and refusing


def test_operations_of_two_layers() -> None:
    """A product of n numbers is n multiplications and n additions: 2 (64 x 32 + 32 x 10)."""
    inner = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    compute = TorchCompute({"p": program(inner)})
    x = Rows(np.full((3, 5, 64), np.nan, np.float32), np.array([5, 0, 1]))
    assert compute.flops("p", {"x": x}) == 2 * (64 * 32 + 32 * 10)


def test_what_is_asked_wrongly_is_told() -> None:
    made, weights, rows = devices("mlp", [2, 3])
    compute = TorchCompute({"p": made, "mute": Program("mute", made.module)})
    recipe = Recipe(0.1, 1, 2)
    with pytest.raises(SettingError, match="Did you mean 'p'"):
        compute.predict("pp", weights, rows)
    with pytest.raises(TaskError, match="no loss"):
        compute.fit("mute", weights, rows, recipe, key=keys(2))
    less = Tree({k: a for k, a in weights.items() if k != "inner.0.bias"})
    for call in (
        lambda w: compute.predict("p", w, {"x": rows["x"]}),
        lambda w: compute.fit("p", w, rows, recipe, key=keys(2)),
        lambda w: compute.backward("p", w, rows),
    ):
        with pytest.raises(TaskError, match=r"not given the weight 'inner\.0\.bias'"):
            call(less)
        with pytest.raises(TaskError, match="does not take the weight 'extra'"):
            call(Tree({**weights, "extra": weights["inner.0.bias"]}))


class Read(nn.Module):
    """The last state of an LSTM."""

    def __init__(self, *layers: int, both: bool = False) -> None:
        super().__init__()
        self.lstm = nn.LSTM(*layers, batch_first=True, bidirectional=both)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0][:, -1]  # type: ignore[no-any-return]


@pytest.mark.parametrize(("layers", "both"), [(1, False), (2, False), (1, True)])
def test_operations_of_an_lstm_are_counted(layers: int, both: bool) -> None:
    """By hand, 2 for each multiplication: four gates of the input and of the state, 7 times."""
    made = program(Read(3, 5, layers, both=both))
    rows = {"x": Rows(np.zeros((1, 2, 7, 3), np.float32), np.array([2]))}
    ways = 1 + both
    wanted = sum(4 * 5 * ((3 if at == 0 else 5 * ways) + 5) for at in range(layers))
    assert made.flops(rows) == 2 * 7 * ways * wanted


def test_an_lstm_is_left_one_by_one() -> None:
    """Mapped over devices it took four times as long as one after the other."""
    made, n = program(Read(2, 4)), np.array([3, 2])
    x, y = np.zeros((2, 3, 5, 2), np.float32), np.zeros((2, 3), np.int64)
    start = Tree({k: np.stack([a, a]) for k, a in made.initial().items()})
    compute = TorchCompute({"p": made})
    compute.fit("p", start, {"x": Rows(x, n), "y": Rows(y, n)}, Recipe(0.1), key=keys(2))
    assert compute.explain("p").startswith("sequential")
