"""What compiled code is made with: draws by the dice, and code kept between runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llvmlite import binding
from torch import nn

from kitestring import dice
from kitestring.core import Recipe, Rows, Tree
from kitestring.devices.fit.compiled import shelf
from kitestring.devices.fit.compiled.build import Builder, compiled
from kitestring.devices.fit.compiled.draws import draw
from kitestring.devices.fit.compiled.emit import BYTES, i64
from kitestring.devices.fit.compiled.memory import place
from kitestring.devices.fit.compiled.views import Buffer, plain
from kitestring.devices.fit.compute import TorchCompute
from modules import keys, program

STEP, PLACE = 70_000, 3


def filled(rows: int, shape: tuple[int, ...], real: int, chance: float) -> Any:
    """What native code draws for the real ones of some rows; it leaves alone what lies behind."""
    out, other = (Buffer(name, "f32", int(np.prod(shape)), fixed=True) for name in ("out", "other"))
    size = place([out, other], [])
    builder = Builder()
    e, numbers = builder.main()
    memory, key, step = (e.b.load(e.b.gep(numbers, [i64(k)])) for k in range(3))
    where = e.b.inttoptr(memory, BYTES)
    draw(e, where, (plain(out, shape), chance), key, step, PLACE, i64(real), rows)
    e.done()
    native = compiled(builder, size, {})
    there = native.memory()
    native([there.ctypes.data, int(keys(1).view(np.int64)[0]), STEP])
    assert not there[other.at :].any()
    count = real * int(np.prod(shape)) // rows
    return there[out.at : out.at + 4 * count].view(np.float32)


@pytest.mark.parametrize(("rows", "shape", "real"), [
    (1, (1, 1), 1), (8, (8, 39), 8), (40, (40, 100), 33), (4, (8, 5, 5), 3),
])  # fmt: skip
@pytest.mark.parametrize("chance", [0.7, 0.1, 1.0, 0.0])
def test_draws_are_those_of_the_dice(
    rows: int, shape: tuple[int, ...], real: int, chance: float
) -> None:
    """To the bit, where a row is several of the first dimension too."""
    found = filled(rows, shape, real, chance)
    numbers = dice.uniform(dice.drawn(keys(1), STEP, PLACE), found.size)[0]
    assert np.array_equal(found, numbers < np.float32(chance))


def test_a_draw_is_compared_as_a_float_is() -> None:
    """The least of the numbers is not below itself, and is below the float that comes next."""
    numbers = dice.uniform(dice.drawn(keys(1), STEP, PLACE), 1000)[0]
    least = numbers.min()
    assert least < 0.25, "or floats here would be as far apart as the numbers are"
    assert not filled(1, (1, 1000), 1, float(least)).any()
    above = filled(1, (1, 1000), 1, float(np.nextafter(least, np.float32(1))))
    assert np.flatnonzero(above).tolist() == [numbers.argmin()]


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
