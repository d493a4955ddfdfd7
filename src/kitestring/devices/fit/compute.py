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
# Operations a row from which convolutions are left one by one. Grouped ones still won narrowly at
# 2e6 and lost at 7e6 (benchmarks/convolutions.py); where little is won, the reference is taken.
_HEAVY = 1e6
_SLICE = 512  # rows of one model predicted at a time


class TorchCompute:
    """`how`: "auto" takes vmap where a module can be mapped and that is faster."""

    def __init__(self, programs: Mapping[str, Program], how: How = "auto") -> None:
        self.programs, self.how = programs, how
        self.used: dict[str, str] = {}  # program -> how it was computed; callers may clear it
        self._chosen: dict[tuple[str, bool], str] = {}

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
        """How several devices were computed, and why: "vmap", "sequential: ...", or not at all."""
        return self.used.get(program, "one model")

    def explain_all(self) -> str:
        """The same for all programs that were used: one word where all are mapped."""
        slow = [f"{name} {how}" for name, how in sorted(self.used.items()) if how != "vmap"]
        return "; ".join(slow) or ("vmap" if self.used else "one model")

    def _maps(
        self, program: Program, weights: Tree, rows: Mapping[str, Rows], trains: bool = False
    ) -> bool:
        if len(next(iter(rows.values())).n) == 1:
            return False
        key = (program.name, trains)
        if key not in self._chosen:
            why = self._why_not(program, weights, rows, trains)
            self._chosen[key] = f"sequential: {why}" if why else "vmap"
        if self.used.get(program.name, "vmap") == "vmap":
            self.used[program.name] = self._chosen[key]
        return self._chosen[key] == "vmap"

    def _why_not(
        self, program: Program, weights: Tree, rows: Mapping[str, Rows], trains: bool
    ) -> str:
        """What keeps devices from being computed all at once; nothing does if empty."""
        if self.how == "sequential":
            return "as asked"
        why = _unmappable(program, trains) or _probe(program, weights, rows, trains)
        if not why and self.how == "auto" and _convolves(program.module):
            flops = program.flops({k: r.values for k, r in rows.items()})
            why = "convolutions of this size are faster so" if flops > _HEAVY else ""
        return why

    def predict(self, program: str, weights: Tree, inputs: Mapping[str, Rows]) -> Tree:
        p, first = self.program(program), next(iter(inputs.values()))
        p.check(weights)
        if all(len(a) == 1 or a.strides[0] == 0 for a in weights.values()):
            found = self._predict_shared(p, weights, inputs)
        else:
            way = vmapped if self._maps(p, weights, inputs) else sequential
            found = way.predict(p, weights, _filled(inputs))
        return Tree({k: Rows(v, first.n) for k, v in found.items()})

    def _predict_shared(
        self, p: Program, weights: Tree, inputs: Mapping[str, Rows]
    ) -> dict[str, Array]:
        """One model, whoever's rows: the real rows side by side, as one device's."""
        one = Tree({k: a[:1] for k, a in weights.items()})
        first = next(iter(inputs.values()))
        real = first.mask()
        flat = {k: r.values[r.mask()][None] for k, r in inputs.items()}
        if not real.any():  # not every module takes no rows: learn the outputs' shapes from one
            flat = {k: np.zeros((1, 1, *v.shape[2:]), v.dtype) for k, v in flat.items()}
        cuts = range(0, max(1, int(real.sum())), _SLICE)
        parts = [
            sequential.predict(p, one, {k: v[:, at : at + _SLICE] for k, v in flat.items()})
            for at in cuts
        ]
        out = {}
        for k in parts[0]:
            whole = np.concatenate([part[k][0] for part in parts])
            out[k] = np.zeros((*real.shape, *whole.shape[1:]), whole.dtype)
            out[k][real] = whole[: int(real.sum())]
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
        p.check(weights)
        plan = schedule(key, next(iter(rows.values())).n, batch, epochs)
        mapped = self._maps(p, weights, rows, trains=True)
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
        p.check(weights)
        real = first.mask()
        share = real.astype(np.float32) if row_weights is None else np.where(real, row_weights, 0)
        cot = None
        if cotangent is not None:
            wide = {k: _as_wide(r, real.shape[1]) for k, r in cotangent.items()}
            cot = {k: np.where(_wide(real, v), v, np.zeros(1, v.dtype)) for k, v in wide.items()}
        way = vmapped if self._maps(p, weights, rows) else sequential
        loss, d_weights, d_columns = way.backward(
            p, weights, _filled(rows), cot, share.astype(np.float32)
        )
        return loss, Tree(d_weights), Tree({k: Rows(v, first.n) for k, v in d_columns.items()})


def _wide(mask: Array, like: Array) -> Array:
    return mask.reshape(mask.shape + (1,) * (like.ndim - 2))


def _as_wide(rows: Rows, width: int) -> Array:
    """The values [D, width, ...]: columns of the same rows may be padded to different widths."""
    values = rows.values
    if values.shape[1] < width:
        values = np.pad(
            values, [(0, 0), (0, width - values.shape[1])] + [(0, 0)] * (values.ndim - 2)
        )
    return values[:, :width]


def _filled(rows: Mapping[str, Rows]) -> dict[str, Array]:
    """Columns as wide as the first, with each device's first row (or zero) as the padding.

    It may have held anything, and 0 * NaN is NaN, and a token out of range an error."""
    real = next(iter(rows.values())).mask()
    columns = {k: _as_wide(r, real.shape[1]) for k, r in rows.items()}
    if real.all():
        return columns
    out = {}
    for k, v in columns.items():
        head = np.where(_wide(real[:, :1], v), v[:, :1], np.zeros(1, v.dtype))
        out[k] = np.where(_wide(real, v), v, head)
    return out


def _convolves(module: nn.Module) -> bool:
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d)
    return any(isinstance(m, kinds) for m in module.modules())


def _unmappable(program: Program, trains: bool) -> str:
    """Batches are padded to be stacked, which a module that mixes their rows would see."""
    kinds = nn.modules.batchnorm._BatchNorm
    if trains and any(isinstance(m, kinds) for m in program.module.modules()):
        return "batch statistics change in training"
    return ""


def _probe(program: Program, weights: Tree, rows: Mapping[str, Rows], trains: bool) -> str:
    """Try two devices of three and two rows; what vmap says when it cannot is the reason."""
    heads = {
        k: v[:, :1]
        for k, v in _filled({k: Rows(r.values[:2], r.n[:2]) for k, r in rows.items()}).items()
    }
    few = {k: np.concatenate([v, v[::-1], v], axis=1) for k, v in heads.items()}
    two = Tree(
        {
            k: np.ascontiguousarray(np.broadcast_to(a[:1], (2, *a.shape[1:])))
            for k, a in weights.items()
        }
    )
    try:
        if not trains:
            a, b = vmapped.predict(program, two, few), sequential.predict(program, two, few)
        else:
            n, key = np.array([3, 2]), np.zeros(2, np.uint64)
            plan = schedule(key, n, 3, 1)
            one, other = (
                way.fit(
                    program,
                    two,
                    {k: Rows(v, n) for k, v in few.items()},
                    plan,
                    lr=0.1,
                    optimiser="sgd",
                    seeds=key,
                ).parameters
                for way in (vmapped, sequential)
            )
            a, b = dict(one), dict(other)
    except (RuntimeError, ValueError, NotImplementedError, TypeError, IndexError) as problem:
        lines = str(problem).strip().splitlines()
        return f"vmap cannot map it ({lines[0][:80] if lines else type(problem).__name__})"
    if not all(np.allclose(a[k], b[k], rtol=1e-3, atol=1e-5, equal_nan=True) for k in a):
        return "vmap gives other numbers"
    return ""


def thread_per_process() -> None:
    """One thread each: workers share the cores, and small products lose by splitting."""
    torch.set_num_threads(1)
