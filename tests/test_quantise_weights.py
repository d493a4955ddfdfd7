"""Weights in few bits: grids, rounding to nearest, GPTQ and AWQ."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kitestring.compress.calibrate import inputs_of
from kitestring.compress.hessian import row_errors
from kitestring.compress.quantise.awq import Scaled, awq, best, narrowed
from kitestring.compress.quantise.fold import fold, givers
from kitestring.compress.quantise.gptq import gptq, gptq_codes
from kitestring.compress.quantise.grid import Codes, nearest_codes
from kitestring.compress.quantise.layers import WeightOnlyEmbedding, WeightOnlyLinear
from kitestring.compress.quantise.nearest import nearest
from kitestring.errors import SettingError, TaskError
from told import told
from whole_models import IDS, OF_TEXT, correlated, llama, one, transformer

WAYS: dict[str, Callable[..., nn.Module]] = {
    "nearest": lambda model, batches, *how, **named: nearest(model, *how, **named),
    "gptq": gptq,
    "awq": awq,
}
every_way = pytest.mark.parametrize("way", list(WAYS))


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def hessian_of(x: Tensor) -> Tensor:
    return inputs_of(one(1, x.shape[1], 0), [x], ["0"])["0"].hessian


# The grid


def test_symmetric_codes_by_hand() -> None:
    """3 bits: scale 2 * 7 / 7 = 2 (and 2^-19), zero 4; -7 / 2 and 7 / 2 go inwards to -3 and 3,
    1.1 / 2 to 1, 0.9 / 2 to 0 and -5.1 / 2 to -3."""
    found = nearest_codes(torch.tensor([[-7.0, 7, 1.1, 0.9, 0, -5.1]]), 3)
    assert found.scale.tolist() == [[2 + 2**-19]]
    assert found.zero.tolist() == [[4]]
    assert found.codes.tolist() == [[1, 7, 5, 4, 4, 1]]
    assert torch.allclose(found.weight(), torch.tensor([[-6.0, 6, 2, 0, 0, -6]]), rtol=1e-6)
    # The same for the weights' negatives, and for weights that differ by a float's noise.
    for other in (-1.0, 1 + 2**-22, 1 - 2**-22, 1e-9):
        codes = nearest_codes(torch.tensor([[-7.0, 7, 1.1, 0.9, 0, -5.1]]) * other, 3).codes
        assert codes.tolist() == [[7, 1, 3, 4, 4, 7] if other < 0 else [1, 7, 5, 4, 4, 1]]


def test_asymmetric_codes_by_hand() -> None:
    """2 bits, groups of 2, the last shorter: [-1, 2] has scale 3 / 3 and zero 1; [4, 9] reaches
    from 0, as 0 is always a code: scale 3, zero 0, 4 / 3 rounds to 1; [-6]: scale 2, zero 3."""
    found = nearest_codes(torch.tensor([[-1.0, 2, 4, 9, -6]]), 2, 2, symmetric=False)
    assert found.scale.tolist() == [[1, 3, 2]]
    assert found.zero.tolist() == [[1, 0, 3]]
    assert found.codes.tolist() == [[0, 3, 1, 3, 0]]
    assert found.weight().tolist() == [[-1, 2, 3, 9, -6]]


@settings(max_examples=60)
@given(
    bits=st.integers(2, 8),
    group=st.none() | st.integers(1, 40),
    symmetric=st.booleans(),
    shift=st.floats(-5, 5),
    size=st.floats(-30, 30),
    seed=st.integers(0, 99),
)
def test_no_weight_is_further_than_half_a_step_from_its_code(
    bits: int, group: int | None, symmetric: bool, shift: float, size: float, seed: int
) -> None:
    """Of any size between 1e-30 and 1e30, and wherever the weights lie: 0 is in the range."""
    weight = (drawn(5, 33, seed=seed) + shift) * 10**size
    weight[1] = 0
    weight[2, :7] = 0
    found = nearest_codes(weight, bits, group, symmetric)
    steps = found.scale[:, torch.arange(33) // found.group]
    assert ((found.weight() - weight).abs() <= steps * (0.5 + 1e-4)).all()
    assert (found.weight()[weight == 0] == 0).all()
    assert int(found.codes.max()) < 2**bits
    assert found.scale.shape == (5, -(-33 // found.group))


def test_groups_of_zeros_and_of_almost_nothing() -> None:
    """Scale 1 where there is nothing, or less than a float's quotient can tell."""
    for weight in (torch.zeros(2, 8), torch.full((2, 8), 1e-42)):
        for symmetric in (True, False):
            found = nearest_codes(weight, 4, 4, symmetric)
            assert (found.scale == 1).all()
            assert (found.weight() == 0).all()


def test_ranges_may_be_narrowed() -> None:
    """Half the range of the first group: 2 * 7 / 2 / 7 = 1 a step, and 7 gets the last code, 3."""
    shrink = torch.tensor([[0.5, 1]])
    found = nearest_codes(torch.tensor([[7.0, 1, 7, 1]]), 3, 2, shrink=shrink).weight()
    assert torch.allclose(found, torch.tensor([[3.0, 1, 6, 0]]), rtol=1e-6)


def test_what_has_no_codes_is_refused() -> None:
    weight = torch.ones(2, 3)
    for bits in (1, 9, 4.0, True):
        with told(SettingError, "bits"):
            nearest_codes(weight, bits)
    for group in (0, -1, 2.0, True):
        with told(SettingError, "groups of"):
            nearest_codes(weight, 4, group)
    for bad in (float("nan"), float("inf")):
        with told(TaskError, "NaN or infinity"):
            nearest_codes(weight * bad, 4)
    for odd in (torch.ones(3), torch.ones(0, 3), torch.ones(3, 0)):
        with told(TaskError, "weights are"):
            nearest_codes(odd, 4)
    fine = nearest_codes(weight, 4, 2)
    parts = {"codes": fine.codes, "scale": fine.scale, "zero": fine.zero, "bits": 4, "group": 2}
    for wrong in ({"codes": fine.codes.int()}, {"scale": fine.scale[:, :1]}, {"group": 3},
                  {"zero": fine.zero.float()}):  # fmt: skip
        with told(TaskError, where="Codes"):
            Codes(**{**parts, **wrong})
    with told(SettingError, "bits"):
        Codes(**{**parts, "bits": 9})


# Rounding to nearest


def test_nearest_is_the_codes_of_every_layer() -> None:
    model = nn.Sequential(
        nn.Embedding(7, 8), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3, bias=False)
    )
    for bits, group in ((8, None), (4, 4), (3, 5)):
        found = nearest(model, bits, group)
        for i in (1, 3):
            assert isinstance(found[i], WeightOnlyLinear)
            codes = nearest_codes(model[i].weight, bits, group)
            assert torch.equal(found[i].weight, codes.weight())
        assert type(found[0]) is nn.Embedding
    both = nearest(model, embeddings=True, symmetric=False)
    assert isinstance(both[0], WeightOnlyEmbedding)
    table = nearest_codes(model[0].weight, 8, None, False).weight()
    assert torch.equal(both[0](torch.tensor([2, 5])), table[[2, 5]])
    assert torch.equal(nearest(nn.Linear(3, 2)).weight, nearest(one(2, 3, 0))[0].weight) is False
    assert isinstance(nearest(nn.Linear(3, 2)), WeightOnlyLinear)


def test_a_table_that_renormalises_itself_is_left_alone() -> None:
    model = nn.Sequential(nn.Embedding(7, 8, max_norm=1.0), nn.Linear(8, 6))
    assert type(nearest(model, embeddings=True)[0]) is nn.Embedding


# GPTQ


def plain_gptq(weight: Tensor, hessian: Tensor, bits: int, group: int) -> Tensor:
    """The weights that OBQ gives in the order of the columns (Frantar et al., equation 2): the
    inverse of what is left of H is taken anew for every column. No blocks, no Cholesky."""
    weight = weight.double().clone()
    found = torch.empty_like(weight)
    for j in range(weight.shape[1]):
        if j % group == 0:
            first = nearest_codes(weight[:, j : j + group], bits)
        scale, zero = first.scale[:, 0].double(), first.zero[:, 0].double()
        code = ((weight[:, j] / scale).round() + zero).clamp(0, 2**bits - 1)
        found[:, j] = scale * (code - zero)
        inverse = hessian[j:, j:].inverse()
        change = (weight[:, j] - found[:, j]) / inverse[0, 0]
        weight[:, j:] -= change[:, None] * inverse[0]
    return found


@pytest.mark.parametrize("group", [4, 6, 16, 20])
@pytest.mark.parametrize("bits", [3, 4])
def test_gptq_is_obq_in_the_order_of_the_columns(bits: int, group: int) -> None:
    """Against a plain reference, and whatever the block: blocks change the speed alone."""
    for seed in range(3):
        hessian, weight = hessian_of(correlated(60, 20, seed)), drawn(6, 20, seed=seed)
        damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(20)
        wanted = plain_gptq(weight, damped, bits, group)
        for block in (1, 3, 8, 20, 128):
            found = gptq_codes(weight, hessian, bits, group, block=block).weight().double()
            assert torch.allclose(found, wanted, atol=1e-6), (seed, block)


def test_the_first_answer_by_hand() -> None:
    """Two columns, H = [[2, 1], [1, 2]] without damping: H^-1 = [[2, -1], [-1, 2]] / 3. Of
    w = [7, 2.8] in 3 bits the scale is 2; 7 is rounded to 6, and 2.8 becomes
    2.8 - (7 - 6) / (2 / 3) * (-1 / 3) = 3.3, of which the nearest code is 4, where 2.8's is 2."""
    hessian = torch.tensor([[2.0, 1], [1, 2]], dtype=torch.float64)
    weight = torch.tensor([[7.0, 2.8]])
    found = gptq_codes(weight, hessian, 3, None, damping=0)
    assert torch.allclose(found.weight(), torch.tensor([[6.0, 4]]), rtol=1e-6)
    assert torch.allclose(nearest_codes(weight, 3).weight(), torch.tensor([[6.0, 2]]), rtol=1e-6)
    # In groups of one column the second scale is that of the weight that has answered.
    found = gptq_codes(weight, hessian, 3, 1, damping=0)
    assert found.scale.tolist()[0] == pytest.approx([2, 2 * 3.3 / 7], rel=2e-6)


def test_the_largest_inputs_first() -> None:
    """The same as putting the columns in that order beforehand and back afterwards; the scales are
    those of the weights at the start."""
    x, weight = correlated(60, 12, 0), drawn(5, 12)
    hessian = hessian_of(x)
    order = hessian.diagonal().argsort(descending=True)
    found = gptq_codes(weight, hessian, 4, None, by_size=True)
    moved = gptq_codes(weight[:, order], hessian[order][:, order], 4, None)
    assert torch.equal(found.codes[:, order], moved.codes)
    grouped = gptq_codes(weight, hessian, 4, 5, by_size=True)
    assert torch.equal(grouped.scale, nearest_codes(weight, 4, 5).scale)


@pytest.mark.parametrize("by_size", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_gptq_on_independent_inputs_is_nearest(by_size: bool, symmetric: bool) -> None:
    """H = 2 / n I: no column can answer for another. The same codes, scales and zeros."""
    weight = drawn(9, 40)
    for hessian in (torch.eye(40, dtype=torch.float64) / 20, torch.zeros(40, 40).double()):
        how: dict[str, Any] = {"symmetric": symmetric, "by_size": by_size, "block": 16}
        found = gptq_codes(weight, hessian, 4, 8, **how)
        wanted = nearest_codes(weight, 4, 8, symmetric)
        for part in ("codes", "scale", "zero"):
            assert torch.equal(getattr(found, part), getattr(wanted, part))


@pytest.mark.parametrize("how", [{"bits": 4, "group": 8}, {"bits": 3, "group": None},
                                 {"bits": 2, "group": 16}, {"bits": 4, "group": 8, "by_size": True},
                                 {"bits": 3, "group": 8, "symmetric": False}])  # fmt: skip
def test_gptq_errs_less_than_nearest_on_correlated_inputs(how: dict[str, Any]) -> None:
    """|| (W' - W) X ||^2 in each of 30 draws. No theorem, but rounding to nearest throws away what
    half of the columns could answer."""
    ratios = []
    for seed in range(30):
        hessian, weight = hessian_of(correlated(100, 32, seed)), drawn(16, 32, seed=seed)
        plain = {k: v for k, v in how.items() if k != "by_size"}
        mine, theirs = (
            float(row_errors(codes.weight() - weight, hessian).sum())
            for codes in (gptq_codes(weight, hessian, **how), nearest_codes(weight, **plain))
        )
        ratios.append(mine / theirs)
    assert max(ratios) < 0.9
    assert sum(ratios) / 30 < 0.6


# AWQ


def test_factors_of_one_are_rounding_to_nearest() -> None:
    """Where all inputs are of one size, every power of it is 1; and where no power is better."""
    model, x = one(6, 16, 0), torch.eye(16).repeat(2, 1) * 3
    found, wanted = awq(model, [x], 4, 8, clip=False), nearest(model, 4, 8)
    assert isinstance(found[0], WeightOnlyLinear)
    assert torch.equal(found[0].weight, wanted[0].weight)


def test_factors_by_hand() -> None:
    """Column 0 carries 100 times as much, and its weight 0.4 is nothing on the grid of 7: at a = 0
    it is rounded to 0. The best factor keeps most of it: s is larger for column 0, and the product
    of the largest and the smallest is 1."""
    weight = torch.tensor([[0.4, 7.0], [0.3, -7.0]]).double()
    model = nn.Sequential(nn.Linear(2, 2))
    x = torch.tensor([[100.0, 0], [0, 1], [-100, 0], [0, -1]])
    seen = inputs_of(model, [x], ["0"])["0"]
    assert seen.mean.tolist() == [50, 0.5]
    s = best([weight], [seen], 3, None)
    assert float(s[0] * s[1]) == pytest.approx(1)
    assert float(s[0]) > 2
    a = float(s[0].log()) / 10**0 / float(torch.tensor(10.0).log())
    assert (a * 20) == pytest.approx(round(a * 20), abs=1e-5)  # s = (100 ^ (1/2)) ^ a, a of 20ths
    kept = nearest_codes(weight * s, 3).weight() / s
    assert nearest_codes(weight, 3).weight()[:, 0].tolist() == [0, 0]
    assert (kept[:, 0] > 0.15).all()


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize(("bits", "group"), [(4, 8), (3, 16), (2, None)])
def test_awq_errs_no_more_than_nearest(clip: bool, bits: int, group: int | None) -> None:
    """A theorem for one layer: a = 0 is on the grid, and narrower ranges are kept only in rows in
    which they prove better. In most draws it is less: inputs' sizes differ by a hundred."""
    ratios = []
    for seed in range(8):
        model, x = one(16, 32, seed), correlated(100, 32, seed, decades=2)
        hessian = hessian_of(x)
        found = awq(model, [x], bits, group, clip=clip)[0]
        weight = found.inner.weight * found.factor if isinstance(found, Scaled) else found.weight
        plain = nearest(model, bits, group)[0].weight
        mine, theirs = (
            float(row_errors(w - model[0].weight.detach(), hessian).sum()) for w in (weight, plain)
        )
        ratios.append(mine / theirs)
    assert max(ratios) <= 1 + 1e-6
    assert sum(ratios) / len(ratios) < 0.95


def test_narrower_ranges_are_judged_by_what_scaled_layers_are_fed() -> None:
    """x / s has the Hessian H / (s s^T). The factors do not depend on ranges, so that no row errs
    more with narrower ones, and many err less."""
    for seed in range(4):
        model, x = one(16, 32, seed), correlated(100, 32, seed, decades=2)
        weight, seen = model[0].weight.detach().double(), inputs_of(model, [x], ["0"])["0"]
        hessian = seen.hessian
        whole, found = (awq(model, [x], 2, 16, clip=clip)[0] for clip in (False, True))
        s = best([weight], [seen], 2, 16)
        scaled = (weight * s).float().double()
        by = narrowed(scaled, hessian / torch.outer(s, s), 2, 16)
        assert torch.equal(found.inner.weight, nearest_codes(scaled, 2, 16, True, by).weight())
        more, less = (
            row_errors(layer.inner.weight * layer.factor - weight, hessian)
            for layer in (whole, found)
        )
        assert (less <= more * (1 + 1e-5)).all()
        assert (less < more).sum() > 8


@settings(max_examples=20)
@given(seed=st.integers(0, 10**6), bits=st.integers(2, 5), group=st.sampled_from([3, 8, None]))
def test_narrower_ranges_err_no_more_in_any_row(seed: int, bits: int, group: int | None) -> None:
    weight, hessian = drawn(7, 20, seed=seed) ** 3, hessian_of(correlated(60, 20, seed))
    shrink = narrowed(weight.double(), hessian, bits, group)
    assert shrink.min() >= 0.5
    mine, plain = (
        row_errors(nearest_codes(weight, bits, group, True, by).weight() - weight, hessian)
        for by in (shrink, None)
    )
    assert (mine <= plain * (1 + 1e-9)).all()


class Sized(nn.Module):
    """A norm without a part of its own to scale."""

    def forward(self, x: Tensor) -> Tensor:
        return x / x.norm(dim=-1, keepdim=True)


class Residual(nn.Module):
    """The norm's output is taken by a sum too."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return x + self.inner(x)  # type: ignore[no-any-return]


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.gate(x).sigmoid() * self.up(x))  # type: ignore[no-any-return]


LINEAR = (nn.Linear(8, 8), nn.Linear(8, 8))
FOLDS: dict[str, tuple[Callable[[], nn.Module], str, str | None]] = {
    "norm": (lambda: nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 4)), "1", "0"),
    "rms norm": (lambda: nn.Sequential(nn.RMSNorm(8), nn.Linear(8, 4)), "1", "0"),
    "batch norm": (lambda: nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 4)), "1", "0"),
    "relu": (lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), "2", "0"),
    "product": (Gate, "down", "up"),
    "gelu": (lambda: nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 4)), "2", None),
    "relu6": (lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU6(), nn.Linear(8, 4)), "2", None),
    "no norm": (lambda: nn.Sequential(nn.LayerNorm(8), Sized(), nn.Linear(8, 4)), "2", None),
    "residual": (Residual, "inner", None),
    "nothing before": (lambda: nn.Sequential(nn.Linear(8, 4)), "0", None),
    "tanh between": (lambda: nn.Sequential(nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 4)), "2", None),
    "other width": (lambda: nn.Sequential(nn.Linear(8, 16), nn.GLU(), nn.Linear(8, 4)), "2", None),
}


@pytest.mark.parametrize("name", list(FOLDS))
def test_factors_go_where_they_change_nothing_else(name: str) -> None:
    """Folded into what gives the tensor, and the layer's columns multiplied: the same function."""
    make, layer, source = FOLDS[name]
    torch.manual_seed(0)
    model = make().eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    x = drawn(5, 8) / 4  # so small that ReLU6 seems a ReLU
    before = {k: v.clone() for k, v in model.state_dict().items()}
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    found = givers(model, layers, [[layer]], x)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert found == [model.get_submodule(source) if source else None]
    if found[0] is not None:
        s = drawn(8).exp()
        wanted = model(x)
        with torch.no_grad():
            fold(found[0], s)
            layers[layer].weight.mul_(s)
        assert torch.allclose(model(x), wanted, atol=1e-6)


class Bound(nn.Module):
    """One channel is at most 6, or nothing below 1e-3; inputs lie between."""

    def __init__(self, channel: int, high: bool) -> None:
        super().__init__()
        self.channel, self.high = channel, high

    def forward(self, x: Tensor) -> Tensor:
        one = x[..., self.channel].clone()
        x = x.clone()
        x[..., self.channel] = one.clamp(max=6) if self.high else one.where(one.abs() > 1e-3, 0)
        return x


@pytest.mark.parametrize("high", [False, True])
def test_a_bound_on_a_single_channel_is_found(high: bool) -> None:
    """Each channel is tried with a large and with a small factor."""
    x = drawn(5, 8).abs() + 0.1
    for channel in range(8):
        model = nn.Sequential(nn.Linear(8, 8, bias=False), Bound(channel, high), nn.Linear(8, 4))
        nn.init.eye_(model[0].weight)
        layers = {"0": model[0], "2": model[2]}
        assert givers(model, layers, [["2"]], x) == [None]


def test_what_an_awq_layer_is_fed_is_scaled() -> None:
    inner = one(3, 4, 0)[0]
    x, factor = drawn(5, 4), torch.tensor([1.0, 2, 4, 0.5])
    scaled = Scaled(inner, factor)
    assert torch.equal(scaled(x), inner(x * factor))
    assert torch.allclose(nn.functional.linear(x, scaled.weight, scaled.bias), scaled(x), atol=1e-6)


# Whole models


def cnn() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(),
        nn.Linear(128, 5), nn.ReLU(), nn.Linear(5, 5),
    )  # fmt: skip


MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    **OF_TEXT,
    "cnn": (cnn, drawn(6, 64).reshape(6, 4, 4, 4)),
}


@every_way
@pytest.mark.parametrize("name", list(MODELS))
def test_whole_models(way: str, name: str) -> None:
    """Every linear layer is in codes, nothing else changes its kind, outputs are near the model's
    (8 bits), and the given model keeps its weights, mode and slopes."""
    make, x = MODELS[name]
    model = make()
    wanted = model.eval()(x).detach()
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = WAYS[way](model, [x[:2], x[2:]], 8, 4)
    assert not found.training
    kinds = {n: type(m) for n, m in found.named_modules() if "inner" not in n}
    for layer, kind in ((n, type(m)) for n, m in model.named_modules()):
        assert kinds[layer] in ((WeightOnlyLinear, Scaled) if kind is nn.Linear else (kind,))
    assert kinds.keys() == dict(model.named_modules()).keys()
    assert not torch.equal(found(x), wanted)
    assert torch.allclose(found(x), wanted, atol=0.02 * float(wanted.abs().max()))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(m.training for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_where_factors_go_in_a_llama() -> None:
    """Into the norms before queries, keys and values, and before gate and up; into the values
    before the output, which only weights them; into up before down. So no layer needs a product."""
    model = llama().eval()
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    at = "model.layers.1."
    groups = [
        [f"{at}self_attn.{part}_proj" for part in "qkv"],
        [f"{at}self_attn.o_proj"],
        [f"{at}mlp.gate_proj", f"{at}mlp.up_proj"],
        [f"{at}mlp.down_proj"],
        ["lm_head"],
    ]
    sources = ["input_layernorm", "self_attn.v_proj", "post_attention_layernorm", "mlp.up_proj"]
    wanted = [at + s for s in sources] + ["model.norm"]
    found = givers(model, layers, groups, IDS)
    assert found == [model.get_submodule(name) for name in wanted]


def test_tied_tables_may_be_in_codes_too() -> None:
    """A tied model scores with the table's codes."""
    for make, name in ((llama, "model.embed_tokens"), (transformer, "tokens")):
        model = make(True).eval()
        found, wanted = nearest(model, embeddings=True), model(IDS).detach()
        assert torch.allclose(found(IDS), wanted, atol=0.02 * float(wanted.abs().max()))
        assert isinstance(found.get_submodule(name), WeightOnlyEmbedding)


def test_later_layers_see_what_the_rounded_earlier_ones_give() -> None:
    """GPTQ of both layers is GPTQ of the second behind the rounded first."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))
    x = correlated(100, 16, 0)
    both = gptq(model, [x], 2, 8)
    with torch.no_grad():
        first = nn.Linear(16, 16)
        first.weight.copy_(both[0].weight)
        first.bias.copy_(model[0].bias)
    behind_rounded = gptq(nn.Sequential(first, nn.ReLU(), model[2]), [x], 2, 8, skip=["0"])
    behind_whole = gptq(model, [x], 2, 8, skip=["0"])
    assert torch.equal(both[2].weight, behind_rounded[2].weight)
    assert not torch.equal(both[2].weight, behind_whole[2].weight)


@every_way
def test_inputs_that_are_always_zero(way: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    with torch.no_grad():
        model[0].bias.fill_(-1e6)
    x = drawn(50, 8)
    x[:, [1, 2, 5, 6]] = 0
    found = WAYS[way](model, [x], 4, 4)
    assert found(x).isfinite().all()
    last = found[2].inner if isinstance(found[2], Scaled) else found[2]
    assert torch.equal(last.weight, nearest_codes(model[2].weight, 4, 4).weight())


@every_way
def test_layers_may_be_left_out(way: str) -> None:
    found = WAYS[way](llama(), [IDS], 4, 4, skip=["lm_head", "model.layers.0"])
    for name, module in found.named_modules():
        if name.startswith(("lm_head", "model.layers.0")):
            assert not isinstance(module, WeightOnlyLinear | Scaled)
    assert isinstance(found.get_submodule("model.layers.1.mlp.up_proj"), WeightOnlyLinear)
    with told(SettingError, "'head'", where="skip"):
        WAYS[way](llama(), [IDS], skip=["head"])
    with told(TaskError, "no layer"):
        WAYS[way](llama(), [IDS], skip=["model", "lm_head"])


@every_way
def test_nonsense_is_refused(way: str) -> None:
    model, x = one(4, 6, 0), drawn(30, 6)
    with told(SettingError, "9 bits"):
        WAYS[way](model, [x], 9)
    with told(SettingError, "groups of 0"):
        WAYS[way](model, [x], 4, 0)
    with torch.no_grad():
        model[0].weight[1, 2] = float("nan")
    with told(TaskError, "NaN", where="0"):
        WAYS[way](model, [x])
    shared = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    shared[1].weight = shared[0].weight
    with told(TaskError, "those of 1 too", where="0", mend="Skip"):
        WAYS[way](shared, [x[:, :4]])
    if way != "nearest":
        with told(TaskError, "no batch"):
            WAYS[way](one(4, 6, 0), [])
    if way == "gptq":
        with told(SettingError, "blocks of 0"):
            gptq(one(4, 6, 0), [x], block=0)


@every_way
def test_layers_whose_weights_are_read_by_the_module_around_them(way: str) -> None:
    """torch's transformer layer does so without slopes; its attention is left alone."""
    torch.manual_seed(0)
    model, x = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(), drawn(3, 5, 8)
    found = WAYS[way](model, [x], 8)
    assert torch.allclose(found(x), model(x), atol=0.02)
    with torch.no_grad():
        assert torch.allclose(found(x), model(x), atol=0.02)
    assert isinstance(found.linear2, WeightOnlyLinear | Scaled)
    assert not isinstance(found.self_attn.out_proj, WeightOnlyLinear)


@every_way
def test_a_layer_in_two_places_stays_one(way: str) -> None:
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    x = correlated(9, 4, 0)
    found = WAYS[way](model, [x], 8)
    assert found[0] is found[2]
    wanted = model(x).detach()
    assert torch.allclose(found(x), wanted, atol=0.02 * float(wanted.abs().max()))
