"""What quantised layers compute, in numbers: w = scale (code - zero).

Where activations are rounded too, products of whole numbers are summed exactly, and so in whatever
order a runtime takes: Jacob, Kligys, Chen, Zhu, Tang, Howard, Adam, Kalenichenko: "Quantization and
Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", CVPR 2018, arXiv
1712.05877, section 2. Rows are computed one by one: none looks at another, not for the range of its
numbers either.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

WEIGHT_BITS = 7
"""Of weights that meet rounded activations. Processors without instructions for such products (x86
without VNNI) add two of them, 255 * w each, in 16 bits: with 7 bits that never overflows."""
LEVELS = 255  # of an activation that lies between two ends
EACH = 127  # steps to either side of an activation whose row has a scale of its own
SMALLEST = 1e-30  # scale of a row of zeros
_EXACT = 2**24  # float32 holds whole numbers below it


def packed(codes: Tensor, bits: int) -> Tensor:
    """uint8 [..., n] of numbers below 2^bits -> uint8 with two of 4 bits in each byte, the first in
    the lower half; as they are with 8 bits."""
    if bits == 8:
        return codes.contiguous()
    even = F.pad(codes, (0, codes.shape[-1] % 2))
    return even[..., ::2] | even[..., 1::2] << 4


def unpacked(codes: Tensor, bits: int) -> Tensor:
    """The inverse of `packed`, with an even number of codes."""
    return codes if bits == 8 else torch.stack([codes & 15, codes >> 4], -1).flatten(-2)


def dequantise(
    codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, block: int, width: int
) -> Tensor:
    """Codes [out, blocks, bytes] and scales [out, blocks] -> weights [out, width]. `block` columns
    share a scale; `zero` [out, bytes] is packed too, and the middle of the codes where it is None.
    """
    values = unpacked(codes, bits)[..., :block].float()
    if zero is None:
        values = values - 2.0 ** (bits - 1)
    else:
        values = values - unpacked(zero, bits)[:, : scale.shape[1], None].float()
    return (values * scale[..., None]).flatten(1)[:, :width].contiguous()


def weight_only_linear(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None,
    bits: int, block: int, width: int,
) -> Tensor:  # fmt: skip
    weight = dequantise(codes, scale, zero, bits, block, width).to(x.dtype)
    return F.linear(x, weight, bias if bias is None else bias.to(x.dtype))


def weight_only_embedding(
    ids: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None,
    bits: int, block: int, width: int,
) -> Tensor:  # fmt: skip
    flat = ids.flatten()
    rows = None if zero is None else zero[flat]
    return dequantise(codes[flat], scale[flat], rows, bits, block, width).view(*ids.shape, width)


def dynamic_linear(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Codes int8 [in, out], one scale for each output. The largest number of a row is 127 steps."""
    with _unrounded(x):
        wide = x.float()
        step = (wide.abs().amax(-1, keepdim=True) / EACH).clamp(min=SMALLEST)
        out = _product((wide / step).round(), codes) * step * scale
        return (out if bias is None else out + bias).to(x.dtype)


def static_linear(
    x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, x_scale: Tensor, x_zero: Tensor
) -> Tensor:
    """Codes int8 [in, out]. `x_scale` and `x_zero` (uint8) are those of all inputs."""
    with _unrounded(x):
        out = _product(whole(x.float(), x_scale, x_zero), codes) * (x_scale * scale)
        return (out if bias is None else out + bias).to(x.dtype)


def static_conv2d(
    x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, x_scale: Tensor, x_zero: Tensor,
    y_scale: Tensor, y_zero: Tensor, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int,
) -> Tensor:  # fmt: skip
    """Codes int8 [out, in / groups, *kernel]. Outputs are rounded too: on the grid of `y_scale` and
    `y_zero`, beyond whose ends there is nothing."""
    with _unrounded(x):
        steps = whole(x.float(), x_scale, x_zero)
        kind = _summed_in(LEVELS, codes[0].numel())
        images = steps.reshape(-1, *x.shape[-3:]).to(kind)
        sums = F.conv2d(images, codes.to(kind), None, stride, padding, dilation, groups)
        each = x_scale * scale
        if bias is not None:
            sums = sums.double() + (bias / each).round().double()[:, None, None]
        found = (sums.float() * (each / y_scale)[:, None, None]).round()
        low = -y_zero.float()
        out = torch.minimum(torch.maximum(found, low), low + LEVELS) * y_scale
        return out.view(*x.shape[:-3], *out.shape[1:]).to(x.dtype)


def _unrounded(x: Tensor) -> Any:
    """Where training rounds products to bfloat16, sums of codes would not be exact."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def beyond(x: Tensor, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
    """In steps from zero, on a grid without ends; and the lower end."""
    return (x / scale).round(), -zero.float()


def whole(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    found, low = beyond(x, scale, zero)
    return torch.minimum(torch.maximum(found, low), low + LEVELS)


def _summed_in(most: int, terms: int) -> torch.dtype:
    """The type that holds sums of so many products of activations up to `most` exactly."""
    fits = most * 2 ** (WEIGHT_BITS - 1) * terms < _EXACT
    return torch.float32 if fits else torch.float64


def _product(whole: Tensor, codes: Tensor) -> Tensor:
    kind = _summed_in(LEVELS, len(codes))
    return (whole.to(kind) @ codes.to(kind)).float()
