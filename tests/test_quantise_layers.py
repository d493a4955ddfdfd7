"""Layers of whole numbers against their definitions, computed with numpy's integers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

from kitestring.compress.quantise import ops, qat
from kitestring.compress.quantise.dynamic import dynamic
from kitestring.compress.quantise.grid import Codes, nearest_codes
from kitestring.compress.quantise.layers import (
    DynamicLinear,
    StaticConv2d,
    StaticLinear,
    WeightOnlyEmbedding,
    WeightOnlyLinear,
    grid,
)
from kitestring.compress.quantise.ranges import without_norms
from kitestring.compress.quantise.static import static
from kitestring.errors import SettingError, TaskError
from kitestring.tasks.adapters import low_rank, merged
from told import told

KEPT = [(8, None), (8, 20), (4, None), (4, 16), (4, 32), (4, 48), (4, 7), (3, None), (2, 16)]
"""Bits, and columns that share a scale: whole rows, powers of two, and what is neither."""


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def codes_of(layer: Any) -> Codes:
    return nearest_codes(layer.weight.flatten(1), 7)


# Weights alone


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group"), KEPT)
def test_a_layer_is_linear_with_what_its_codes_stand_for(
    bits: int, group: int | None, symmetric: bool
) -> None:
    """`Codes.weight` is the definition; equal to the bit, however the codes are laid out."""
    codes, bias = nearest_codes(drawn(5, 100), bits, group, symmetric), drawn(5)
    layer, x = WeightOnlyLinear.of(codes, bias), drawn(3, 2, 100, seed=1)
    assert torch.equal(layer.weight, codes.weight())
    assert torch.equal(layer(x), F.linear(x, codes.weight(), bias))
    table, ids = WeightOnlyEmbedding.of(codes), torch.tensor([[0, 4], [2, 2]])
    assert torch.equal(table(ids), codes.weight()[ids])
    assert torch.equal(table.weight, codes.weight())


def test_two_codes_of_four_bits_lie_in_a_byte() -> None:
    """The first in the lower half, as MatMulNBits takes them: 1 + 16 * 2 = 33, 3 + 16 * 15 = 243;
    zeros 5 and 6 of two groups alike: 5 + 16 * 6 = 101."""
    row = torch.tensor([1, 2, 3, 15] * 4 + [4, 0] * 8, dtype=torch.uint8)[None]
    codes = Codes(row, torch.ones(1, 2), torch.tensor([[5, 6]], dtype=torch.uint8), 4, 16)
    layer = WeightOnlyLinear.of(codes, None)
    assert layer.codes.tolist() == [[[33, 243] * 4, [4] * 8]]
    assert layer.zero is not None
    assert layer.zero.tolist() == [[101]]
    assert layer.weight[0, :4].tolist() == [-4, -3, -2, 10]


@pytest.mark.parametrize(("bits", "group", "share"), [(8, None, 1 / 4), (4, 128, 1 / 8)])
def test_it_takes_a_quarter_or_an_eighth_of_the_bytes(
    bits: int, group: int | None, share: float
) -> None:
    """And a scale of 4 bytes for each group: of 512 columns 0.2 %, of 128 columns 6 % of 4 bits."""
    layer = WeightOnlyLinear.of(nearest_codes(drawn(64, 512), bits, group), None)
    size = sum(t.numel() * t.element_size() for t in layer.state_dict().values())
    whole = 64 * 512 * 4
    assert whole * share < size < whole * share * 1.07


def test_a_whole_row_of_four_bits_is_laid_out_in_the_fewest_bytes() -> None:
    """192 columns: six blocks of 32, 6 (16 + 4) = 120 bytes; three of 64, 3 (32 + 4) = 108; two of
    128, 2 (64 + 4) = 136; one of 256, 132."""
    assert WeightOnlyLinear.of(nearest_codes(drawn(2, 192), 4), None).block == 64


def test_nothing_in_it_is_trained() -> None:
    layer = WeightOnlyLinear.of(nearest_codes(drawn(5, 100), 8), drawn(5))
    assert not list(layer.parameters())
    assert layer.state_dict().keys() == {"codes", "scale", "bias"}
    again = copy.deepcopy(layer)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again.weight, layer.weight)


# Activations too: sums of whole numbers, exactly


def of_numpy(x: Tensor, low: float, high: float) -> tuple[np.ndarray, float, int]:
    """Codes of `x` as Jacob et al. 2018 round them, less the code of zero."""
    scale = np.float32((high - low) / 255)
    zero = round(-low / float(scale))
    codes = np.clip(np.rint(x.numpy() / scale) + zero, 0, 255).astype(np.int64)
    return codes - zero, scale, zero


def test_a_static_linear_layer_is_a_product_of_integers() -> None:
    layer, x = nn.Linear(40, 6), drawn(9, 40)
    codes, ends = codes_of(layer), (-2.0, 1.5)
    steps, scale, _ = of_numpy(x, *ends)
    whole = codes.codes.numpy().astype(np.int64) - 64
    sums = steps @ whole.T
    wanted = sums.astype(np.float32) * (scale * codes.scale[:, 0].numpy())
    assert layer.bias is not None
    wanted = wanted + layer.bias.detach().numpy()
    found = StaticLinear(codes, layer.bias, ends)(x)
    assert np.array_equal(found.numpy(), wanted)
    assert np.abs(steps).max() == 146  # -2 / (3.5 / 255): beyond that there is nothing


def test_a_dynamic_linear_layer_is_a_product_of_integers() -> None:
    """Each row by 127 steps to its own largest number; a row of zeros is none."""
    layer, x = nn.Linear(40, 6), drawn(9, 40) * torch.logspace(-3, 3, 9)[:, None]
    x[4] = 0
    codes = codes_of(layer)
    step = np.maximum(np.abs(x.numpy()).max(1, keepdims=True) / np.float32(127), np.float32(1e-30))
    steps = np.rint(x.numpy() / step).astype(np.int64)
    assert list(np.abs(steps).max(1)) == [127] * 4 + [0] + [127] * 4
    sums = steps @ (codes.codes.numpy().astype(np.int64) - 64).T
    assert layer.bias is not None
    wanted = sums.astype(np.float32) * step * codes.scale[:, 0].numpy()
    wanted = wanted + layer.bias.detach().numpy()
    assert np.array_equal(DynamicLinear(codes, layer.bias)(x).numpy(), wanted)


@pytest.mark.parametrize(
    "how",
    [{}, {"padding": 1}, {"stride": 2, "dilation": 2}, {"groups": 2, "padding": "same"},
     {"padding": (0, 2), "bias": False}, {"groups": 4, "padding": "valid"}],
)  # fmt: skip
def test_a_static_convolution_is_one_of_integers(how: dict[str, Any]) -> None:
    """Summed place by place in int64; the bias is a whole number of x_scale * scale."""
    layer, x = nn.Conv2d(4, 8, 3, **how), drawn(2, 4, 9, 8)
    codes, inside, outside = codes_of(layer), (-2.0, 2.5), (-0.7, 1.0)
    steps, x_scale, _ = of_numpy(x, *inside)
    weight = (codes.codes.numpy().astype(np.int64) - 64).reshape(layer.weight.shape)
    up, across = (2, 2) if layer.padding == "same" else (0, 0)
    if isinstance(layer.padding, str):
        up = across = int(layer.padding == "same")
    else:
        up, across = layer.padding
    wide = np.pad(steps, ((0, 0), (0, 0), (up, up), (across, across)))
    (s, _), (d, _) = layer.stride, layer.dilation
    rows, columns = ((n - 2 * d - 1) // s + 1 for n in wide.shape[2:])
    sums = np.zeros((2, 8, rows, columns), np.int64)
    inner = 4 // layer.groups
    for o in range(8):
        first = o // (8 // layer.groups) * inner
        for i, r, c in np.ndindex(inner, 3, 3):
            part = wide[:, first + i, r * d :, c * d :][:, : (rows - 1) * s + 1 : s]
            sums[:, o] += weight[o, i, r, c] * part[:, :, : (columns - 1) * s + 1 : s]
    each = (x_scale * codes.scale[:, 0].numpy())[:, None, None]
    if layer.bias is not None:
        sums += np.rint(layer.bias.detach().numpy()[:, None, None] / each).astype(np.int64)
    y_scale = np.float32(1.7 / 255)
    y_zero = round(0.7 / float(y_scale))
    out = np.rint(sums.astype(np.float32) * (each / y_scale))
    wanted = np.clip(out, -y_zero, 255 - y_zero) * y_scale
    found = StaticConv2d(codes, layer, inside, outside)(x)
    assert np.array_equal(found.numpy(), wanted.astype(np.float32))
    assert len(np.unique(wanted)) > 50


def test_sums_beyond_24_bits_are_exact_too() -> None:
    """5,000 products of 255 and 63 are 80 million, which float32 cannot count in ones."""
    codes = Codes(
        torch.full((1, 5000), 127, dtype=torch.uint8), torch.ones(1, 1),
        torch.full((1, 1), 64, dtype=torch.uint8), 7, 5000,
    )  # fmt: skip
    layer, x = StaticLinear(codes, None, (0.0, 255.0)), torch.full((1, 5000), 255.0)
    x[0, 0] = 254
    assert layer(x).item() == np.float32(63 * (255 * 4999 + 254))
    assert DynamicLinear(codes, None)(x).item() == pytest.approx(63 * 255 * 5000, rel=1e-6)


def test_two_products_fit_into_sixteen_bits() -> None:
    """What processors without VNNI add up there: two of 0 .. 255 by -64 .. 63."""
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten(), nn.Linear(3, 2))
    for layer in static(model, [drawn(4, 1, 3, 3)]):  # type: ignore[attr-defined]
        if hasattr(layer, "codes"):
            assert layer.codes.dtype == torch.int8
            assert 2 * 255 * int(layer.codes.int().abs().max()) <= 2**15
    eight = nearest_codes(drawn(3, 4), 8)
    for made in (lambda: DynamicLinear(eight, None), lambda: StaticLinear(eight, None, (0, 1))):
        with told(TaskError, "codes of 8 bits", mend="at most 7 bits"):
            made()
    with told(TaskError, "in 2 groups, not symmetric"):
        DynamicLinear(nearest_codes(drawn(3, 4), 7, 2, symmetric=False), None)


def test_a_bias_far_beyond_the_weights_does_not_overflow() -> None:
    """In steps of x_scale * scale it would be 1e15; sums have 32 bits."""
    layer = nn.Conv2d(1, 2, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1e-15, 1.0]).reshape(2, 1, 1, 1))
        layer.bias.copy_(torch.tensor([3.0, 0.5]))  # type: ignore[union-attr]
    made = StaticConv2d(codes_of(layer), layer, (0.0, 1.0), (0.0, 4.0))
    x = torch.rand(1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    assert float((made.bias / (made.x_scale * made.scale)).abs().max()) <= 2**30  # type: ignore[operator]
    assert torch.allclose(made(x), layer(x), atol=0.02)


@pytest.mark.parametrize(("ends", "scale", "zero"), [
    ((0.0, 2.55), 0.01, 0), ((-1.28, 1.27), 0.01, 128), ((-2.55, 0.0), 0.01, 255),
    ((0.5, 2.55), 0.01, 0), ((0.0, 0.0), 1.0, 0),
])  # fmt: skip
def test_the_grid_between_two_ends(ends: tuple[float, float], scale: float, zero: int) -> None:
    """Zero is always on it."""
    found = grid(ends)
    assert found[0].item() == pytest.approx(scale)
    assert found[1].item() == zero


# Rows


def stacks() -> dict[str, nn.Module]:
    torch.manual_seed(3)
    plain = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 5))
    image = nn.Sequential(
        nn.Unflatten(1, (1, 3, 4)), nn.Conv2d(1, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(24, 5)
    )
    x = drawn(64, 12, seed=5)
    return {"dynamic": dynamic(plain), "static": static(plain, [x]), "image": static(image, [x])}


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 7), st.floats(1e-3, 1e3))
def test_a_row_does_not_see_the_others(seed: int, n: int, far: float) -> None:
    """To the bit: alone, and beside rows of other sizes."""
    x = drawn(n, 12, seed=seed)
    beside = torch.cat([drawn(3, 12, seed=seed + 1) * far, x])
    for kind, model in stacks().items():
        alone = torch.cat([model(row[None]) for row in x])
        assert torch.equal(model(beside)[3:], alone), kind


# Slopes


def test_the_slope_of_weights_alone_is_that_of_their_product() -> None:
    layer = WeightOnlyLinear.of(nearest_codes(drawn(5, 100), 4, 16), drawn(5))
    x, slope = drawn(3, 2, 100, seed=1).requires_grad_(), drawn(3, 2, 5, seed=2)
    layer(x).backward(slope)
    assert torch.allclose(x.grad, slope @ layer.weight, atol=1e-5)  # type: ignore[arg-type]


def test_slopes_go_straight_through_rounding_and_not_beyond_the_ends() -> None:
    """One weight, 1: the slope is 1 from -1.004 to 1.004 (half a step beyond), and 0 elsewhere."""
    codes = Codes(
        torch.tensor([[127]], dtype=torch.uint8), torch.tensor([[1 / 63]]),
        torch.tensor([[64]], dtype=torch.uint8), 7, 1,
    )  # fmt: skip
    layer = StaticLinear(codes, None, (-1.0, 1.0))
    x = torch.tensor([-1.1, -1.0, 0.3, 1.0, 1.1])[:, None].requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None
    assert x.grad[:, 0].tolist() == pytest.approx([0, 1, 1, 1, 0])
    assert DynamicLinear(codes, None)(x)[4].item() == pytest.approx(1.1)


def test_the_slope_of_a_convolution() -> None:
    """Where nothing is cut off, that of the float convolution with the same weights; nothing goes
    through outputs at the end of their range."""
    layer, x = nn.Conv2d(4, 8, 3, padding=1, groups=2, stride=2), drawn(2, 4, 6, 6)
    made = StaticConv2d(codes_of(layer), layer, (-9.0, 9.0), (-9.0, 9.0))
    given_x, slope = x.clone().requires_grad_(), drawn(2, 8, 3, 3, seed=4)
    made(given_x).backward(slope)
    plain = x.clone().requires_grad_()
    F.conv2d(plain, made.weight, None, 2, 1, 1, 2).backward(slope)
    assert torch.allclose(given_x.grad, plain.grad, atol=1e-5)  # type: ignore[arg-type]
    cut = StaticConv2d(codes_of(layer), layer, (-9.0, 9.0), (0.0, 1e-4))
    flat = x.clone().requires_grad_()
    out = cut(flat)
    assert out.unique().tolist() == pytest.approx([0, 1e-4])
    out.backward(slope)
    assert not flat.grad.any()  # type: ignore[union-attr]


def each_kind() -> dict[str, tuple[nn.Module, Tensor]]:
    conv = nn.Conv2d(2, 3, 2)
    linear = nn.Linear(12, 4)
    return {
        "8 bits": (WeightOnlyLinear.of(nearest_codes(linear.weight, 8), linear.bias), drawn(6, 12)),
        "4 bits": (WeightOnlyLinear.of(nearest_codes(linear.weight, 4, 5), None), drawn(6, 12)),
        "dynamic": (DynamicLinear(codes_of(linear), linear.bias), drawn(6, 12)),
        "static": (StaticLinear(codes_of(linear), linear.bias, (-3.0, 3.0)), drawn(6, 12)),
        "conv": (
            StaticConv2d(codes_of(conv), conv, (-3.0, 3.0), (-3.0, 3.0)), drawn(6, 2, 4, 4),
        ),
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["8 bits", "4 bits", "dynamic", "static", "conv"])
def test_mapped_over_models_it_is_the_same(kind: str) -> None:
    """torch.func.vmap over rows of three models, with one layer for all and with three; its slopes
    as well."""
    layer, x = each_kind()[kind]
    many = torch.stack([x, x.flip(0), 2 * x])
    one_by_one = torch.stack([layer(part) for part in many])
    assert torch.equal(vmap(layer)(many), one_by_one)
    state = {k: v.expand(3, *v.shape).clone() for k, v in layer.state_dict().items()}

    def called(own: dict[str, Tensor], part: Tensor) -> Tensor:
        return functional_call(layer, own, (part,))  # type: ignore[no-any-return]

    assert torch.equal(vmap(called)(state, many), one_by_one)
    if isinstance(layer, WeightOnlyLinear):
        how = (layer.scale, layer.zero, layer.bits, layer.block, layer.in_features)
        weights = vmap(lambda codes: ops.dequantise(codes, *how))(state["codes"])
        assert torch.equal(weights, layer.weight.expand(3, -1, -1))

    def total(part: Tensor) -> Tensor:
        return (layer(part) ** 2).sum()

    slopes = vmap(grad(total))(many)
    for part, slope in zip(many, slopes, strict=True):
        alone = part.clone().requires_grad_()
        total(alone).backward()
        assert torch.allclose(slope, alone.grad, atol=1e-4)  # type: ignore[arg-type]
        assert slope.any()


@pytest.mark.parametrize("kind", ["8 bits", "4 bits", "dynamic", "static", "conv"])
def test_operations_count_as_those_of_a_float_layer(kind: str) -> None:
    layer, x = each_kind()[kind]
    plain = nn.Conv2d(2, 3, 2) if kind == "conv" else nn.Linear(12, 4)
    counts = []
    for module in (layer, plain):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            module(x)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("kind", ["dynamic", "static", "conv"])
def test_products_in_bfloat16_leave_whole_numbers_alone(kind: str) -> None:
    layer, x = each_kind()[kind]
    outside = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), outside)


@pytest.mark.parametrize("kind", ["8 bits", "4 bits", "dynamic", "static", "conv"])
def test_half_as_wide_inputs_have_slopes_as_wide(kind: str) -> None:
    """As a layer before it gives them in bfloat16, which has 8 bits."""
    layer, x = each_kind()[kind]
    wide, narrow = x.clone().requires_grad_(), x.bfloat16().requires_grad_()
    for given_x in (wide, narrow):
        out = layer(given_x)
        assert out.dtype == given_x.dtype
        (out.float() ** 2).sum().backward()
    assert narrow.grad is not None
    assert wide.grad is not None
    assert narrow.grad.dtype == torch.bfloat16
    assert (narrow.grad.float() - wide.grad).abs().max() < 0.05 * wide.grad.abs().max()


# Whole models


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3, bias=False),
        nn.BatchNorm2d(6), nn.ReLU6(), nn.Flatten(), nn.Linear(24, 8), nn.ReLU(), nn.Linear(8, 3),
    )  # fmt: skip


def stirred(model: nn.Module) -> nn.Module:
    """Norms that do something."""
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            assert m.running_mean is not None
            assert m.running_var is not None
            m.running_mean.copy_(drawn(len(m.running_mean), seed=8))
            m.running_var.copy_(drawn(len(m.running_var), seed=9) ** 2 + 0.1)
            with torch.no_grad():
                m.weight.copy_(drawn(len(m.weight), seed=10))
                m.bias.copy_(drawn(len(m.bias), seed=11))
    return model


def test_a_norm_right_behind_a_convolution_becomes_part_of_it() -> None:
    model, x = stirred(network()).eval(), drawn(5, 1, 6, 6)
    whole = without_norms(copy.deepcopy(model))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in whole.modules())
    assert torch.allclose(whole(x), model(x), atol=1e-5)


def test_convolutions_that_share_weights_take_their_norms_in_each_by_itself() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
    )
    model[2].weight = model[0].weight
    stirred(model).eval()
    x = drawn(5, 3, 6, 6)
    assert torch.allclose(without_norms(copy.deepcopy(model))(x), model(x), atol=1e-4)


def test_a_convolution_that_makes_its_weights_anew_keeps_its_norm() -> None:
    """torch.nn.utils.prune puts them there before each call, so what is written to them is lost."""
    model = stirred(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3))).eval()
    prune.l1_unstructured(model[0], "weight", amount=0.5)  # type: ignore[index]
    x = drawn(5, 1, 6, 6)
    with told(TaskError, "it cannot be copied", mend="prune.remove"):
        static(model, [x])
    with torch.no_grad():
        wanted = model(x)  # without slopes torch can copy it
    assert torch.allclose(without_norms(copy.deepcopy(model))(x), wanted, atol=1e-5)
    made: Any = static(model, [x])
    assert [type(m) for m in made] == [nn.Conv2d, nn.BatchNorm2d, StaticConv2d]
    assert torch.allclose(made(x), wanted, atol=0.03 * float(wanted.abs().max()))


def test_convolutions_in_groups_are_chosen_like_all_others() -> None:
    def model() -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 2, 3, groups=2))

    x = [drawn(5, 4, 6, 6)]
    named = nn.Sequential()
    named.add_module("deep", model()[0])
    named.add_module("wide", model()[1])
    made: Any = static(named, x, skip="deep")  # one name, as elsewhere
    assert [type(m) for m in made] == [nn.Conv2d, StaticConv2d]
    shared = nn.Sequential(*(nn.Conv2d(4, 4, 1, groups=4) for _ in range(2)))
    shared[1].weight = shared[0].weight
    with told(TaskError, "those of 1 too", where="0"):
        static(shared, x)
    with told(TaskError, "batches are one tensor", mend="[x]"):
        static(model(), x[0])


def test_static_ranges_are_those_of_the_batches() -> None:
    """Of all batches together; an output that goes into a ReLU matters above 0 alone, into ReLU6 up
    to 6."""
    model, x = network().eval(), [drawn(20, 1, 6, 6, seed=i) * 9 for i in range(3)]
    made: Any = static(model, x)
    whole = torch.cat(x)
    assert made[0].x_scale.item() == pytest.approx(float(whole.max() - whole.min()) / 255)
    first = without_norms(copy.deepcopy(model))[0](whole)
    assert made[0].y_zero.item() == 0
    assert made[0].y_scale.item() == pytest.approx(first.max().item() / 255, rel=1e-4)
    assert made[3].y_scale.item() <= 6 / 255 + 1e-9
    assert isinstance(made[1], nn.Identity)
    kinds = [type(m) for m in made if hasattr(m, "codes")]
    assert kinds == [StaticConv2d, StaticConv2d, StaticLinear, StaticLinear]


def test_a_percentile_leaves_out_what_is_far_away() -> None:
    """One number in 1,000 is 100 times as large as the others: 99.5 leaves it out."""
    x = torch.linspace(0, 1, 1000)[:, None]
    x[0] = 100
    layer: Any = static(nn.Sequential(nn.Linear(1, 1)), [x], percentile=99.5)[0]  # type: ignore[index]
    # By definition the values at ranks 0.005 * 999 and 0.995 * 999 of 0.001, 0.002 .. 1, 100.
    ends = [float(np.quantile(x.numpy().astype(np.float64), q)) for q in (0.005, 0.995)]
    assert layer.x_scale.item() == pytest.approx((ends[1] - min(ends[0], 0)) / 255, rel=1e-4)
    for wrong in (50, 101):
        with told(SettingError, "a percentile of"):
            static(nn.Sequential(nn.Linear(1, 1)), [x], percentile=wrong)


@pytest.mark.parametrize("make", [
    dynamic, lambda m, **how: static(m, [drawn(4, 1, 6, 6)], **how),
    lambda m, **how: qat.prepare(m, [drawn(4, 1, 6, 6)], **how),
])  # fmt: skip
def test_the_model_that_is_given_stays_as_it_is(make: Callable[..., nn.Module]) -> None:
    model = stirred(network()).train()
    before = copy.deepcopy(model.state_dict())
    made = make(model, skip=["9"])
    assert type(made[9]) is nn.Linear  # type: ignore[index]
    assert not isinstance(made[7], nn.Linear)  # type: ignore[index]
    assert made.training is isinstance(made[7], qat.Rounded)  # type: ignore[index]
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with told(SettingError, "no module is called 'head'", mend="named_modules"):
        make(model, skip=["head"])
    with told(TaskError, "no layer to change"):
        make(model, skip=[str(i) for i in range(10)])


def test_what_cannot_be_done_is_told() -> None:
    x = drawn(4, 1, 6, 6)
    with told(TaskError, "padded by 'reflect'", mend="Pad by zeros"):
        static(nn.Sequential(nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect")), [x])
    with told(TaskError, "pads one side more than the other", mend="odd kernel"):
        qat.prepare(nn.Sequential(nn.Conv2d(1, 2, 2, padding="same")), [x])
    spoilt = x.clone()
    spoilt[0, 0, 0, 0] = float("nan")
    for bad in ([x / 0], [spoilt], [x, spoilt], [spoilt, x]):
        for percentile in (99.0, 100.0):
            with told(TaskError, "its inputs have NaN or infinity", where="0"):
                static(nn.Sequential(nn.Conv2d(1, 2, 3)), bad, percentile=percentile)
    for bad in ([spoilt], [x / 0]):
        with told(TaskError, "numbers lie between", mend="NaN"):
            qat.prepare(nn.Sequential(nn.Conv2d(1, 2, 3)), [x])(bad[0])
    with told(TaskError, "the model fails on a batch", mend="as it takes"):
        static(nn.Sequential(nn.Linear(5, 2)), [x])

    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.other = nn.Linear(6, 2), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)  # type: ignore[no-any-return]

    with told(TaskError, "no batch reached the layer", where="other", mend="skip it"):
        static(Unused(), [x])
    with told(TaskError, "nothing in it was prepared", mend="prepare"):
        qat.convert(Unused())


# Training that knows


def test_a_prepared_model_gives_what_it_will_give_when_converted() -> None:
    """To the bit, in training as well: ranges of before, then those that have moved."""
    model = qat.prepare(stirred(network()), [drawn(20, 1, 6, 6)], pace=0.3)
    optimiser = torch.optim.SGD(model.parameters(), 0.05)
    for step in range(4):
        x = drawn(8, 1, 6, 6, seed=step)
        loss = F.cross_entropy(model(x), torch.arange(8) % 3)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    x = drawn(30, 1, 6, 6, seed=50)
    whole = qat.convert(model)
    assert torch.equal(model.eval()(x), whole(x))
    assert not any(isinstance(m, qat.Rounded) for m in whole.modules())
    assert not whole.training


def test_slopes_of_training_go_straight_through() -> None:
    """Of a linear layer: by the weights, the slope by the rounded input; by the input, that by the
    rounded weights, and none where the input was beyond its range."""
    x = torch.cat([drawn(6, 12), torch.full((1, 12), 50.0)])
    model: Any = qat.prepare(nn.Sequential(nn.Linear(12, 4)), [x[:6]], pace=0)
    given_x, slope = x.clone().requires_grad_(), drawn(7, 4, seed=2)
    model(given_x).backward(slope)
    made: Any = qat.convert(model)[0]  # type: ignore[index]
    steps = (x / made.x_scale).round()
    near = steps.clamp(-int(made.x_zero), 255 - int(made.x_zero)) * made.x_scale
    layer = model[0].layer
    assert torch.allclose(layer.weight.grad, slope.T @ near, atol=1e-4)
    assert torch.allclose(layer.bias.grad, slope.sum(0), atol=1e-5)
    assert torch.allclose(given_x.grad[:6], (slope @ made.weight)[:6], atol=1e-5)  # type: ignore[index]
    assert not given_x.grad[6].any()  # type: ignore[index]


def test_ranges_follow_the_batches() -> None:
    """From 0..1 with a pace of 0.1 towards -1..3: -0.1 and 1.2; not where the model predicts."""
    model: Any = qat.prepare(nn.Sequential(nn.Linear(2, 1)), [torch.tensor([[0.0, 1.0]])], pace=0.1)
    model.eval()(torch.tensor([[-1.0, 3.0]]))
    assert model[0].inputs.tolist() == [0, 1]
    model.train()(torch.tensor([[-1.0, 3.0]]))
    assert model[0].inputs.tolist() == pytest.approx([-0.1, 1.2])
    with told(SettingError, "a pace of 2"):
        qat.prepare(nn.Sequential(nn.Linear(2, 1)), [torch.ones(1, 2)], pace=2)


# Digits


def test_digits_lose_less_than_a_point() -> None:
    """scikit-learn's 1,797 images, a third of them held out: of 597 rows, a point is 6 rows."""
    from sklearn.datasets import load_digits

    found = load_digits()
    x = torch.tensor(found.data, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    y = torch.tensor(found.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:1200], order[1200:]
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10),
    )  # fmt: skip
    optimiser = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(120):
        batch = train[torch.randint(0, len(train), (64,))]
        loss = F.cross_entropy(model(x[batch]), y[batch])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.eval()

    def right(module: nn.Module) -> float:
        with torch.no_grad():
            return float((module(x[test]).argmax(1) == y[test]).float().mean())

    plain = right(model)
    assert plain > 0.93
    assert right(static(model, [x[train[:200]]])) > plain - 0.01
    assert right(dynamic(model)) > plain - 0.01


# Adapters


@pytest.mark.parametrize("kind", ["8 bits", "4 bits", "dynamic", "static"])
def test_an_adapter_stands_beside_a_quantised_layer(kind: str) -> None:
    """At first nothing is added; merged, it is a float layer of the codes' weights and the
    adapter."""
    layer, x = each_kind()[kind]
    model = nn.Sequential(layer, nn.ReLU(), nn.Linear(4, 2))
    adapted = low_rank(model, 2, targets=["0"])
    assert torch.equal(adapted(x), model(x))
    trained = {k for k, p in adapted.named_parameters() if p.requires_grad}
    assert trained == {"0.down", "0.up"}
    with torch.no_grad():
        adapted[0].up.copy_(drawn(4, 2))  # type: ignore[index]
    whole = merged(adapted)
    assert type(whole[0]) is nn.Linear  # type: ignore[index]
    off = (whole(x) - adapted(x)).abs().max() / whole(x).abs().max()
    assert off < (1e-5 if "bits" in kind else 0.05)
    adapted(x).sum().backward()
    assert adapted[0].down.grad.any()  # type: ignore[index]
