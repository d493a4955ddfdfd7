"""A package from a task and a collaboration: rehearsed, recorded, exported, held against torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import onnx
from safetensors.numpy import save as save_tensors

from kitestring import __version__
from kitestring.core import Array, Rows, Tree
from kitestring.devices.fit.compute import TorchCompute
from kitestring.devices.runtime import golden
from kitestring.devices.runtime.compute import OrtCompute
from kitestring.devices.runtime.golden import Golden
from kitestring.devices.runtime.graph import Form
from kitestring.devices.runtime.half import declared
from kitestring.devices.runtime.load import RUNTIME
from kitestring.export.builder import LEAST_OF_MICROSOFT, LEAST_RUNTIME, MICROSOFT
from kitestring.export.graphs import Graph, backward_graph, predict_graph, step_graph
from kitestring.pack.recording import plans
from kitestring.pack.rehearse import rehearse
from kitestring.pack.schema import schema
from kitestring.package.plan import encode
from kitestring.package.record import Call
from kitestring.tasks.programs import programs, recorded_programs
from kitestring.tasks.task import Recorded, Task

_GOLDEN_ROWS = 5
Told = Callable[[str], None]


@dataclass(frozen=True)
class Built:
    """What `archive.write` takes, and how far the graphs are from torch."""

    manifest: Mapping[str, Any]
    files: Mapping[str, bytes]
    checked: Sequence[golden.Checked]


@dataclass(frozen=True)
class Source:
    """What a package is made of. `state`: of the collaboration, trained; its start if None.
    `starts`: programs that the cloud trained before."""

    task: Task | Recorded
    collaboration: Any
    state: Any = None
    starts: Mapping[str, Tree] = field(default_factory=dict)
    seed: int = 0


def build(source: Source, told: Told = lambda _: None) -> Built:
    """Raises `TaskError` where the device half cannot be recorded or a model cannot be exported,
    and `PackageError` where a graph does not give what torch gives."""
    task, collaboration = source.task, source.collaboration
    told("rehearsing")
    columns = schema(task)
    compute = TorchCompute(_programs(task, source.seed), "sequential")

    def pretrained(program: str) -> Tree:
        return source.starts.get(program) or compute.initial(program)

    pool = isinstance(task, Task) and bool(task.users.pool)
    rehearsal = rehearse(collaboration, columns, compute, pool, pretrained)
    told("recording")
    recorded, calls = plans(collaboration, rehearsal.scenes)
    graphs, goldens = dict[str, bytes](), list[Golden]()
    for call in _distinct(calls):
        told(f"exporting {call.primitive} of {call.program}")
        graph = _graph(compute, call)
        graphs[f"graphs/{len(graphs):02d} {call.primitive} {call.program}.onnx"] = graph.model
        goldens.append(_golden(compute, call))
    told("checking")
    initial = {name: compute.initial(name) for name in sorted({c.program for c in calls})}
    abouts = [Graph(model).about for model in graphs.values()]
    checked = golden.check(goldens, OrtCompute(graphs, initial), abouts)
    service = collaboration.serve()
    state = rehearsal.start if source.state is None else source.state
    tensors, named = _shared({**initial, "": service.deploy(state)})
    listed, arrays = golden.pack(goldens)
    files = {
        "plans.json": json.dumps({n: encode(p) for n, p in recorded.items()}).encode(),
        "weights.safetensors": save_tensors(tensors),
        "golden.json": json.dumps(listed, indent=1).encode(),
        "golden.safetensors": save_tensors(arrays),
        **graphs,
    }
    manifest = {
        "kitestring": __version__,
        "task": task.name,
        "collaboration": {
            "name": type(collaboration).__name__, "settings": asdict(collaboration),
        },
        "runtime": _runtime(graphs),
        "columns": {name: asdict(column) for name, column in columns.items()},
        "crosses": {
            "rounds": declared(collaboration.crosses), "requests": declared(service.crosses),
        },
        "deployed": named.pop(""),
        "programs": named,
    }  # fmt: skip
    return Built(manifest, files, checked)


def _runtime(graphs: Mapping[str, bytes]) -> dict[str, Any]:
    """What a device needs to run them; a build of the runtime may leave out all other operators."""
    models = [onnx.load_from_string(blob) for blob in graphs.values()]
    opsets = [o for m in models for o in m.opset_import]
    opset = max((o.version for o in opsets if not o.domain), default=0)
    own = any(o.domain == MICROSOFT for o in opsets)
    names = sorted({_operator(node) for m in models for node in m.graph.node})
    least = LEAST_OF_MICROSOFT if own else LEAST_RUNTIME
    return {"name": RUNTIME, "least": least, "opset": opset, "operators": names}


def _operator(node: Any) -> str:
    return f"{node.domain}.{node.op_type}" if node.domain else str(node.op_type)


def _programs(task: Task | Recorded, seed: int) -> Any:
    if isinstance(task, Recorded):
        return recorded_programs(task)
    first = task.users.load(task.users.devices[0])["train"]["x"]
    return programs(task, seed, np.asarray(first[:2]))


def _distinct(calls: Iterable[Call]) -> list[Call]:
    """One for each graph: the numbers of a recipe go in, what it does is the graph's form."""
    found: dict[Any, Call] = {}
    for call in calls:
        if call.primitive in ("predict", "fit", "backward"):
            columns = tuple(sorted((k, r.row[0], str(r.row[1])) for k, r in call.columns.items()))
            r = call.recipe
            form = r and Form.of(r, r.train, call.centre, call.linear)
            terms = bool(r and r.mu), tuple(call.cotangents)
            found.setdefault((call.primitive, call.program, columns, form, terms), call)
    return list(found.values())


def _graph(compute: TorchCompute, call: Call) -> Graph:
    program = compute.program(call.program)
    if call.primitive == "predict":
        return predict_graph(program, call.columns)
    if call.primitive == "backward":
        return backward_graph(program, call.columns, tuple(call.cotangents))
    assert call.recipe is not None
    return step_graph(program, call.columns, call.recipe, centre=call.centre, linear=call.linear)


def _golden(compute: TorchCompute, call: Call) -> Golden:
    """The rows are those of a made-up device. Batches of three: the last one is ragged."""
    recipe = call.recipe and replace(call.recipe, epochs=1, batch=min(3, call.recipe.batch))
    rows, by = ({k: _first(r) for k, r in part.items()} for part in (call.columns, call.cotangents))
    asked = Golden(call.primitive, call.program, rows, recipe, call.centre, call.linear, by)
    return replace(asked, out=golden.outputs(asked, compute, golden.first(compute, call.program)))


def _first(rows: Rows) -> Array:
    return rows.values[0, : min(_GOLDEN_ROWS, int(rows.n[0]))]


def _shared(trees: Mapping[str, Tree]) -> tuple[dict[str, Array], dict[str, dict[str, str]]]:
    """Each array once, under the name of its first owner; and owner -> name -> array."""
    tensors: dict[str, Array] = {}
    known: dict[Any, str] = {}
    named: dict[str, dict[str, str]] = {}
    for owner, tree in trees.items():
        named[owner] = {}
        for name, leaf in tree.items():
            a = np.asarray(leaf, order="C")  # a number by itself stays one
            label = known.setdefault(
                (a.dtype.str, a.shape, a.tobytes()), f"{owner or 'deployed'}/{name}"
            )
            tensors[label] = a
            named[owner][name] = label
    return tensors, named
