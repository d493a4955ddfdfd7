"""The three primitives of a program as ONNX graphs, for any number of rows.

Only operators of the standard set ai.onnx are used, so stock ONNX Runtime computes them, training
steps too: a step is an ordinary function of weights, rows and settings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value

from kitestring.core import Recipe, Rows
from kitestring.devices.fit.programs import Program
from kitestring.devices.runtime.graph import KEY, NEXT, About, Draw, Form, Leaf, Primitive
from kitestring.devices.runtime.graph import Graph as Graph
from kitestring.errors import ExportError, KitestringError
from kitestring.export import refusal
from kitestring.export.builder import OPSET, Builder, Value
from kitestring.export.descend import descend
from kitestring.export.lower import lower
from kitestring.export.operation import Unsupported, dtype_of
from kitestring.export.sizes import ROWS, Dim, Shape, Size
from kitestring.export.tracing import DRAWS, UNTRACEABLE, Traced, Uneven, confirm, refs, trace

Batch = Mapping[str, Tensor]


def predict_graph(program: Program, columns: Mapping[str, Rows]) -> Graph:
    """What `predict` gives. `columns` are examples of the rows' shapes and dtypes.

    Raises `ExportError` for what has no counterpart in ONNX."""
    source = _Source(program, columns, "predict")
    names: list[str] = []

    def outputs(w: Batch, rows: Batch) -> list[Tensor]:
        found = program.predict(functional_call(source.module, dict(w), (dict(rows),)), rows)
        names[:] = list(found)
        return list(found.values())

    b, made = Builder(built_in=True), dict[str, Leaf]()
    found, _ = source.lowered(b, outputs)
    for name, value in zip(names, found, strict=True):
        row = tuple(d for d in value.shape[1:] if isinstance(d, int))
        if value.shape[:1] != (ROWS,) or len(row) != value.rank - 1:
            raise ExportError(
                f"its output {name!r} is [{', '.join(map(str, value.shape))}]",
                f"program {program.name!r}", "Return one output for each row, [rows, ...]",
            )  # fmt: skip
        made[name] = Leaf(str(value.dtype), row)
    values = {f"out:{k}": v for k, v in zip(names, found, strict=True)}
    return source.graph(b, values, outputs=made)


def step_graph(
    program: Program,
    columns: Mapping[str, Rows],
    recipe: Recipe,
    centre: Sequence[str] = (),
    linear: Sequence[str] = (),
) -> Graph:
    """One minibatch step of `fit`: the gradient of the mean loss over the rows, then the optimiser.

    `centre` and `linear` name the weights that have one; no centre stands for the weights that the
    fit starts from. Only what the recipe names is built in, its numbers are inputs. Raises
    `ExportError` for what has no counterpart in ONNX, and for batch statistics."""
    source = _Source(program, columns, "step")
    source.need_loss()
    refusal.no_batch_statistics(program)
    chosen = source.trained(recipe.train)
    for kind, names in (("centre", centre), ("linear", linear)):
        if odd := sorted(set(names) - set(chosen)):
            where, mend = f"program {program.name!r}", f"Trained: {', '.join(chosen)}"
            raise ExportError(f"{kind} names {odd[0]!r}, which is not trained", where, mend)
    form = Form.of(recipe, chosen, tuple(centre) or chosen, tuple(linear))
    buffers = [k for k in source.weights if k in source.statistics]

    def slopes(w: Batch, rows: Batch) -> list[Tensor]:
        def loss(train: dict[str, Tensor], held: dict[str, Tensor]) -> Tensor:
            out = functional_call(source.module, {**held, **train}, (dict(rows),))
            return source.loss(out, rows).mean()

        train = {k: w[k] for k in chosen}
        held = {k: v for k, v in w.items() if k not in train}
        gradients, value = grad_and_value(loss)(train, held)
        return [value, *(gradients[k] for k in chosen), *(held[k] for k in buffers)]

    b = Builder()
    (loss, *found), draws = source.lowered(b, slopes)
    weights = {k: b.input(f"w:{k}", *source.weight(k)) for k in chosen}
    by = dict(zip(chosen, found, strict=False))
    for name, end in zip(buffers, found[len(chosen) :], strict=True):
        if end.name != f"w:{name}":
            refusal.statistics(program, name)
    after = {f"{NEXT}{name}": v for name, v in descend(b, form, weights, by).items()}
    values = {"loss": b.cast(loss, np.float32), **after}
    return source.graph(b, values, form=form, draws=tuple(draws))


def backward_graph(
    program: Program, columns: Mapping[str, Rows], cotangents: Sequence[str] = ()
) -> Graph:
    """The gradients of what `predict` computes, by the trained weights and by the float columns:
    of the loss, rows weighted by "share", or of the outputs named in `cotangents`.

    Raises `ExportError` for what has no counterpart in ONNX."""
    source = _Source(program, columns, "backward")
    if not cotangents:
        source.need_loss()
    chosen = program.chosen(("",))
    floats = [k for k, leaf in source.leaves.items() if np.dtype(leaf.dtype).kind == "f"]
    by = source.cotangents(cotangents)

    def slopes(w: Batch, rows: Batch) -> list[Tensor]:
        def total(train: dict[str, Tensor], moved: dict[str, Tensor]) -> Tensor:
            inside = {k: moved.get(k, v) for k, v in rows.items() if k in source.leaves}
            out = functional_call(source.module, {**w, **train}, (inside,))
            if cotangents:
                parts = [(out[k] * rows[f"by:{k}"]).sum() for k in cotangents]
                return torch.stack(parts).sum()
            return (source.loss(out, inside) * rows["share"]).sum()

        train = {k: w[k] for k in chosen}
        moved = {k: rows[k] for k in floats}
        (d_weights, d_columns), value = grad_and_value(total, argnums=(0, 1))(train, moved)
        return [value, *(d_weights[k] for k in chosen), *(d_columns[k] for k in floats)]

    b = Builder()
    extra = {f"by:{k}": leaf for k, leaf in by.items()} or {"share": Leaf("float32", ())}
    (loss, *found), _ = source.lowered(b, slopes, extra)
    names = [*(f"d:{k}" for k in chosen), *(f"dx:{k}" for k in floats)]
    values = {"loss": b.cast(loss, np.float32), **dict(zip(names, found, strict=True))}
    return source.graph(b, values, cotangents=by)


@dataclass(frozen=True)
class _Source:
    """A program with examples of its columns, on the way to a graph."""

    program: Program
    columns: Mapping[str, Rows]
    primitive: Primitive

    @cached_property
    def module(self) -> nn.Module:
        return self.program.training if self.primitive == "step" else self.program.evaluating

    @cached_property
    def leaves(self) -> dict[str, Leaf]:
        rows = {k: self.columns[k].row for k in sorted(self.columns)}
        return {k: Leaf(str(np.dtype(dtype)), tuple(shape)) for k, (shape, dtype) in rows.items()}

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """Of the weights and statistics, each once."""
        state = self.program.module.state_dict()
        return {k: state[k] for k in sorted(self.program.names) if k not in self.tied}

    @cached_property
    def statistics(self) -> set[str]:
        return {name for name, _ in self.program.module.named_buffers()}

    @cached_property
    def tied(self) -> dict[str, str]:
        """Second names of parameters and buffers -> the first."""
        module, first, found = self.program.module, dict[int, str](), dict[str, str]()
        named = (*module.named_parameters(remove_duplicate=False),
                 *module.named_buffers(remove_duplicate=False))  # fmt: skip
        for name, p in named:
            if (known := first.setdefault(id(p), name)) != name and name in self.program.names:
                found[name] = known
        return found

    def weight(self, name: str) -> tuple[Any, Shape]:
        tensor = self.weights[name]
        return dtype_of(tensor.dtype), tuple(tensor.shape)

    def loss(self, out: Batch, rows: Batch) -> Tensor:
        assert self.program.loss is not None
        return self.program.loss(out, rows)

    def need_loss(self) -> None:
        if self.program.loss is None:
            name = self.program.name
            mend = "Give it one, or export what it predicts"
            raise ExportError("has no loss to train with", f"program {name!r}", mend)

    def trained(self, prefixes: tuple[str, ...]) -> tuple[str, ...]:
        found = self.program.chosen(prefixes)
        if not found:
            known = ", ".join(self.program.chosen(("",))) or "none"
            what = f"train names {prefixes!r}, and no trainable weight begins so"
            raise ExportError(what, f"program {self.program.name!r}", f"Trainable: {known}")
        return found

    def cotangents(self, names: Sequence[str]) -> dict[str, Leaf]:
        if not names:
            return {}
        with torch.no_grad():
            try:
                out = self.module({k: v for k, v in self.examples(2, self.leaves).items()})
            except UNTRACEABLE as problem:
                raise self._refused(problem) from None
        if odd := [k for k in names if k not in out]:
            mend = f"Its outputs: {', '.join(out)}"
            raise ExportError(f"has no output {odd[0]!r}", f"program {self.program.name!r}", mend)
        return {
            k: Leaf(str(dtype_of(out[k].dtype)), tuple(out[k].shape[1:])) for k in sorted(names)
        }

    def examples(self, rows: int, leaves: Mapping[str, Leaf]) -> dict[str, Tensor]:
        shapes = {k: (rows, *leaf.shape) for k, leaf in leaves.items()}
        return {
            k: torch.from_numpy(np.zeros(shape, leaves[k].dtype)) for k, shape in shapes.items()
        }

    def lowered(
        self, b: Builder, f: Callable[[Batch, Batch], list[Tensor]],
        extra: Mapping[str, Leaf] | None = None,
    ) -> tuple[list[Value], list[Draw]]:  # fmt: skip
        """The values that `f` gives, of named weights and columns. `extra` are more columns,
        inputs under these names."""
        extra = extra or {}
        leaves = {**self.leaves, **extra}
        held, _ = list(self.weights), self.module  # copied before it is traced

        def flat(*tensors: Tensor) -> list[Tensor]:
            w = dict(zip(held, tensors, strict=False))
            return f(w, dict(zip(leaves, tensors[len(held) :], strict=True)))

        def inputs(rows: int) -> list[Tensor]:
            return [*self.weights.values(), *self.examples(rows, leaves).values()]

        try:
            traced = trace(flat, inputs)
            values = [b.input(f"w:{k}", *self.weight(k)) for k in held]
            for name, leaf in leaves.items():
                there = name if name in extra else f"x:{name}"
                values.append(b.input(there, np.dtype(leaf.dtype), (ROWS, *leaf.shape)))
            b.rows_of(values[_column(traced, len(held))])
            found, drawn = lower(b, traced, values)
            chances = [_chance(c.args[1]) for c in traced.calls.values() if c.name == DRAWS]
            confirm(traced, flat, inputs)
        except KitestringError:
            raise
        except (*UNTRACEABLE, Uneven, Unsupported) as problem:
            raise self._refused(problem) from None
        if drawn and self.primitive != "step":
            raise refusal.draws_anyway(self.program)
        draws = zip(chances, drawn, strict=True)
        return found, [Draw(p, tuple(_line(d) for d in v.shape)) for p, v in draws]

    def _refused(self, problem: Exception) -> ExportError:
        return refusal.refused(
            self.program, self.module, lambda rows: self.examples(rows, self.leaves), problem
        )

    def graph(self, b: Builder, values: Mapping[str, Value], **more: Any) -> Graph:
        read = b.needed(values)
        about = About(
            self.program.name, self.primitive, OPSET, self.program.flops(self.columns),
            {k: leaf for k, leaf in self.leaves.items() if f"x:{k}" in read},
            {k: Leaf(str(a.dtype), a.shape) for k, a in self.program.initial().items()},
            unused=tuple(k for k in self.weights if f"w:{k}" not in read),
            trainable=self.program.chosen(("",)), tied=self.tied, rounds=b.rounds, **more,
        )  # fmt: skip
        model = b.model(values, {KEY: about.encode()})
        return Graph(model.SerializeToString())


def _chance(p: Any) -> float:
    if not isinstance(p, int | float):
        raise Unsupported("bernoulli with a chance for each number")
    return float(p)


def _line(dim: Dim) -> tuple[int, int]:
    return (dim.each, dim.more) if isinstance(dim, Size) else (0, dim)


def _column(traced: Traced, weights: int) -> int:
    """The first column that anything reads; the first of all if none is."""
    used = {ref.at for c in traced.calls.values() for ref in refs([c.args, c.kwargs])}
    columns = [
        at for at, call in traced.calls.items() if call.name.startswith("input:") and at >= weights
    ]
    return next((at for at in columns if at in used), columns[0])
