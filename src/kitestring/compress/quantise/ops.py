"""Quantised layers as operations of torch: a tracer sees one for each of them.

The slope is that of the input alone, straight through the rounding: that of the product with the
float weights that the codes stand for, and zero where the input was beyond its range.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kitestring.compress.quantise import arithmetic
from kitestring.compress.quantise.arithmetic import LEVELS, beyond

_LIBRARY = torch.library.Library("kitestring", "DEF")  # type: ignore[no-untyped-call]


# Slopes by the input, from that by the output.


def _of_weight_only(
    slope: Tensor, x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None,
    bias: Tensor | None, bits: int, block: int, width: int,
) -> Tensor:  # fmt: skip
    return slope @ dequantise(codes, scale, zero, bits, block, width)


def _of_dynamic(slope: Tensor, x: Tensor, codes: Tensor, scale: Tensor, *rest: Any) -> Tensor:
    return slope @ (codes.float() * scale).t()


def _of_static(
    slope: Tensor, x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, x_scale: Tensor,
    x_zero: Tensor,
) -> Tensor:  # fmt: skip
    return _inside(slope @ (codes.float() * scale).t(), x, x_scale, x_zero)


def _of_conv2d(
    slope: Tensor, x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, x_scale: Tensor,
    x_zero: Tensor, y_scale: Tensor, y_zero: Tensor, *how: Any,
) -> Tensor:  # fmt: skip
    """An output at an end of its range may have been beyond it: no slope goes through."""
    given = (x, codes, scale, bias, x_scale, x_zero, y_scale, y_zero)
    steps, low = beyond(static_conv2d(*given, *how), y_scale, y_zero)
    through = torch.where((steps > low) & (steps < low + LEVELS), slope, torch.zeros_like(slope))
    weight = codes.float() * scale[:, None, None, None]
    stride, padding, dilation, groups = how
    images = x.reshape(-1, *x.shape[-3:])
    found = torch.ops.aten.convolution_backward(
        through.reshape(-1, *slope.shape[-3:]), images, weight, None, stride, padding, dilation,
        False, [0, 0], groups, [True, False, False],
    )[0]  # fmt: skip
    return _inside(found.reshape(x.shape), x, x_scale, x_zero)


def _inside(slope: Tensor, x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    steps, low = beyond(x, scale, zero)
    within = (steps >= low) & (steps <= low + LEVELS)
    return torch.where(within, slope, torch.zeros_like(slope))


def _operation(
    schema: str,
    how: Callable[..., Tensor],
    slope: Callable[..., Tensor] | None = None,
    of_rows: bool = True,
) -> Callable[..., Tensor]:
    """The operation `kitestring::<schema>`, to be called with its arguments in their order. The
    first one has rows along its first axes, as many as there may be, unless it is not `of_rows`."""
    name = f"kitestring::{schema.partition('(')[0]}"
    _LIBRARY.define(schema)  # type: ignore[no-untyped-call]
    _LIBRARY.impl(name, how, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    target = getattr(torch.ops.kitestring, schema.partition("(")[0]).default

    class Called(torch.autograd.Function):
        @staticmethod
        def forward(*given: Any) -> Tensor:
            return target(*given)  # type: ignore[no-any-return]

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            ctx.save_for_backward(*(v if isinstance(v, Tensor) else None for v in inputs))
            ctx.plain = [None if isinstance(v, Tensor) else v for v in inputs]

        @staticmethod
        def backward(ctx: Any, *slopes: Tensor) -> Any:
            rest = [None] * (len(ctx.plain) - 1)
            if slope is None or not ctx.needs_input_grad[0]:
                return None, *rest
            x, *inputs = [
                v if t is None else t for v, t in zip(ctx.plain, ctx.saved_tensors, strict=True)
            ]
            return slope(slopes[0].float(), x.float(), *inputs).to(x.dtype), *rest

        @staticmethod
        def vmap(info: Any, places: tuple[Any, ...], *given: Any) -> tuple[Tensor, int]:
            """Rows of other models are more rows; other weights are computed one by one."""
            first, *rest = places
            if of_rows and not any(isinstance(place, int) for place in rest):
                return call(given[0].movedim(first, 0), *given[1:]), 0
            found = [
                call(*(v.select(at, i) if isinstance(at, int) else v
                       for v, at in zip(given, places, strict=True)))
                for i in range(info.batch_size)
            ]  # fmt: skip
            return torch.stack(found), 0

    def call(*given: Any) -> Tensor:
        sloped = torch.is_grad_enabled() and given[0].requires_grad
        if sloped or torch._C._are_functorch_transforms_active():
            return Called.apply(*given)  # type: ignore[no-untyped-call, no-any-return]
        return target(*given)  # type: ignore[no-any-return]  # a third of the time

    return call


dequantise = _operation(
    "dequantise(Tensor codes, Tensor scale, Tensor? zero, int bits, int block, int width)"
    " -> Tensor",
    arithmetic.dequantise, of_rows=False,
)  # fmt: skip
weight_only_linear = _operation(
    "weight_only_linear(Tensor x, Tensor codes, Tensor scale, Tensor? zero, Tensor? bias,"
    " int bits, int block, int width) -> Tensor",
    arithmetic.weight_only_linear, _of_weight_only,
)  # fmt: skip
weight_only_embedding = _operation(
    "weight_only_embedding(Tensor ids, Tensor codes, Tensor scale, Tensor? zero,"
    " int bits, int block, int width) -> Tensor",
    arithmetic.weight_only_embedding,
)
dynamic_linear = _operation(
    "dynamic_linear(Tensor x, Tensor codes, Tensor scale, Tensor? bias) -> Tensor",
    arithmetic.dynamic_linear, _of_dynamic,
)  # fmt: skip
static_linear = _operation(
    "static_linear(Tensor x, Tensor codes, Tensor scale, Tensor? bias, Tensor x_scale,"
    " Tensor x_zero) -> Tensor",
    arithmetic.static_linear, _of_static,
)  # fmt: skip
static_conv2d = _operation(
    "static_conv2d(Tensor x, Tensor codes, Tensor scale, Tensor? bias, Tensor x_scale,"
    " Tensor x_zero, Tensor y_scale, Tensor y_zero, int[2] stride, int[2] padding,"
    " int[2] dilation, int groups) -> Tensor",
    arithmetic.static_conv2d, _of_conv2d,
)  # fmt: skip

ROUNDING = ("kitestring.dynamic_linear", "kitestring.static_linear", "kitestring.static_conv2d")
"""Operations that round activations: a number that lies between two steps may be taken to the one
here and to the other elsewhere."""


# Operations are counted as those of float layers are, 2 for each multiply-add.


@register_flop_formula(torch.ops.kitestring.weight_only_linear)
def _flops_of_weight_only(x: Sequence[int], codes: Sequence[int], *rest: Any, **how: Any) -> int:
    return 2 * prod(x) * codes[0]


@register_flop_formula([torch.ops.kitestring.dynamic_linear, torch.ops.kitestring.static_linear])
def _flops_of_linear(x: Sequence[int], codes: Sequence[int], *rest: Any, **how: Any) -> int:
    return 2 * prod(x) * codes[1]


@register_flop_formula(torch.ops.kitestring.static_conv2d)
def _flops_of_conv2d(
    x: Sequence[int], codes: Sequence[int], *rest: Any, out_shape: Sequence[int], **how: Any
) -> int:
    return 2 * prod(out_shape) * prod(codes[1:])
