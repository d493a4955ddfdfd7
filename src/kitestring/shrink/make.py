"""A candidate's module: of which width, and in which precision."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kitestring.compress.prune.structured import USUAL, slim
from kitestring.compress.quantise.dynamic import dynamic
from kitestring.compress.quantise.gptq import gptq
from kitestring.compress.quantise.nearest import nearest
from kitestring.compress.quantise.static import static
from kitestring.shrink.candidates import Base, Precision
from kitestring.tasks.task import Task

GROUP = 32  # columns of a 4-bit matrix that share a scale
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def fresh(task: Task, base: Base, seed: int) -> nn.Module:
    """One of the task's models with the weights that the seed draws."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module: nn.Module = getattr(task, base)()
    return module.eval()


def slimmed(module: nn.Module, keep: float, some: Sequence[Tensor]) -> nn.Module:
    """Narrower all through, what runs beside residuals too. Raises `TaskError` where it cannot be
    done."""
    return module if keep == 1 else slim(module, some[0][:2], keep, what=(*USUAL, "width"))


def compressed(
    module: nn.Module, precision: Precision, some: Sequence[Tensor], draft: bool = False
) -> nn.Module:
    """The module in that precision. `some` are inputs, batch by batch. A draft has the form of what
    is made and takes less time to make; it answers less well.

    Raises `TaskError` where it has no layer that could be quantised so."""
    some = some[:1] if draft else some
    if precision == "float32":
        return module
    if precision == "int8":
        if any(isinstance(layer, _CONVOLUTIONS) for layer in module.modules()):
            return static(module, some)
        return dynamic(module)
    if precision == "weights8":
        return nearest(module, bits=8, embeddings=True)
    if draft:
        return nearest(module, bits=4, group=GROUP, embeddings=True)
    return gptq(_tables(module), some, bits=4, group=GROUP)


def _tables(module: nn.Module) -> nn.Module:
    """With its embeddings in 4 bits: a table has no inputs that could make up for rounding."""
    if not any(isinstance(layer, nn.Embedding) for layer in module.modules()):
        return module
    linears = [n for n, layer in module.named_modules() if isinstance(layer, nn.Linear)]
    return nearest(module, bits=4, group=GROUP, skip=linears, embeddings=True)
