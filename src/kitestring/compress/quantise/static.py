"""Linear layers and convolutions in whole numbers, with ranges of activations seen on examples.

Jacob, Kligys, Chen, Zhu, Tang, Howard, Adam, Kalenichenko: "Quantization and Training of Neural
Networks for Efficient Integer-Arithmetic-Only Inference", CVPR 2018, arXiv 1712.05877, section 2.
Weights have a scale for each output (Krishnamoorthi 2018, arXiv 1806.08342) and 7 bits, with which
no processor's sums overflow; activations have 8 bits and one grid for a tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from kitestring.compress.calibrate import Batches
from kitestring.compress.matrices import Layer, copied, matrix, replaced
from kitestring.compress.quantise.arithmetic import WEIGHT_BITS
from kitestring.compress.quantise.grid import Codes, nearest_codes
from kitestring.compress.quantise.layers import StaticConv2d, StaticLinear
from kitestring.compress.quantise.ranges import Ends, chosen, observed, without_norms


def static(
    model: nn.Module, batches: Batches, skip: Sequence[str] = (), *, percentile: float = 100.0
) -> nn.Module:
    """A copy of `model` whose linear layers and convolutions, but for those named in `skip`, are
    `StaticLinear` and `StaticConv2d`. A BatchNorm2d right behind a convolution becomes part of it.

    Ranges are those of the `batches`; with a percentile below 100, what is further out is cut off.
    Raises `SettingError` for settings, and `TaskError` where no layer is left, for weights that are
    not finite or are used in several modules, for layers that no batch reaches, and for
    convolutions that do not pad by zeros and alike on both sides."""
    copy = without_norms(copied(model))
    layers = chosen(copy, skip)
    seen = observed(copy, batches, layers, percentile)
    new = {
        name: rounded(layer, weight_codes(layer), *seen[name].ends)
        for name, layer in layers.items()
    }
    return replaced(copy, new)


def weight_codes(layer: Layer) -> Codes:
    return nearest_codes(matrix(layer), WEIGHT_BITS)


def rounded(layer: Layer, codes: Codes, inputs: Ends, outputs: Ends) -> nn.Module:
    """The layer in whole numbers, of inputs between two ends; only a convolution rounds outputs."""
    if isinstance(layer, nn.Conv2d):
        return StaticConv2d(codes, layer, inputs, outputs)
    return StaticLinear(codes, layer.bias, inputs)
