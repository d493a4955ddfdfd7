"""Models on the disk: weights, and what they are weights of."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from kitestring.comparison.order import Order
from kitestring.compress.prune.structured import reshape, shape_of
from kitestring.errors import RunError, unknown
from kitestring.shrink import data
from kitestring.shrink.candidates import CANDIDATES, Candidate
from kitestring.shrink.data import Pool
from kitestring.shrink.make import compressed, fresh
from kitestring.shrink.study import MODELS, settings
from kitestring.tasks.llama import fill
from kitestring.tasks.task import Task


def path(folder: Path, candidate: Candidate, seed: int) -> Path:
    """Of its weights. Beside them, .json says what they are weights of, .onnx answers requests."""
    name = candidate.slug + (f"-seed-{seed}" if seed else "")
    return folder / MODELS / f"{name}.safetensors"


def keep(file: Path, module: nn.Module, widths: Any) -> None:
    """`widths`: of the module before it was quantised; None of one that is as wide as the task's.

    The weights come last: where they are, all is."""
    write(file.with_suffix(".json"), json.dumps(widths).encode())
    write(file, save(_once(module)))


def write(file: Path, blob: bytes) -> None:
    """Whole or not at all."""
    part = file.with_name(file.name + ".part")
    try:
        part.write_bytes(blob)
        os.replace(part, file)
    except OSError as problem:
        part.unlink(missing_ok=True)
        mend = "Free some space; --resume loses nothing"
        raise RunError(f"cannot be written: {problem.strerror}", str(file), mend) from None


def _once(module: nn.Module) -> dict[str, Tensor]:
    """Weights that are the same memory under one name."""
    found: dict[int, str] = {}
    state = module.state_dict()
    first = {n for n, t in state.items() if found.setdefault(t.data_ptr(), n) == n or not t.numel()}
    return {n: t.contiguous() for n, t in state.items() if n in first}


def widths(whole: nn.Module, module: nn.Module) -> Any:
    """What `read` needs to make a module of the same widths of the whole one."""
    return shape_of(whole, module)


def kept_widths(folder: Path, candidate: Candidate, seed: int) -> Any:
    """Of a candidate that was kept."""
    file = path(folder, candidate, seed).with_suffix(".json")
    with _readable(file):
        return json.loads(file.read_text("utf-8"))


def read(
    task: Task, folder: Path, candidate: Candidate, seed: int, pool: Callable[[], Pool]
) -> nn.Module:
    """A candidate that was kept; `pool` is asked where its form follows from rows."""
    file = path(folder, candidate, seed)
    module = fresh(task, candidate.shape.base, seed)
    if candidate.shape.keep != 1:
        module = reshape(module, kept_widths(folder, candidate, seed))
    if candidate.precision != "float32":
        module = compressed(module, candidate.precision, pool().some, draft=True)
    with _readable(file):
        weights = load_file(file)
    fill(module, weights, str(file))
    return module.eval()


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    """Raises `RunError` where the file is gone or damaged."""
    try:
        yield
    except (OSError, ValueError, SafetensorError) as problem:
        what = f"cannot be read: {type(problem).__name__}: {problem}"
        raise RunError(what, str(file), "Search anew with --fresh") from None


def task_of(folder: Path) -> Task:
    """What was searched on, with as many users as it had. Raises `RunError` where no search is."""
    found = settings(folder)
    if found is None:
        raise RunError("no search is here", str(folder), "Name a folder that shrink has written")
    data_of = {key: found[key] for key in ("task", "csv", "user", "target", "users")}
    return data.checked(Order(**data_of).load())


def load(folder: Path, name: str, seed: int = 0) -> nn.Module:
    """A model of a search by its name, as in `front.json`: load("runs/shrink-digits", "small").

    Raises `RunError` where it is not there and `SettingError` for a name that there is not."""
    folder = Path(folder)
    if name not in CANDIDATES:
        raise unknown("model", name, CANDIDATES)
    task = task_of(folder)
    candidate = CANDIDATES[name]
    if not path(folder, candidate, seed).is_file():
        there = sorted(file.stem for file in (folder / MODELS).glob("*.safetensors"))
        what = f"the search kept no {name!r} of seed {seed}"
        raise RunError(what, str(folder), f"It kept: {', '.join(there) or 'none'}")
    return read(task, folder, candidate, seed, cache(lambda: data.pool(task)))
