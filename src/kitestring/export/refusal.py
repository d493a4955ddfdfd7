"""What cannot be exported, told in one line: what, where in the module, and what to write instead.

An operation of the backward pass belongs to no line of the module. So each of its parts is tried by
itself, the innermost first: the first one that fails alike is the place.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value
from torch.utils import _pytree as pytree

from kitestring.devices.fit.programs import Program
from kitestring.errors import ExportError
from kitestring.export.builder import Builder
from kitestring.export.instead import instead
from kitestring.export.lower import lower
from kitestring.export.operation import Unsupported, dtype_of
from kitestring.export.sizes import ROWS, Shape
from kitestring.export.tracing import MANY, UNTRACEABLE, Uneven, confirm, trace

Columns = Callable[[int], Mapping[str, Tensor]]

_SHOWN = 160
_ANY = "Let any number of rows through"
_FIRST = "keep the first axis, as x.flatten(1) and x[:, i] do"


def refused(
    program: Program, module: nn.Module, columns: Columns, problem: Exception
) -> ExportError:
    """The error for a program that could not be traced or lowered."""
    if isinstance(problem, KeyError) and problem.args and isinstance(problem.args[0], str):
        what = f"needs the column {problem.args[0]!r}, and is given {', '.join(columns(2))}"
        mend = "Give an example of each column that it reads"
        return ExportError(what, f"program {program.name!r}", mend)
    place = _Search(module, columns, problem).place()
    if not place and isinstance(problem, Unsupported):
        place = "its loss, or what is made of its outputs"
    where = f"program {program.name!r}" + (f", {place}" if place else "")
    return ExportError(_what(problem), where, _mend(problem))


def no_batch_statistics(program: Program) -> None:
    """Raises `ExportError` for layers whose statistics change in training."""
    for path, m in program.training.named_modules():
        normed = isinstance(m, nn.modules.batchnorm._NormBase) and m.track_running_stats
        if normed and m.training:
            _refuse_statistics(program, f"{path} ({type(m).__name__})")


def statistics(program: Program, name: str) -> None:
    """Raises `ExportError` for a buffer that changes in training."""
    _refuse_statistics(program, name)


def _refuse_statistics(program: Program, where: str) -> None:
    raise ExportError(
        "batch statistics change in training, and a row is then not computed by itself",
        f"program {program.name!r}, {where}",
        "Use GroupNorm or LayerNorm, or keep its statistics: a subclass whose train() leaves it in "
        "evaluation",
    )


def draws_anyway(program: Program) -> ExportError:
    return ExportError(
        "it draws random numbers when it predicts", f"program {program.name!r}",
        "Drop only in training: pass training=self.training",
    )  # fmt: skip


def _what(problem: Exception) -> str:
    if isinstance(problem, Unsupported):
        return f"{problem.kind} has no counterpart in ONNX"
    if isinstance(problem, Uneven):
        return f"it does not compute rows one like another: {problem}"
    if _looks_for_a_causal_mask(problem):
        return "it looks at the values of its mask for whether it is causal"
    if _branches(problem):
        return "it branches on a value that only data decides"
    lines = str(problem).strip().splitlines() or [type(problem).__name__]
    return f"it cannot be traced ({lines[0][:_SHOWN]})"


def _mend(problem: Exception) -> str:
    told = str(problem)
    quoted = re.search(r"derivative for (?:'|aten::)(\w+)", told)
    kind = problem.kind if isinstance(problem, Unsupported) else quoted and quoted[1]
    if kind:
        return instead(kind)
    if _looks_for_a_causal_mask(problem):
        return "Give it is_causal=True or False beside its mask (a decoder: tgt_is_causal)"
    if _branches(problem):
        return "Compute both and choose by torch.where"
    if isinstance(problem, Uneven):
        return f"{_ANY}, without a branch on len(x): {_FIRST}"
    if "data pointer" in told or "numpy" in told or "constant of the module" in told:
        return "Compute with torch's operations alone, on what goes in"
    if "setup_context" in told:
        return "Give the autograd.Function a setup_context, or write it with torch's operations"
    return f"{_ANY}: {_FIRST}"


def _branches(problem: Exception) -> bool:
    told = str(problem)
    return "data-dependent" in told or "_local_scalar_dense" in told or ".item()" in told


def _looks_for_a_causal_mask(problem: Exception) -> bool:
    """As torch's encoders and decoders do where they are not told."""
    frames = traceback.walk_tb(problem.__traceback__)
    asked = any(frame.f_code.co_name == "_detect_is_causal_mask" for frame, _ in frames)
    return asked and _branches(problem)


def _alike(a: Exception, b: Exception | None) -> bool:
    if isinstance(a, Unsupported) and isinstance(b, Unsupported):
        return a.kind == b.kind
    if isinstance(a, Uneven) or isinstance(b, Uneven):
        return type(a) is type(b)
    return b is not None and not isinstance(b, Unsupported) and _branches(a) == _branches(b)


@dataclass
class _Search:
    """For the innermost part of `module` that fails as the whole did."""

    module: nn.Module
    columns: Columns
    problem: Exception
    _seen: dict[int, dict[str, Any]] = field(default_factory=dict)

    def place(self) -> str:
        """As in "layers.3 (Linear)"; empty where no part fails alike."""
        inner = sorted(self.module.named_modules(), key=lambda named: -_depth(named[0]))
        leaves_first = sorted(inner, key=lambda named: bool(list(named[1].children())))
        if path := self._fails_at_once():
            return self._named(path)
        for path, part in leaves_first:
            if path in self._inputs(5) and any(
                _alike(self.problem, self._tried(path, part, sloped)) for sloped in (True, False)
            ):
                return self._named(path)
        return ""

    def _named(self, path: str) -> str:
        kind = type(self.module.get_submodule(path)).__name__
        return f"{path} ({kind})" if path else f"the module ({kind})"

    def _fails_at_once(self) -> str:
        """Where it stops without being traced: with 5 rows, or 7, or many."""
        for rows in (5, 7, MANY):
            try:
                self._inputs(rows)
            except _Stopped as stopped:
                return stopped.path
        return ""

    def _inputs(self, rows: int) -> dict[str, Any]:
        """What each part is given, by its path."""
        if rows not in self._seen:
            self._seen[rows] = _captured(self.module, self.columns(rows))
        return self._seen[rows]

    def _tried(self, path: str, part: nn.Module, sloped: bool) -> Exception | None:
        """How it fails by itself: its outputs, and the slopes of their sum."""
        weights = {k: v.detach() for k, v in part.state_dict().items() if v.is_floating_point()}

        def inputs(rows: int) -> list[Tensor]:
            given = pytree.tree_leaves(self._inputs(rows)[path])
            return [*weights.values(), *(v for v in given if isinstance(v, Tensor))]

        def whole(*tensors: Tensor) -> list[Tensor]:
            return _computed(part, list(weights), self._inputs(5)[path], tensors, sloped)

        try:
            traced = trace(whole, inputs)
            b = Builder()
            shapes = {c.name: c.out.shape for c in traced.calls.values()}
            examples = inputs(5)
            values = [
                b.input(f"i{i}", dtype_of(v.dtype), _shape(shapes, i, v))
                for i, v in enumerate(examples)
            ]
            b.rows_of(next((v for v in values if ROWS in v.shape[:1]), values[0]))
            lower(b, traced, values)
            confirm(traced, whole, inputs)
        except (*UNTRACEABLE, Uneven, Unsupported) as problem:
            return problem
        return None


def _shape(shapes: Mapping[str, Shape], i: int, example: Tensor) -> Shape:
    return shapes.get(f"input:{i}", tuple(example.shape))


def _computed(
    part: nn.Module, names: Sequence[str], given: Any, tensors: Sequence[Tensor], sloped: bool
) -> list[Tensor]:
    weights = dict(zip(names, tensors, strict=False))
    leaves, form = pytree.tree_flatten(given)
    fresh = iter(tensors[len(names) :])
    inside = [next(fresh) if isinstance(v, Tensor) else v for v in leaves]
    floats = {i: v for i, v in enumerate(inside) if isinstance(v, Tensor) and v.is_floating_point()}

    def total(w: dict[str, Tensor], moved: dict[int, Tensor]) -> tuple[Tensor, list[Tensor]]:
        args, kwargs = pytree.tree_unflatten([moved.get(i, v) for i, v in enumerate(inside)], form)
        out = functional_call(part, w, args, kwargs)
        made = [v for v in pytree.tree_leaves(out) if isinstance(v, Tensor)]
        sums = [v.sum() for v in made if v.is_floating_point()]
        return torch.stack(sums).sum() if sums else torch.zeros(()), made

    if not sloped:
        return total(weights, floats)[1]
    (by_weights, by_inputs), (value, made) = grad_and_value(total, (0, 1), has_aux=True)(
        weights, floats
    )
    return [value, *made, *by_weights.values(), *by_inputs.values()]


def _depth(path: str) -> int:
    return len(path.split(".")) if path else 0


class _Stopped(RuntimeError):
    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path = path


def _captured(module: nn.Module, columns: Mapping[str, Tensor]) -> dict[str, Any]:
    """(args, kwargs) of each part, the first time that it is called. Raises `_Stopped` where a
    part fails."""
    found: dict[str, Any] = {}
    running: list[str] = []
    hooks = []
    for path, part in module.named_modules():

        def before(_: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
            running.append(path)
            found.setdefault(path, (args, kwargs))

        def after(_: nn.Module, args: Any, out: Any) -> None:
            running.pop()

        hooks += [part.register_forward_pre_hook(before, with_kwargs=True),
                  part.register_forward_hook(after)]  # fmt: skip
    try:
        with torch.no_grad():
            module(dict(columns))
    except UNTRACEABLE:
        raise _Stopped(running[-1] if running else "") from None
    finally:
        for hook in hooks:
            hook.remove()
    return found
