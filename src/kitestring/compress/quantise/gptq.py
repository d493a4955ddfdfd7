"""GPTQ: weights are rounded one column after the other, and those after make up for it.

Frantar, Ashkboos, Hoefler, Alistarh: "GPTQ: Accurate Post-Training Quantization for Generative
Pre-trained Transformers", ICLR 2023, arXiv 2210.17323, algorithm 1. With U the upper Cholesky
factor of the damped H^-1, column j is rounded to q_j and the ones after it answer by

    w -= (w_j - q_j) / U_jj * U_j          over the columns after j.

A group's scales are found when its first column is reached, of weights that have answered by then.
Later layers see what the rounded earlier ones give.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kitestring.compress.calibrate import Batches, in_turn
from kitestring.compress.hessian import blocks, factor
from kitestring.compress.matrices import copied, fill, linears, matrix, replaced
from kitestring.compress.quantise.grid import Codes, bits_and_group, nearest_codes, rounded, spread
from kitestring.compress.quantise.layers import WeightOnlyLinear


def gptq(
    model: nn.Module,
    batches: Batches,
    bits: int = 4,
    group: int | None = 32,
    skip: Sequence[str] = (),
    *,
    symmetric: bool = True,
    by_size: bool = False,
    damping: float = 0.01,
    block: int = 128,
) -> nn.Module:
    """A copy of `model` whose linear layers, but for those named in `skip`, are `WeightOnlyLinear`:
    `bits` a weight and one scale for `group` columns, or for a whole row where it is None.

    With `by_size` (the authors' "act-order") the columns with the largest inputs come first, when
    most others can still answer; a group's scales are then those of its weights at the start.
    `damping` times the mean of H's diagonal is added to it. Raises `SettingError` and `TaskError`
    for settings, layers and batches that this cannot be done for."""
    bits_and_group(bits, group)
    found = copied(model)
    layers = linears(found, skip)
    new: dict[str, nn.Module] = {}
    for name, inputs in in_turn(found, batches, layers):
        layer = layers[name]
        codes = gptq_codes(
            matrix(layer), inputs.hessian, bits, group,
            symmetric=symmetric, by_size=by_size, damping=damping, block=block, where=name,
        )  # fmt: skip
        fill(layer, codes.weight())
        new[name] = WeightOnlyLinear.of(codes, layer.bias)
    return replaced(found, new)


def gptq_codes(
    weight: Tensor,
    hessian: Tensor,
    bits: int,
    group: int | None,
    *,
    symmetric: bool = True,
    by_size: bool = False,
    damping: float = 0.01,
    block: int = 128,
    where: str = "gptq",
) -> Codes:
    """The codes of weights [out, in] whose inputs have this `hessian` [in, in]; `block` columns are
    gone through before the rest is told, which changes the speed alone."""
    rows, columns = weight.shape
    group = columns if group is None else min(group, columns)
    weight = weight.double().clone()
    if by_size:
        order = hessian.diagonal().argsort(descending=True, stable=True)
        start = nearest_codes(weight, bits, group, symmetric)
        scale, zero = start.scale, start.zero
    else:
        order = torch.arange(columns, device=weight.device)
        scale = weight.new_empty(rows, -(-columns // group), dtype=torch.float32)
        zero = torch.empty_like(scale, dtype=torch.uint8)
    weight = weight[:, order]
    upper = factor(hessian[order][:, order], damping, where)
    groups = (order // group).tolist()
    codes = torch.empty_like(weight, dtype=torch.uint8)
    for first, end in blocks(columns, block, 1 if by_size else group):
        errors = weight.new_empty(rows, end - first)
        for j in range(first, end):
            g = groups[j]
            if not by_size and j % group == 0:
                scale[:, g], zero[:, g] = spread(weight[:, j : j + group], bits, symmetric)
            codes[:, j] = rounded(weight[:, j], scale[:, g], zero[:, g], bits)
            nearest = scale[:, g].double() * (codes[:, j].double() - zero[:, g])
            errors[:, j - first] = (weight[:, j] - nearest) / upper[j, j]
            weight[:, j + 1 : end] -= errors[:, j - first, None] * upper[j, j + 1 : end]
        weight[:, end:] -= errors @ upper[first:end, end:]
    return Codes(codes[:, order.argsort()].contiguous(), scale, zero, bits, group)
