"""The inverse Hessian of a layer's error, made ready for going through its columns in their order.

Frantar, Ashkboos, Hoefler, Alistarh: "GPTQ: Accurate Post-Training Quantization for Generative
Pre-trained Transformers", ICLR 2023, arXiv 2210.17323, steps 2 (blocks) and 3 (Cholesky). Once
column j is fixed, the best answer of the columns after it is given by row j of the inverse of what
is left of H. All these rows, each divided by the root of its first entry, are the rows of the upper
Cholesky factor of H^-1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kitestring.errors import SettingError, TaskError


def factor(hessian: Tensor, damping: float, where: str) -> Tensor:
    """U float64 [in, in], upper, with U^T U = (H + damping * mean(diag H) * I)^-1.

    Where nothing but zeros came in, H is taken for I. Raises `SettingError` for damping that is
    negative or no number, and `TaskError` where it is too little to invert H."""
    if not 0 <= damping < float("inf"):
        raise SettingError(f"damping is {damping}", "hessian", "Give 0.01, or a little more")
    mean = float(hessian.diagonal().mean())
    eye = torch.eye(len(hessian), dtype=torch.float64, device=hessian.device)
    damped = hessian + damping * mean * eye if mean else eye
    lower, failed = torch.linalg.cholesky_ex(damped)
    if not failed:
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed:
            found: Tensor = upper
            return found
    raise TaskError("its inputs depend on each other", where, "Give more batches or damping")


def row_errors(change: Tensor, hessian: Tensor) -> Tensor:
    """[out]: what changing a layer's weights by [out, in] does to each output, d H d^T; half of it
    is the mean squared change over the rows that H is of."""
    return ((change.double() @ hessian) * change).sum(-1)


def blocks(columns: int, block: int, unit: int = 1) -> list[tuple[int, int]]:
    """(from, to) over the columns, at most `block` wide and never across units of `unit` columns:
    whole units where one fits into a block, and parts of units otherwise."""
    if block < 1:
        raise SettingError(f"blocks of {block} columns", "hessian", "Give a whole number from 1")
    found = []
    wide = max(block // unit, 1) * unit
    for first in range(0, columns, wide):
        end = min(first + wide, columns)
        found += [(start, min(start + block, end)) for start in range(first, end, block)]
    return found
