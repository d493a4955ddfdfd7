"""Somebody's torch module by name, and what it needs: `package.module:name` or `file.py:name`."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kitestring.core import Rows
from kitestring.devices.fit.programs import Batch, Program
from kitestring.errors import SettingError, TaskError
from kitestring.measure.inputs import Row
from kitestring.measure.operations import Counted


def source(name: str) -> Any:
    """What is named: a module, or a function or class that makes one without arguments."""
    where, _, attribute = name.rpartition(":")
    module = _from_file(Path(where)) if where.endswith(".py") else _from_module(where)
    if not hasattr(module, attribute):
        raise SettingError(f"no {attribute!r} there", where, "Check the name after the colon")
    return getattr(module, attribute)


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise SettingError("no such file", str(path), "Check the path")
    path = path.resolve()
    sys.path.insert(0, str(path.parent))  # so that the file can import its neighbours
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise SettingError("not a Python file", str(path), "Name a file that ends with .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except Exception as problem:
        raise told("the file fails", problem) from None
    return module


def _from_module(name: str) -> ModuleType:
    sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as problem:
        if problem.name and (name == problem.name or name.startswith(problem.name + ".")):
            mend = f"Looked in {Path.cwd()} and among the installed packages"
            raise SettingError(f"no module {problem.name!r}", mend=mend) from None
        raise told(f"module {name} fails", problem) from None
    except Exception as problem:
        raise told(f"module {name} fails", problem) from None


def made(found: Any, name: str) -> nn.Module:
    """A module of its own, as it predicts: its weights are counted as its memory."""
    if not isinstance(found, nn.Module) and callable(found):
        try:
            found = found()
        except Exception as problem:
            raise told("it fails", problem) from None
    elif isinstance(found, nn.Module):
        found = copy.deepcopy(found)
    if not isinstance(found, nn.Module):
        mend = "Name a torch.nn.Module, or a function without arguments that makes one"
        raise TaskError(f"gives {type(found).__name__}, not a module", name, mend)
    return found.eval()


def told(what: str, problem: Exception) -> TaskError:
    """Somebody's fault as one line, with the line of their code."""
    said = (str(problem).strip().splitlines() or [""])[0][:160]
    frames = [f for f in traceback.extract_tb(problem.__traceback__) if f.filename != __file__]
    own = [f for f in frames if "site-packages" not in f.filename and f.filename[0] != "<"]
    at = f"{own[-1].filename}:{own[-1].lineno}" if own else ""
    return TaskError(f"{what} with {type(problem).__name__}: {said}", at, "Mend it there")


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
