"""Weights as whole numbers: w ~ scale * (code - zero), with one scale for each group of columns.

The grid is that of Frantar, Ashkboos, Hoefler, Alistarh: "GPTQ: Accurate Post-Training Quantization
for Generative Pre-trained Transformers", ICLR 2023, arXiv 2210.17323 (uniform min-max, for a row or
a group of consecutive columns). With b bits there are 2^b codes:

    symmetric    scale = 2 max|w| / (2^b - 1),                zero = 2^(b-1)
    asymmetric   scale = (max(w, 0) - min(w, 0)) / (2^b - 1), zero = round(-min(w, 0) / scale)

so that the ends lie at most half a step beyond the outermost codes: no weight is further than
scale / 2 from its code, and 0 is always a code. Symmetric ends would lie half way between two codes
to the bit, where noise decides; a scale that is a millionth larger takes both inwards.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from kitestring.errors import SettingError, TaskError

INWARDS = 1 + 2**-20


@dataclass(frozen=True, eq=False)
class Codes:
    """A matrix [out, in] in codes 0 .. 2^bits - 1, one a byte; a group of columns shares a scale.

    `codes` uint8 [out, in], `scale` float32 and `zero` uint8 [out, groups], groups = in / group
    rounded up: the last one may be shorter."""

    codes: Tensor
    scale: Tensor
    zero: Tensor
    bits: int
    group: int

    def __post_init__(self) -> None:
        bits_and_group(self.bits, self.group)
        if self.codes.ndim != 2 or self.codes.dtype != torch.uint8:
            what = f"codes are {self.codes.dtype} {list(self.codes.shape)}"
            raise TaskError(what, "Codes", "Give uint8 [out, in]")
        groups = (self.codes.shape[0], -(-self.codes.shape[1] // self.group))
        for name, dtype in (("scale", torch.float32), ("zero", torch.uint8)):
            found: Tensor = getattr(self, name)
            if found.shape != groups or found.dtype != dtype:
                what = f"{name} is {found.dtype} {list(found.shape)}"
                raise TaskError(what, "Codes", f"Give {dtype} {list(groups)}")

    def weight(self) -> Tensor:
        """float32 [out, in] = scale * (codes - zero)."""
        columns = torch.arange(self.codes.shape[1], device=self.codes.device) // self.group
        return self.scale[:, columns] * (self.codes.float() - self.zero.float()[:, columns])


def nearest_codes(
    weight: Tensor,
    bits: int,
    group: int | None = None,
    symmetric: bool = True,
    shrink: Tensor | None = None,
) -> Codes:
    """The code nearest to each weight [out, in] of any float type, each by itself.

    `group` columns share a scale, a whole row where it is None. A group of zeros has scale 1.
    `shrink` [out, groups] in 0..1 narrows ranges: what lies outside gets the outermost code.
    Raises `SettingError` for bits outside 2..8 and a group below 1, and `TaskError` for weights
    that are no matrix, empty or not finite."""
    if weight.ndim != 2 or not weight.numel():
        what = f"weights are {list(weight.shape)}"
        raise TaskError(what, "nearest_codes", "Give a matrix [out, in] that is not empty")
    if not weight.isfinite().all():
        raise TaskError("weights have NaN or infinity", "nearest_codes", "Train the model anew")
    rows, columns = weight.shape
    bits_and_group(bits, group)
    group = columns if group is None else min(group, columns)
    padding = -columns % group  # zeros widen no range
    parts = functional.pad(weight.detach().double(), (0, padding)).reshape(rows, -1, group)
    scale, zero = spread(parts if shrink is None else parts * shrink[..., None], bits, symmetric)
    codes = rounded(parts, scale[..., None], zero[..., None], bits)
    return Codes(codes.reshape(rows, -1)[:, :columns].contiguous(), scale, zero, bits, group)


def spread(weight: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scale (float32) and zero (uint8), both [...], of groups of weights [..., group]."""
    steps = 2**bits - 1
    wide = weight.double()
    high, low = wide.amax(-1).clamp(min=0), wide.amin(-1).clamp(max=0)
    if symmetric:
        high = torch.maximum(high, -low) * INWARDS
        low = -high
    scale = ((high - low) / steps).float()
    # Below the smallest normal number, quotients by it mean nothing.
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, torch.ones_like(scale), scale)
    if symmetric:
        return scale, torch.full_like(scale, 2 ** (bits - 1), dtype=torch.uint8)
    return scale, (-low / scale).round().clamp(0, steps).to(torch.uint8)


def rounded(weight: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """The nearest codes (uint8) of weights, on grids that broadcast against them."""
    return ((weight / scale).round() + zero).clamp(0, 2**bits - 1).to(torch.uint8)


def bits_and_group(bits: int, group: int | None) -> None:
    """Raises `SettingError` for what no grid can have."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
        raise SettingError(f"{bits!r} bits", "quantise", "Give a whole number from 2 to 8")
    whole = isinstance(group, int) and not isinstance(group, bool)
    if group is not None and not (whole and group >= 1):
        what = f"groups of {group!r} columns"
        raise SettingError(what, "quantise", "Give a whole number from 1, or None for whole rows")
