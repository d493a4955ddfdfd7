"""A module as an ExecuTorch program (.pte): its whole forward pass, XNNPACK where it can be.

Inference only. Held against torch in ExecuTorch's own runtime, whose kernels are those of its
Android and iOS packages. ExecuTorch plans its memory beforehand, so it must know the most rows.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kitestring.core import Array
from kitestring.errors import ExportError, SettingError
from kitestring.export.checked import (
    MOST,
    Case,
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

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # of what ExecuTorch brings along


def to_executorch(
    module: nn.Module, inputs: Sequence[Input], path: Path, most: int = MOST
) -> Export:
    """Write `module` and its weights to `path`, as it predicts, for 1 to `most` rows at a time.

    Inputs and outputs are by position, forward's arguments and what it returns in their order; an
    argument that `inputs` do not name is left out.

    Raises `ExportError` in one line for what ExecuTorch lacks and for an export that disagrees with
    torch, `SettingError` where it cannot be checked or written."""
    need(("executorch",), "ExecuTorch", "'kitestring[executorch]'")
    if most < 2:
        raise SettingError(f"{most} rows at most", mend="Give 2 or more: --rows 2")
    from importlib.metadata import version

    from kitestring.export import forward

    where, runtime = str(path), f"ExecuTorch {version('executorch')}, XNNPACK"
    inputs = forward.arranged(module, inputs, where)
    cases = drawn(inputs, most)
    wanted = forward.answers(module, cases, where)
    # Lowering asks, say, whether there are 16 rows or more (convolutions do), and takes the answer
    # for the example as a bound. Traced with the most rows, and one more allowed, what it bounds is
    # below: the memory that is planned is enough, and it stays a range.
    program = forward.traced(module, inputs, where, most, most + 1)
    model, delegated, left = _lowered(program, where)
    with unproven(path) as part:
        part.write_bytes(model)
        try:
            found = apart(__name__, part, "", cases)
        except Died as died:
            raise _cannot_run(died, program, where) from None
        check = held(cases, wanted, found, path, runtime)
    note = f"{delegated} parts run in XNNPACK, {left} operators beside them"
    return Export(path, (check,), tuple(inputs), tuple(cases), tuple(wanted), (note,))


def _lowered(program: Any, where: str) -> tuple[bytes, int, int]:
    """The file's bytes, how many parts XNNPACK runs, and how many operators are beside them."""
    from kitestring.export import forward

    with forward.quiet():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

        try:
            lowered = to_edge_transform_and_lower(
                program,
                partitioner=[XnnpackPartitioner()],
                # The check of dtypes fixes the number of rows at that of the example; what it
                # would find is found when the program is run.
                compile_config=EdgeCompileConfig(_check_ir_validity=False),
            )
            lower = lowered.exported_program()
            calls = [n for n in lower.graph.nodes if n.op == "call_function"]
            changed = sorted(lower.graph_signature.user_inputs_to_mutate.values())
            model = bytes(lowered.to_executorch().buffer)
        except Exception as problem:
            raise _untranslated(problem, program, where) from None
    if changed:
        what = f"the module changes its input {changed[0]}, which ExecuTorch would return as well"
        mend = "Change a copy, x.clone(), and let no first layer have inplace=True"
        raise ExportError(what, where, mend)
    parts = sum("executorch_call_delegate" in str(n.target) for n in calls)
    beside = sum(hasattr(n.target, "_schema") for n in calls)
    return model, parts, beside


def _untranslated(problem: Exception, program: Any, where: str) -> ExportError:
    from kitestring.export import forward

    found = re.search(r"out variants: \{'?(\w+::\w+)", str(problem))
    if found:
        operator = found[1].replace("::", ".")
        return forward.refused(operator, "ExecuTorch", forward.find(program, operator), where)
    said = (str(problem).strip().splitlines() or [""])[0][:160]
    return ExportError(
        f"ExecuTorch cannot take the module: {type(problem).__name__}: {said}", where,
        "Write that part of the module differently",
    )  # fmt: skip


def _cannot_run(died: Died, program: Any, where: str) -> ExportError:
    """What the runtime logged names the operator that is missing, or that failed."""
    from kitestring.export import forward

    found = re.search(r"Missing operator: \[\d+\] (\w+::\w+)", died.said)
    if found:
        operator = found[1].replace("::", ".")
        return forward.refused(operator, "ExecuTorch", forward.find(program, operator), where)
    found = re.search(r"KernelCall failed at instruction \S+ in operator (\w+::\w+)", died.said)
    at = f" at {found[1].replace('::', '.')}" if found else ""
    mend = "Write that part of the module differently"
    return ExportError(f"ExecuTorch cannot run the export{at}: {died}", where, mend)


def run(path: str, how: str, cases: Sequence[Case]) -> list[list[Array]]:
    """In the process of `apart`."""
    import torch
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(path).load_method("forward")
    found = []
    for case in cases:
        outputs = method.execute([torch.from_numpy(a) for a in case.values()])
        found.append([t.numpy().copy() for t in outputs])
    return found
