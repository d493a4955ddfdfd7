"""Programs as ONNX graphs: every use of a recipe, every loss, the shipped tasks' programs and
modules drawn at random, computed in stock ONNX Runtime and held against torch one after the other.

Float error: 1e-5 of a leaf's largest value; measured at most 2e-6, nearly always 3e-7. Modules
drawn at random: 1e-4, and of leaves whose slopes are noise beside the others', of a hundredth of
the largest (a bias before a norm has no slope but noise); measured at most 3e-5.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import drawn_modules
import test_shipped
import tiny
from exported import (
    PLAIN,
    Beside,
    Case,
    case,
    checked,
    fits,
    near,
    numbers,
    predicts,
    runtime,
    slopes,
    tokens,
    torch_of,
)
from kitestring import dice
from kitestring.core import Recipe, Rows, Tree
from kitestring.devices.fit.compute import TorchCompute
from kitestring.devices.fit.programs import Program
from kitestring.devices.runtime.graph import KEY, About, Graph
from kitestring.errors import ExportError, PackageError
from kitestring.export.graphs import backward_graph, predict_graph, step_graph
from kitestring.tasks.adapters import low_rank
from kitestring.tasks.layers import Transformer
from modules import Column, devices, keys
from test_recipe import HEAD, USES, like
from told import told


def of(kind: str, n: list[int]) -> Case:
    return Case(*devices(kind, n))


# --- recipes


@pytest.mark.parametrize("use", USES)
def test_every_use_of_a_recipe(use: str) -> None:
    c = of("mlp", [5, 1, 0, 7])
    ends = fits(c, USES[use])
    plain = torch_of(c).fit("p", c.weights, c.rows, USES["sgd"], key=keys(4)).parameters
    assert use in ("sgd", "loose clip") or tiny.apart(ends, plain) > 1e-3, "it does nothing"


@pytest.mark.parametrize("optimiser", ["sgd", "adam"])
@pytest.mark.parametrize("prefixes", [(), (HEAD,)])
def test_a_centre_and_a_linear_term(optimiser: str, prefixes: tuple[str, ...]) -> None:
    c = of("mlp", [5, 1, 0, 7])
    recipe = Recipe(0.05, 2, 3, optimiser, mu=0.7, clip=0.5, decay=0.1)
    centre, linear = like(c.weights, 1, *prefixes), like(c.weights, 2, *prefixes)
    fits(c, recipe, centre=centre, linear=linear)
    if optimiser == "sgd":
        fits(c, recipe, centre=centre)
        fits(c, replace(recipe, mu=0), linear=linear)


@pytest.mark.parametrize("optimiser", ["sgd", "adam"])
def test_only_some_weights_train(optimiser: str) -> None:
    c = of("mlp", [5, 1, 0, 7])
    recipe = Recipe(0.05, 2, 3, optimiser, decay=0.1, clip=0.5, mu=0.3, train=(HEAD,))
    ends = fits(c, recipe, linear=like(c.weights, 1, HEAD))
    for name, a in c.weights.items():
        assert np.array_equal(ends[name], a) != name.startswith(HEAD)


def test_what_a_recipe_does_not_name_leaves_no_trace() -> None:
    c = of("mlp", [3])
    plain = step_graph(c.program, c.rows, PLAIN)
    names = {i.name for i in checked(plain).graph.input}
    assert names == {f"w:{k}" for k in c.weights} | {"x:x", "x:y", "lr"}
    everything = Recipe(0.1, momentum=0.9, decay=0.1, clip=1.0, mu=0.5)
    model = checked(step_graph(c.program, c.rows, everything, linear=("inner.0.bias",)))
    found = {i.name for i in model.graph.input} - names
    terms = {f"{kind}{k}" for k in c.weights for kind in ("centre:", "memory:velocity.")}
    assert found == terms | {"linear:inner.0.bias", "mu", "momentum", "decay", "clip"}
    assert {o.name for o in model.graph.output} == {"loss"} | {
        f"next:{kind}{k}" for k in c.weights for kind in ("w:", "memory:velocity.")
    }
    # Numbers are inputs: another rate, another graph, is the same graph.
    assert step_graph(c.program, c.rows, replace(PLAIN, lr=3.0, epochs=7)).model == plain.model


def test_adapters_train_beside_a_frozen_base() -> None:
    c = case(low_rank(Beside([Transformer(7, 5, 8, 2, 1)]), 2), {"x": tokens(7, 5)})
    ends = fits(c, Recipe(0.05, 2, 3, "adam"))
    moved = {k for k, a in ends.items() if not np.array_equal(a, c.weights[k])}
    assert moved == c.program.trained
    assert all(k.endswith(("down", "up")) for k in moved)


# --- losses


class Heads(nn.Module):
    """A product for each loss, so that a failure names it."""

    def __init__(self, losses: Mapping[str, Any]) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({k: nn.Linear(6, 4) for k in losses})

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {k: head(batch["x"]) for k, head in self.heads.items()}


def _positions(out: Tensor) -> Tensor:
    return torch.stack([out, -out, 2 * out], 2)  # [n, 4, 3]


LOSSES: dict[str, Any] = {
    "classes": lambda o, b: F.cross_entropy(o, b["y"], reduction="none"),
    "smoothed": lambda o, b: F.cross_entropy(o, b["y"], reduction="none", label_smoothing=0.1),
    "weighted": lambda o, b: F.cross_entropy(
        o, b["y"], torch.tensor([1.0, 2.0, 0.5, 1.0]), reduction="none"),
    "other ignored": lambda o, b: F.cross_entropy(
        o, b["y"].clamp(min=0), ignore_index=2, reduction="none"),
    "positions": lambda o, b: F.cross_entropy(_positions(o), b["z"], reduction="none").mean(1),
    "soft": lambda o, b: F.cross_entropy(o, b["t"].softmax(1), reduction="none"),
    "likelihood": lambda o, b: F.nll_loss(o.log_softmax(1), b["y"], reduction="none"),
    "logits": lambda o, b: F.binary_cross_entropy_with_logits(o, b["l"], reduction="none").mean(1),
    "logits weighted": lambda o, b: F.binary_cross_entropy_with_logits(
        o, b["l"], pos_weight=torch.tensor([2.0]), reduction="none").mean(1),
    "probabilities": lambda o, b: F.binary_cross_entropy(
        o.sigmoid(), b["l"], reduction="none").mean(1),
    "squares": lambda o, b: F.mse_loss(o, b["t"], reduction="none").mean(1),
    "absolute": lambda o, b: F.l1_loss(o, b["t"], reduction="none").mean(1),
    "smooth": lambda o, b: F.smooth_l1_loss(o, b["t"], reduction="none", beta=0.5).mean(1),
    "Huber": lambda o, b: F.huber_loss(o, b["t"], reduction="none", delta=0.5).mean(1),
    "divergence": lambda o, b: F.kl_div(
        o.log_softmax(1), b["t"].softmax(1), reduction="none").sum(1),
    "of logarithms": lambda o, b: F.kl_div(
        o.log_softmax(1), b["t"].log_softmax(1), reduction="none", log_target=True).sum(1),
    "Poisson": lambda o, b: F.poisson_nll_loss(o, b["t"].abs(), reduction="none").mean(1),
    "margin": lambda o, b: F.triplet_margin_loss(o, b["t"], b["l"], reduction="none"),
    "cosine": lambda o, b: F.cosine_embedding_loss(
        o, b["t"], 2 * b["l"][:, 0] - 1, reduction="none"),
    "hinge": lambda o, b: F.hinge_embedding_loss(o, 2 * b["l"] - 1, reduction="none").mean(1),
}  # fmt: skip


@pytest.mark.parametrize("check", [fits, pytest.param(slopes, marks=pytest.mark.slow)])
def test_losses(check: Any) -> None:
    """With labels that are to be ignored, soft labels, a teacher's outputs."""

    def labels(rng: np.random.Generator, n: int, *row: int) -> Any:
        found = rng.integers(0, 4, (n, *row))
        return np.where(rng.random(found.shape) < 0.2, -100, found)

    def total(outputs: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        return torch.stack([LOSSES[k](out, batch) for k, out in outputs.items()]).sum(0)

    columns = {
        "x": numbers(6), "t": numbers(4), "y": labels,
        "z": lambda rng, n: labels(rng, n, 3),
        "l": lambda rng, n: rng.integers(0, 2, (n, 4)).astype(np.float32),
    }  # fmt: skip
    check(case(Heads(LOSSES), columns, total))


# --- backward


@pytest.mark.parametrize("kind", ["mlp", "embedding"])
def test_rows_are_weighted_and_cotangents_are_taken(kind: str) -> None:
    c = of(kind, [5, 1, 0, 7])
    slopes(c, row_weights=np.random.default_rng(0).normal(0, 1, (4, 7)).astype(np.float32))
    slopes(c, ("out",))


class Two(nn.Module):
    """Two columns of numbers, one of which is read by the loss alone, and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(4, 3), nn.Linear(4, 2)

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"h": self.one(batch["x"]).tanh(), "g": self.other(batch["x"]), "i": batch["y"] * 2}


def test_slopes_of_what_is_frozen_are_by_columns_alone() -> None:
    c = of("mlp", [5, 1])
    c.program.module.requires_grad_(False)
    found = runtime(c.program, backward_graph(c.program, c.rows)).backward("p", c.weights, c.rows)
    assert found[1] == {}
    # By hand: the slope of the sum of losses by x is that of the trainable twin.
    twin = of("mlp", [5, 1])
    wanted = torch_of(twin).backward("p", twin.weights, twin.rows)
    near(found[2], wanted[2])


def test_slopes_by_columns_and_of_some_outputs() -> None:
    """The loss's own column has a slope; by an output that does not need it, it is zero."""

    def loss(outputs: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        return ((outputs["h"] - batch["t"]) ** 2).sum(1) + outputs["g"].sum(1)

    c = case(Two(), {"x": numbers(4), "t": numbers(3), "y": tokens(3)}, loss)
    slopes(c)
    slopes(c, ("h",))
    slopes(c, ("g", "h"))
    back = runtime(c.program, backward_graph(c.program, c.rows, ("h",)))
    out = torch_of(c).predict("p", c.weights, c.rows)
    found = back.backward("p", c.weights, c.rows, cotangent={"h": out["h"]})
    assert not found[1]["other.weight"].any()
    assert not found[2]["t"].values.any()
    assert found[2].keys() == {"x", "t"}


# --- dropout


class Masked(nn.Module):
    """Two dropouts as somebody would write them: masks are given, not drawn."""

    def __init__(self, masks: list[Tensor]) -> None:
        super().__init__()
        self.one, self.other, self.masks = nn.Linear(6, 8), nn.Linear(8, 3), masks

    def forward(self, x: Tensor) -> Tensor:
        h = self.one(x) * self.masks[0] / 0.6
        return self.other(h.relu() * self.masks[1] / 0.5)


class Dropped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.dropout(self.one(x), 0.4, self.training)
        return self.other(F.dropout(h.relu(), 0.5, self.training))  # type: ignore[no-any-return]


def test_dropout_keeps_what_the_dice_say() -> None:
    """A plain loop of torch with masks made here, from keys, steps and places."""
    columns = {"x": numbers(6), "y": numbers(3)}

    def loss(outputs: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        return ((outputs["out"] - batch["y"]) ** 2).mean(1)

    c = case(Column(Dropped()), columns, loss, n=(7,))
    recipe = Recipe(0.1, epochs=2, batch=3, shuffle=False)
    graph = step_graph(c.program, c.rows, recipe)
    assert [(d.chance, d.shape) for d in graph.about.draws] == [
        (0.6, ((1, 0), (0, 8))), (0.5, ((1, 0), (0, 8))),
    ]  # fmt: skip
    key = keys(1)
    found = runtime(c.program, graph).fit("p", c.weights, c.rows, recipe, key=key)
    masks: list[Tensor] = []
    plain = Column(Masked(masks))
    plain.load_state_dict({k: torch.from_numpy(np.array(a[0])) for k, a in c.weights.items()})
    step, total = torch.optim.SGD(plain.parameters(), 0.1), 0.0
    batches = [slice(0, 3), slice(3, 6), slice(6, 7)] * 2
    for t, rows in enumerate(batches):
        size = rows.stop - rows.start
        masks[:] = [
            torch.from_numpy(
                (dice.uniform(dice.drawn(key, t, place), size * 8)[0] < np.float32(chance))
                .astype(np.float32).reshape(size, 8)
            )
            for place, chance in enumerate((0.6, 0.5))
        ]  # fmt: skip
        step.zero_grad()
        batch = {k: torch.from_numpy(r.values[0, rows]) for k, r in c.rows.items()}
        value = loss(plain(batch), batch).mean()
        value.backward()  # type: ignore[no-untyped-call]
        step.step()
        total += float(value.detach())
    for k, p in plain.state_dict().items():
        assert tiny.apart(found.parameters[k][0], p.numpy()) < 1e-6
    assert found.loss[0] == pytest.approx(total / 6, rel=1e-6)


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.TransformerEncoderLayer(8, 2, 16, 0.1, batch_first=True), numbers(3, 8)),
        (
            nn.Sequential(nn.Conv2d(2, 4, 3), nn.Dropout2d(0.3), nn.AlphaDropout(0.2)),
            numbers(2, 6, 6),
        ),
    ],
)  # fmt: skip
def test_dropout_of_every_kind(layer: nn.Module, x: Any) -> None:
    fits(case(Beside([layer]), {"x": x}), Recipe(0.05, 2, 3))


# --- programs of tasks


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "kind",
    ["sequence", *(pytest.param(k, marks=SLOW) for k in ("classes", "binary", "values"))],
)
def test_programs_of_tasks(kind: str) -> None:
    """The tiny tasks', as `tasks.programs` makes them for every task: whole models, fronts, large
    backs, answers with their confidence, a teacher's column."""
    rows = tiny.population(kind).rows(np.arange(3), "train")
    for name, program in tiny.programs(kind).items():
        columns = _columns(kind, name, program, rows)
        weights = Tree({k: np.repeat(a[None], 3, 0) for k, a in program.initial().items()})
        c = Case(program, weights, columns)
        predicts(c) if program.loss is None else fits(c, Recipe(0.05, 1, 4, momentum=0.9))


def _columns(kind: str, name: str, program: Program, rows: Any) -> dict[str, Rows]:
    """What collaborations give it."""
    first = next(iter(rows.values()))
    rng = np.random.default_rng(0)

    def drawn(*row: int) -> Rows:
        shape = (*first.values.shape[:2], *row)
        return Rows(rng.normal(0, 1, shape).astype(np.float32), first.n)

    h = (tiny.LENGTH, 6) if kind == "sequence" else (6,)
    out = {"classes": (tiny.CLASSES,), "sequence": (tiny.LENGTH, tiny.TOKENS)}.get(kind, ())
    found = dict(rows)
    if name.startswith(("server", "critic")):
        found = {"h": drawn(*h), "y": rows["y"]}
    if name == "critic":
        found = {"h": drawn(6), "y": Rows((rows["x"].n[:, None] > 3) * np.ones(first.shape[:2],
                 np.float32), first.n)}  # fmt: skip
    if name == "decoder.answer":
        found = {"code": drawn(*h)}
    if name.endswith(("distill", "taught")):
        found["teacher"] = drawn(*out)
    return found


def test_recorded_programs() -> None:
    rows = tiny.population("recorded").rows(np.arange(3), "train")
    for program in tiny.programs("recorded").values():
        weights = Tree({k: np.repeat(a[None], 3, 0) for k, a in program.initial().items()})
        predicts(Case(program, weights, rows))


@pytest.mark.parametrize(
    "name",
    ["digits", *(pytest.param(n, marks=SLOW) for n in ("qmnist", *test_shipped.TEXTS))],
)
def test_every_model_that_ships(name: str) -> None:
    """On rows that are made up, of two devices: what devices train and answer with, and the large
    models too, dropout included."""
    every = test_shipped.made(name)
    rows = {k: Rows(v, test_shipped.N) for k, v in test_shipped.columns(name).items()}
    plain = TorchCompute(every, "sequential")

    def start(program: str) -> Tree:
        return Tree({k: np.stack([a, a]) for k, a in plain.initial(program).items()})

    teacher = plain.predict("large", start("large"), rows)["out"]
    h = plain.predict("front", start("front"), rows)["h"]
    given = {
        "small": rows, "small.answer": rows, "front": rows, "joint": rows, "large.answer": rows,
        "small.distill": {**rows, "teacher": teacher}, "server": {"h": h, "y": rows["y"]},
    }  # fmt: skip
    for program, columns in given.items():
        c = Case(every[program], start(program), columns)
        if every[program].loss is None:
            predicts(c)
        else:
            fits(c, Recipe(0.02, 1, 4, momentum=0.9))
    slopes(Case(every["front"], start("front"), {"x": rows["x"]}), ("h",))


# --- modules drawn at random

_LESS = 1e-2  # of the largest slope of all leaves


def _drawn(seed: int) -> Case:
    d = drawn_modules.draw(seed)

    def column(name: str) -> Any:
        return lambda rng, n: d.columns(n, rng)[name]

    return case(d.module, {"x": column("x"), "y": column("y")}, d.loss)


@pytest.mark.parametrize("seed", range(4))
def test_modules_drawn_at_random(seed: int) -> None:
    fits(_drawn(seed), close=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4, 64))
def test_many_modules_drawn_at_random(seed: int) -> None:
    c = _drawn(seed)
    fits(c, close=1e-4)
    compute = runtime(c.program, backward_graph(c.program, c.rows))
    found, wanted = (m.backward("p", c.weights, c.rows)[1] for m in (compute, torch_of(c)))
    most = max(float(np.abs(a).max()) for a in wanted.values())
    for k, a in wanted.items():
        scale = max(float(np.abs(a).max()), _LESS * most)
        assert np.abs(found[k] - a).max() < 1e-4 * scale, k


# --- what a graph says of itself


def test_a_graph_says_what_it_is() -> None:
    """Read by us from the bytes, and by ONNX Runtime from the model: the same."""
    c = of("mlp", [3])
    graph = step_graph(c.program, c.rows, Recipe(0.1, momentum=0.5))
    session = onnxruntime.InferenceSession(graph.model, providers=["CPUExecutionProvider"])
    told_by_runtime = session.get_modelmeta().custom_metadata_map[KEY]
    about = graph.about
    assert About.decode(told_by_runtime) == about
    assert about.encode() == told_by_runtime
    assert (about.program, about.primitive, about.opset) == ("p", "step", 18)
    assert about.form is not None
    assert about.form.memory == ("velocity.",)
    assert set(about.form.trained) == set(c.weights)
    # Two products, 2 operations a multiply-add: 2 (4 * 6 + 6 * 3).
    assert about.flops == 84
    assert {k: v.shape for k, v in about.weights.items()} == {
        k: a.shape[1:] for k, a in c.weights.items()
    }


def test_a_prediction_needs_no_labels_and_says_so() -> None:
    c = of("mlp", [3])
    about = predict_graph(c.program, c.rows).about
    assert about.columns.keys() == {"x"}
    assert about.outputs["out"].shape == (3,)


@pytest.mark.parametrize(
    ("model", "told_so"),
    [(b"", "without"), (b"rubbish", "not an ONNX model"), (b"\x72\xff", "not an ONNX model"),
     (onnx.ModelProto(ir_version=8).SerializeToString(), "without")],
)  # fmt: skip
def test_what_is_no_graph_of_ours(model: bytes, told_so: str) -> None:
    with pytest.raises(PackageError, match=told_so):
        _ = Graph(model).about


def test_metadata_of_another_format() -> None:
    c = of("mlp", [3])
    found = json.loads(predict_graph(c.program, c.rows).about.encode())
    with told(PackageError, "of another format"):
        About.decode(json.dumps({**found, "format": 99}))
    del found["columns"]
    with pytest.raises(PackageError, match="cannot be read"):
        About.decode(json.dumps(found))


class Spare(nn.Module):
    """Has weights that nothing reads, one trained and one not, and a table that is no float."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare = nn.Linear(4, 3), nn.Parameter(torch.ones(2))
        self.still = nn.Parameter(torch.ones(2), requires_grad=False)
        self.register_buffer("order", torch.tensor([2, 0, 3, 1]))

    def forward(self, x: Tensor) -> Tensor:
        order: Tensor = self.order  # type: ignore[assignment]
        return self.used(x[:, order])  # type: ignore[no-any-return]


def test_weights_that_nothing_reads() -> None:
    """They are named as unused; those that train are still pulled to their centre."""
    c = case(Beside([Spare()]), {"x": numbers(4)})
    assert predict_graph(c.program, c.rows).about.unused == ("layers.0.spare", "layers.0.still")
    assert step_graph(c.program, c.rows, PLAIN).about.unused == ("layers.0.still",)
    fits(c)
    slopes(c)
    ends = fits(c, Recipe(0.1, 1, 3, mu=1.0), centre=like(c.weights, 1, "layers.0.spare"))
    assert not np.array_equal(ends["layers.0.spare"][0], c.weights["layers.0.spare"][0])
    assert np.array_equal(ends["layers.0.still"], c.weights["layers.0.still"])


class Tied(nn.Module):
    """One table under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(7, 4)
        self.back = nn.Linear(4, 7, bias=False)
        self.back.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.back(self.tokens(x).mean(1))  # type: ignore[no-any-return]


def test_tied_weights_stay_tied() -> None:
    c = case(Beside([Tied()]), {"x": tokens(7, 3)})
    one, other = "layers.0.tokens.weight", "layers.0.back.weight"
    c.weights[one] = c.weights[other]
    assert step_graph(c.program, c.rows, PLAIN).about.tied == {other: one}
    predicts(c)
    ends = fits(c, Recipe(0.05, 2, 3, momentum=0.5))
    assert np.array_equal(ends[one], ends[other])


def test_a_program_that_trains_nothing_has_no_step() -> None:
    c = of("mlp", [3])
    loss, c.program.__dict__["loss"] = c.program.loss, None
    with told(ExportError, "has no loss", where="program 'p'"):
        step_graph(c.program, c.rows, PLAIN)
    c.program.__dict__["loss"] = loss
    with told(ExportError, "no trainable weight begins so", mend="inner.0.weight"):
        step_graph(c.program, c.rows, replace(PLAIN, train=("head",)))
    with told(ExportError, "centre names 'inner.0.bias', which is not trained"):
        step_graph(c.program, c.rows, replace(PLAIN, mu=1.0, train=(HEAD,)), ("inner.0.bias",))
    with told(ExportError, "has no output 'h'", mend="out"):
        backward_graph(c.program, c.rows, ("h",))
    with told(ExportError, "needs the column 'y', and is given x", mend="each column"):
        step_graph(c.program, {"x": c.rows["x"]}, PLAIN)
