"""The three primitives with torch, and the choice of how to compute them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Literal, TypeVar, get_args

import numpy as np
import torch
from torch import nn

from kitestring.core import Array, Fit, Recipe, Rows, Tree
from kitestring.devices.fit import check_native, sequential, vmapped
from kitestring.devices.fit.check_native import native, shared
from kitestring.devices.fit.compiled.views import Refused
from kitestring.devices.fit.programs import CPU, Precision, Program
from kitestring.devices.fit.recipes import check
from kitestring.devices.fit.stopwatch import Stopwatch
from kitestring.devices.schedule import schedule
from kitestring.errors import SettingError, unknown

How = Literal["auto", "compiled", "sequential", "vmap"]
# Operations a row from which layers are left one by one. Grouped convolutions still won narrowly
# at 2e6 and lost at 7e6 (benchmarks/convolutions.py); where little is won, the reference is taken.
# GRUs won at 8e6 and lost at 3e7; LSTMs, which are one operation on the CPU, never won.
_HEAVY: dict[tuple[type[nn.Module], ...], float] = {
    (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d): 1e6,
    (nn.LSTM,): 0,
    (nn.RNN, nn.GRU): 2e7,
}
_SLICE = 512  # rows of one model predicted at a time
T = TypeVar("T")


class TorchCompute:
    """`how`: "auto" takes compiled code where there is some, then vmap where a module can be
    mapped and that is faster, then one device after the other. "compiled" does without vmap.
    `device`: the torch device to compute on, as in "cuda"; what goes in and out are arrays.
    `precision`: "bfloat16" rounds what goes into products in `fit` and `backward`, one device after
    the other; weights, their gradients and the optimiser's memory stay float32. `predict` is
    float32 in any case: training is what costs, and a score is then of the weights alone."""

    concurrent = True  # several threads may call at once: modules and memory are each one's own

    def __init__(
        self,
        programs: Mapping[str, Program],
        how: How = "auto",
        like: TorchCompute | None = None,
        device: str = "cpu",
        precision: Precision = "float32",
    ) -> None:
        """`like`: of the same programs with other initial weights; what it has compiled and
        tried serves here too."""
        self.how, self.device, self.precision = how, usable(device), known(precision)
        self.used: dict[tuple[str, str], str] = {}  # (program, verb) -> how; callers may clear it
        self.preparing = Stopwatch()  # while code is made, and ways are tried
        self._initial = {name: p.initial() for name, p in programs.items()}
        compiles = how in ("auto", "compiled") and self.device == CPU
        self._code = native(self.preparing) if compiles else None
        self._maps_it: dict[tuple[str, bool], str] = {}
        self._tried: dict[tuple[str, str, int], str] = {}
        self.programs = {name: p.on(self.device, precision) for name, p in programs.items()}
        mine = (how, self.device, precision)
        if like is not None and (like.how, like.device, like.precision) == mine:
            shared = programs.keys() & like.programs.keys()
            if all(programs[name].resembles(like.programs[name]) for name in shared):
                self.programs |= {name: like.programs[name] for name in shared}
                self._code, self._maps_it, self._tried = like._code, like._maps_it, like._tried
                self.preparing = like.preparing

    def program(self, name: str) -> Program:
        if name not in self.programs:
            raise unknown("program", name, self.programs)
        return self.programs[name]

    def initial(self, program: str) -> Tree:
        """Without a device axis."""
        self.program(program)
        return Tree({name: a.copy() for name, a in self._initial[program].items()})

    def flops(self, program: str, columns: Mapping[str, Rows]) -> float:
        """Of one forward pass over one row."""
        return self.program(program).flops(columns)

    def explain(self, program: str) -> str:
        """How it was computed, and why not otherwise: "compiled", "vmap: ...", "sequential: ...";
        by verb where those differ."""
        ways = {verb: way for (name, verb), way in sorted(self.used.items()) if name == program}
        if len(set(ways.values())) == 1:
            return next(iter(ways.values()))
        return ", ".join(f"{verb} {way}" for verb, way in ways.items()) or "not at all"

    def explain_all(self) -> str:
        """The same for all programs that were used: one word where all are compiled."""
        names = sorted({name for name, _ in self.used})
        rest = [f"{n} {how}" for n in names if (how := self.explain(n)) != "compiled"]
        return "; ".join(rest) or ("compiled" if self.used else "not at all")

    def _native(
        self, p: Program, verb: str, rows: int, agrees: Callable[[], str], run: Callable[[], T]
    ) -> T | None:
        """What compiled code gives; None where there is none. On its first use for batches of
        that many rows it is compared with one device after the other."""
        why = ""
        if self._rounds(verb):
            return None
        if self.how in ("auto", "compiled"):
            cpu = self.device == CPU
            why = "llvmlite is not installed" if cpu else "compiled code is for the CPU"
        if self._code is not None:
            key = (p.name, verb, rows)
            try:
                if key not in self._tried:
                    with self.preparing:
                        self._tried[key] = agrees()
                why = self._tried[key]
                if not why:
                    found = run()
                    self.used[p.name, verb] = "compiled"
                    return found
            except Refused as reason:
                why = str(reason)
        self.used[p.name, verb] = why
        return None

    def _rounds(self, verb: str) -> bool:
        return self.precision == "bfloat16" and verb != "predict"

    def _way(
        self, p: Program, verb: str, weights: Tree, rows: Mapping[str, Rows], trains: bool = False
    ) -> ModuleType:
        """vmap or sequential, for what is not compiled."""
        if self._rounds(verb):  # torch cannot map all of it: the slope of a LayerNorm, for one
            self._say(p, verb, "sequential", "bfloat16 products")
            return sequential
        not_compiled, one = self.used[p.name, verb], len(next(iter(rows.values())).n) == 1
        key = (p.name, trains)
        if not one and key not in self._maps_it:
            with self.preparing:
                self._maps_it[key] = self._why_not(p, weights, rows, trains)
        why = "one model" if one else self._maps_it[key]
        told = "" if why == "one model" else why
        self._say(p, verb, "sequential" if why else "vmap", not_compiled, told)
        return sequential if why else vmapped

    def _say(self, p: Program, verb: str, way: str, *reasons: str) -> None:
        told = ", and ".join(dict.fromkeys(r for r in reasons if r))
        self.used[p.name, verb] = f"{way}: {told}" if told else way

    def _why_not(
        self, program: Program, weights: Tree, rows: Mapping[str, Rows], trains: bool
    ) -> str:
        """What keeps devices from being computed all at once; nothing does if empty."""
        if self.how in ("sequential", "compiled"):
            return "as asked" if self.how == "sequential" else "vmap was not asked for"
        if self.how == "auto" and self.device == CPU and _heavy(program, rows):
            return "layers of this size are faster so"
        return _unmappable(program, trains) or _probe(program, weights, rows, trains)

    def predict(self, program: str, weights: Tree, inputs: Mapping[str, Rows]) -> Tree:
        p, first = self.program(program), next(iter(inputs.values()))
        p.check(weights)

        together = shared(weights)
        size = check_native.block(first.n, together)
        found = self._native(
            p, "predict", size,
            lambda: check_native.predict(self._code, p, weights, inputs, size),
            lambda: self._code.predict(p, weights, inputs, size),  # type: ignore[union-attr]
        )  # fmt: skip
        if found is None and together:
            self._say(p, "predict", "sequential", self.used[p.name, "predict"])
            found = self._predict_shared(p, weights, inputs)
        elif found is None:
            way = self._way(p, "predict", weights, inputs)
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
        recipe: Recipe,
        *,
        centre: Tree | None = None,
        linear: Tree | None = None,
        key: Array,
    ) -> Fit:
        """`key` [D] draws the batches."""
        p, n = self.program(program), next(iter(rows.values())).n
        check(p, weights, rows, recipe, centre, linear)
        found = self._native(
            p, "fit", check_native.batch(n, recipe.batch),
            lambda: check_native.fit(self._code, p, weights, rows, recipe),
            lambda: self._code.fit(  # type: ignore[union-attr]
                p, weights, rows, recipe, centre=centre, linear=linear, seeds=key
            ),
        )  # fmt: skip
        if found is not None:
            return found
        plan = schedule(key, n, recipe.batch, recipe.epochs, recipe.shuffle)
        way = self._way(p, "fit", weights, rows, trains=True)
        return way.fit(  # type: ignore[no-any-return]
            p, weights, rows, plan, recipe, centre=centre, linear=linear, seeds=key
        )

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
        share = share.astype(np.float32)
        size = check_native.block(first.n)
        found = self._native(
            p, "backward", size,
            lambda: check_native.backward(self._code, p, weights, rows, cotangent, size),
            lambda: self._code.backward(  # type: ignore[union-attr]
                p, weights, rows, cotangent, Rows(share, first.n), size
            ),
        )  # fmt: skip
        if found is None:
            cot = None
            if cotangent is not None:
                wide = {k: _as_wide(r, real.shape[1]) for k, r in cotangent.items()}
                cot = {
                    k: np.where(_wide(real, v), v, np.zeros(1, v.dtype)) for k, v in wide.items()
                }
            way = self._way(p, "backward", weights, rows)
            found = way.backward(p, weights, _filled(rows), cot, share)
        loss, d_weights, d_columns = found
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


def _heads(rows: Rows) -> Array:
    """The first row of two devices, [2, 1, ...]; zero where there is none."""
    (flat, start), (shape, dtype) = rows.flat, rows.row
    heads = np.zeros((2, 1, *shape), dtype)
    for d in range(2):
        if rows.n[d]:
            heads[d, 0] = flat[start[d]]
    return heads


def _heavy(program: Program, rows: Mapping[str, Rows]) -> bool:
    limits = [
        limit
        for kinds, limit in _HEAVY.items()
        if any(isinstance(m, kinds) for m in program.module.modules())
    ]
    return bool(limits) and program.flops(rows) > min(limits)


def _unmappable(program: Program, trains: bool) -> str:
    """Batches are padded to be stacked, which a module that mixes their rows would see."""
    kinds = nn.modules.batchnorm._BatchNorm
    if trains and any(isinstance(m, kinds) for m in program.module.modules()):
        return "batch statistics change in training"
    return ""


def _probe(program: Program, weights: Tree, rows: Mapping[str, Rows], trains: bool) -> str:
    """Try two devices of three and two rows; what vmap says when it cannot is the reason."""
    heads = {k: _heads(r) for k, r in rows.items()}
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
            n, key, recipe = np.array([3, 2]), np.zeros(2, np.uint64), Recipe(0.1, batch=3)
            little = {k: Rows(v, n) for k, v in few.items()}
            plan = schedule(key, n, recipe.batch, recipe.epochs)
            one, other = (
                way.fit(program, two, little, plan, recipe, seeds=key).parameters
                for way in (vmapped, sequential)
            )
            a, b = dict(one), dict(other)
    except (RuntimeError, ValueError, NotImplementedError, TypeError, IndexError) as problem:
        lines = str(problem).strip().splitlines()
        return f"vmap cannot map it ({lines[0][:80] if lines else type(problem).__name__})"
    if not all(np.allclose(a[k], b[k], rtol=1e-3, atol=1e-5, equal_nan=True) for k in a):
        return "vmap gives other numbers"
    return ""


def known(precision: Precision) -> Precision:
    if precision not in get_args(Precision):
        raise unknown("precision", precision, get_args(Precision))
    return precision


def usable(name: str) -> torch.device:
    """The torch device of that name, tried: a number must go there and come back."""
    try:
        there = torch.zeros(1, device=name)
        there.cpu()
    except (RuntimeError, AssertionError, ImportError):  # torch has one for each kind of device
        bare = name.partition(":")[0] == "cuda" and not torch.cuda.is_available()
        raise SettingError(
            f"torch has no {'CUDA device' if bare else 'such device'} here", f"device {name!r}",
            "Leave --device out, or "
            + ("install a CUDA build of torch" if bare else "name one that it has, such as cuda:0"),
        ) from None  # fmt: skip
    if there.device.type == "cuda":
        # By default convolutions are rounded to ten bits there: ways would differ by more than
        # float error.
        torch.backends.cudnn.allow_tf32 = False
    return CPU if there.device.type == "cpu" else there.device


def thread_per_process() -> None:
    """One thread each: workers share the cores, and small products lose by splitting."""
    torch.set_num_threads(1)
