"""Weights rounded to the nearest code of their group, each by itself: no data is needed.

The baseline "RTN" of GPTQ (Frantar et al. 2023, arXiv 2210.17323) and AWQ (Lin et al. 2024, arXiv
2306.00978). Activations stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from kitestring.compress.matrices import copied, found, matrix, replaced
from kitestring.compress.quantise.grid import nearest_codes
from kitestring.compress.quantise.layers import WeightOnlyEmbedding, WeightOnlyLinear


def nearest(
    model: nn.Module,
    bits: int = 8,
    group: int | None = None,
    skip: Sequence[str] = (),
    *,
    symmetric: bool = True,
    embeddings: bool = False,
) -> nn.Module:
    """A copy of `model` whose linear layers, but for those named in `skip`, are `WeightOnlyLinear`:
    `bits` a weight and one scale for `group` columns, or for a whole row where it is None. With
    `embeddings`, tables are `WeightOnlyEmbedding` as well.

    Raises `SettingError` for bits outside 2..8 and a group below 1, and `TaskError` where no layer
    is left, and for weights that are not finite or are used in several modules."""
    copy = copied(model)
    kinds = (nn.Linear, nn.Embedding) if embeddings else (nn.Linear,)
    new: dict[str, nn.Module] = {}
    for name, layer in found(copy, skip, *kinds).items():
        codes = nearest_codes(matrix(layer), bits, group, symmetric)
        if isinstance(layer, nn.Linear):
            new[name] = WeightOnlyLinear.of(codes, layer.bias)
        else:
            new[name] = WeightOnlyEmbedding.of(codes)
    return replaced(copy, new)
