"""Wanda: of each output's weights those go that add least to it on real inputs.

Sun, Liu, Bair, Kolter: "A Simple and Effective Pruning Approach for Large Language Models", ICLR
2024, arXiv 2306.11695, section 3: the score of W_ij is |W_ij| ||X_j||_2, compared
within row i; what is left is not changed. Later layers see what the pruned earlier ones give.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from kitestring.compress.calibrate import Batches, in_turn
from kitestring.compress.matrices import copied, fill, matrices, matrix
from kitestring.compress.prune.pattern import Pattern, fine, least, least_of_each, share


def wanda(
    model: nn.Module,
    batches: Batches,
    sparsity: float = 0.5,
    pattern: Pattern | None = None,
    skip: Sequence[str] = (),
) -> nn.Module:
    """A copy of `model` in which floor(sparsity * in) weights of each output row are zero, or, with
    a `pattern` (n, m), n of every m consecutive ones.

    Layers are nn.Linear and nn.Conv2d without groups, but for those named in `skip`. Raises
    `SettingError` and `TaskError` for settings, layers and batches that this cannot be done for."""
    found = copied(model)
    layers = matrices(found, skip)
    fine(layers, sparsity, pattern)
    for name, inputs in in_turn(found, batches, layers):
        weight = matrix(layers[name])
        scores = weight.abs() * inputs.norm
        if pattern is None:
            gone = least(scores, share(sparsity, weight.shape[1]))
        else:
            gone = least_of_each(scores, pattern)
        fill(layers[name], weight.masked_fill(gone, 0))
    return found
