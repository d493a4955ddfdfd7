"""A graph without what is constant in it: a runtime computes that once, when it loads the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_KEPT = {"QuantizeLinear", "DequantizeLinear"}
"""ONNX Runtime leaves these where they are, unless told otherwise: it looks for them around what it
can do in whole numbers."""
_DRAWN = {"RandomNormal", "RandomUniform", "Multinomial", "Bernoulli", "Dropout"}
_MOST = 2**30  # bytes: beyond, graphs are taken as they are


def folded(path: str, runtime: Any, weights: bool) -> str | bytes:
    """The serialised graph with the results of such nodes in their place; `path` itself where there
    are none, or without the package onnx. `runtime` is the module onnxruntime. `weights`: whether
    dequantising them is such a node."""
    try:
        import onnx
    except ImportError:
        return path
    if Path(path).stat().st_size > _MOST:
        return path
    try:
        model = onnx.load(path)
    except Exception:  # the runtime will say what is wrong with it
        return path
    graph = model.graph
    known, still = {t.name for t in graph.initializer}, []
    for node in graph.node:
        inner = any(a.type in (a.GRAPH, a.GRAPHS) for a in node.attribute)
        given = all(name in known or not name for name in node.input)
        left = _DRAWN if weights else _KEPT | _DRAWN
        if given and not inner and node.op_type not in left:
            known.update(node.output)
            still.append(node)
    made = {name for node in still for name in node.output if name}
    gone = {id(node) for node in still}
    rest = [node for node in graph.node if id(node) not in gone]
    wanted = sorted(made & {name for node in rest for name in node.input})
    if not wanted or made & {output.name for output in graph.output}:
        return path
    parts = onnx.ModelProto()
    parts.CopyFrom(model)
    del parts.graph.node[:], parts.graph.input[:], parts.graph.output[:]
    parts.graph.node.extend(still)
    parts.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    session = runtime.InferenceSession(
        parts.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    values = zip(wanted, session.run(wanted, {}), strict=True)
    del graph.node[:]
    graph.node.extend(rest)
    graph.initializer.extend(onnx.numpy_helper.from_array(a, name) for name, a in values)
    return bytes(model.SerializeToString())
