"""Everything that a recipe can say, against a plain loop of `nn.Module` and `torch.optim`.

Float error: one after the other is bit for bit the plain loop. Stacked (vmap) and compiled agree
within 5e-5 of a leaf's largest value; float32, at most 20 steps here, measured at most 1e-6.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import tiny
from kitestring import dice
from kitestring.cloud.session import CloudSession
from kitestring.core import Recipe, Rows, Tree
from kitestring.devices.fit.compute import TorchCompute
from kitestring.devices.fit.programs import Program
from kitestring.devices.schedule import schedule
from kitestring.errors import SettingError, TaskError
from modules import both, device, devices, keys, program
from told import told

STACKED = 5e-5
N = [5, 1, 0, 7]
HEAD = "inner.2."  # of the "mlp": the last of its two layers


def like(weights: Tree, seed: int, *prefixes: str) -> Tree:
    """Numbers in the shape of those weights."""
    draw = np.random.default_rng(seed)
    chosen = weights.pick(*prefixes) if prefixes else weights
    return Tree({k: draw.normal(0, 0.3, a.shape).astype(a.dtype) for k, a in chosen.items()})


def plain(
    made: Program,
    weights: Tree,
    rows: dict[str, Rows],
    recipe: Recipe,
    centre: Tree | None = None,
    linear: Tree | None = None,
) -> Tree:
    """What a person would write with torch, for each device."""
    n = next(iter(rows.values())).n
    plan = schedule(keys(len(n)), n, recipe.batch, recipe.epochs, recipe.shuffle)
    ends = Tree({k: np.array(a) for k, a in weights.items()})
    for d in range(len(n)):
        module = copy.deepcopy(made.module).train()
        module.load_state_dict({k: torch.from_numpy(np.array(a[d])) for k, a in weights.items()})
        for name, p in module.named_parameters():
            p.requires_grad_(p.requires_grad and name.startswith(recipe.train))
        train = {name: p for name, p in module.named_parameters() if p.requires_grad}
        towards = weights if centre is None else centre
        start = {k: torch.from_numpy(np.array(a[d])) for k, a in towards.items() if k in train}
        step: torch.optim.Optimizer
        if recipe.optimiser == "adam":
            step = torch.optim.Adam(train.values(), recipe.lr, weight_decay=recipe.decay)
        else:
            step = torch.optim.SGD(
                train.values(), recipe.lr, momentum=recipe.momentum, weight_decay=recipe.decay
            )
        for t in range(plan.steps[d]):
            index = plan.index[d, t][plan.real[d, t]]
            batch = {k: torch.from_numpy(r.values[d][index]) for k, r in rows.items()}
            step.zero_grad()
            assert made.loss is not None
            made.loss(module(batch), batch).mean().backward()  # type: ignore[no-untyped-call]
            for name, p in train.items():
                assert p.grad is not None
                if recipe.mu and name in start:
                    p.grad += recipe.mu * (p.detach() - start[name])
                if linear is not None and name in linear:
                    p.grad += torch.from_numpy(np.array(linear[name][d]))
            if recipe.clip is not None:
                nn.utils.clip_grad_norm_(train.values(), recipe.clip)
            step.step()
        for name, value in module.state_dict().items():
            ends[name][d] = value.numpy()
    return ends


def same(a: Tree, b: Tree) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def held_against(
    made: Program, weights: Tree, rows: dict[str, Rows], recipe: Recipe, **trees: Tree
) -> Tree:
    """What the plain loop makes of it, which all ways to compute have been held against."""
    wanted = plain(made, weights, rows, recipe, **trees)
    stacked, one_by_one = both(made)
    n = next(iter(rows.values())).n
    fit = one_by_one.fit("p", weights, rows, recipe, **trees, key=keys(len(n)))
    assert same(fit.parameters, wanted)
    again = stacked.fit("p", weights, rows, recipe, **trees, key=keys(len(n)))
    assert stacked.explain("p") == "vmap"
    native = TorchCompute({"p": made}, "compiled")
    made_so = native.fit("p", weights, rows, recipe, **trees, key=keys(len(n)))
    partly = {"centre"} & trees.keys() and len(trees["centre"]) < len(weights)
    assert partly or native.explain("p") == "compiled"
    for found in (again, made_so):
        assert tiny.apart(found.parameters, wanted) < STACKED
        assert tiny.apart(found.loss, fit.loss) < STACKED
        for d in np.nonzero(n == 0)[0]:
            assert all(np.array_equal(a[d], weights[k][d]) for k, a in found.parameters.items())
    return wanted


# --- each use alone


USES: dict[str, Recipe] = {
    "sgd": Recipe(0.05, 2, 3),
    "adam": Recipe(0.05, 2, 3, "adam"),
    "momentum": Recipe(0.05, 2, 3, momentum=0.9),
    "decay": Recipe(0.05, 2, 3, decay=0.1),
    "decay, adam": Recipe(0.05, 2, 3, "adam", decay=0.1),
    "clip": Recipe(0.05, 2, 3, clip=0.2),
    "clip, adam": Recipe(0.05, 2, 3, "adam", clip=0.2),
    "loose clip": Recipe(0.05, 2, 3, clip=1e6),
    "mu": Recipe(0.05, 2, 3, mu=0.7),
    "in order": Recipe(0.05, 2, 3, shuffle=False),
}


@pytest.mark.parametrize("kind", ["mlp", "embedding"])
@pytest.mark.parametrize("use", USES)
def test_each_use_is_the_plain_loop(use: str, kind: str) -> None:
    ends = held_against(*devices(kind, N), USES[use])
    if use not in ("sgd", "loose clip"):
        made, weights, rows = devices(kind, N)
        assert not same(ends, plain(made, weights, rows, USES["sgd"])), "the use does nothing"


@pytest.mark.parametrize("prefixes", [(), (HEAD,)])
def test_a_centre_and_a_linear_term(prefixes: tuple[str, ...]) -> None:
    """For all the weights or for some; those that are not named are neither pulled nor pushed."""
    made, weights, rows = devices("mlp", N)
    recipe = Recipe(0.05, 2, 3, mu=0.7)
    centre, linear = like(weights, 1, *prefixes), like(weights, 2, *prefixes)
    held_against(made, weights, rows, recipe, centre=centre)
    held_against(made, weights, rows, replace(recipe, mu=0), linear=linear)
    held_against(made, weights, rows, recipe, centre=centre, linear=linear)


def test_they_are_the_gradients_of_a_proximal_and_a_linear_loss() -> None:
    """mu / 2 |w - centre|^2 + <linear, w>, written as a loss for torch to differentiate."""
    made, weights, rows = devices("mlp", [4])
    centre, linear = like(weights, 1), like(weights, 2)
    recipe = Recipe(0.05, 3, 4, mu=0.7, shuffle=False)
    module = copy.deepcopy(made.module)
    module.load_state_dict({k: torch.from_numpy(a[0]) for k, a in weights.items()})
    named = dict(module.named_parameters())
    step = torch.optim.SGD(module.parameters(), recipe.lr)
    batch = {k: torch.from_numpy(r.values[0, :4]) for k, r in rows.items()}
    for _ in range(3):
        step.zero_grad()
        assert made.loss is not None
        loss = made.loss(module(batch), batch).mean()
        for name, p in named.items():
            far = p - torch.from_numpy(centre[name][0])
            loss = loss + recipe.mu / 2 * (far**2).sum()
            loss = loss + (torch.from_numpy(linear[name][0]) * p).sum()
        loss.backward()
        step.step()
    for compute in both(made):
        fit = compute.fit("p", weights, rows, recipe, centre=centre, linear=linear, key=keys(1))
        for name, p in named.items():
            assert tiny.apart(fit.parameters[name][0], p.detach().numpy()) < 1e-6


@pytest.mark.parametrize("how", ["sequential", "vmap"])
def test_what_changes_nothing(how: Any) -> None:
    """mu of 0, a centre that is the start anyway, a shared tree given once, and no linear term."""
    made, weights, rows = devices("mlp", N)
    compute = TorchCompute({"p": made}, how)
    recipe = Recipe(0.05, 2, 3, mu=0.7, momentum=0.5)

    def ends(recipe: Recipe, **trees: Tree) -> Tree:
        return compute.fit("p", weights, rows, recipe, **trees, key=keys(4)).parameters

    off = replace(recipe, mu=0)
    assert same(ends(off), ends(off, centre=like(weights, 1)))
    assert same(ends(recipe), ends(recipe, centre=weights))
    assert same(ends(recipe), ends(recipe, linear=Tree()))
    assert same(ends(recipe, centre=Tree()), ends(off))
    one = Tree({k: a[:1] for k, a in like(weights, 3).items()})
    wide = Tree({k: np.broadcast_to(a, (4, *a.shape[1:])) for k, a in one.items()})
    full = Tree({k: a.copy() for k, a in wide.items()})
    assert same(ends(recipe, centre=wide, linear=wide), ends(recipe, centre=full, linear=full))


# --- which weights train


@pytest.mark.parametrize("optimiser", ["sgd", "adam"])
def test_only_the_named_weights_train(optimiser: str) -> None:
    made, weights, rows = devices("mlp", N)
    recipe = Recipe(0.05, 2, 3, optimiser, decay=0.1, clip=0.5, mu=0.3, train=(HEAD,))
    ends = held_against(made, weights, rows, recipe, linear=like(weights, 1, HEAD))
    for name, a in weights.items():
        assert np.array_equal(ends[name], a) != name.startswith(HEAD)
    shared = Tree({k: np.broadcast_to(a[:1], a.shape) for k, a in weights.items()})
    ends = held_against(made, shared, rows, recipe)
    # What was trained last time in the same thread is not left behind.
    held_against(made, weights, rows, replace(recipe, train=("inner.0.", HEAD)))
    held_against(made, weights, rows, replace(recipe, train=("inner.0.weight",)))


def test_frozen_weights_stay_whatever_is_named() -> None:
    made, weights, rows = devices("mlp", N)
    made.module.inner[0].weight.requires_grad_(False)  # type: ignore[index, union-attr]
    ends = held_against(made, weights, rows, Recipe(0.05, 2, 3, momentum=0.5))
    assert np.array_equal(ends["inner.0.weight"], weights["inner.0.weight"])
    assert not np.array_equal(ends["inner.0.bias"][0], weights["inner.0.bias"][0])


class Spare(nn.Module):
    """Has a weight that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare = nn.Linear(4, 3), nn.Parameter(torch.ones(2))

    def forward(self, batch: Any) -> dict[str, Tensor]:
        return {"out": self.used(batch["x"])}


@pytest.mark.parametrize("optimiser", ["sgd", "adam"])
def test_a_weight_that_the_loss_does_not_use_has_gradient_zero(optimiser: str) -> None:
    """So that decay and pull move it, both ways alike."""
    _, _, rows = devices("mlp", [4, 4])
    made = Program("p", Spare(), program(nn.Identity()).loss)
    weights = Tree({k: np.stack([a, a + 1]) for k, a in made.initial().items()})
    still, moved = Recipe(0.1, 1, 2, optimiser), Recipe(0.1, 1, 2, optimiser, decay=0.1)
    ends = [c.fit("p", weights, rows, moved, key=keys(2)).parameters for c in both(made)]
    assert tiny.apart(*ends) < STACKED
    assert (ends[0]["spare"] < weights["spare"]).all()
    for c in both(made):
        fit = c.fit("p", weights, rows, still, key=keys(2))
        assert np.array_equal(fit.parameters["spare"], weights["spare"])


# --- together


@dataclass(frozen=True)
class Draw:
    """A recipe with trees, and devices of any numbers of rows."""

    recipe: Recipe
    n: list[int]
    centre: bool
    linear: bool
    seed: int


@st.composite
def drawn(draw: Callable[..., Any]) -> Draw:
    optimiser = draw(st.sampled_from(["sgd", "sgd", "adam"]))
    recipe = Recipe(
        lr=0.03,
        epochs=draw(st.integers(1, 3)),
        batch=draw(st.integers(1, 4)),
        optimiser=optimiser,
        momentum=draw(st.sampled_from([0.0, 0.9])) if optimiser == "sgd" else 0.0,
        decay=draw(st.sampled_from([0.0, 0.05])),
        clip=draw(st.sampled_from([None, 0.3])),
        mu=draw(st.sampled_from([0.0, 0.5])),
        train=draw(st.sampled_from([("",), (HEAD,), ("inner.0.", "inner.2.bias")])),
        shuffle=draw(st.booleans()),
    )
    n = draw(st.lists(st.integers(0, 6), min_size=2, max_size=4))
    return Draw(recipe, n, draw(st.booleans()), draw(st.booleans()), draw(st.integers(0, 99)))


@settings(max_examples=12)
@given(drawn())
def test_any_combination_is_the_plain_loop(draw: Draw) -> None:
    made, weights, rows = devices("mlp", draw.n, draw.seed)
    trees = {}
    if draw.centre:
        trees["centre"] = like(weights, draw.seed, *draw.recipe.train)
    if draw.linear:
        trees["linear"] = like(weights, draw.seed + 1, *draw.recipe.train[:1])
    held_against(made, weights, rows, draw.recipe, **trees)


# --- rows


class Taught(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 3)

    def forward(self, batch: Any) -> dict[str, Tensor]:
        return {"out": self.inner(batch["x"])}


def test_a_teachers_outputs_are_one_more_column() -> None:
    """T^2 KL(teacher || student), Hinton et al. 2015; the module itself does not see the column."""
    _, _, rows = devices("mlp", N)
    draw = np.random.default_rng(1)
    logits = tiny.stacked({"t": [draw.normal(0, 1, (m, 3)).astype(np.float32) for m in N]})["t"]
    wider = Rows(np.concatenate([logits.values, np.full((4, 2, 3), np.nan, "f4")], 1), logits.n)

    def distil(out: Any, batch: Any) -> Tensor:
        p, q = (F.log_softmax(a / 2, -1) for a in (batch["teacher"], out["out"]))
        far: Tensor = 4 * F.kl_div(q, p, reduction="none", log_target=True).sum(-1)
        return far + F.cross_entropy(out["out"], batch["y"], reduction="none")

    torch.manual_seed(0)
    made = Program("p", Taught(), distil)
    weights = Tree({k: np.repeat(a[None], 4, 0) for k, a in made.initial().items()})
    recipe = Recipe(0.1, 2, 3)
    ends = held_against(made, weights, {**rows, "teacher": logits}, recipe)
    assert same(ends, held_against(made, weights, {**rows, "teacher": wider}, recipe))
    other = Rows(-logits.values, logits.n)
    assert not same(ends, plain(made, weights, {**rows, "teacher": other}, recipe))


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("how", ["sequential", "vmap"])
def test_rows_that_lie_in_one_array_need_no_padding(how: Any, shuffle: bool) -> None:
    """Devices in any order, others' rows (NaN) between, and nobody may write to them."""
    made, weights, rows = devices("mlp", N)
    at, lying = np.array([20, 9, 0, 2]), {}
    for name, r in rows.items():
        flat = np.full((30, *r.values.shape[2:]), np.nan if name == "x" else -9, r.values.dtype)
        for d, m in enumerate(N):
            flat[at[d] : at[d] + m] = r.values[d, :m]
        flat.setflags(write=False)
        lying[name] = Rows.lying(flat, at, np.array(N))
    recipe = Recipe(0.05, 2, 3, shuffle=shuffle)
    compute = TorchCompute({"p": made}, how)
    a = compute.fit("p", weights, rows, recipe, key=keys(4))
    b = compute.fit("p", weights, lying, recipe, key=keys(4))
    assert same(a.parameters, b.parameters)
    assert compute.flops("p", lying) == compute.flops("p", rows)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.integers(1, 4), st.integers(1, 3))
def test_rows_in_their_order(n: list[int], batch: int, epochs: int) -> None:
    plan = schedule(keys(len(n)), np.array(n), batch, epochs, shuffle=False)
    for d, m in enumerate(n):
        used = [plan.index[d, t][plan.real[d, t]].tolist() for t in range(plan.steps[d])]
        assert used == [list(range(m))[at : at + batch] for at in range(0, m, batch)] * epochs


def test_the_shuffled_order_is_what_it_always_was() -> None:
    """A stable sort of each epoch's dice: written out, and held to by every run on disk."""
    n = np.array([7, 0, 3])
    plan = schedule(keys(3), n, 3, 2)
    for d, m in enumerate(n):
        used = [i for t in range(plan.steps[d]) for i in plan.index[d, t][plan.real[d, t]]]
        draws = [dice.uniform(keys(3)[d : d + 1] + np.uint64(e), 7)[0, :m] for e in range(2)]
        assert used == [i for draw in draws for i in np.argsort(draw, kind="stable")]


# --- modules with their own dice, and threads


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * torch.randn_like(x) if self.training else x


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(2, 3, num_layers=2, dropout=0.5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.cell(x.unflatten(1, (2, 2)))[0][:, -1]
        return out


RANDOM: dict[str, Callable[[], nn.Module]] = {
    "dropout": lambda: nn.Sequential(
        nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 6), nn.Dropout(0.3), nn.Linear(6, 3)
    ),
    "noise": lambda: nn.Sequential(nn.Linear(4, 8), Noise(), nn.Linear(8, 3)),
    "noise and dropout": lambda: nn.Sequential(
        nn.Linear(4, 8), Noise(), nn.Dropout(0.3), nn.Linear(8, 3)
    ),
    "recurrent": Recurrent,
}


@pytest.mark.parametrize("kind", RANDOM)
def test_a_modules_own_dice_are_each_devices_own(kind: str) -> None:
    """A plain loop that drops out by hand, by `dice.drawn`; all else as by torch.manual_seed."""
    n, recipe = [4, 3], Recipe(0.05, 2, 2, momentum=0.5)
    _, _, rows = devices("mlp", n)
    made = program(RANDOM[kind]())
    weights = Tree({k: np.repeat(a[None], 2, 0) for k, a in made.initial().items()})
    compute = TorchCompute({"p": made})
    fit = compute.fit("p", weights, rows, recipe, key=keys(2))
    compiled = compute.explain("p") == "compiled"  # which draws what a dropout keeps itself
    assert compiled == (kind == "dropout")
    assert compiled or compute.explain("p").startswith("sequential")
    one_by_one = TorchCompute({"p": made}, "sequential")
    plainly = one_by_one.fit("p", weights, rows, recipe, key=keys(2)).parameters
    for d in range(2):
        own = Program("p", _ByHand(made.module, keys(2)[d : d + 1]), made.loss)
        mine = {k: Rows(r.values[[d, d]], r.n[[d, d]] * [d == 0, d == 1]) for k, r in rows.items()}
        two = Tree({f"whole.{k}": a for k, a in weights.items()})
        ends = plain(own, two, mine, recipe)
        assert all(np.array_equal(ends[f"whole.{k}"][d], a[d]) for k, a in plainly.items())
        for k, a in fit.parameters.items():
            room = STACKED * np.abs(a[d]).max() if compiled else 0
            assert np.abs(ends[f"whole.{k}"][d] - a[d]).max() <= room


class _ByHand(nn.Module):
    """Drops out by numbers written down for its step; seeds torch once, before its first."""

    def __init__(self, whole: nn.Module, key: Any) -> None:
        super().__init__()
        self.whole, self.key, self.step = whole, key, 0

    def forward(self, batch: Any) -> Any:
        if self.step == 0:
            torch.manual_seed(int(self.key[0] >> np.uint64(1)))
        self.step, self.place = self.step + 1, 0
        inner, x = self.whole.inner, batch["x"]
        if isinstance(inner, Recurrent):
            return {"out": self.recurrent(inner.cell, x.unflatten(1, (2, 2)))}
        assert isinstance(inner, nn.Sequential)
        for layer in inner:
            x = self.drop(x, layer.p) if isinstance(layer, nn.Dropout) else layer(x)
        return {"out": x}

    def recurrent(self, cell: nn.LSTM, x: Tensor) -> Tensor:
        """Between its layers torch has the positions first, and then the rows."""
        start = [torch.zeros(1, len(x), 3)] * 2
        every: list[Any] = cell._flat_weights
        first, second = every[:4], every[4:]
        x = torch.lstm(x, start, first, True, 1, 0.0, True, False, True)[0]
        x = self.drop(x.transpose(0, 1), cell.dropout).transpose(0, 1)
        return torch.lstm(x, start, second, True, 1, 0.0, True, False, True)[0][:, -1]

    def drop(self, x: Tensor, p: float) -> Tensor:
        key = dice.drawn(self.key, self.step - 1, self.place)
        numbers = dice.uniform(key, x.numel())[0].reshape(x.shape)
        self.place += 1
        return x * (torch.from_numpy(numbers < np.float32(1 - p)).float() / (1 - p))


@pytest.mark.parametrize("how", ["sequential", "vmap"])
@pytest.mark.parametrize("kind", ["plain", *RANDOM])
def test_several_threads_at_once(kind: str, how: Any) -> None:
    """Each computes its own chunk with the one `TorchCompute`, to the same bits as alone."""
    n = [6, 3, 4]
    _, _, rows = devices("mlp", n)
    inner = RANDOM[kind]() if kind != "plain" else nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3))
    made = program(inner)
    compute = TorchCompute({"p": made}, how)
    recipe = Recipe(0.05, 3, 2)

    def chunk(seed: int) -> list[Any]:
        weights = Tree({k: np.repeat(a[None], 3, 0) for k, a in made.initial().items()})
        weights = weights + like(weights, seed)
        mine = replace(recipe, train=("",) if seed % 2 else ("inner.",))
        fit = compute.fit("p", weights, rows, mine, key=keys(3) + np.uint64(seed))
        out = compute.predict("p", fit.parameters, {"x": rows["x"]})["out"]
        _, slope, _ = compute.backward("p", fit.parameters, rows)
        return [fit.parameters, Tree(out=np.where(out.mask()[..., None], out.values, 0)), slope]

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(chunk, range(12)))
    for seed in range(12):
        assert all(same(a, b) for a, b in zip(found[seed], chunk(seed), strict=True))


# --- in the cloud


def test_in_the_cloud_trees_have_no_device_axis() -> None:
    made, weights, rows = devices("mlp", [4, 3])
    one = Tree({k: a[0] for k, a in weights.items()})
    compute = TorchCompute({"p": made})
    cloud = CloudSession(compute, 2, 5, None, None, compute.initial)
    recipe = Recipe(0.05, 2, 3, mu=0.5)
    centre, linear = (Tree({k: a[0] for k, a in like(weights, s).items()}) for s in (1, 2))
    fit = cloud.fit("p", one, rows, recipe, centre=centre, linear=linear)
    beside = {k: np.concatenate([r.values[0, :4], r.values[1, :3]])[None] for k, r in rows.items()}
    whole = compute.fit(
        "p",
        device(weights, 0),
        {k: Rows(v, np.array([7])) for k, v in beside.items()},
        recipe,
        centre=Tree({k: a[None] for k, a in centre.items()}),
        linear=Tree({k: a[None] for k, a in linear.items()}),
        key=dice.keys(5, np.array([dice.CLOUD]), 0, "fit"),
    )
    assert same(Tree({k: a[None] for k, a in fit.parameters.items()}), whole.parameters)
    assert fit.steps == 6
    # The rows of one device go in as they lie, padded or not.
    alone = {k: Rows(r.values[:1], r.n[:1]) for k, r in rows.items()}
    assert same(
        cloud.fit("p", one, alone, recipe).parameters,
        cloud.fit("p", one, device(rows, 0), recipe).parameters,
    )


# --- refusing


@pytest.mark.parametrize(
    ("wrong", "what", "mend"),
    [
        ({"lr": 0.0}, "lr is 0.0", "above 0"),
        ({"lr": float("nan")}, "lr is nan", "above 0"),
        ({"lr": float("inf")}, "lr is inf", "above 0"),
        ({"epochs": 0}, "epochs is 0", "from 1"),
        ({"batch": 0}, "batch is 0", "from 1"),
        ({"batch": 2.5}, "batch is 2.5", "whole number"),
        ({"momentum": 1.0}, "momentum is 1.0", "below 1"),
        ({"momentum": -0.1}, "momentum is -0.1", "from 0"),
        ({"momentum": 0.9, "optimiser": "adam"}, "momentum is 0.9", "take sgd"),
        ({"decay": -1.0}, "decay is -1.0", "Give 0"),
        ({"clip": 0.0}, "clip is 0.0", "or None"),
        ({"clip": float("nan")}, "clip is nan", "or None"),
        ({"mu": -0.5}, "mu is -0.5", "Give 0"),
        ({"mu": float("inf")}, "mu is inf", "Give 0"),
        ({"train": ()}, "train is ()", '("",)'),
        ({"train": HEAD}, "train is 'inner.2.'", "tuple"),
        ({"train": (HEAD, "outer")}, "'outer'", "inner.0.weight"),
    ],
)
def test_settings_that_make_no_sense_are_told(wrong: Any, what: str, mend: str) -> None:
    made, weights, rows = devices("mlp", [2, 3])
    compute = TorchCompute({"p": made})
    recipe = replace(Recipe(0.1), **wrong)
    with told(TaskError, what, where="fit of program 'p'", mend=mend):
        compute.fit("p", weights, rows, recipe, key=keys(2))


def test_an_optimiser_that_nobody_knows() -> None:
    made, weights, rows = devices("mlp", [2, 3])
    compute = TorchCompute({"p": made})
    with told(SettingError, "optimiser 'sdg'", mend="Did you mean 'sgd'"):
        compute.fit("p", weights, rows, Recipe(0.1, optimiser="sdg"), key=keys(2))


@pytest.mark.parametrize("tree", ["centre", "linear"])
def test_trees_that_do_not_fit_are_told(tree: str) -> None:
    made, weights, rows = devices("mlp", [2, 3])
    compute = TorchCompute({"p": made})
    recipe = Recipe(0.1, mu=0.5, train=(HEAD,))
    name = "inner.2.bias"
    for leaves, what, mend in (
        (Tree({"inner.0.bias": weights["inner.0.bias"]}), "not trained", "inner.2.weight"),
        (Tree({"nobody": weights["inner.0.bias"]}), "'nobody'", "inner.2.weight"),
        (Tree({name: weights[name][0]}), f"{tree} {name!r} is (3,)", "(2, 3)"),
        (Tree({name: weights[name][:1]}), f"{tree} {name!r} is (1, 3)", "(2, 3)"),
    ):
        trees: dict[str, Any] = {tree: leaves}
        with told(TaskError, what, where="fit of program 'p'", mend=mend):
            compute.fit("p", weights, rows, recipe, **trees, key=keys(2))


def test_columns_of_different_lengths_are_told() -> None:
    made, weights, rows = devices("mlp", [2, 3])
    shorter = {**rows, "y": Rows(rows["y"].values, np.array([2, 2]))}
    with told(TaskError, "'x' and 'y'", where="fit of program 'p'", mend="as many rows"):
        TorchCompute({"p": made}).fit("p", weights, shorter, Recipe(0.1), key=keys(2))
