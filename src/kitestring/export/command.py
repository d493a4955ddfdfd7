"""`kitestring export`."""

from __future__ import annotations

import argparse
import inspect
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kitestring.errors import SettingError
from kitestring.export.checked import MOST, Export, Input, unproven
from kitestring.extras import need
from kitestring.units import size

if TYPE_CHECKING:
    from torch import nn

ENDING = {"onnx": ".onnx", "executorch": ".pte", "gguf": ".gguf"}
_INPUT = re.compile(r"(?:(\w+)=)?(\d+(?:x\d+)*)(?::([a-z]+\d*)(?::(\d+(?:\.\d+)?))?)?")
_DTYPES = ("float32", "float64", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")
_SIZES = ("small", "large")
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
        help="of one row, for each of forward's arguments: 1x28x28, 20:int64:1000 (numbers below "
        "1000), or mask=20:float32",
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
    for file in (path, given.golden):
        if file is not None and not file.absolute().parent.is_dir():
            raise SettingError("there is no such folder", str(file.parent), "Make it first")
    module, inputs, note = _model(given)
    if given.weights is not None:
        from kitestring.tasks.llama import load

        load(module, given.weights)
        note = ""
    export = _exported(given, module, inputs, path)
    print("\n".join([*_told(export), *([note] if note else [])]))
    if given.golden is not None:
        _keep(export, given.golden)
        print(f"{given.golden}: drawn inputs and what torch gives, for the app's own test")


def _belongs(given: argparse.Namespace) -> None:
    for name, target in (("rows", "executorch"), ("quantize", "gguf"), ("vocabulary", "gguf")):
        if getattr(given, name) is not None and given.to != target:
            raise SettingError(f"--{name} belongs to --to {target}")
    if given.to == "gguf" and given.input:
        raise SettingError("--input is not for gguf: a language model takes tokens")


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
    if ":" not in given.model:
        mend = "Name the module in it, as in my_model.py:Net, or a task's, as digits:small"
        raise SettingError(f"no model named in {given.model!r}", mend=mend)
    module = made(source(given.model), given.model)
    return module, _inputs(given, module), ""


def _inputs(given: argparse.Namespace, module: nn.Module) -> list[Input]:
    if given.to == "gguf":
        return []
    parameters = [
        p for p in inspect.signature(module.forward).parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]  # fmt: skip
    needed = [p.name for p in parameters if p.default is p.empty]
    asked = [p.name for p in parameters]
    if not len(needed) <= len(given.input) <= len(asked):
        raise SettingError(
            f"{len(given.input)} inputs given, and forward takes {', '.join(needed) or 'none'}",
            given.model,
            "Give the shape of one row of each: --input 1x28x28, or --input 20:int64:1000",
        )
    found = [_input(text, name) for text, name in zip(given.input, asked, strict=False)]
    if len({i.name for i in found}) < len(found):
        raise SettingError("two inputs have the same name", given.model)
    return [_bounded(i, module) for i in found]


def _input(text: str, name: str) -> Input:
    parts = _INPUT.fullmatch(text)
    dtype = (parts and parts[3]) or "float32"
    if parts is None or dtype not in _DTYPES:
        mend = f"Write 1x28x28, 20:int64:1000 or mask=20:float32; types: {', '.join(_DTYPES)}"
        raise SettingError(f"--input {text!r} is no shape", mend=mend)
    shape = tuple(map(int, parts[2].split("x")))
    return Input(parts[1] or name, shape, dtype, float(parts[4]) if parts[4] else None)


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


def _told(export: Export) -> list[str]:
    outputs = [
        f"{name} {a.dtype} [{', '.join(map(str, ('rows', *a.shape[1:])))}]"
        for name, a in export.wanted[-1].items()
    ]
    rows = [str(len(next(iter(case.values())))) for case in export.cases]
    if export.path.suffix == ENDING["gguf"]:
        outputs, given = ["logits of the next token"], "tokens"
    else:
        given = f"inputs of {', '.join(rows[:-1])} and {rows[-1]} rows"
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
    return lines + [f"  {note}" for note in export.notes]


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
