"""An export is good once its target's own runtime gives what its source gives, on drawn inputs.

Nothing stands under the final name before that. The runtime runs in a process of its own, so that
one that aborts takes nobody with it. Imports no torch: that process has no need of it.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import numpy as np

import kitestring
from kitestring.core import Array
from kitestring.errors import ExportError, SettingError

TOLERANCE = 1e-4
"""Of an output's largest value, in float32; runtimes stay some hundred times below. Whole numbers
must be equal."""
ROUNDED = 2e-2
"""The same of what rounds activations to 8 bits: see `devices.runtime.golden.ROUNDED`."""
MOST = 16
"""Rows at a time, where a target must know how many there may be."""
_FLOOR = 1e-3  # outputs smaller than that are compared as if they were that large
_CHILD = "import sys; from kitestring.export.checked import child; child(*sys.argv[1:])"


@dataclass(frozen=True)
class Input:
    """One row of an input: `shape` without the rows. Whole numbers are drawn from 0 to under
    `below` (the type's range for uint8, else 0 and 1); floats from a standard normal distribution,
    or evenly from 0 to `below`. Raises `SettingError` for a bound that the type cannot hold."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    below: float | None = None

    def __post_init__(self) -> None:
        if self.below is None:
            return
        dtype = np.dtype(self.dtype)
        if dtype.kind == "f":
            highest = float(np.finfo(dtype).max)
            fine, most = 0 < self.below <= highest, f"{highest:g}"
        else:
            largest = 1 if dtype.kind == "b" else int(np.iinfo(dtype).max)
            fine = float(self.below).is_integer() and 1 <= self.below <= largest + 1
            most = f"{largest + 1}, and a whole number"
        if not fine:
            what = f"{self.dtype} values below {self.below:g} cannot be drawn"
            raise SettingError(what, f"input {self.name}", f"Give more than 0, at most {most}")

    @property
    def high(self) -> float | None:
        """What drawn values stay below; None where nothing bounds them."""
        if self.below is None and np.dtype(self.dtype).kind != "f":
            return 256 if self.dtype == "uint8" else 2
        return self.below

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} [{', '.join(map(str, ('rows', *self.shape)))}]"


Case = Mapping[str, Array]


def drawn(inputs: Sequence[Input], most: int = MOST, seed: int = 0) -> list[dict[str, Array]]:
    """The golden inputs: 1, 2, 3 and `most` rows. Nobody's rows are among them."""
    rng = np.random.default_rng(seed)
    rows = sorted({1, 2, 3, most} - set(range(most + 1, 4)))
    return [{i.name: _draw(i, n, rng) for i in inputs} for n in rows]


def _draw(one: Input, rows: int, rng: np.random.Generator) -> Array:
    shape, dtype = (rows, *one.shape), np.dtype(one.dtype)
    if one.high is None:
        return np.asarray(rng.normal(size=shape), dtype)
    if dtype.kind == "f":
        return np.asarray(rng.uniform(0, one.high, shape), dtype)
    return np.asarray(rng.integers(0, int(one.high), shape), dtype)


@dataclass(frozen=True)
class Off:
    """How far an output was off at most: `error` in its own units, `share` of its largest value,
    with so many `rows`."""

    output: str
    error: float
    share: float
    rows: int


@dataclass(frozen=True)
class Check:
    """A runtime that gave, for each output, what the source gives, within `tolerance`."""

    runtime: str
    tolerance: float
    off: tuple[Off, ...]


@dataclass(frozen=True)
class Export:
    """What was written, and by which runtimes it was checked. `notes` are for a person."""

    path: Path
    checks: tuple[Check, ...]
    inputs: tuple[Input, ...]
    cases: tuple[Case, ...]
    wanted: tuple[Case, ...]
    notes: tuple[str, ...] = ()


def _compared(
    cases: Sequence[Case], wanted: Sequence[Case], found: Sequence[Sequence[Array]], path: Path
) -> list[Off]:
    """The worst of each output over all cases; outputs are `found` in their order."""
    names = list(wanted[0])
    if any(len(outputs) != len(names) for outputs in found):
        raise _refused(path, f"it gives {len(found[0])} outputs, and the source {len(names)}")
    worst: dict[str, Off] = {}
    for place, name in enumerate(names):
        scale = max(_largest(case[name]) for case in wanted)
        for given, case, outputs in zip(cases, wanted, found, strict=True):
            have, want = outputs[place], case[name]
            if have.shape != want.shape:
                what = f"{name} is {list(have.shape)}, and the source's {list(want.shape)}"
                raise _refused(path, what)
            error = _error(have, want)
            off = Off(name, error, error / max(scale, _FLOOR), len(next(iter(given.values()))))
            if name not in worst or not off.error <= worst[name].error:
                worst[name] = off
    return list(worst.values())


def _largest(a: Array) -> float:
    return float(np.abs(a.astype(np.float64)).max(initial=0.0))


def _error(have: Array, want: Array) -> float:
    """NaN where one is not finite and the other is."""
    difference: Array = np.abs(have.astype(np.float64) - want.astype(np.float64))
    return float(difference.max(initial=0.0))


def held(
    cases: Sequence[Case], wanted: Sequence[Case], found: Sequence[Sequence[Array]], path: Path,
    runtime: str, tolerance: float = TOLERANCE,
) -> Check:  # fmt: skip
    """Raises `ExportError` with the largest error, and the output that has it, where one is further
    off than `tolerance`; whole numbers may not be off at all."""
    off = _compared(cases, wanted, found, path)
    whole = {name for name, a in wanted[0].items() if a.dtype.kind != "f"}
    bad = [o for o in off if not o.share <= (0.0 if o.output in whole else tolerance)]
    if bad:
        worst = max(bad, key=lambda o: np.inf if np.isnan(o.error) else o.share)
        allowed = 0.0 if worst.output in whole else tolerance
        what = (
            f"{worst.output} is off by {worst.error:.2g} in {runtime} with {worst.rows} rows: "
            f"{worst.share:.1e} of its largest value, and {allowed:g} is allowed"
        )
        raise _refused(path, what)
    return Check(runtime, tolerance, tuple(off))


def _refused(path: Path, what: str) -> ExportError:
    mend = "It was deleted: what stands under that name, if anything, is an earlier export"
    return ExportError(f"the export disagrees with its source: {what}", str(path), mend)


@contextmanager
def unproven(path: Path) -> Iterator[Path]:
    """Another name in the same folder: it gets its own once the block ends, and is deleted where
    the block fails. So `path` is whole and checked, or as it was before."""
    part = path.with_name(f".{path.name}.{os.getpid()}.unproven")
    try:
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as problem:
        raise SettingError(f"cannot be written: {problem.strerror}", str(path)) from problem
    finally:
        part.unlink(missing_ok=True)


def need(modules: Sequence[str], what: str, install: str) -> None:
    """Refuse what could not be checked, before the work. `install`: the command's argument."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise SettingError(
                f"{what} needs {module}, which is not installed: an export that cannot be checked "
                "is not written",
                mend=f"Run: pip install {install}",
            )


def apart(module: str, path: Path, how: str, cases: Sequence[Case]) -> list[list[Array]]:
    """What `module.run(path, how, cases)` gives, in a process of its own: for each case the outputs
    in their order. Raises `Died` where the runtime fails there."""
    with tempfile.TemporaryDirectory() as folder:
        given, made = Path(folder, "given.npz"), Path(folder, "made.npz")
        _save(given, [list(case.values()) for case in cases], [list(case) for case in cases])
        paths = [str(Path(kitestring.__file__).parents[1]), *filter(None, sys.path)]
        # ONNX Runtime reports nothing (its 1.29 and newer would), whatever is imported first.
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "ORT_DISABLE_TELEMETRY": "1"}
        done = subprocess.run(
            [sys.executable, "-c", _CHILD, module, str(path), how, str(given), str(made)],
            env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
        )  # fmt: skip
        if done.returncode != 0 or not made.exists():
            raise Died(done.returncode, done.stderr)
        with np.load(made, allow_pickle=False) as kept:
            return _cases(kept)


class Died(Exception):
    """The runtime's process failed, and what it said."""

    def __init__(self, status: int, said: str) -> None:
        super().__init__(status, said)
        self.status, self.said = status, said

    def __str__(self) -> str:
        """The last line that says something."""
        lines = [line.strip() for line in self.said.splitlines() if line.strip()]
        how = f"signal {-self.status}" if self.status < 0 else f"status {self.status}"
        return lines[-1][:200] if lines and self.status > 0 else f"its process ended with {how}"


def child(module: str, path: str, how: str, given: str, made: str) -> None:
    """The other side of `apart`."""
    with np.load(given, allow_pickle=False) as kept:
        names = [str(text).split("\n") for text in kept["names"]]
        cases = [dict(zip(n, a, strict=True)) for n, a in zip(names, _cases(kept), strict=True)]
    _save(Path(made), import_module(module).run(path, how, cases), [])


def _save(path: Path, cases: Sequence[Sequence[Array]], names: Sequence[Sequence[str]]) -> None:
    arrays = {f"{i}.{k}": a for i, case in enumerate(cases) for k, a in enumerate(case)}
    np.savez(path, names=np.array(["\n".join(n) for n in names], str), **arrays)


def _cases(kept: Mapping[str, Array]) -> list[list[Array]]:
    found: dict[int, dict[int, Array]] = {}
    for key in kept:
        if key != "names":
            case, place = map(int, key.split("."))
            found.setdefault(case, {})[place] = kept[key]
    return [[found[i][k] for k in sorted(found[i])] for i in sorted(found)]
