"""AWQ: input channels that carry much are scaled up before rounding, so that they lose less.

Lin, Tang, Tang, Yang, Chen, Wang, Xiao, Dang, Gan, Han: "AWQ: Activation-aware Weight Quantization
for On-Device LLM Compression and Acceleration", MLSys 2024, arXiv 2306.00978, section 3.2: W x
becomes (W s) (x / s) with one factor for each input channel,

    s = mean|x|^a,     a in 0 .. 1 by a grid search on || Q(W s) (x / s) - W x ||^2        (4), (5)

where 1 / s goes into what gives x (a norm's or a linear layer's weights) if that changes nothing
else (`fold`), and is a product in the layer itself if it does. Then ranges may be narrowed by the
same error ("weight clipping" in the authors' code, there for each group by itself). Layers are
judged on the inputs of `model` as it was given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from kitestring.compress.calibrate import Batches, Inputs, held, in_order, inputs_of
from kitestring.compress.hessian import row_errors
from kitestring.compress.matrices import copied, fill, linears, matrix, replaced
from kitestring.compress.quantise.fold import fold, givers
from kitestring.compress.quantise.grid import bits_and_group, nearest_codes
from kitestring.compress.quantise.layers import WeightOnlyLinear

GRID = 20  # values of a: 0, 0.05 .. 0.95
NARROWEST = 0.5


class Scaled(nn.Module):
    """A layer of inputs [..., in] that are multiplied by `factor` [in] first."""

    factor: Tensor

    def __init__(self, inner: nn.Linear | WeightOnlyLinear, factor: Tensor) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("factor", factor)

    @property
    def weight(self) -> Tensor:
        """[out, in] of the linear layer that this is: some modules read it themselves."""
        return self.inner.weight * self.factor

    @property
    def bias(self) -> Tensor | None:
        return self.inner.bias

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.inner(x * self.factor))


def awq(
    model: nn.Module,
    batches: Batches,
    bits: int = 4,
    group: int | None = 32,
    skip: Sequence[str] = (),
    *,
    symmetric: bool = True,
    clip: bool = True,
) -> nn.Module:
    """A copy of `model` whose linear layers, but for those named in `skip`, are `WeightOnlyLinear`,
    or such a layer in `Scaled`: `bits` a weight and one scale for `group` columns, or for a whole
    row where it is None. `clip` looks for narrower ranges too.

    Layers that are fed the same tensor share their factors if these go into what gives it. Raises
    `SettingError` and `TaskError` for settings, layers and batches that this cannot be done for."""
    bits_and_group(bits, group)
    found, kept = copied(model), held(batches)
    layers = linears(found, skip)
    inputs = inputs_of(found, kept, layers)
    factors: dict[str, Tensor] = {}
    wrapped: set[str] = set()
    groups = [fed.names for fed in in_order(found, kept, layers)]
    for group_of, source in zip(groups, givers(found, layers, groups, kept[0]), strict=True):
        for names in (group_of,) if source else [(name,) for name in group_of]:
            weights = [matrix(layers[name]) for name in names]
            s = best(weights, [inputs[name] for name in names], bits, group, symmetric)
            factors.update(dict.fromkeys(names, s))
            if bool((s == 1).all()):
                continue
            for name, weight in zip(names, weights, strict=True):
                fill(layers[name], weight * s)
            if source:
                fold(source, s)
            else:
                wrapped.update(names)
    new: dict[str, nn.Module] = {}
    for name, layer in layers.items():
        s, weight = factors[name], matrix(layer)
        hessian = inputs[name].hessian / torch.outer(s, s)
        shrink = narrowed(weight, hessian, bits, group, symmetric) if clip else None
        codes = nearest_codes(weight, bits, group, symmetric, shrink)
        made = WeightOnlyLinear.of(codes, layer.bias)
        new[name] = Scaled(made, (1 / s).to(layer.weight.dtype)) if name in wrapped else made
    return replaced(found, new)


def best(
    weights: Sequence[Tensor],
    inputs: Sequence[Inputs],
    bits: int,
    group: int | None,
    symmetric: bool = True,
) -> Tensor:
    """The factors [in] of least error, summed over layers [out, in] that share them."""
    mean = torch.stack([given.mean for given in inputs]).mean(0)
    mean = mean.clamp(min=1e-4 * float(mean.max()))
    found, least = torch.ones_like(mean), float("inf")
    for step in range(GRID if bool(mean.any()) else 1):
        s = mean ** (step / GRID) if step else torch.ones_like(mean)
        s = s / (s.max() * s.min()).sqrt()
        error = 0.0
        for weight, given in zip(weights, inputs, strict=True):
            near = nearest_codes(weight * s, bits, group, symmetric).weight() / s
            error += float(row_errors(near - weight, given.hessian).sum())
        if error < least:
            found, least = s, error
    return found


def narrowed(
    weight: Tensor, hessian: Tensor, bits: int, group: int | None, symmetric: bool = True
) -> Tensor:
    """[out, groups]: by how much to narrow ranges, 1 to `NARROWEST`.

    Group after group the one of least error in its row, as it is with what was chosen for those
    before: no row errs more than with whole ranges."""
    rows, columns = weight.shape
    group = columns if group is None else min(group, columns)
    steps = torch.arange(GRID - 1, GRID * NARROWEST - 1, -1) / GRID
    shrink = weight.new_ones(rows, -(-columns // group))
    change = nearest_codes(weight, bits, group, symmetric).weight() - weight
    push = change @ hessian
    for g, first in enumerate(range(0, columns, group)):
        own = slice(first, first + group)
        part, before = weight[:, own], change[:, own].clone()
        least = weight.new_zeros(rows)
        for step in steps.tolist():
            tried = weight.new_full((rows, 1), step)
            other = nearest_codes(part, bits, None, symmetric, tried).weight() - part
            turn = other - before
            gain = (turn * (2 * push[:, own] + turn @ hessian[own, own])).sum(1)
            better = gain < least
            least = torch.where(better, gain, least)
            shrink[better, g] = step
            change[better, own] = other[better]
        push += (change[:, own] - before) @ hessian[own]
    return shrink
