"""Training in bfloat16: asked for, told, and no further from float32 than rounding takes it.

A bfloat16 has 8 significant bits: rounding is off by at most 2^-9 of a number. In a chain of two
layers a gradient goes through two products forward and two back, each with two inputs and an output
rounded: 12 roundings, which in the worst case all add up. So the way that weights have gone is held
to 12 * 2^-9, 2.3 % of its length; measured 0.1 to 1 %. Modules are smooth: where a ReLU falls
the other way, or where Adam divides noise by itself, no such bound holds.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kitestring.cli import main
from kitestring.comparison.compare import load
from kitestring.comparison.order import Order
from kitestring.core import Recipe, Tree
from kitestring.devices.fit.compute import TorchCompute
from kitestring.devices.fit.programs import Program
from kitestring.devices.schedule import schedule
from kitestring.errors import SettingError
from modules import device, devices, keys, program

TINY = f"{Path(__file__).parent / 'tiny.py'}:task"
N = [5, 1, 0, 7]
ROUNDINGS = 12 * 2**-9
PLAIN = Recipe(0.05, 2, 3)
HOWS = ("auto", "compiled", "vmap", "sequential")


def pair(made: Program, how: Any = "sequential", **more: Any) -> tuple[TorchCompute, TorchCompute]:
    """In float32, as without a word, and in bfloat16."""
    rounded = TorchCompute({"p": made}, how, precision="bfloat16", **more)
    return TorchCompute({"p": made}, how, **more), rounded


def away(a: Tree, b: Tree) -> float:
    """The distance between two trees, over all weights of all devices."""
    return float(np.sqrt(sum(np.sum((a[k].astype(np.float64) - b[k]) ** 2) for k in a)))


def same(a: Tree, b: Tree) -> bool:
    return all(np.array_equal(a[k], b[k]) for k in b)


# --- the numbers


@pytest.mark.parametrize(
    "recipe",
    [
        PLAIN,
        replace(PLAIN, lr=1e-5),
        replace(PLAIN, lr=1e-5, momentum=0.9),
        replace(PLAIN, lr=1e-5, momentum=0.9, decay=0.01, clip=0.5),
        replace(PLAIN, lr=1e-5, optimiser="adam"),
        replace(PLAIN, mu=0.1, shuffle=False),
    ],
    ids=["plain", "small", "momentum", "clipped", "adam", "pulled"],
)
@pytest.mark.parametrize("kind", ["norm", "embedding"])
def test_as_far_from_float32_as_rounding_takes_it(kind: str, recipe: Recipe) -> None:
    """At the small rate a step is less than weights in bfloat16 could take: they would stay."""
    made, weights, rows = devices(kind, N, width=16)
    exact, rounded = (c.fit("p", weights, rows, recipe, key=keys(4)).parameters for c in pair(made))
    assert 0 < away(rounded, exact) < ROUNDINGS * away(weights, exact)


def test_slopes_are_rounded_too() -> None:
    made, weights, rows = devices("norm", N)
    (_, exact, d_x), (_, rounded, rounded_x) = (c.backward("p", weights, rows) for c in pair(made))
    nothing = Tree({k: np.zeros_like(a) for k, a in exact.items()})
    assert 0 < away(rounded, exact) < ROUNDINGS * away(exact, nothing)
    one, other = Tree(x=d_x["x"].values), Tree(x=rounded_x["x"].values)
    assert 0 < away(other, one) < ROUNDINGS * away(one, Tree(x=np.zeros_like(one["x"])))


def test_the_plain_loop_under_autocast() -> None:
    """Bit for bit, with logits widened before the loss, and each device alone as among others."""
    made, weights, rows = devices("mlp", N)
    compute = pair(made)[1]
    fit = compute.fit("p", weights, rows, PLAIN, key=keys(4))
    plan, module = schedule(keys(4), np.array(N), 3, 2), made.module
    for d, n in enumerate(N):
        module.load_state_dict({k: torch.from_numpy(a[d]) for k, a in weights.items()})
        step, losses = torch.optim.SGD(module.parameters(), 0.05), []
        for t in range(2 * -(-n // 3)):
            index = plan.index[d, t][plan.real[d, t]]
            x, y = (torch.from_numpy(rows[k].values[d][index]) for k in ("x", "y"))
            with torch.autocast("cpu", torch.bfloat16):
                logits = module({"x": x})["out"]
            assert logits.dtype == torch.bfloat16
            step.zero_grad()
            value = nn.functional.cross_entropy(logits.float(), y)
            value.backward()  # type: ignore[no-untyped-call]
            step.step()
            losses.append(value.item())
        assert all(np.array_equal(fit.parameters[k][d], a) for k, a in module.state_dict().items())
        assert fit.loss[d] == pytest.approx(np.mean(losses) if losses else 0, rel=1e-6)


def test_noise_and_batch_statistics_are_a_devices_own() -> None:
    inner = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    made, (_, _, rows) = program(inner), devices("mlp", N)
    weights = Tree({k: np.repeat(a[None], 4, 0) for k, a in made.initial().items()})
    exact, rounded = pair(made)
    whole = rounded.fit("p", weights, rows, PLAIN, key=keys(4)).parameters
    assert not same(whole, exact.fit("p", weights, rows, PLAIN, key=keys(4)).parameters)
    for d in (3, 0):
        own, few, key = device(weights, d), device(rows, d), keys(4)[d : d + 1]
        assert same(device(whole, d), rounded.fit("p", own, few, PLAIN, key=key).parameters)


# --- what is rounded, and what is not


class Spy(nn.Module):
    """Notes, while it is computed, whether torch was told to round."""

    seen: list[bool]

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(torch.is_autocast_enabled("cpu"))
        return x


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_training_rounds_and_predicting_does_not(precision: Any) -> None:
    spy, (_, weights, rows) = Spy(), devices("mlp", N)
    Spy.seen = []
    made = program(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3), spy))
    compute, rounds = TorchCompute({"p": made}, "sequential", precision=precision), []
    for call in (
        lambda: compute.fit("p", weights, rows, PLAIN, key=keys(4)),
        lambda: compute.backward("p", weights, rows),
        lambda: compute.predict("p", weights, {"x": rows["x"]}),
    ):
        Spy.seen.clear()
        call()
        assert len(set(Spy.seen)) == 1
        rounds.append(Spy.seen[0])
    assert rounds == ([True, True, False] if precision == "bfloat16" else [False] * 3)


@pytest.mark.parametrize("how", HOWS)
def test_without_a_word_it_is_float32(how: Any) -> None:
    made, weights, rows = devices("mlp", N)
    silent, named = (
        TorchCompute({"p": made}, how),
        TorchCompute({"p": made}, how, precision="float32"),
    )
    a, b = (c.fit("p", weights, rows, PLAIN, key=keys(4)) for c in (silent, named))
    assert same(a.parameters, b.parameters)
    assert silent.explain("p") == named.explain("p")
    assert "bfloat16" not in silent.explain("p")


@pytest.mark.parametrize("how", HOWS)
def test_what_comes_back_is_float32_and_it_says_how(how: Any) -> None:
    made, weights, rows = devices("norm", N)
    exact, rounded = pair(made, how)
    fit = rounded.fit("p", weights, rows, replace(PLAIN, momentum=0.5), key=keys(4))
    assert rounded.explain("p") == rounded.explain_all()[2:] == "sequential: bfloat16 products"
    loss, d_weights, d_columns = rounded.backward("p", weights, rows)
    assert rounded.explain("p") == "sequential: bfloat16 products"
    found, x = [c.predict("p", weights, {"x": rows["x"]})["out"] for c in (rounded, exact)]
    assert np.array_equal(found.values, x.values)  # as exact, and by the same way
    assert rounded.used["p", "predict"] == exact.used["p", "predict"]
    arrays = [*fit.parameters.values(), fit.loss, loss, *d_weights.values(), found.values]
    assert {a.dtype for a in (*arrays, d_columns["x"].values)} == {np.dtype(np.float32)}


@pytest.mark.parametrize("first", ["float32", "bfloat16"])
def test_what_is_like_another_has_its_precision_or_nothing_of_it(first: Any) -> None:
    made, weights, rows = devices("mlp", N)
    other = "bfloat16" if first == "float32" else "float32"
    given = TorchCompute({"p": made}, precision=first)
    given.fit("p", weights, rows, PLAIN, key=keys(4))
    alike = TorchCompute({"p": made}, like=given, precision=other)
    alone = TorchCompute({"p": made}, precision=other)
    a, b = (c.fit("p", weights, rows, PLAIN, key=keys(4)) for c in (alike, alone))
    assert same(a.parameters, b.parameters)
    assert alike.explain("p") == alone.explain("p") != given.explain("p")
    shared = TorchCompute({"p": made}, like=given, precision=first)
    assert shared.program("p") is given.program("p")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is none")
def test_on_cuda() -> None:
    made, weights, rows = devices("norm", N, width=16)
    exact, rounded = (
        c.fit("p", weights, rows, PLAIN, key=keys(4)).parameters for c in pair(made, device="cuda")
    )
    assert 0 < away(rounded, exact) < ROUNDINGS * away(weights, exact)


# --- asked for, kept, told


def test_a_name_that_is_none() -> None:
    made, _, _ = devices("mlp", [1])
    for ask in (
        lambda: TorchCompute({"p": made}, precision="bf16"),  # type: ignore[arg-type]
        lambda: Order(precision="bf16"),  # type: ignore[arg-type]
    ):
        with pytest.raises(SettingError, match=r"unknown precision 'bf16'.* mean 'bfloat16'"):
            ask()
    with pytest.raises(SystemExit, match="2"):
        main(["compare", "--precision", "bf16"])


def test_a_comparison_says_it_and_is_not_resumed_in_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["compare", TINY, "--seeds", "2", "--trials", "1", "--only"]
    exact = [*words, "device_only", "--out", str(tmp_path / "exact")]
    rounded = [*words, "splitnn", "--out", str(tmp_path / "rounded")]
    assert main(exact) == 0
    assert "bfloat16" not in (tmp_path / "exact" / "report.html").read_text()
    assert "bfloat16" not in capsys.readouterr().out
    assert main([*rounded, "--precision", "bfloat16", "--explain"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "Trained in bfloat16" in told
    assert "Trained in bfloat16" in (tmp_path / "rounded" / "report.html").read_text()
    assert "sequential: bfloat16 products" in told
    notes = load(tmp_path / "rounded").notes
    assert "Devices were trained one after the other: bfloat16 products." in notes
    for other in ([*exact, "--precision", "bfloat16"], rounded):
        assert main([*other, "--resume"]) == 2
        assert "differs in precision" in capsys.readouterr().err
    assert main([*rounded, "--precision", "bfloat16", "--resume"]) == 0
