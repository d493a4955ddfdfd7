"""From a package to what runs on a device: checked first, then trusted."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from safetensors.numpy import load as load_tensors

from kitestring.core import Tree
from kitestring.devices.runtime import golden
from kitestring.devices.runtime.compute import OrtCompute
from kitestring.devices.runtime.graph import About, Graph
from kitestring.devices.runtime.half import RecordedHalf, crossing
from kitestring.devices.session import frozen
from kitestring.errors import PackageError
from kitestring.package import archive
from kitestring.package.plan import decode

RUNTIME = "onnxruntime"


@dataclass(frozen=True)
class Loaded:
    """`half` runs with `compute`; `deployed` is what requests are answered with, until the cloud
    sends something newer."""

    package: archive.Package
    half: RecordedHalf
    compute: OrtCompute
    deployed: Tree
    checked: list[golden.Checked]


def load(path: Path, known: frozenset[str], threads: int = 1) -> Loaded:
    """Raises `PackageError`: see `archive.read`; also for another runtime than the one here, for
    what is signed and yet not a whole package, and for graphs that do not give their golden outputs
    here."""
    package = archive.read(path, known)
    try:
        return _checked(package, threads)
    except PackageError:
        raise
    except Exception as problem:  # whoever made it may have put anything anywhere
        what = f"something is missing in it, or is not what it should be ({problem!r})"
        raise PackageError(what, package.name, "Pack it anew") from problem


def _checked(package: archive.Package, threads: int) -> Loaded:
    manifest, where = package.manifest, package.name
    _check_runtime(manifest["runtime"], where)
    if not isinstance(manifest["collaboration"]["name"], str):
        raise TypeError("the collaboration's name is not a text")
    tensors = load_tensors(package.files["weights.safetensors"])
    plans = {name: decode(plan) for name, plan in package.json("plans.json").items()}
    half = RecordedHalf(
        plans,
        crossing(manifest["crosses"]["rounds"]),
        crossing(manifest["crosses"]["requests"]),
    )
    graphs = {n: b for n, b in package.files.items() if n.startswith("graphs/")}
    initial = {p: _tree(names, tensors) for p, names in manifest["programs"].items()}
    goldens = golden.unpack(
        package.json("golden.json"), load_tensors(package.files["golden.safetensors"])
    )
    abouts = [Graph(model).about for model in graphs.values()]
    _check_goldens(goldens, abouts, where)
    deployed = frozen(_tree(manifest["deployed"], tensors))
    compute = OrtCompute(graphs, initial, threads=threads)
    return Loaded(package, half, compute, deployed, golden.check(goldens, compute, abouts))


def _check_goldens(goldens: Sequence[golden.Golden], abouts: Sequence[About], where: str) -> None:
    """One for each graph: what is held against nothing could compute anything."""
    wanted = Counter((a.call, a.program) for a in abouts)
    if odd := wanted - Counter((g.primitive, g.program) for g in goldens):
        primitive, program = next(iter(odd))
        raise PackageError(f"no golden outputs for {primitive} of {program}", where, "Pack it anew")


def _tree(names: dict[str, str], tensors: dict[str, Any]) -> Tree:
    return Tree({name: tensors[there] for name, there in names.items()})


def _check_runtime(wanted: dict[str, Any], where: str) -> None:
    if wanted["name"] != RUNTIME:
        what = f"made for the runtime {wanted['name']!r}; here is {RUNTIME}"
        raise PackageError(what, where, "Export it for this runtime")
    try:
        here = version(RUNTIME)
    except PackageNotFoundError:
        mend = f"Run: pip install {RUNTIME}"
        raise PackageError(f"{RUNTIME} is not installed", where, mend) from None
    if _numbers(here) < _numbers(wanted["least"]):
        what = f"needs {RUNTIME} {wanted['least']} or newer (operator set {wanted['opset']})"
        raise PackageError(f"{what}; here is {here}", where, f"Update {RUNTIME}")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", text)[:3])
