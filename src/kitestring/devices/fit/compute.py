"""The three primitives with torch, and the choice of how to compute them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from torch import nn

from kitestring.core import Array, Fit, Rows, Tree
from kitestring.devices.fit import sequential, vmapped
from kitestring.devices.fit.programs import Program
from kitestring.devices.fit.schedule import schedule
from kitestring.errors import TaskError, unknown

How = Literal["auto", "sequential", "vmap"]
_SLICE = 2048  # rows of one model predicted at a time


class TorchCompute:
    """`how`: "auto" takes vmap where a module can be mapped and that is faster."""

    def __init__(self, programs: Mapping[str, Program], how: How = "auto") -> None:
        self.programs, self.how = programs, how
        self._chosen: dict[str, tuple[bool, str]] = {}

    def program(self, name: str) -> Program:
        if name not in self.programs:
            raise unknown("program", name, self.programs)
        return self.programs[name]

    def initial(self, program: str) -> Tree:
        """Without a device axis."""
        return self.program(program).initial()

    def flops(self, program: str, columns: Mapping[str, Rows]) -> float:
        """Of one forward pass over one row."""
        return self.program(program).flops({k: r.values for k, r in columns.items()})

    def explain(self, program: str) -> str:
        """How a program is computed for several devices, and why: "vmap", "sequential: ..."."""
        return self._chosen.get(program, (False, "sequential: one device at a time"))[1]

    def _maps(self, program: Program, weights: Tree, columns: Mapping[str, Array]) -> bool:
        if self.how == "sequential" or len(next(iter(columns.values()))) == 1:
            return False
        if program.name not in self._chosen:
            why = _unmappable(program) or _probe(program, weights, columns)
            if not why and self.how == "auto" and _convolves(program.module):
                why = "convolutions are faster one device at a time"
            self._chosen[program.name] = (not why, f"sequential: {why}" if why else "vmap")
        return self._chosen[program.name][0]

    def predict(self, program: str, weights: Tree, inputs: Mapping[str, Rows]) -> Tree:
        p, first = self.program(program), next(iter(inputs.values()))
        if all(len(a) == 1 or a.strides[0] == 0 for a in weights.values()):
            found = self._predict_shared(p, weights, inputs)
        else:
            columns = {k: r.values for k, r in inputs.items()}
            way = vmapped if self._maps(p, weights, columns) else sequential
            found = way.predict(p, weights, columns)
        return Tree({k: Rows(v, first.n) for k, v in found.items()})

    def _predict_shared(
        self, p: Program, weights: Tree, inputs: Mapping[str, Rows]
    ) -> dict[str, Array]:
        """One model, whoever's rows: the real rows side by side, as one device's."""
        one = Tree({k: a[:1] for k, a in weights.items()})
        first = next(iter(inputs.values()))
        real = first.mask()
        flat = {k: r.values[real][None] for k, r in inputs.items()}
        cuts = range(0, max(1, int(real.sum())), _SLICE)
        parts = [
            sequential.predict(p, one, {k: v[:, at : at + _SLICE] for k, v in flat.items()})
            for at in cuts
        ]
        out = {}
        for k in parts[0]:
            whole = np.concatenate([part[k][0] for part in parts])
            out[k] = np.zeros((*real.shape, *whole.shape[1:]), whole.dtype)
            out[k][real] = whole
        return out

    def fit(
        self,
        program: str,
        weights: Tree,
        rows: Mapping[str, Rows],
        *,
        lr: float,
        epochs: int,
        batch: int,
        optimiser: str = "sgd",
        key: Array,
    ) -> Fit:
        """`key` [D] draws the batches."""
        if optimiser not in ("sgd", "adam"):
            raise unknown("optimiser", optimiser, ("sgd", "adam"))
        p = self.program(program)
        if p.loss is None:
            raise TaskError(f"program {program!r} has no loss to train with")
        plan = schedule(key, next(iter(rows.values())).n, batch, epochs)
        mapped = self._maps(p, weights, {k: r.values for k, r in rows.items()})
        fit = vmapped.fit if mapped else sequential.fit
        return fit(p, weights, rows, plan, lr=lr, optimiser=optimiser, seeds=key)

    def backward(
        self,
        program: str,
        weights: Tree,
        rows: Mapping[str, Rows],
        *,
        cotangent: Mapping[str, Rows] | None = None,
        row_weights: Array | None = None,
    ) -> tuple[Array, Tree, Tree]:
        p, first = self.program(program), next(iter(rows.values()))
        real = first.mask()
        share = real.astype(np.float32) if row_weights is None else np.where(real, row_weights, 0)
        # Padding may hold anything, NaN too, and 0 * NaN is NaN: put a real row (or zero) there.
        columns = {k: _fill(r, real) for k, r in rows.items()}
        cot = (
            None
            if cotangent is None
            else {
                k: np.where(_wide(real, r.values), r.values, 0).astype(r.values.dtype)
                for k, r in cotangent.items()
            }
        )
        way = vmapped if self._maps(p, weights, columns) else sequential
        loss, d_weights, d_columns = way.backward(
            p, weights, columns, cot, share.astype(np.float32)
        )
        return loss, Tree(d_weights), Tree({k: Rows(v, first.n) for k, v in d_columns.items()})


def _wide(mask: Array, like: Array) -> Array:
    return mask.reshape(mask.shape + (1,) * (like.ndim - 2))


def _fill(rows: Rows, real: Array) -> Array:
    head = np.where(_wide(real[:, :1], rows.values), rows.values[:, :1], 0)
    return np.where(_wide(real, rows.values), rows.values, head).astype(rows.values.dtype)


def _convolves(module: nn.Module) -> bool:
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d)
    return any(isinstance(m, kinds) for m in module.modules())


def _unmappable(program: Program) -> str:
    names = dict(program.module.named_parameters())
    for name, buffer in program.module.named_buffers():
        if name not in names and buffer.is_floating_point() and "running" in name:
            return "batch statistics change in training"
    return ""


def _probe(program: Program, weights: Tree, columns: Mapping[str, Array]) -> str:
    """Try two devices and one row each; what vmap says when it cannot is the reason."""
    few = {
        k: _fill(Rows(v[:2, :1], np.array([1, 1])), np.ones((2, 1), bool))
        for k, v in columns.items()
    }
    two = Tree(
        {
            k: np.ascontiguousarray(np.broadcast_to(a[:1], (2, *a.shape[1:])))
            for k, a in weights.items()
        }
    )
    few = {k: np.nan_to_num(v) if v.dtype.kind == "f" else v for k, v in few.items()}
    try:
        if program.loss is None:
            a, b = vmapped.predict(program, two, few), sequential.predict(program, two, few)
        else:
            rows = {k: Rows(v, np.array([1, 1])) for k, v in few.items()}
            key = np.zeros(2, np.uint64)
            plan = schedule(key, np.array([1, 1]), 1, 1)
            one, other = (
                way.fit(program, two, rows, plan, lr=0.1, optimiser="sgd", seeds=key).parameters
                for way in (vmapped, sequential)
            )
            a, b = dict(one), dict(other)
    except (RuntimeError, ValueError, NotImplementedError, TypeError) as problem:
        lines = str(problem).strip().splitlines()
        return f"vmap cannot map it ({lines[0][:80] if lines else type(problem).__name__})"
    if not all(np.allclose(a[k], b[k], rtol=1e-3, atol=1e-5, equal_nan=True) for k in a):
        return "vmap gives other numbers"
    return ""


def thread_per_process() -> None:
    """One thread each: workers share the cores, and small products lose by splitting."""
    torch.set_num_threads(1)
