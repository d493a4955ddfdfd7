"""Golden outputs find a runtime that computes something else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import tiny
from kitestring.core import Recipe, Tree
from kitestring.devices.runtime import golden
from kitestring.devices.runtime.compute import OrtCompute
from kitestring.devices.runtime.golden import Golden
from kitestring.errors import PackageError
from kitestring.export.graphs import predict_graph, step_graph
from kitestring.pack.build import _golden
from kitestring.package.record import Call

ROWS = tiny.population().rows(np.array([0]), "train")


def fit() -> tuple[Golden, OrtCompute]:
    """With a pull to a centre and a linear term."""
    compute = tiny.compute("classes", "sequential")
    first = compute.initial("small")
    call = Call("fit", "small", ROWS, Recipe(0.1, mu=0.5), tuple(first), tuple(first)[:1])
    assert call.recipe is not None
    graph = step_graph(
        compute.program("small"), ROWS, call.recipe, centre=call.centre, linear=call.linear
    )
    return _golden(compute, call), OrtCompute({"fit": graph.model}, {"small": first})


def test_the_terms_of_a_step_are_among_what_is_checked() -> None:
    made, ort = fit()
    (checked,) = golden.check([made], ort)
    assert checked.error < checked.tolerance / 100


@pytest.mark.parametrize("term", ["centre", "linear"])
def test_a_term_that_is_taken_otherwise_is_found(
    term: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, ort = fit()
    right = ort.fit

    def wrong(*args: Any, **how: Any) -> Any:
        return right(*args, **{**how, term: Tree({k: a * 2 for k, a in how[term].items()})})

    monkeypatch.setattr(ort, "fit", wrong)
    with pytest.raises(PackageError, match="fit of small does not give its golden outputs"):
        golden.check([made], ort)


def test_the_graph_with_its_weights_built_in_is_checked_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A runtime may fold what it knows in another way."""
    compute = tiny.compute("classes", "sequential")
    rows = {"x": ROWS["x"]}
    graph = predict_graph(compute.program("small.answer"), rows)
    first = compute.initial("small.answer")
    ort = OrtCompute({"predict": graph.model}, {"small.answer": first})
    made = _golden(compute, Call("predict", "small.answer", rows))
    golden.check([made], ort)
    (kept,) = ort._settled.values()
    assert kept.session is not None
    ort = OrtCompute({"predict": graph.model}, {"small.answer": first})
    right = ort._built_in

    def wrong(session: Any, weights: Tree) -> Any:
        found = right(session, weights)
        return found and session.settled({f"w:{k}": a[0] * 2 for k, a in weights.items()})

    monkeypatch.setattr(ort, "_built_in", wrong)
    with pytest.raises(PackageError, match=r"predict of small\.answer does not give"):
        golden.check([made], ort)
