"""What a device installs: the wheel alone, without torch, must do all that a device does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from kitestring.cli import main

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]

IMPORT_ALL = """
import importlib, pkgutil, sys
import kitestring.core, kitestring.errors, kitestring.dice

for layer in sys.argv[1:]:
    package = importlib.import_module("kitestring." + layer)
    for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not found.name.startswith("kitestring.devices.fit"):
            importlib.import_module(found.name)
            print(found.name)
"""


def run(*command: str | Path, cwd: Path, patience: float = 300) -> subprocess.CompletedProcess[str]:
    """Run outside the checkout's own environment: no PYTHONPATH, no active venv, no terminal."""
    hidden = ("PYTHON", "VIRTUAL_ENV", "KITESTRING", "COV_", "PYTEST")
    env = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=env | {"NO_COLOR": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=patience,
    )


def must(*command: str | Path, cwd: Path, patience: float = 300) -> str:
    done = run(*command, cwd=cwd, patience=patience)
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    build = ("-m", "build", "--wheel", "--no-isolation", "--outdir", out)
    must(sys.executable, *build, cwd=ROOT)
    (built,) = out.glob("kitestring-*.whl")
    return built


@pytest.fixture(scope="module")
def device(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment that holds the wheel and what it requires, no more."""
    home = tmp_path_factory.mktemp("device")
    must(sys.executable, "-m", "venv", home / "venv", cwd=home)
    bin = home / "venv" / "bin"
    pip = ("-m", "pip", "install", "-qq", "-c", ROOT / "constraints.txt")
    must(bin / "python", *pip, wheel, cwd=home)
    return bin


def test_the_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    source = ROOT / "src"
    wanted = {
        str(path.relative_to(source))
        for path in (source / "kitestring").rglob("*")
        if path.suffix in (".py", ".toml", ".css", ".typed")
    }
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert wanted <= names, wanted - names
    extra = {n for n in names - wanted if ".dist-info/" not in n}
    assert not extra, extra
    assert any(n.endswith("/licenses/LICENSE") for n in names)


def test_a_device_installs_what_runs_and_opens_packages_and_nothing_else(
    device: Path, tmp_path: Path
) -> None:
    frozen = must(device / "python", "-m", "pip", "list", "--format=freeze", cwd=tmp_path)
    names = {line.split("==")[0].lower() for line in frozen.splitlines()}
    runs = {"numpy", "onnxruntime", "flatbuffers", "packaging", "protobuf"}
    opens = {"safetensors", "cryptography", "cffi", "pycparser"}
    # Newer releases of these need less; anything that is not named here is one too many.
    assert names - {"pip", "setuptools"} <= {"kitestring"} | runs | opens
    assert {"kitestring", "numpy", "onnxruntime", "safetensors", "cryptography"} <= names
    done = run(device / "python", "-c", "import torch", cwd=tmp_path)
    assert "ModuleNotFoundError" in done.stderr


def test_device_cloud_and_collaborations_import_without_torch(device: Path, tmp_path: Path) -> None:
    layers = ("exchange", "devices", "cloud", "collaborate", "package")
    imported = must(device / "python", "-W", "error", "-c", IMPORT_ALL, *layers, cwd=tmp_path)
    for layer in layers:
        assert f"kitestring.{layer}." in imported


def test_help_works_without_torch(device: Path, tmp_path: Path) -> None:
    assert "compare" in must(device / "kitestring", "--help", cwd=tmp_path)


@pytest.mark.parametrize(
    "words",
    [("compare", "digits"), ("report", "runs/digits"), ("pack", "digits", "fedavg"),
     ("export", "digits:small"), ("cut", "digits:large"), ("measure", "--profiles")],
    ids=lambda words: words[0],
)  # fmt: skip
def test_what_needs_more_names_the_extra_in_one_line(
    device: Path, tmp_path: Path, words: tuple[str, ...]
) -> None:
    done = run(device / "kitestring", *words, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert "which is not installed" in line
    assert "kitestring[compare]" in line


def test_a_package_is_shown_and_measured_where_there_is_no_torch(
    device: Path, tmp_path: Path
) -> None:
    key, package = str(tmp_path / "k"), str(tmp_path / "a.kite")
    assert main(["keys", key]) == 0
    assert main(["pack", "digits", "fedavg", "--key", key, "--out", package]) == 0
    shown = must(device / "kitestring", "show", "a.kite", "--trust", "k.pub", cwd=tmp_path)
    assert "Signed by a trusted key, whole, and runs here" in shown
    words = ("measure", "a.kite", "--trust", "k.pub", "--runs", "3")
    found = json.loads(must(device / "kitestring", *words, cwd=tmp_path))
    names = [pair["subject"]["name"] for pair in found["pairs"]]
    assert names == ["step small", "predict small.answer"]
    assert all(pair["subject"]["wall"]["p50"] > 0 for pair in found["pairs"])
