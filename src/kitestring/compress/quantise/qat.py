"""Training that knows that the model will be rounded.

Jacob, Kligys, Chen, Zhu, Tang, Howard, Adam, Kalenichenko: "Quantization and Training of Neural
Networks for Efficient Integer-Arithmetic-Only Inference", CVPR 2018, arXiv 1712.05877, section 3,
algorithm 1. Layers give what they will give once they are converted, to the bit. Slopes are those
of the float layer with rounded inputs and weights, straight through the rounding (Bengio, Léonard,
Courville 2013, arXiv 1308.3432), and zero beyond the ends of a range. Ranges of activations follow
those of the batches, as a moving average; those of weights are theirs at each step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kitestring.compress.calibrate import Batches
from kitestring.compress.matrices import Layer, copied, replaced
from kitestring.compress.quantise.arithmetic import LEVELS, beyond, whole
from kitestring.compress.quantise.grid import Codes
from kitestring.compress.quantise.layers import grid
from kitestring.compress.quantise.ranges import (
    FREE,
    Ends,
    chosen,
    followed,
    observed,
    without_norms,
)
from kitestring.compress.quantise.static import rounded, weight_codes
from kitestring.errors import SettingError, TaskError


class _Straight(torch.autograd.Function):
    """`value`, with the slope of `x` where it is `inside`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, inside: Tensor | None) -> Tensor:
        ctx.save_for_backward(inside)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Any:
        (inside,) = ctx.saved_tensors
        return slopes[0] if inside is None else slopes[0] * inside, None, None


class Rounded(nn.Module):
    """A linear layer or a convolution in training: `layer` has the weights that are trained, and
    `inputs` and `outputs` [2] are the ends of the ranges."""

    inputs: Tensor
    outputs: Tensor

    def __init__(
        self, layer: Layer, inputs: Ends, outputs: Ends, bounds: Ends, pace: float
    ) -> None:
        super().__init__()
        self.layer, self.bounds, self.pace = layer, bounds, pace
        self.register_buffer("inputs", torch.tensor(inputs))
        self.register_buffer("outputs", torch.tensor(outputs))

    def forward(self, x: Tensor) -> Tensor:
        self._follow(self.inputs, x)
        x_grid = grid(_pair(self.inputs))
        layer = self.layer
        codes = weight_codes(layer)
        weight = _straight(layer.weight, codes.weight().reshape(layer.weight.shape))
        given = _straight(x, whole(x, *x_grid) * x_grid[0], _inside(x, *x_grid))
        if isinstance(layer, nn.Linear):
            made, inside = F.linear(given, weight, layer.bias), None
        else:
            made = layer._conv_forward(given, weight, layer.bias)
            self._follow(self.outputs, made)
            inside = _inside(made, *grid(_pair(self.outputs)))
        with torch.no_grad():
            value = self._whole(codes)(x)
        return _straight(made, value, inside)

    def converted(self) -> nn.Module:
        """The layer in whole numbers, as it is now."""
        return self._whole(weight_codes(self.layer))

    def _whole(self, codes: Codes) -> nn.Module:
        return rounded(self.layer, codes, _pair(self.inputs), _pair(self.outputs))

    @torch.no_grad()
    def _follow(self, ends: Tensor, x: Tensor) -> None:
        if self.training:
            bounds = self.bounds if ends is self.outputs else None
            seen = torch.stack(x.clamp(*bounds).aminmax() if bounds else x.aminmax())
            ends.lerp_(seen.to(ends.dtype), self.pace)


def prepare(
    model: nn.Module, batches: Batches, skip: Sequence[str] = (), *, pace: float = 0.01
) -> nn.Module:
    """A copy of `model` to be trained: its linear layers and convolutions, but for those named in
    `skip`, are `Rounded`, with ranges that are those of `batches` at first.

    `pace`: how far a range moves towards that of a batch, 0 to 1. Errors as of `static`."""
    if not 0 <= pace <= 1:
        raise SettingError(f"a pace of {pace:g}", "quantise", "Give a number from 0 to 1")
    copy = without_norms(copied(model))
    layers, bounds = chosen(copy, skip), followed(copy)
    seen = observed(copy, batches, layers)
    new = {
        name: Rounded(layer, *seen[name].ends, bounds.get(name, FREE), pace)
        for name, layer in layers.items()
    }
    return replaced(copy, new).train()


def convert(model: nn.Module) -> nn.Module:
    """A copy of a model that was prepared, in whole numbers; it gives what the model itself gives
    in eval mode, to the bit. Raises `TaskError` where nothing in it was prepared."""
    copy = copied(model)
    layers = {name: m for name, m in copy.named_modules() if isinstance(m, Rounded)}
    new = {name: layer.converted() for name, layer in layers.items()}
    if not new:
        raise TaskError("nothing in it was prepared", type(model).__name__, "Call prepare() first")
    return replaced(copy, new)


def _straight(x: Tensor, value: Tensor, inside: Tensor | None = None) -> Tensor:
    return _Straight.apply(x, value.to(x.dtype), inside)  # type: ignore[no-untyped-call, no-any-return]


def _inside(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    steps, low = beyond(x, scale, zero)
    return (steps >= low) & (steps <= low + LEVELS)


def _pair(ends: Tensor) -> Ends:
    low, high = ends.tolist()
    return low, high
