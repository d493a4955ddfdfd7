"""A module as an ONNX file: its whole forward pass, for any number of rows.

Written by torch's own exporter in ordinary operators (set 18), and held against torch in stock ONNX
Runtime: on the CPU, and through each other execution provider that is there. Quantised layers keep
their codes; those of 4 bits are multiplied by an operator of ONNX Runtime's own (1.17 and newer).
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kitestring.core import Array
from kitestring.errors import ExportError
from kitestring.export.checked import (
    ROUNDED,
    TOLERANCE,
    Case,
    Check,
    Died,
    Export,
    Input,
    apart,
    drawn,
    held,
    need,
    unproven,
)

if TYPE_CHECKING:
    from torch import nn

OPSET, IR = 18, 8  # of ONNX 1.13; ONNX Runtime reads them from 1.14 on (February 2023)
CPU = "CPUExecutionProvider"
REMOTE = {"AzureExecutionProvider": "it calls a network service"}
_TWO_GB = 2**31 - 2**20  # Protocol Buffers' limit, and some room for the graph
_TRACED = 3  # rows; any number above 1 is as good


def to_onnx(module: nn.Module, inputs: Sequence[Input], path: Path) -> Export:
    """Write `module` and its weights to `path`, as it predicts.

    Inputs keep the names of `inputs`: forward's arguments, or else names for them in their order.
    Outputs are called `out`, `out0`, `out1`, or by their keys. The first axis of each input is the
    rows. The metadata say from which range inputs were drawn.

    Raises `ExportError` in one line for what ONNX lacks and for an export that disagrees with
    torch, `SettingError` where it cannot be checked or written."""
    need(("onnx", "onnxscript", "onnxruntime"), "ONNX", "'kitestring[compare]'")
    from kitestring.export import forward, translations

    where = str(path)
    size = sum(t.numel() * t.element_size() for t in module.state_dict().values())
    if size > _TWO_GB:
        what = f"{size / 1e9:.1f} GB of weights do not fit into one ONNX file (2 GB)"
        raise ExportError(what, where, "Make the model smaller, or export a language model to gguf")
    inputs = forward.arranged(module, inputs, where)
    cases = drawn(inputs)
    wanted = forward.answers(module, cases, where)
    kinds = dict.fromkeys(module.state_dict(), "a weight") | {i.name: "an input" for i in inputs}
    for name in kinds.keys() & wanted[0].keys():
        what = f"{kinds[name]} and an output are both called {name}, and ONNX has one name for one"
        raise ExportError(what, where, f"Return it under another key, as {name}_out")
    program = forward.traced(module, inputs, where, _TRACED)
    model = _translated(program, inputs, list(wanted[0]), where)
    places = _stripped(model)
    tolerance = ROUNDED if translations.rounds(program) else TOLERANCE
    with unproven(path) as part:
        part.write_bytes(model.SerializeToString())
        checks, notes = _checks(part, path, cases, wanted, places, tolerance)
    return Export(path, tuple(checks), tuple(inputs), tuple(cases), tuple(wanted), tuple(notes))


def _translated(program: Any, inputs: Sequence[Input], outputs: list[str], where: str) -> Any:
    """ONNX's ModelProto."""
    import torch

    from kitestring.export import forward, translations

    # What it optimises is that it computes what is constant: codes would become floats.
    ours = bool(translations.operations(program))
    how: dict[str, Any] = (
        {"custom_translation_table": translations.table(), "optimize": False} if ours else {}
    )
    with forward.quiet():
        try:
            made = torch.onnx.export(
                program, (), dynamo=True, verbose=False, opset_version=OPSET,
                input_names=[i.name for i in inputs], output_names=outputs, **how,
            )  # fmt: skip
        except Exception as problem:
            raise _untranslated(problem, where) from None
    assert made is not None
    model = made.model_proto
    model.ir_version = IR
    open_axis = model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = re.sub(rf"\b{open_axis}\b", "rows", dim.dim_param)
    ranges = {i.name: {"low": 0, "high": i.high} for i in inputs if i.high is not None}
    entry = model.metadata_props.add()
    entry.key, entry.value = "kitestring.drawn", json.dumps({"inputs": ranges})
    return model


def _stripped(model: Any) -> dict[str, str]:
    """Take out what the exporter writes of the source: stack traces hold paths of the machine that
    exported. Returns where in the module each node comes from."""
    places = {}
    for node in model.graph.node:
        kept = {entry.key: entry.value for entry in node.metadata_props}
        scopes = ast.literal_eval(kept.get("pkg.torch.onnx.name_scopes", "[]"))
        kinds = ast.literal_eval(kept.get("pkg.torch.onnx.class_hierarchy", "[]"))
        if len(scopes) > 1 and len(kinds) > 1:
            kind = kinds[-2].rpartition(".")[2]
            places[node.name] = f"in {scopes[-2] or 'the module itself'}, {kind}"
        node.doc_string = ""
    for part in (model.graph, *model.graph.node, *model.graph.value_info, *model.graph.input,
                 *model.graph.output, *model.graph.initializer):  # fmt: skip
        del part.metadata_props[:]
    return places


def _untranslated(problem: Exception, where: str) -> ExportError:
    from kitestring.export import forward

    found = re.search(r"No ONNX function found for <OpOverload\(op='([\w.]+)'", str(problem))
    found = found or re.search(r"target=torch\.ops\.(\w+\.\w+)", str(problem))
    if found:
        return forward.unsupported(problem, found[1], "ONNX", where)
    said = (str(problem).strip().splitlines() or [""])[0][:160]
    return ExportError(f"torch's exporter fails: {said}", where, "Write that part differently")


def _checks(
    part: Path, path: Path, cases: Sequence[Case], wanted: Sequence[Case],
    places: Mapping[str, str], tolerance: float,
) -> tuple[list[Check], list[str]]:  # fmt: skip
    import os

    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    checks, notes = [], []
    present = [p for p in onnxruntime.get_available_providers() if p != CPU]
    for provider in (CPU, *present):
        runtime = (
            f"ONNX Runtime {onnxruntime.__version__}, {provider.removesuffix('ExecutionProvider')}"
        )
        if provider in REMOTE:
            notes.append(f"not run in {runtime}: {REMOTE[provider]}")
            continue
        try:
            found = apart(__name__, part, provider, cases)
        except Died as died:
            if provider == CPU:
                raise _cannot_run(died, str(path), places) from None
            notes.append(f"not run in {runtime}: {died}")
            continue
        checks.append(held(cases, wanted, found, path, runtime, tolerance))
    return checks, notes


def _cannot_run(died: Died, where: str, places: Mapping[str, str]) -> ExportError:
    mend = "Write that part of the module differently: with float32, and other operators"
    lacks = re.search(r"implementation for (\w+)\(\d+\) node with name '([^']*)'", died.said)
    if lacks is None:
        return ExportError(f"ONNX Runtime cannot run the export: {died}", where, mend)
    at = places.get(lacks[2], "")
    what = f"ONNX Runtime has no {lacks[1]} for these types{f' ({at})' if at else ''}"
    return ExportError(what, where, mend)


def run(path: str, provider: str, cases: Sequence[Case]) -> list[list[Array]]:
    """In the process of `apart`. Raises where the provider is there but does not start: ONNX
    Runtime would go on with the CPU and say nothing."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # TensorFloat-32 has 10 bits of mantissa; what is checked is float32.
    settings = {"use_tf32": "0"} if provider == "CUDAExecutionProvider" else {}
    session = onnxruntime.InferenceSession(path, options, providers=[(provider, settings)])
    if provider not in session.get_providers():
        raise RuntimeError(f"{provider} does not start on this machine")
    return [list(session.run(None, dict(case))) for case in cases]
