"""Linear layers in whole numbers, with a range that is found for each row when it is computed.

Weights are rounded once, by output; activations row by row of the input. No data is needed.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from kitestring.compress.matrices import copied, linears, matrix, replaced
from kitestring.compress.quantise.arithmetic import WEIGHT_BITS
from kitestring.compress.quantise.grid import nearest_codes
from kitestring.compress.quantise.layers import DynamicLinear


def dynamic(model: nn.Module, skip: Sequence[str] = ()) -> nn.Module:
    """A copy of `model` whose linear layers, but for those named in `skip`, are `DynamicLinear`.

    Raises `SettingError` for an unknown name and `TaskError` where no layer is left, and for
    weights that are not finite or are used in several modules."""
    copy = copied(model)
    return replaced(
        copy,
        {
            name: DynamicLinear(nearest_codes(matrix(layer), WEIGHT_BITS), layer.bias)
            for name, layer in linears(copy, skip).items()
        },
    )
