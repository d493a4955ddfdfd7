"""Somebody's torch module by name, and what it needs: `package.module:name` or `file.py:name`."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kitestring.core import Array, Rows
from kitestring.devices.fit.programs import Batch, Program
from kitestring.errors import SettingError, TaskError
from kitestring.measure.inputs import Row
from kitestring.measure.operations import Counted
from kitestring.tasks import named


def source(name: str) -> Any:
    """What is named: a module, or a function or class that makes one without arguments."""
    where, _, attribute = name.rpartition(":")
    module = named.module(where)
    if not hasattr(module, attribute):
        raise SettingError(f"no {attribute!r} there", where, "Check the name after the colon")
    return getattr(module, attribute)


def made(found: Any, name: str) -> nn.Module:
    """A module of its own, as it predicts: its weights are counted as its memory."""
    if not isinstance(found, nn.Module) and callable(found):
        with named.told("it fails", name):
            found = found()
    elif isinstance(found, nn.Module):
        with named.told("it cannot be copied", name):
            found = copy.deepcopy(found)
    if not isinstance(found, nn.Module):
        mend = "Name a torch.nn.Module, or a function without arguments that makes one"
        raise TaskError(f"gives {type(found).__name__}, not a module", name, mend)
    return found.eval()


def rows(module: nn.Module, name: str) -> list[Row]:
    """What the module takes, where its first layer says so."""
    leaves = (m for m in module.modules() if not list(m.children()) and not _shapeless(m))
    first = next(leaves, None)
    if isinstance(first, nn.Linear):
        return [Row((first.in_features,))]
    raise SettingError(
        f"what {name} takes cannot be known", mend="Give one row's shape: --input 1x28x28"
    )


def _shapeless(layer: nn.Module) -> bool:
    """Layers that take any shape and leave its last size as it is."""
    return isinstance(layer, nn.Identity | nn.ReLU | nn.Tanh | nn.Sigmoid | nn.Dropout)


def ordered(module: nn.Module, given: Mapping[str, Array], where: str) -> list[Array]:
    """Inputs by name in the order of forward's arguments; those without names, which
    `numpy.savez` calls arr_0, arr_1, as they come."""
    if all(name.startswith("arr_") for name in given):
        return list(given.values())
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(module.forward).parameters.values()
    known = [p.name for p in parameters if p.kind in kinds]
    first = known[: len(given)]
    if set(first) != given.keys():
        what = f"it holds {', '.join(given)}, and forward takes {', '.join(known) or 'none'}"
        raise SettingError(what, where, "Name them so, and leave none out before the last")
    return [given[name] for name in first]


def weights(module: nn.Module) -> int:
    """Bytes."""
    return sum(t.numel() * t.element_size() for t in module.state_dict().values())


def count(module: nn.Module, given: list[Tensor]) -> Counted:
    """Operations of one run, as those of a task's programs are counted, and bytes moved."""
    with torch.no_grad(), _Moved() as moved:
        module(*given)
    names = [f"x{place:03}" for place in range(len(given))]
    program = Program("measured", _Called(module, names))
    columns = {
        name: Rows(t[None, :1].numpy(), t.new_ones(1).long().numpy())
        for name, t in zip(names, given, strict=True)
    }
    return Counted(program.flops(columns) * len(given[0]), float(moved.bytes), weights(module))


class _Called(nn.Module):
    """A module of positional inputs, called with columns as a program is."""

    def __init__(self, module: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.module, self.names = module, names

    def forward(self, columns: Batch) -> Any:
        return self.module(*[columns[name] for name in self.names])


class _Moved(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes that each operation reads and writes; a view moves nothing."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
            self.bytes += sum(t.numel() * t.element_size() for t in tensors)
        return out
