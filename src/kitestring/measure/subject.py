"""What is measured: a model in a runtime, and what it is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from kitestring.errors import SettingError

Runtime = Literal["onnx", "torch", "executorch", "gguf"]
_FILES: dict[str, Runtime] = {".onnx": "onnx", ".pte": "executorch", ".gguf": "gguf"}
_NAMED = "Name an .onnx, .pte, .gguf or .kite file, or a module: package.module:name, file.py:name"


@dataclass(frozen=True)
class Subject:
    """`source` is a file, or the name of a torch module or of a function that makes one.

    `values` is a file of inputs (NumPy's .npz, by input name); without it they are drawn."""

    name: str
    runtime: Runtime
    source: str
    size: int | None = None  # bytes on disk; None: a module, which is no file
    values: str = ""


@dataclass(frozen=True)
class Inputs:
    """What drawn inputs look like. `shapes`: of a module's inputs, one row each, as "1x28x28" or,
    whole numbers below a bound, "20:int64:1000". `dims`: sizes of an ONNX graph's named ones."""

    rows: int = 1
    shapes: tuple[str, ...] = ()
    dims: Mapping[str, int] = field(default_factory=dict)


def subjects(
    path: str, values: str = "", rows: int = 1, trusted: tuple[Path, ...] = (),
    folder: Path | None = None,
) -> list[Subject]:  # fmt: skip
    """The one or more models that a path or a name stands for, each to be measured by itself.

    A package's graphs go into `folder`; it must be signed by one of the `trusted` keys."""
    if ":" in path and not Path(path).exists():
        source, _, attribute = path.rpartition(":")
        if not source or not attribute:
            raise SettingError(f"no module named in {path!r}", mend=_NAMED)
        if source.endswith(".py") and not Path(source).is_file():
            raise SettingError("no such file", source, "Check the path")
        return [Subject(attribute, "torch", path, values=values)]
    file = Path(path)
    if file.suffix not in (*_FILES, ".kite"):
        raise SettingError(f"{path!r} is no model", mend=_NAMED)
    if not file.is_file():
        raise SettingError("no such file", path, "Check the path")
    if file.suffix != ".kite":
        return [
            Subject(file.stem, _FILES[file.suffix], str(file.resolve()), _on_disk(file), values)
        ]
    if values:
        raise SettingError("a package brings its own inputs", path, "Leave --inputs out")
    if not trusted or folder is None:
        mend = "Name a public key: --trust FILE"
        raise SettingError("a package is not run before its signature is checked", path, mend)
    from kitestring.measure import packaged

    return packaged.subjects(file, list(trusted), rows, folder)


def _on_disk(file: Path) -> int:
    """With the weights that large ONNX models keep in a file beside them."""
    beside = [file.with_name(file.name + end) for end in (".data", "_data")]
    return sum(f.stat().st_size for f in (file, *beside) if f.is_file())
