"""A module's whole forward pass: its outputs by name, its graph, and why there is none."""

from __future__ import annotations

import contextlib
import inspect
import logging
import re
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from kitestring.core import Array
from kitestring.errors import ExportError, SettingError
from kitestring.export.checked import Case, Input
from kitestring.export.instead import OTHERWISE, instead

_BRANCH = "Choose with torch.where instead of a Python if, and keep numbers in tensors"
_TAKES = "It must take any number of rows; --input gives the shape of one"
_ROWS = "Take the number of rows from the input: x.shape[0]"


@contextmanager
def predicting(module: nn.Module) -> Iterator[None]:
    """As it predicts: no dropout, running statistics; afterwards each part is as it was."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, training in modes.items():
            part.training = training


@contextmanager
def quiet() -> Iterator[None]:
    """Exporters warn of their own insides at length."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def arguments(module: nn.Module) -> dict[str, inspect.Parameter]:
    """Forward's arguments that have a name, in their order."""
    found = inspect.signature(module.forward).parameters
    return {k: p for k, p in found.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}


def arranged(module: nn.Module, inputs: Sequence[Input], where: str) -> list[Input]:
    """In the order of forward's arguments where all names are theirs; else they go by position."""
    if not inputs:
        mend = "Let forward take rows, and give the shape of one: --input 1x28x28"
        raise SettingError("no inputs, so the outputs would never change", where, mend)
    known = arguments(module)
    if not {i.name for i in inputs} <= known.keys():
        return list(inputs)
    order = list(known)
    found = sorted(inputs, key=lambda i: order.index(i.name))
    for one, expected in zip(found, order, strict=False):
        if one.name != expected and known[one.name].kind is inspect.Parameter.POSITIONAL_ONLY:
            what = f"{one.name} goes by position, and {expected} before it is left out"
            raise SettingError(what, where, f"Give {expected} too")
    return found


def given(module: nn.Module, case: Case) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Positional and named arguments of a call, of inputs that were `arranged`. Copies: a module
    may change what it is given."""
    tensors = {name: torch.from_numpy(a.copy()) for name, a in case.items()}
    known = arguments(module)
    if not tensors.keys() <= known.keys():
        return tuple(tensors.values()), {}
    fit = 0  # as many as are not behind one that is left out
    for name, wanted in zip(tensors, known.values(), strict=False):
        if name != wanted.name or wanted.kind is wanted.KEYWORD_ONLY:
            break
        fit += 1
    return tuple(tensors.values())[:fit], dict(list(tensors.items())[fit:])


def named(outputs: Any, prefix: str = "") -> dict[str, Tensor]:
    """Outputs by name, in the order in which torch flattens them: `out`, `out0`, a key."""
    if isinstance(outputs, Tensor):
        return {prefix or "out": outputs}
    if isinstance(outputs, Mapping):
        parts = {f"{prefix}.{k}" if prefix else str(k): v for k, v in outputs.items()}
    elif isinstance(outputs, tuple | list):
        parts = {f"{prefix or 'out'}{k}": v for k, v in enumerate(outputs)}
    else:
        what = f"an output is {type(outputs).__name__}, not a tensor"
        raise ExportError(what, prefix, "Return tensors, or a tuple, list or dict of them")
    below = [named(value, key) for key, value in parts.items()]
    found = {name: t for part in below for name, t in part.items()}
    if len(parts) < len(outputs) or len(found) < sum(map(len, below)):
        raise ExportError("two outputs would have the same name", prefix, "Give one another key")
    return found


def answers(module: nn.Module, cases: Sequence[Case], where: str) -> list[dict[str, Array]]:
    """What the module gives for each case: numbers that are finite, and the same when asked again.

    Raises `ExportError` where it fails on its inputs, or an export could not be held against it."""
    found: list[dict[str, Array]] = []
    with predicting(module):
        for case in cases:
            try:
                twice = [_once(module, case) for _ in range(2)]
            except ExportError as problem:
                raise ExportError(problem.what, where, problem.mend) from None
            except Exception as problem:
                shapes = ", ".join(f"{k} {v.dtype} {list(v.shape)}" for k, v in case.items())
                what = f"the module fails on {shapes}: {_said(problem)}"
                raise ExportError(what, _line(problem) or where, _TAKES) from None
            names = list(found[0] if found else twice[0])
            if any(list(one) != names for one in twice):
                mend = "Return the same outputs each time, for any number of rows"
                raise ExportError("its outputs are others from call to call", where, mend)
            for name, one in twice[0].items():
                _usable(name, one, twice[1][name], where)
            found.append(twice[0])
    return found


def _once(module: nn.Module, case: Case) -> dict[str, Array]:
    args, kwargs = given(module, case)
    outputs = named(module(*args, **kwargs))
    if not outputs:
        raise ExportError("the module returns nothing", mend="Return tensors")
    return {name: _array(name, t) for name, t in outputs.items()}


def _array(name: str, t: Tensor) -> Array:
    """A copy: the module may return memory of its own, and change it when it is called again."""
    if t.is_complex():
        mend = "Return torch.view_as_real of it"
        raise ExportError(f"output {name} is complex, which no target has", mend=mend)
    try:
        return t.detach().numpy().copy()
    except (TypeError, RuntimeError):
        kind = str(t.dtype if t.layout == torch.strided else t.layout).removeprefix("torch.")
        what = f"output {name} is {kind}, which cannot be held against a runtime"
        raise ExportError(what, mend="Return it dense and as float32: .float()") from None


def _usable(name: str, one: Array, other: Array, where: str) -> None:
    if not np.isfinite(one).all():
        mend = "Draw inputs from a range that it takes: --input 8:float32:1 draws from 0 to 1"
        raise ExportError(f"output {name} is not finite on drawn inputs", where, mend)
    if not np.array_equal(one, other):
        mend = "Draw outside the model and give it the numbers as an input"
        raise ExportError(f"output {name} is another one each time", where, mend)


def traced(
    module: nn.Module, inputs: Sequence[Input], where: str, rows: int, most: int | None = None
) -> ExportedProgram:
    """The forward pass for any number of rows, traced with `rows` of them (at most `most`).

    Raises `ExportError` for a branch on values, a fixed number of rows, or what torch cannot trace;
    it says where in the module."""
    args, kwargs = given(module, {i.name: np.zeros((rows, *i.shape), i.dtype) for i in inputs})
    dim = Dim("rows", max=most) if most else Dim("rows")
    call: dict[str, Any] = {
        "args": args,
        "kwargs": kwargs,
        "dynamic_shapes": tuple({0: dim} for _ in inputs),
    }
    with predicting(module), quiet():
        try:
            return torch.export.export(module, **call, strict=False)
        except Exception as problem:
            raise _untraceable(problem, module, call, where) from None


def _untraceable(
    problem: Exception, module: nn.Module, call: Mapping[str, Any], where: str
) -> ExportError:
    said = str(problem)
    place = _place(problem, module)
    if "specialized it to be a constant" in said or "Constraints violated" in said:
        try:  # this way of tracing says in which line
            torch.export.export(module, **call, strict=True)
        except Exception as again:
            lines = re.findall(r'File "([^"]+)", line (\d+)', str(again))
            own = [f"{file}:{line}" for file, line in lines if "/torch/" not in file]
            place = own[-1] if own else place
        return ExportError("the module fixes the number of rows", place or where, _ROWS)
    if "data-dependent" in said or type(problem).__name__ == "GuardOnDataDependentSymNode":
        what = "the module decides in Python by a value of a tensor"
        return ExportError(what, place or where, _BRANCH)
    return ExportError(
        f"torch cannot trace the module: {_said(problem)}", place or where, OTHERWISE
    )


def unsupported(problem: Exception, operator: str, target: str, where: str) -> ExportError:
    """The refusal of an operator that the target lacks; where it is in the module is told by the
    node at which the exporter stopped."""
    return refused(operator, target, _node(problem), where)


def refused(operator: str, target: str, node: fx.Node | None, where: str) -> ExportError:
    at = _module_of(node) if node is not None else ""
    return ExportError(
        f"{target} has no {operator}{f' ({at})' if at else ''}", where, instead(operator)
    )


def _module_of(node: fx.Node) -> str:
    """Dotted path and class of the innermost module that the node comes from."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    if not stack:
        return ""
    path, kind = stack[-1]
    kind = kind if isinstance(kind, str) else kind.__name__
    return f"in {path or 'the module itself'}, {kind.rpartition('.')[2]}"


def find(program: ExportedProgram, operator: str) -> fx.Node | None:
    """The first node of that operator, such as `aten.sort`, before or after decomposition."""
    name = operator.rpartition(".")[2]
    with quiet():
        for graph in (program.graph, program.run_decompositions().graph):
            for node in graph.nodes:
                if node.op == "call_function" and getattr(node.target, "_opname", "") == name:
                    assert isinstance(node, fx.Node)
                    return node
    return None


def _node(problem: BaseException) -> fx.Node | None:
    """The node that was being translated, from the frames of what was raised."""
    found: fx.Node | None = None
    seen: set[int] = set()
    link: BaseException | None = problem
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        for frame, _ in traceback.walk_tb(link.__traceback__):
            there = frame.f_locals.get("node")
            found = there if isinstance(there, fx.Node) else found
        link = link.__cause__ or link.__context__
    return found


def _place(problem: Exception, module: nn.Module) -> str:
    """The innermost module that was running, and the line of somebody's own code."""
    names = {id(part): name for name, part in module.named_modules()}
    inner = ""
    for frame, _ in traceback.walk_tb(problem.__traceback__):
        one = frame.f_locals.get("self")
        if isinstance(one, nn.Module) and names.get(id(one)):
            inner = f"{names[id(one)]} ({type(one).__name__})"
    return ", ".join(part for part in (inner, _line(problem)) if part)


def _line(problem: Exception) -> str:
    """The innermost line that is neither torch's nor of this folder."""
    hidden = (
        str(Path(torch.__file__).parent),
        str(Path(__file__).parent),
        contextlib.__file__,
        "<",
    )
    frames = traceback.extract_tb(problem.__traceback__)
    own = [f for f in frames if not f.filename.startswith(hidden)]
    return f"{own[-1].filename}:{own[-1].lineno}" if own else ""


def _said(problem: Exception) -> str:
    line = (str(problem).strip().splitlines() or [""])[0][:160]
    return f"{type(problem).__name__}: {line}" if line else type(problem).__name__
