"""Inputs for a model that is measured: drawn by type, shape and range, or read from a file."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kitestring.core import Array
from kitestring.errors import SettingError
from kitestring.measure.subject import Inputs

TYPES = {
    "tensor(float)": "float32", "tensor(double)": "float64", "tensor(float16)": "float16",
    "tensor(int64)": "int64", "tensor(int32)": "int32", "tensor(int16)": "int16",
    "tensor(int8)": "int8", "tensor(uint8)": "uint8", "tensor(bool)": "bool",
}  # fmt: skip
"""What ONNX Runtime calls an input's type -> NumPy's name."""

_SHAPE = re.compile(r"(\d+(?:x\d+)*)(?::(float32|int64)(?::(\d+))?)?")
_SMALL = 0.1  # floats are drawn below it: not negative, and so small that few networks overflow


@dataclass(frozen=True)
class Row:
    """One row of an input: its shape, its type, and the bound that whole numbers are below."""

    shape: tuple[int, ...]
    dtype: str = "float32"
    below: int = 2


def row(text: str) -> Row:
    """ "1x28x28", "20:int64" or "20:int64:1000"."""
    found = _SHAPE.fullmatch(text)
    if not found:
        raise SettingError(f"--input {text!r} is no shape", mend="Write 1x28x28 or 20:int64:1000")
    sizes, dtype, below = found.groups()
    if below is not None and not 1 <= int(below) < 2**63:
        what = f"--input {text!r}: no whole number is drawn below {below}"
        raise SettingError(what, mend="Write 1x28x28 or 20:int64:1000")
    return Row(tuple(map(int, sizes.split("x"))), dtype or "float32", int(below or 2))


def draw(shape: tuple[int, ...], dtype: str, low: float | None, high: float | None) -> Array:
    """The same numbers each time: floats in [0, 0.1), whole numbers 0 or 1, or as the range says
    (low included, high not). A single number that counts something is 1."""
    dice = np.random.default_rng(0)
    if np.dtype(dtype).kind == "f":
        ends = (0.0 if low is None else low, _SMALL if high is None else high)
        return np.asarray(dice.uniform(*ends, shape), dtype)
    if high is None and not shape:
        return np.ones((), dtype)
    ends = (0 if low is None else int(low), 2 if high is None else max(int(high), 1))
    return np.asarray(dice.integers(*ends, shape), dtype)


def sized(name: str, shape: list[Any], first: set[Any], given: Inputs) -> tuple[int, ...]:
    """An ONNX input's shape with its open sizes filled in: those that are called as a first one
    are numbers of rows; others must be given."""
    sizes = []
    for axis, size in enumerate(shape):
        if isinstance(size, int) and size >= 0:
            sizes.append(size)
        elif (key := f"{name}.{axis}") in given.dims or (key := str(size)) in given.dims:
            sizes.append(given.dims[key])
        elif axis == 0 or size in first:
            sizes.append(given.rows)
        else:
            called = str(size) if isinstance(size, str) and size else f"{name}.{axis}"
            raise SettingError(
                f"input {name!r} leaves the size of its axis {axis} open",
                mend=f"Give it: --dim {called}=N",
            )
    return tuple(sizes)


def drawn(
    wanted: list[tuple[str, str, list[Any]]], ranges: Mapping[str, Any], given: Inputs
) -> dict[str, Array]:
    """For inputs of an ONNX graph: (name, type, shape). `ranges`: name -> {"low", "high"}."""
    first = {shape[0] for _, _, shape in wanted if shape and isinstance(shape[0], str)} - {""}
    found = {}
    for name, kind, shape in wanted:
        if kind not in TYPES:
            raise SettingError(f"input {name!r} is a {kind}, which cannot be drawn", mend=_GIVE)
        span = ranges.get(name, {})
        sizes = sized(name, shape, first, given)
        found[name] = draw(sizes, TYPES[kind], span.get("low"), span.get("high"))
    return found


_GIVE = "Give inputs in a file: --inputs FILE.npz"


def read(path: str) -> dict[str, Array]:
    """Inputs by name from an .npz file."""
    try:
        with np.load(Path(path), allow_pickle=False) as kept:
            return {name: kept[name] for name in kept.files}
    except (OSError, ValueError, AttributeError, zipfile.BadZipFile) as problem:
        said = (str(problem).splitlines() or [type(problem).__name__])[0]
        raise SettingError(
            f"no .npz file of inputs: {said}", path, "numpy.savez writes one"
        ) from None


def matching(path: str, names: list[str]) -> dict[str, Array]:
    """Inputs of a file that must hold these names."""
    found = read(path)
    for name in names:
        if name not in found:
            held = ", ".join(sorted(found)) or "nothing"
            raise SettingError(f"input {name!r} is missing: it holds {held}", path, _GIVE)
    return {name: found[name] for name in names}
