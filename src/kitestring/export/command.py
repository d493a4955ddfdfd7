"""`kitestring export`."""

from __future__ import annotations

import argparse
import inspect
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kitestring.errors import SettingError, unknown
from kitestring.export.checked import MOST, Export, Input, unproven
from kitestring.extras import need
from kitestring.units import size

if TYPE_CHECKING:
    from torch import nn

ENDING = {"onnx": ".onnx", "executorch": ".pte", "gguf": ".gguf"}
_TYPE = r":([a-z]+\d*)(?::(\d+(?:\.\d+)?))?"
_INPUT = re.compile(rf"(?:\w+=)?(?:(\d+(?:x\d+)*)(?:{_TYPE})?|{_TYPE})")
_DTYPES = ("float32", "float64", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")
_SIZES = ("small", "large")
_NAMED = "Write forward with one argument for each input: def forward(self, x, mask)"
_KEPT = 2  # golden cases in the file for the app's own test


def add(commands: Any) -> None:
    export = commands.add_parser(
        "export",
        help="write a model for phones: ONNX, ExecuTorch or GGUF",
        description="Write a model for phones: ONNX, ExecuTorch or GGUF. It is run in its target's "
        "own runtime on drawn inputs, and kept only if it gives what torch gives.",
    )
    export.add_argument(
        "model", metavar="MODEL",
        help="package.module:name or file.py:name, a torch module or what makes one; or a "
        "built-in task's, as digits:small",
    )  # fmt: skip
    export.add_argument("--to", choices=tuple(ENDING), default="onnx", help="the format (onnx)")
    export.add_argument(
        "--input", action="append", default=[], metavar="SHAPE",
        help="of one row, for each of forward's arguments in their order, or by its name: 1x28x28, "
        "20:int64:1000 (numbers below 1000), mask=20:float32, label=:int64:5 (one number a row)",
    )  # fmt: skip
    export.add_argument("--weights", type=Path, metavar="FILE", help="a .safetensors file of them")
    export.add_argument("--out", type=Path, metavar="FILE", help="(the model's name)")
    export.add_argument(
        "--golden", type=Path, metavar="FILE",
        help="also write drawn inputs and what torch gives, as JSON for the app's own test",
    )  # fmt: skip
    export.add_argument(
        "--rows", type=int, metavar="N", help=f"executorch: most rows at a time ({MOST})"
    )
    export.add_argument(
        "--quantize", choices=("f16", "q8_0"), metavar="TYPE", help="gguf: matrices as f16 or q8_0"
    )
    export.add_argument(
        "--vocabulary", type=Path, metavar="FILE",
        help="gguf: a JSON list of each token's text, null for the one that stands for all others",
    )  # fmt: skip


def run(given: argparse.Namespace, command: str) -> None:
    """Write the file, and say what it is and how far it was off."""
    need("exporting", "torch")
    _belongs(given)
    title = given.model.replace(":", "-") if _built_in(given.model) else given.model.split(":")[-1]
    path = given.out or Path(title + ENDING[given.to])
    _writable(given, path)
    module, inputs, note = _model(given)
    if given.weights is not None:
        from kitestring.tasks.llama import load

        load(module, given.weights)
        note = ""
    export = _exported(given, module, inputs, path)
    print("\n".join([*_told(export, given.to), *([note] if note else [])]))
    if given.golden is not None:
        _keep(export, given.golden)
        print(f"{given.golden}: drawn inputs and what torch gives, for the app's own test")


def _belongs(given: argparse.Namespace) -> None:
    for name, target in (("rows", "executorch"), ("quantize", "gguf"), ("vocabulary", "gguf")):
        if getattr(given, name) is not None and given.to != target:
            raise SettingError(f"--{name} belongs to --to {target}")
    if given.to == "gguf" and given.input:
        raise SettingError("--input is not for gguf: a language model takes tokens")


def _writable(given: argparse.Namespace, path: Path) -> None:
    """Refuse before the work what would be lost or could not be written after it."""
    taken = {}
    for option in ("weights", "vocabulary"):
        file = getattr(given, option)
        if file is not None:
            taken[file.resolve()] = f"--{option}"
    if given.model.rpartition(":")[0].endswith(".py"):
        taken[Path(given.model.rpartition(":")[0]).resolve()] = "MODEL"
    for option, file in (("--out", path), ("--golden", given.golden)):
        if file is None:
            continue
        if file.is_dir():
            raise SettingError(f"{option} is a folder", str(file), "Name a file in it")
        if not file.absolute().parent.is_dir():
            raise SettingError("there is no such folder", str(file.parent), "Make it first")
        other = taken.setdefault(file.resolve(), option)
        if other != option:
            what = f"{other} and {option} are the same file, and one would be lost"
            raise SettingError(what, str(file), f"Give {option} another name")


def _exported(
    given: argparse.Namespace, module: nn.Module, inputs: Sequence[Input], path: Path
) -> Export:
    if given.to == "executorch":
        from kitestring.export.executorch import to_executorch

        return to_executorch(module, inputs, path, MOST if given.rows is None else given.rows)
    if given.to == "gguf":
        from kitestring.export.gguf import to_gguf

        words = None if given.vocabulary is None else _vocabulary(given.vocabulary)
        return to_gguf(module, path, given.quantize or "f32", words)
    from kitestring.export.onnx_file import to_onnx

    return to_onnx(module, inputs, path)


def _built_in(name: str) -> bool:
    from kitestring.tasks.find import BUILT_IN

    task, _, which = name.partition(":")
    return task in BUILT_IN and which in _SIZES


def _model(given: argparse.Namespace) -> tuple[nn.Module, list[Input], str]:
    """The module, its inputs, and what to say of its weights."""
    import torch

    from kitestring.tasks.find import BUILT_IN, find

    task, _, which = given.model.partition(":")
    if _built_in(given.model):
        from kitestring.tasks.task import Recorded

        found = find(task)
        if isinstance(found, Recorded):
            what = f"the task {task} has recorded answers, and no models"
            raise SettingError(what, mend="Choose one with models, as digits:small")
        torch.manual_seed(0)
        module = getattr(found, which)()
        note = "its weights are the first ones, drawn with seed 0: --weights gives trained ones"
        if given.input or given.to == "gguf":
            return module, _inputs(given, module), note
        x = found.users.load(found.users.devices[0])["train"]["x"]  # for its shape and type alone
        return module, [_bounded(Input("x", x.shape[1:], str(x.dtype)), module)], note
    from kitestring.measure.modules import made, source

    if task in BUILT_IN and "." not in which:
        mend = f"Choose one of them, as {task}:small"
        raise SettingError(f"the task {task} has two models, small and large", mend=mend)
    if not all(given.model.rpartition(":")):
        mend = "Name the module in it, as in my_model.py:Net, or a task's, as digits:small"
        raise SettingError(f"no model named in {given.model!r}", mend=mend)
    module = made(source(given.model), given.model)
    return module, _inputs(given, module), ""


def _inputs(given: argparse.Namespace, module: nn.Module) -> list[Input]:
    """Those that are asked for; one without a name is forward's next argument."""
    if given.to == "gguf":
        return []
    from kitestring.export.forward import arguments

    known = arguments(module)
    names = [text.rpartition("=")[0] for text in given.input]
    for name in names:
        if name and name not in known:
            wrong = unknown("argument of forward", name, known)
            raise SettingError(wrong.what, given.model, wrong.mend if known else _NAMED)
    free = (k for k, p in known.items() if p.kind is not p.KEYWORD_ONLY and k not in names)
    names = [name or next(free, "") for name in names]
    if "" not in names and len({*names}) < len(names):
        raise SettingError("two inputs have the same name", given.model)
    needed = [k for k, p in known.items() if p.default is p.empty]
    if not names or "" in names or not {*needed} <= {*names}:
        raise _otherwise(given, module, needed or [*known])
    found = [_input(text, name) for text, name in zip(given.input, names, strict=True)]
    return [_bounded(one, module) for one in found]


def _otherwise(given: argparse.Namespace, module: nn.Module, names: Sequence[str]) -> SettingError:
    """The inputs are not those that forward takes."""
    taken = inspect.signature(module.forward).parameters.values()
    stars = [f"{p} without a name" for p in taken if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    count = f"{len(given.input)} input{'' if len(given.input) == 1 else 's'} given"
    what = f"{count}, and forward takes {', '.join([*names, *stars]) or 'none'}"
    mend = "Give the shape of one row of each: --input 1x28x28, or --input 20:int64:1000"
    return SettingError(what, given.model, mend if names and not stars else _NAMED)


def _input(text: str, name: str) -> Input:
    parts = _INPUT.fullmatch(text)
    dtype, below = (parts[2] or parts[4], parts[3] or parts[5]) if parts else (None, None)
    dtype = dtype or "float32"
    shape = tuple(map(int, parts[1].split("x"))) if parts and parts[1] else ()
    if parts is None or dtype not in _DTYPES or 0 in shape:
        mend = (
            "Write 1x28x28, 20:int64:1000, mask=20:float32, or :int64 for one number a row; types: "
            f"{', '.join(_DTYPES)}"
        )
        raise SettingError(f"--input {text!r} is no shape", mend=mend)
    return Input(name, shape, dtype, float(below) if below else None)


def _bounded(one: Input, module: nn.Module) -> Input:
    """Whole numbers without a bound look rows of the module's smallest table up, if it has any."""
    from torch import nn

    tables = [m.num_embeddings for m in module.modules() if isinstance(m, nn.Embedding)]
    if one.below is not None or not tables or one.dtype not in ("int64", "int32"):
        return one
    return Input(one.name, one.shape, one.dtype, min(tables))


def _vocabulary(file: Path) -> list[str | None]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise SettingError(f"cannot be read: {problem}", str(file), "Give a JSON list") from None
    if not isinstance(found, list) or not all(t is None or isinstance(t, str) for t in found):
        raise SettingError("is no list of texts", str(file), 'Write ["a", "b", null]')
    return found


def _told(export: Export, to: str) -> list[str]:
    outputs, notes = [], list(export.notes)
    if to == "gguf":
        outputs, given = ["logits of the next token"], "tokens"
    else:
        count = [len(next(iter(case.values()))) for case in export.cases]
        for name, a in export.wanted[-1].items():
            shapes = [case[name].shape for case in export.wanted]
            outputs.append(f"{name} {a.dtype} {_axes(shapes, count)}")
            if len({*shapes}) == 1:
                notes.append(f"{name} has no axis of rows: it is one answer for all rows together")
        given = f"inputs of {', '.join(map(str, count[:-1]))} and {count[-1]} rows"
    lines = [f"{export.path}: {size(export.path.stat().st_size)}"]
    lines += [f"  in   {one}" for one in export.inputs]
    lines += [f"  out  {one}" for one in outputs]
    lines.append(f"checked against torch on drawn {given}:")
    for check in export.checks:
        worst = max(check.off, key=lambda o: o.share)
        lines.append(
            f"  {check.runtime}: {worst.output} is off by {worst.error:.1e} at most, "
            f"{worst.share:.1e} of its largest value (allowed {check.tolerance:g})"
        )
    return lines + [f"  {note}" for note in notes]


def _axes(shapes: Sequence[tuple[int, ...]], count: Sequence[int]) -> str:
    """An output's shape, of its shapes with so many rows."""
    if len({*map(len, shapes)}) > 1:
        each = zip(shapes, count, strict=True)
        return ", ".join(f"{list(s)} of {n} row{'s' if n > 1 else ''}" for s, n in each)
    return f"[{', '.join(_axis(sizes, count) for sizes in zip(*shapes, strict=True))}]"


def _axis(sizes: Sequence[int], count: Sequence[int]) -> str:
    if len({*sizes}) == 1:
        return str(sizes[0])
    each = (sizes[1] - sizes[0]) // (count[1] - count[0])
    more = sizes[0] - each * count[0]
    if any(size != each * n + more for size, n in zip(sizes, count, strict=True)):
        return " or ".join(map(str, sizes))
    return ("rows" if each == 1 else f"{each} rows") + (f" {more:+d}" if more else "")


def _keep(export: Export, file: Path) -> None:
    """A few golden cases as JSON: a phone's processor is checked by the app, on the phone."""
    pairs = list(zip(export.cases, export.wanted, strict=True))[:_KEPT]
    kept = {
        "model": export.path.name,
        "tolerance": max(check.tolerance for check in export.checks),
        "cases": [
            {"inputs": _listed(given), "outputs": _listed(wanted)} for given, wanted in pairs
        ],
    }
    with unproven(file) as part:
        part.write_text(json.dumps(kept), encoding="utf-8")


def _listed(arrays: Any) -> dict[str, Any]:
    return {
        name: {"dtype": str(a.dtype), "shape": list(a.shape), "values": a.ravel().tolist()}
        for name, a in arrays.items()
    }
