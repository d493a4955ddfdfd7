"""The training of many devices, one after the other, as one native function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch.fx import GraphModule

from kitestring.devices.fit.compiled import trace
from kitestring.devices.fit.compiled.build import Builder, Native, compiled, step_function
from kitestring.devices.fit.compiled.draws import check
from kitestring.devices.fit.compiled.drive import drive
from kitestring.devices.fit.compiled.kernels import Table, add_rows, pointwise
from kitestring.devices.fit.compiled.layout import HYPER, Kind, Layout
from kitestring.devices.fit.compiled.lower import lower
from kitestring.devices.fit.compiled.lowering import Lowering, Product, RowsAdded
from kitestring.devices.fit.compiled.memory import place
from kitestring.devices.fit.compiled.product import product
from kitestring.devices.fit.compiled.tensors import (
    column_views,
    sample,
    weight_shapes,
    weight_views,
)
from kitestring.devices.fit.compiled.views import Buffer, Expr, View, leaves, plain
from kitestring.devices.fit.programs import Program

LARGE = 16_384  # floats of an embedding from which only the rows that are touched are fetched


@dataclass(frozen=True)
class Trainer:
    native: Native
    layout: Layout
    wrong: Buffer  # 1 where a row's number was out of range


def trainer(program: Program, kind: Kind) -> Trainer:
    """Raises `Refused` where the program holds what there is no code for."""
    shapes, state = weight_shapes(program)
    batch = {**sample(kind.columns, kind.batch), "share": torch.ones(kind.batch)}
    traced, names = trace.step(program, state, kind.trained, batch)
    tables = _lookups(traced, shapes) & kind.trained if kind.simple and kind.shared else set()
    made = _lowered(traced, names, kind, shapes, tables)
    if made is None:  # an embedding that is more than looked up
        made = _lowered(traced, names, kind, shapes, set())
    assert made is not None
    low, layout = made
    wrong = low.wrong.buffer
    assert wrong is not None
    for view, _ in low.draws:
        check(view, kind.batch)
    drawn = [view.buffer for view, _ in low.draws if view.buffer]
    size = place([*layout.buffers, wrong, *drawn], low.kernels)
    builder = Builder()
    drive(builder, step_function(builder, low.kernels), layout, low.draws)
    return Trainer(compiled(builder, size, low.constants), layout, wrong)


def _lookups(traced: GraphModule, shapes: Mapping[str, tuple[int, ...]]) -> set[str]:
    """Large weights that are read by one embedding only."""
    inputs = [n for n in traced.graph.nodes if n.op == "placeholder"]
    found = set()
    for name, node in zip(sorted(shapes), inputs, strict=False):
        users = list(node.users)
        once = len(users) == 1 and str(users[0].target) == "aten.embedding.default"
        if once and users[0].args[0] is node and prod(shapes[name]) >= LARGE:
            found.add(name)
    return found


def _lowered(
    traced: GraphModule, names: Sequence[str], kind: Kind, shapes: Mapping[str, tuple[int, ...]],
    looked_up: set[str],
) -> tuple[Lowering, Layout] | None:  # fmt: skip
    layout = _layout(kind, shapes, looked_up)
    share, hyper = plain(layout.share, (kind.batch,)), plain(layout.hyper, (len(HYPER),))
    every = {**layout.columns, "share": share}
    inputs = [layout.views[k] for k in sorted(shapes)] + [every[k] for k in sorted(every)]
    tables = {t.rows.buffer: t for t in layout.tables.values() if t.rows.buffer}
    low, (loss, *slopes) = lower(traced, inputs, late=True, tables=tables)
    by_name = dict(zip(names, slopes, strict=True))
    if not all(isinstance(by_name[name], RowsAdded) for name in looked_up):
        return None
    low.put(pointwise(plain(layout.loss, ()), low.view(loss)))
    if kind.simple:
        _grow(low, layout, by_name, hyper)
    else:
        aims = weight_views(shapes, layout.trained, layout.extra["gradient"])
        for name, slope in by_name.items():
            _into(low, aims[name], slope)
    return low, layout


def _layout(kind: Kind, shapes: Mapping[str, tuple[int, ...]], looked_up: set[str]) -> Layout:
    trained = sorted(kind.trained)
    held = sorted(set(shapes) - kind.trained)
    lying = [name for name in (*trained, *held) if name not in looked_up]
    weights = Buffer("weights", "f32", sum(prod(shapes[k]) for k in lying), fixed=True)
    views = weight_views(shapes, lying, weights)
    tables = {name: _table(shapes[name]) for name in sorted(looked_up)}
    size = sum(prod(shapes[k]) for k in trained if k not in looked_up)
    extra = () if kind.simple else ("gradient", "first", "second", "centre", "linear")
    return Layout(
        kind=kind,
        weights=weights,
        views={**views, **{name: table.rows for name, table in tables.items()}},
        trained=trained,
        held=held,
        tables=tables,
        columns=column_views(kind.columns, kind.batch),
        share=Buffer("share", "f32", kind.batch, fixed=True),
        hyper=Buffer("hyper", "f32", len(HYPER), fixed=True),
        loss=Buffer("loss", "f32", 1, fixed=True),
        extra={name: Buffer(name, "f32", size, fixed=True) for name in extra},
        trained_size=size,
    )


def _table(shape: tuple[int, ...]) -> Table:
    def own(name: str, dtype: str, shape: tuple[int, ...]) -> View:
        return plain(Buffer(name, dtype, prod(shape), fixed=True), shape)

    rows = shape[:1]
    return Table(
        own("table", "f32", shape), own("stamps", "i64", rows), own("touched", "i64", rows),
        own("state", "i64", (3,)),
    )  # fmt: skip


def _grow(low: Lowering, layout: Layout, slopes: Mapping[str, Any], hyper: View) -> None:
    """Weights grow by -lr times their gradients, in place, once all gradients are known."""
    less = hyper.select(0, HYPER.index("less"))
    ready = {}
    for name, slope in slopes.items():
        if not isinstance(slope, Product | RowsAdded):
            own = any(v.buffer is layout.weights for v in leaves(slope))
            if isinstance(slope, Expr) or own:
                slope = low.view(Expr("add", (slope, 0.0), "f32", slope.shape))
        ready[name] = slope
    for name, slope in ready.items():
        weight = layout.views[name]
        if isinstance(slope, Product):
            low.put(product(weight, slope.a, slope.b, weight, less))
        elif isinstance(slope, RowsAdded):
            low.put(add_rows(weight, slope.ids, slope.rows, low.wrong, less))
        else:
            step = Expr("mul", (slope, less.expand(slope.shape)), "f32", slope.shape)
            low.put(pointwise(weight, Expr("add", (weight, step), "f32", slope.shape)))


def _into(low: Lowering, aim: View, slope: Any) -> None:
    if isinstance(slope, Product):
        low.put(product(aim, slope.a, slope.b))
    else:
        low.put(pointwise(aim, low.view(slope)))
