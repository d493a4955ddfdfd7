"""The three primitives with exported graphs in stock ONNX Runtime: numpy, and no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kitestring.core import Array, Fit, Recipe, Rows, Tree
from kitestring.devices.recipes import check
from kitestring.devices.runtime.graph import About, Form, Graph
from kitestring.devices.runtime.session import CPU, Session, Steps, checked
from kitestring.devices.schedule import schedule
from kitestring.errors import PackageError, TaskError, unknown

_BLOCK = 512  # rows predicted at a time


class OrtCompute:
    """`graphs`: serialised models by any name; each says itself what it computes. `initial`: the
    weights that programs are delivered with. `providers`: ONNX Runtime's, the first one that can
    compute an operator does. Devices are computed one after the other: a real one is alone.

    Weights that nobody can write to, as those of `frozen`, do not change: where they come to
    `predict` a second time, they are built into its graph."""

    concurrent = True  # several threads may call at once: what a call changes is its own

    def __init__(
        self,
        graphs: Mapping[str, bytes],
        initial: Mapping[str, Tree],
        threads: int = 1,
        providers: Sequence[str] = CPU,
    ) -> None:
        """Raises `PackageError` for what is no graph of ours and `SettingError` for a provider
        that is not there."""
        known = checked(providers)
        self._graphs = [Session(Graph(model), threads, known) for model in graphs.values()]
        self._initial = dict(initial)
        self._settled: dict[int, _Settled] = {}

    def initial(self, program: str) -> Tree:
        """Without a device axis."""
        if program not in self._initial:
            raise unknown("program", program, self._initial)
        return Tree({k: np.array(a) for k, a in self._initial[program].items()})

    def flops(self, program: str, columns: Mapping[str, Rows]) -> float:
        """Of one forward pass over one row, as counted when the program was exported."""
        return self._find("a graph", program, columns, lambda about: True).about.flops

    def predict(self, program: str, weights: Tree, inputs: Mapping[str, Rows]) -> Tree:
        session = self._find("predict", program, inputs, lambda a: a.primitive == "predict")
        about, built_in = session.about, self._built_in(session, weights)
        if built_in is None:
            _check_weights(about, weights)
        first = next(iter(inputs.values()))
        devices, width = first.shape[:2]

        def run(d: int, at: int, n: int) -> Iterator[tuple[str, Array]]:
            given = _weights(about, weights, d) if built_in is None else {}
            given |= {f"x:{k}": _own(inputs[k], d, n)[at : at + _BLOCK] for k in about.columns}
            for name, out in (built_in or session).run(given).items():
                yield name.removeprefix("out:"), out

        if devices == 1 and first.n[0] == width <= _BLOCK:
            return Tree({name: Rows(out[None], first.n) for name, out in run(0, 0, width)})
        made = {
            k: np.zeros((devices, width, *leaf.shape), leaf.dtype)
            for k, leaf in about.outputs.items()
        }
        for d, n in enumerate(first.n.tolist()):
            for at in range(0, n, _BLOCK):
                for name, out in run(d, at, n):
                    made[name][d, at : at + _BLOCK][: len(out)] = out
        return Tree({k: Rows(v, first.n) for k, v in made.items()})

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
        """`key` [D] draws the batches, and what dropout keeps."""
        trainable = self._trainable(program, rows)
        trained = check(program, trainable, weights, rows, recipe, centre, linear)
        towards = Tree({k: weights[k] for k in trained}) if centre is None else centre
        pushed = Tree() if linear is None else linear
        form = Form.of(recipe, trained, towards, pushed)
        session = self._find(f"fit ({form})", program, rows, lambda a: a.form == form)
        about = session.about
        _check_weights(about, weights)
        n = next(iter(rows.values())).n
        plan = schedule(key, n, recipe.batch, recipe.epochs, recipe.shuffle)
        ends = {k: np.array(weights[k]) for k in trained}
        losses = np.zeros(len(n), np.float32)
        terms = {f"centre:{k}": towards[k] for k in form.centre}
        terms |= {f"linear:{k}": pushed[k] for k in form.linear}
        for d, steps in enumerate(plan.steps.tolist()):
            if steps:
                own = {k: _typed(about, k, v[d]) for k, v in terms.items()}
                fixed = {**_weights(about, weights, d), **_settings(form, recipe), **own}
                columns = {f"x:{k}": _own(rows[k], d, int(n[d])) for k in about.columns}
                run = Steps(session, fixed, columns, key[d : d + 1])
                losses[d] = run.run(plan.index[d, :steps], plan.real[d, :steps].sum(-1).tolist())
                for k in trained:
                    ends[k][d] = run.now(f"w:{k}")
        second = {k: ends[first] for k, first in about.tied.items() if first in ends}
        mean = losses / np.maximum(1, plan.steps).astype(np.float32)
        return Fit(Tree({**weights, **ends, **second}), mean, plan.steps)

    def backward(
        self,
        program: str,
        weights: Tree,
        rows: Mapping[str, Rows],
        *,
        cotangent: Mapping[str, Rows] | None = None,
        row_weights: Array | None = None,
    ) -> tuple[Array, Tree, Tree]:
        by = set(cotangent or ())
        session = self._find(
            f"backward by {', '.join(sorted(by))}" if by else "backward", program, rows,
            lambda a: a.primitive == "backward" and set(a.cotangents) == by,
        )  # fmt: skip
        about = session.about
        _check_weights(about, weights)
        first = next(iter(rows.values()))
        devices, width = len(first.n), first.shape[1]
        loss = np.zeros(devices, np.float32)
        slopes = {k: np.zeros((devices, *about.weights[k].shape), about.weights[k].dtype)
                  for k in about.trainable}  # fmt: skip
        back = {
            k: np.zeros((devices, width, *r.row[0]), r.row[1])
            for k, r in rows.items() if np.dtype(r.row[1]).kind == "f"
        }  # fmt: skip
        for d, n in enumerate(first.n.tolist()):
            if not n:
                continue
            given = _weights(about, weights, d)
            given |= {f"x:{k}": _own(rows[k], d, n) for k in about.columns}
            given |= {f"by:{k}": _own(r, d, n) for k, r in (cotangent or {}).items()}
            share = np.ones(n) if row_weights is None else np.asarray(row_weights)[d, :n]
            given["share"] = share.astype(np.float32)
            out = session.run(given)
            loss[d] = out["loss"]
            for k, a in slopes.items():
                a[d] = out[f"d:{k}"]
            for k, a in back.items():
                if f"dx:{k}" in out:
                    a[d, :n] = out[f"dx:{k}"]
        return loss, Tree(slopes), Tree({k: Rows(v, first.n) for k, v in back.items()})

    def _built_in(self, session: Session, weights: Tree) -> Session | None:
        """The graph with one device's weights built in, from the second time on that they come and
        where nobody can write to them."""
        known = self._settled.get(id(session))
        if known is None or not known.same(weights):
            if all(len(a) == 1 and _fixed(a) for a in weights.values()):
                self._settled[id(session)] = _Settled(Tree(weights))
            return None
        if known.session is None:
            _check_weights(session.about, weights)
            known.session = session.settled(_weights(session.about, weights, 0))
        return known.session

    def _trainable(self, program: str, rows: Mapping[str, Rows]) -> tuple[str, ...]:
        of_it = [g.about for g in self._graphs if g.about.program == program]
        return (of_it or [self._find("fit", program, rows, lambda a: True).about])[0].trainable

    def _find(
        self, what: str, program: str, columns: Mapping[str, Rows], fits: Callable[[About], bool]
    ) -> Session:
        of_it = [g for g in self._graphs if g.about.program == program]
        for graph in of_it:
            if fits(graph.about) and graph.about.reads(columns):
                return graph
        on = ", ".join(f"{k} {r.row[1]}{list(r.row[0])}" for k, r in columns.items())
        there = "; ".join(g.about.label for g in of_it)
        others = sorted({g.about.program for g in self._graphs})
        raise PackageError(
            f"no graph for {what} of {program!r} on {on}", "device runtime",
            f"There is: {there}" if there else f"There are programs: {', '.join(others) or 'none'}",
        )  # fmt: skip


@dataclass
class _Settled:
    """Weights that came last: kept, so that nothing else comes to lie where they do."""

    weights: Tree
    session: Session | None = None

    def same(self, weights: Tree) -> bool:
        """The same memory under the same names."""
        if weights.keys() != self.weights.keys():
            return False
        pairs = [(weights[k], kept) for k, kept in self.weights.items()]
        return all(_place(a) == _place(kept) for a, kept in pairs if a is not kept)


def _fixed(a: Array | None) -> bool:
    """Whether nobody can write to its memory, not by another name either."""
    while isinstance(a, np.ndarray):
        if a.flags.writeable:
            return False
        a = a.base
    return a is None


def _place(a: Array) -> tuple[int, tuple[int, ...], str]:
    return a.__array_interface__["data"][0], a.shape, a.dtype.str


def _check_weights(about: About, weights: Tree) -> None:
    """All of the program's, in their shapes: what is left out would be another device's."""
    where = f"program {about.program!r}"
    if odd := sorted(weights.keys() ^ about.weights.keys()):
        what = "is not given" if odd[0] in about.weights else "does not take"
        raise TaskError(f"{where} {what} the weight {odd[0]!r}")
    for name, leaf in about.weights.items():
        if weights[name].shape[1:] != leaf.shape:
            mend = f"Give {list(leaf.shape)}, or export it for this shape"
            raise TaskError(f"the weight {name!r} is {list(weights[name].shape[1:])}", where, mend)


def _weights(about: About, weights: Tree, d: int) -> dict[str, Array]:
    """Those of device d, by their inputs' names."""
    return {
        f"w:{k}": np.ascontiguousarray(weights[k][d], leaf.dtype).reshape(leaf.shape)
        for k, leaf in about.weights.items() if k not in about.tied
    }  # fmt: skip


def _typed(about: About, term: str, leaf: Array) -> Array:
    """In the dtype of its weight."""
    return np.ascontiguousarray(leaf, about.weights[term.partition(":")[2]].dtype)


def _settings(form: Form, recipe: Recipe) -> dict[str, Array]:
    named = [k for k in form.scalars if k != "step"]
    return {k: np.array(getattr(recipe, k), np.float32) for k in named}


def _own(rows: Rows, d: int, n: int) -> Array:
    """The `n` real rows of device d."""
    flat, start = rows.flat
    return flat[start[d] : start[d] + n]
