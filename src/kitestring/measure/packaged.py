"""The graphs of a signed package, each to be measured by itself with the package's own inputs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load as load_tensors

from kitestring.core import Array
from kitestring.devices.runtime import golden
from kitestring.devices.runtime.golden import Golden
from kitestring.devices.runtime.graph import About, Graph
from kitestring.devices.runtime.settled import settled
from kitestring.errors import PackageError
from kitestring.measure.subject import Subject
from kitestring.package import archive, keys


def subjects(path: Path, trusted: list[Path], rows: int, folder: Path) -> list[Subject]:
    """Verified first. Graphs and inputs are written into `folder`, which must outlive measuring.

    Weights are those of the package, rows its golden ones, over again if there are fewer."""
    package = archive.read(path, keys.trusted(trusted))
    try:
        tensors = load_tensors(package.files["weights.safetensors"])
        goldens = golden.unpack(
            package.json("golden.json"), load_tensors(package.files["golden.safetensors"])
        )
        programs = package.manifest["programs"]
        found: list[Subject] = []
        names = sorted(name for name in package.files if name.startswith("graphs/"))
        for number, name in enumerate(names):
            about = Graph(package.files[name]).about
            weights = {k: tensors[there] for k, there in programs[about.program].items()}
            given = _inputs(about, weights, _call(about, goldens), rows)
            source, values = folder / f"{number}.onnx", folder / f"{number}.npz"
            model = package.files[name]
            if about.primitive == "predict":  # a device that asks again has them built in
                built_in = {k: given.pop(k) for k in list(given) if k.startswith("w:")}
                model = settled(model, {k: built_in[k] for k in _read(about)})
            source.write_bytes(model)
            np.savez(values, **given)
            label = f"{about.primitive} {about.program}"
            label += f" {number}" if any(label == s.name for s in found) else ""
            size = len(package.files[name])
            found.append(Subject(label, "onnx", str(source), size, str(values)))
    except PackageError:
        raise
    except Exception as problem:  # whoever made it may have put anything anywhere
        what = f"something is missing in it, or is not what it should be ({problem!r})"
        raise PackageError(what, package.name, "Pack it anew") from None
    return found


def _read(about: About) -> list[str]:
    """The inputs that hold weights."""
    read = about.weights.keys() - about.tied.keys() - set(about.unused)
    return [f"w:{name}" for name in sorted(read)]


def _call(about: About, goldens: list[Golden]) -> Golden:
    """The golden call that runs this graph."""
    wanted = (about.call, about.program)
    for call in goldens:
        if (call.primitive, call.program) == wanted and about.columns.keys() <= call.rows.keys():
            return call
    raise PackageError(f"it has no golden inputs for {about.label}", "golden.json", "Pack it anew")


def _inputs(
    about: About, weights: Mapping[str, Array], call: Golden, rows: int
) -> dict[str, Array]:
    """Every input that such a graph may have, by the names that `devices/runtime/graph.py` lists.
    Masks of dropout are drawn, an optimiser's memory is empty, as before a first step."""
    dice = np.random.default_rng(0)
    given: dict[str, Any] = {f"w:{k}": w for k, w in weights.items()}
    for name in about.columns:
        given[f"x:{name}"] = _repeated(call.rows[name], rows)
    for name in about.cotangents:
        given[f"by:{name}"] = _repeated(call.cotangents[name], rows)
    given["share"] = np.full(rows, 1 / rows, np.float32)
    given["step"] = np.int64(1)
    for place, draw in enumerate(about.draws):
        given[f"draw:{place}"] = (dice.random(draw.of(rows)) < draw.chance).astype(np.float32)
    if about.form is not None:
        for name in set(about.form.scalars) - {"step"}:
            given[name] = np.float32(getattr(call.recipe, name))
        given |= {f"centre:{k}": weights[k] for k in about.form.centre}
        given |= {f"linear:{k}": np.zeros_like(weights[k]) for k in about.form.linear}
        for prefix in about.form.memory:
            given |= {f"memory:{prefix}{k}": np.zeros_like(weights[k]) for k in about.form.trained}
    return {name: np.asarray(value) for name, value in given.items()}


def _repeated(array: Array, rows: int) -> Array:
    return array[np.arange(rows) % len(array)]
