"""Imports flow one way, files stay short. Sources are parsed, never imported."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src"
ROOT = SRC / "kitestring"

# A layer (the longest prefix counts) -> what it may import of kitestring besides itself.
# The package's own __init__, which holds the version, may be imported by all.
TOP = "kitestring"
LAYERS: dict[str, tuple[str, ...]] = {
    "kitestring.errors": (),
    "kitestring.arrays": (),
    "kitestring.core": ("errors", "arrays"),
    "kitestring.dice": ("errors", "core"),
    "kitestring.exchange": ("errors", "core", "dice"),
    "kitestring.package": ("errors", "arrays", "core"),
    "kitestring.devices": ("errors", "core", "dice", "exchange"),
    "kitestring.devices.fit": ("errors", "core", "dice", "exchange", "devices"),
    "kitestring.devices.runtime": ("errors", "core", "dice", "devices", "package"),
    "kitestring.compress": ("errors", "arrays", "core"),
    "kitestring.export": (
        *("errors", "core", "dice", "package", "compress"),
        *("devices", "devices.fit", "devices.runtime"),
    ),
    "kitestring.cloud": ("errors", "core", "dice", "exchange"),
    "kitestring.collaborate": ("errors", "core", "dice"),
    "kitestring.engines": (
        *("errors", "core", "dice", "exchange"),
        *("devices", "devices.fit", "cloud"),
    ),
    "kitestring.export.command": ("errors", "export", TOP),
    TOP: (),  # on top: tasks, apps, compare, report, decide, cli, ...; these import what they like
}

# A package from outside -> where it may be imported. Nothing else from outside may be imported
# anywhere: a new dependency is a new line here, in pyproject.toml and in docs/dependencies.md.
ANY, ON_TOP = "anywhere", "the layers on top"
OUTSIDE: dict[str, tuple[str, ...]] = {
    "numpy": (ANY,),
    "llvmlite": ("kitestring.devices.fit.compiled",),
    "cryptography": ("kitestring.package",),
    "safetensors": (
        *("kitestring.devices.runtime", "kitestring.pack"),
        *("kitestring.measure", "kitestring.tasks", "kitestring.shrink", "kitestring.compress"),
    ),
    "executorch": ("kitestring.export", "kitestring.measure"),
    "gguf": ("kitestring.export",),
    "llama_cpp": ("kitestring.export", "kitestring.measure"),
    "onnxruntime": ("kitestring.devices.runtime", "kitestring.export", "kitestring.measure"),
    "onnx": ("kitestring.export", "kitestring.pack", "kitestring.measure"),
    "onnxscript": ("kitestring.export",),
    "torch": (
        *("kitestring.devices.fit", "kitestring.export", "kitestring.tasks", "kitestring.apps"),
        *("kitestring.measure", "kitestring.partition", "kitestring.compress", "kitestring.shrink"),
    ),
    "sklearn": ("kitestring.tasks", "kitestring.apps"),
    "scipy": ("kitestring.tasks", "kitestring.apps"),
    "h5py": ("kitestring.tasks", "kitestring.apps"),
    "matplotlib": (ON_TOP,),
    "rich": (ON_TOP,),
    "flwr": ("kitestring.engines.flower",),
    "ray": ("kitestring.engines.ray",),
}


def inside(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(prefix + ".")


def layer(module: str) -> str:
    return max((p for p in LAYERS if inside(module, p)), key=len)


def module_of(path: Path) -> str:
    parts = path.relative_to(SRC).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def exists(module: str) -> bool:
    path = SRC.joinpath(*module.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def imports(source: str, module: str, package: bool) -> Iterator[tuple[int, str]]:
    """Each (line, module) that the source imports, in functions and by constant name too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                home = module.split(".")
                home = home[: len(home) - node.level + package]
                base = ".".join([*home, base] if base else home)
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                yield node.lineno, whole if inside(base, TOP) and exists(whole) else base
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def complaint(module: str, imported: str) -> str | None:
    """Why `module` may not import `imported`; None where it may."""
    mine = layer(module)
    if inside(imported, TOP):
        theirs = layer(imported)
        if imported == TOP or mine in (theirs, TOP):
            return None
        if theirs.removeprefix(TOP + ".") in LAYERS[mine]:
            return None
        return f"{mine} may import only {', '.join(LAYERS[mine]) or 'nothing of kitestring'}"
    name = imported.split(".")[0]
    if name in sys.stdlib_module_names:
        return None
    places = OUTSIDE.get(name, ())
    if ANY in places or (ON_TOP in places and mine == TOP):
        return None
    if any(inside(module, place) for place in places):
        return None
    return f"{name} may be imported in {', '.join(places) or 'no place: it is in no table'}"


def violations(root: Path) -> list[str]:
    found = []
    for path in sorted(root.rglob("*.py")):
        module = module_of(path)
        package = path.name == "__init__.py"
        for line, imported in imports(path.read_text(encoding="utf-8"), module, package):
            if why := complaint(module, imported):
                found.append(f"{path.relative_to(SRC.parent)}:{line}: imports {imported}: {why}")
    return found


def test_imports_flow_one_way() -> None:
    found = violations(ROOT)
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source", "caught"),
    [
        ("kitestring.core", "from kitestring.errors import BadReply", False),
        ("kitestring.core", "from kitestring import dice", True),
        ("kitestring.core", "import numpy as np", False),
        ("kitestring.exchange.wire", "from . import codecs", False),
        ("kitestring.exchange.wire", "from ..devices import profiles", True),
        ("kitestring.devices.session", "from kitestring.cloud import session", True),
        ("kitestring.devices.session", "from kitestring.exchange.wire import pack", False),
        ("kitestring.devices.session", "def f():\n    import torch", True),
        ("kitestring.devices.session", "from kitestring.devices.fit import compute", True),
        ("kitestring.devices.fit.vmapped", "import torch.nn as nn", False),
        ("kitestring.devices.fit.vmapped", "from kitestring.devices.session import View", False),
        ("kitestring.cloud.session", "from kitestring.devices.fit.compute import Compute", True),
        ("kitestring.collaborate.parameters.fedavg", "import torch", True),
        ("kitestring.collaborate.parameters.fedavg", "from numpy import mean", False),
        ("kitestring.collaborate.parameters.fedavg", "import kitestring.exchange.wire", True),
        ("kitestring.collaborate.features.fedmd", "from kitestring.engines import local", True),
        ("kitestring.engines.local", "from kitestring.collaborate import parameters", True),
        ("kitestring.engines.local", "from kitestring import tasks", True),
        ("kitestring.engines.local", "from kitestring import __version__", False),
        ("kitestring.engines.local", "from kitestring.comparison.results import Row", True),
        ("kitestring.engines.local", "import ray", True),
        ("kitestring.engines.local", "import rich", True),
        ("kitestring.engines.local", "importlib.import_module('torch')", True),
        ("kitestring.engines.ray", "import ray", False),
        ("kitestring.engines.flower", "from flwr.server import ServerApp", False),
        ("kitestring.tasks.digits", "import torch, sklearn.datasets", False),
        ("kitestring.cli", "from kitestring.comparison.compare import compare\nimport rich", False),
        ("kitestring.cli", "import torch", True),
        ("kitestring.cli", "import requests", True),
    ],
)
def test_the_table_catches_what_it_should(module: str, source: str, caught: bool) -> None:
    found = [complaint(module, name) for _, name in imports(source, module, package=False)]
    assert any(found) is caught, found


def test_files_stay_short() -> None:
    lengths = {
        path.relative_to(SRC): len(path.read_text(encoding="utf-8").splitlines())
        for path in ROOT.rglob("*.py")
    }
    assert {str(p): n for p, n in lengths.items() if n > 450} == {}
    assert lengths[Path("kitestring/core.py")] < 300
