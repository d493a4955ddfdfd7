"""What compiled code is made with: torch's draws, and code kept between runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llvmlite import binding
from torch import nn

from kitestring.core import Recipe, Rows, Tree
from kitestring.devices.fit.compiled import shelf
from kitestring.devices.fit.compiled.build import Builder, compiled
from kitestring.devices.fit.compiled.draws import Dice
from kitestring.devices.fit.compiled.emit import BYTES, i64
from kitestring.devices.fit.compiled.memory import place
from kitestring.devices.fit.compiled.views import Buffer, plain
from kitestring.devices.fit.compute import TorchCompute
from modules import keys, program


@pytest.mark.parametrize(("rows", "length", "real"), [(1, 1, 1), (8, 39, 8), (40, 100, 33)])
@pytest.mark.parametrize("chance", [0.7, 0.1, 1.0])
def test_draws_are_those_of_torch(rows: int, length: int, real: int, chance: float) -> None:
    """Three times in a row, over the ends of the 312 numbers that are made at a time."""
    dice, out = Dice(), Buffer("out", "f32", rows * length, fixed=True)
    size = place([*dice.buffers, out], [])
    builder = Builder()
    e, numbers = builder.main()
    memory, key = (e.b.load(e.b.gep(numbers, [i64(k)])) for k in range(2))
    memory = e.b.inttoptr(memory, BYTES)
    dice.seed(e, memory, key)
    with e.loop(i64(3)):
        view = plain(out, (rows, length))
        dice.draw(e, memory, view, chance, i64(real), lambda: builder.call(e, memory, dice.twist()))
    e.done()
    native = compiled(builder, size, {})
    there, seed = native.memory(), 2**40 + 12345
    native([there.ctypes.data, 2 * seed])
    torch.manual_seed(seed)
    for _ in range(3):
        wanted = torch.empty(real, length).bernoulli_(chance)
    found = there[out.at : out.at + 4 * real * length].view(np.float32)
    assert np.array_equal(found, wanted.numpy().ravel())


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KITESTRING_CACHE", str(tmp_path))
    return tmp_path / "code"


def fitted() -> Tree:
    """Of a compute of its own, which has compiled nothing yet."""
    torch.manual_seed(0)
    made = program(nn.Sequential(nn.Linear(3, 4), nn.Tanh()))
    n = np.array([5, 3])
    rows = {
        "x": Rows(np.random.default_rng(0).normal(size=(2, 5, 3)).astype(np.float32), n),
        "y": Rows(np.zeros((2, 5), np.int64), n),
    }
    start = Tree({k: np.broadcast_to(a, (2, *a.shape)) for k, a in made.initial().items()})
    compute = TorchCompute({"p": made})
    found = compute.fit("p", start, rows, Recipe(0.1, 1, 4), key=keys(2)).parameters
    assert compute.explain("p") == "compiled"
    return found


def same(a: Tree, b: Tree) -> bool:
    return all(np.array_equal(a[k], b[k]) for k in b)


def test_code_is_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = fitted()
    assert len(list(cache.iterdir())) == 1
    assert cache.stat().st_mode & 0o777 == 0o700
    read: list[Any] = []
    parse = binding.parse_assembly

    def seen(text: str) -> Any:
        read.append(text)
        return parse(text)

    monkeypatch.setattr(binding, "parse_assembly", seen)
    assert same(fitted(), first)
    assert read == [""], "nothing was compiled but the module that the code is added to"


@pytest.mark.parametrize("trouble", ["short", "other bytes", "empty"])
def test_damaged_code_is_made_anew(cache: Path, trouble: str) -> None:
    first = fitted()
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    worse = {"short": whole[:-9], "other bytes": whole[:-9] + bytes(9), "empty": b""}
    file.write_bytes(worse[trouble])
    assert same(fitted(), first)
    assert file.read_bytes() == whole


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="nobody else, as far as one can tell")
def test_a_folder_that_others_write_to_is_not_used(cache: Path) -> None:
    cache.mkdir()
    cache.chmod(0o777)
    first = fitted()
    assert not list(cache.iterdir())
    cache.chmod(0o700)
    assert same(fitted(), first)
    assert list(cache.iterdir())


def test_without_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("KITESTRING_CACHE", str(tmp_path / "file"))
    assert same(fitted(), fitted())


def test_old_code_goes(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelf, "_MOST", 4)
    for i in range(5):
        shelf.keep(str(i), b"code")
        os.utime(cache / str(i), (i, i))
    shelf.keep("5", b"code")
    kept = {file.name for file in cache.iterdir()}
    assert "0" not in kept
    assert {"4", "5"} <= kept
