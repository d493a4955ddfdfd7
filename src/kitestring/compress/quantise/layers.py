"""Layers whose weights are whole numbers, in the layouts that ONNX Runtime computes with.

All that they hold are buffers, so nothing in them is trained; slopes go through to what lies
before. Some of them round activations as well: the range of a row's numbers is found when it is
computed (dynamic), or was found beforehand, on examples (static).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kitestring.compress.quantise import arithmetic, ops
from kitestring.compress.quantise.arithmetic import LEVELS, WEIGHT_BITS
from kitestring.compress.quantise.grid import Codes
from kitestring.errors import TaskError

BLOCKS = (16, 32, 64, 128, 256)
"""Columns that share a scale where ONNX Runtime multiplies by 4-bit codes (MatMulNBits)."""
_MOST = 2**30  # of a convolution's bias, which is added to sums of 32 bits


class WeightOnlyLinear(nn.Module):
    """A linear layer of 8-bit or 4-bit weights: what `nn.Linear` gives with `weight` and `bias`.

    `codes` uint8 [out, blocks, bytes], `scale` [out, blocks], `zero` uint8 [out, bytes] or None
    where it is the middle of the codes. Two codes of 4 bits lie in a byte."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    bias: Tensor | None

    def __init__(self, codes: Codes, bias: Tensor | None) -> None:
        super().__init__()
        self.bits, self.block = _kept(self, codes)
        self.out_features, self.in_features = codes.codes.shape
        self.register_buffer("bias", _copy(bias))

    @classmethod
    def of(cls, codes: Codes, bias: Tensor | None) -> WeightOnlyLinear:
        """Codes of 2 to 4 bits are kept in 4, of 5 to 8 in 8."""
        return cls(codes, bias)

    @property
    def weight(self) -> Tensor:
        """float32 [out, in], without a slope."""
        how = (self.bits, self.block, self.in_features)
        return ops.dequantise(self.codes, self.scale, self.zero, *how)

    def forward(self, x: Tensor) -> Tensor:
        how = (self.bits, self.block, self.in_features)
        return ops.weight_only_linear(x, self.codes, self.scale, self.zero, self.bias, *how)

    def extra_repr(self) -> str:
        sizes = f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, bits={self.bits}, group={self.block}"


class WeightOnlyEmbedding(nn.Module):
    """A table of 8-bit or 4-bit rows: what `nn.Embedding` gives with `weight`; kept as there."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None

    def __init__(self, codes: Codes) -> None:
        super().__init__()
        self.bits, self.block = _kept(self, codes)
        self.num_embeddings, self.embedding_dim = codes.codes.shape

    @classmethod
    def of(cls, codes: Codes) -> WeightOnlyEmbedding:
        return cls(codes)

    @property
    def weight(self) -> Tensor:
        """float32 [rows, width], without a slope."""
        how = (self.bits, self.block, self.embedding_dim)
        return ops.dequantise(self.codes, self.scale, self.zero, *how)

    def forward(self, ids: Tensor) -> Tensor:
        how = (self.bits, self.block, self.embedding_dim)
        return ops.weight_only_embedding(ids, self.codes, self.scale, self.zero, *how)

    def extra_repr(self) -> str:
        sizes = f"{self.num_embeddings}, {self.embedding_dim}"
        return f"{sizes}, bits={self.bits}, group={self.block}"


class DynamicLinear(nn.Module):
    """A linear layer in whole numbers: each row of the input is rounded on a grid of its own, with
    127 steps to its largest number. `codes` int8 [in, out], `scale` [out]."""

    codes: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, codes: Codes, bias: Tensor | None) -> None:
        """Raises `TaskError` for codes that are not symmetric, of more than 7 bits or in groups."""
        super().__init__()
        self.out_features, self.in_features = codes.codes.shape
        self.register_buffer("codes", signed(codes).t().contiguous())
        self.register_buffer("scale", codes.scale[:, 0].clone())
        self.register_buffer("bias", _copy(bias))

    @property
    def weight(self) -> Tensor:
        """float32 [out, in], without a slope."""
        return (self.codes.float() * self.scale).t()

    def forward(self, x: Tensor) -> Tensor:
        return ops.dynamic_linear(x, self.codes, self.scale, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


class StaticLinear(nn.Module):
    """A linear layer in whole numbers: inputs are rounded to x_scale (code - x_zero), with codes
    0 .. 255, and what lies beyond to the nearer end. `codes` int8 [in, out], `scale` [out]."""

    codes: Tensor
    scale: Tensor
    bias: Tensor | None
    x_scale: Tensor
    x_zero: Tensor

    def __init__(self, codes: Codes, bias: Tensor | None, inputs: tuple[float, float]) -> None:
        """Inputs lie between two ends. Raises `TaskError` for codes as `DynamicLinear` does."""
        super().__init__()
        self.out_features, self.in_features = codes.codes.shape
        self.register_buffer("codes", signed(codes).t().contiguous())
        self.register_buffer("scale", codes.scale[:, 0].clone())
        self.register_buffer("bias", _copy(bias))
        _ends(self, "x", inputs)

    @property
    def weight(self) -> Tensor:
        """float32 [out, in], without a slope."""
        return (self.codes.float() * self.scale).t()

    def forward(self, x: Tensor) -> Tensor:
        ends = (self.x_scale, self.x_zero)
        return ops.static_linear(x, self.codes, self.scale, self.bias, *ends)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


class StaticConv2d(nn.Module):
    """A convolution in whole numbers: inputs and outputs are rounded, each on a grid of its own.
    `codes` int8 [out, in / groups, *kernel], `scale` [out]."""

    codes: Tensor
    scale: Tensor
    bias: Tensor | None
    x_scale: Tensor
    x_zero: Tensor
    y_scale: Tensor
    y_zero: Tensor

    def __init__(
        self,
        codes: Codes,
        like: nn.Conv2d,
        inputs: tuple[float, float],
        outputs: tuple[float, float],
    ) -> None:
        super().__init__()
        self.stride, self.dilation, self.groups = (
            _two(like.stride),
            _two(like.dilation),
            like.groups,
        )
        self.padding = padding(like)
        whole, scale = signed(codes), codes.scale[:, 0]
        least = _least_scale(like.bias, inputs)
        if least is not None and bool((least > scale).any()):
            least = torch.maximum(scale, least)
            whole = (whole * (scale / least)[:, None]).round().to(torch.int8)
            scale = least
        self.register_buffer("codes", whole.reshape(like.weight.shape))
        self.register_buffer("scale", scale.clone())
        self.register_buffer("bias", _copy(like.bias))
        _ends(self, "x", inputs)
        _ends(self, "y", outputs)

    @property
    def weight(self) -> Tensor:
        """float32 [out, in / groups, *kernel], without a slope."""
        return self.codes.float() * self.scale[:, None, None, None]

    def forward(self, x: Tensor) -> Tensor:
        ends = (self.x_scale, self.x_zero, self.y_scale, self.y_zero)
        how = (self.stride, self.padding, self.dilation, self.groups)
        return ops.static_conv2d(x, self.codes, self.scale, self.bias, *ends, *how)

    def extra_repr(self) -> str:
        out, inside, *kernel = self.codes.shape
        return (
            f"{inside * self.groups}, {out}, {tuple(kernel)}, stride={tuple(self.stride)}, "
            f"padding={tuple(self.padding)}, dilation={tuple(self.dilation)}, "
            f"groups={self.groups}, bias={self.bias is not None}"
        )


def _kept(module: nn.Module, codes: Codes) -> tuple[int, int]:
    """Registers codes, scales and zeros of a layer that rounds weights alone. Gives their bits, and
    the columns that share a scale."""
    bits = 4 if codes.bits <= 4 else 8
    (rows, width), block = codes.codes.shape, _block(codes, bits)
    blocks, times = -(-width // block), -(-codes.group // block)
    scale, zero = (
        t.repeat_interleave(times, 1)[:, :blocks].contiguous() for t in (codes.scale, codes.zero)
    )
    parts = F.pad(codes.codes, (0, blocks * block - width)).reshape(rows, blocks, block)
    middle = bool((zero == 2 ** (bits - 1)).all())
    module.register_buffer("codes", arithmetic.packed(parts, bits).clone())
    module.register_buffer("scale", scale)
    module.register_buffer("zero", None if middle else arithmetic.packed(zero, bits))
    return bits, block


def _block(codes: Codes, bits: int) -> int:
    """A group; of 4-bit codes a part of one that the runtime can multiply by, that which takes the
    fewest bytes in all."""
    width = codes.codes.shape[1]
    group = min(codes.group, width)
    fits = [b for b in BLOCKS if group == width or group % b == 0]
    if bits == 8 or not fits:
        return group
    return min(fits, key=lambda b: (-(-width // b) * (b // 2 + 4), -b))


def signed(codes: Codes) -> Tensor:
    """int8 [out, in], 0 being 0. Raises `TaskError` for what cannot meet rounded activations."""
    symmetric = bool((codes.zero == 2 ** (codes.bits - 1)).all())
    if codes.bits > WEIGHT_BITS or codes.scale.shape[1] != 1 or not symmetric:
        what = f"codes of {codes.bits} bits in {codes.scale.shape[1]} groups"
        mend = f"Give symmetric ones of at most {WEIGHT_BITS} bits, one group for a row"
        raise TaskError(what + ("" if symmetric else ", not symmetric"), "quantise", mend)
    return (codes.codes.to(torch.int16) - codes.zero).to(torch.int8)


def padding(layer: nn.Conv2d) -> list[int]:
    """Rows and columns on either side. Raises `TaskError` for what is not padded by zeros, or more
    on one side."""
    if layer.padding_mode != "zeros":
        what = f"a convolution padded by {layer.padding_mode!r}"
        raise TaskError(what, "quantise", "Pad by zeros, or skip it")
    if not isinstance(layer.padding, str):
        return _two(layer.padding)
    if layer.padding == "valid":
        return [0, 0]
    wide = [d * (k - 1) for d, k in zip(_two(layer.dilation), layer.kernel_size, strict=True)]
    if any(n % 2 for n in wide):
        what = "a convolution that pads one side more than the other"
        raise TaskError(what, "quantise", "Give it an odd kernel, or skip it")
    return [n // 2 for n in wide]


def grid(ends: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Scale (float32 []) and zero (uint8 []) of 256 codes between two ends, 0 among them. Raises
    `TaskError` for ends that are not finite."""
    if not all(map(isfinite, ends)):
        what = f"numbers lie between {ends[0]:g} and {ends[1]:g}"
        raise TaskError(what, "quantise", "Look for NaN and infinity in the rows; lower lr")
    low, high = min(ends[0], 0.0), max(ends[1], 0.0)
    scale = torch.tensor((high - low) / LEVELS, dtype=torch.float32)
    if scale < torch.finfo(torch.float32).tiny:  # nothing but zeros
        scale = torch.ones(())
    zero = min(LEVELS, round(-low / float(scale)))
    return scale, torch.tensor(zero, dtype=torch.uint8)


def _ends(module: nn.Module, name: str, ends: tuple[float, float]) -> None:
    for kind, value in zip(("scale", "zero"), grid(ends), strict=True):
        module.register_buffer(f"{name}_{kind}", value.to(module.get_buffer("codes").device))


def _least_scale(bias: Tensor | None, inputs: tuple[float, float]) -> Tensor | None:
    """A bias is kept as a whole number of x_scale * scale. Where weights are so small that it would
    not fit, they are nothing beside it, and rounded to a coarser grid."""
    return None if bias is None else bias.detach().float().abs() / (grid(inputs)[0].item() * _MOST)


def _copy(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach().clone()


def _two(value: int | Sequence[int]) -> list[int]:
    return [value] * 2 if isinstance(value, int) else list(value)
