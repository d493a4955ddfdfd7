"""Recorded plans: what code did with arrays, and nothing else, on any number of rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import tiny
from kitestring.core import Recipe, Rows, Tree
from kitestring.devices.session import DeviceSession
from kitestring.errors import PackageError, TaskError
from kitestring.pack.recording import plans
from kitestring.pack.rehearse import apart, rehearse
from kitestring.pack.schema import draw, schema
from kitestring.package import plan as language
from kitestring.package.plan import OPERATIONS, PRIMITIVES, Plan, Step, decode, encode, run
from kitestring.package.record import record

WORDS = st.text(max_size=3)
COLUMNS = schema(tiny.task("classes"))
CASES = [(kind, name) for kind in tiny.KINDS for name in tiny.METHODS if tiny.fits(name, kind)]


def session(rows: int, kind: str = "classes", device: int = 0) -> DeviceSession:
    own = draw(COLUMNS if kind == "classes" else schema(tiny.task(kind)), rows, device, "test")
    return DeviceSession(tiny.compute(kind), np.array([device]), 0, 1, own, Tree(k=np.ones((1, 2))))


def recorded(code: Callable[[Any, Any], Any], counts: tuple[int, ...] = (9, 4, 6)) -> Plan:
    sessions = [session(n) for n in counts]
    plan, _ = record("test", code, sessions, [{"a": np.full((1, 3), float(n))} for n in counts])
    return decode(json.loads(json.dumps(encode(plan))))


def ran(plan: Plan, rows: int) -> Any:
    here = session(rows)
    return run(
        plan, {"a": np.full((1, 3), float(rows)), "own": Tree(here.data), "private": {}}, here
    )


def test_arithmetic_by_hand() -> None:
    """(3 + 1) * 2 where the mask is set, by a code of four steps; dtypes as numpy has them."""
    plan = recorded(lambda g, d: {"b": np.where(g["a"] > 5, (g["a"] + 1) * 2, np.float32(0))})
    assert [s.op for s in plan.steps] == ["greater", "add", "multiply", "where"]
    assert ran(plan, 3)["b"].tolist() == [[0, 0, 0]]
    assert ran(plan, 7)["b"].tolist() == [[16, 16, 16]]
    assert ran(plan, 7)["b"].dtype == np.float64


@settings(deadline=None, max_examples=40)
@example(rows=15, batch=1, share=0.125)  # as many are kept of 9, 4 and 6 rows, and more of 15
@given(rows=st.integers(1, 40), batch=st.integers(1, 12), share=st.floats(0, 1))
def test_rows_of_any_number(rows: int, batch: int, share: float) -> None:
    """A plan from 9, 4 and 6 rows is the code, for every number of them."""

    def code(given: Any, devices: Any) -> Any:
        x, y = devices.data["x"], devices.data["y"]
        chosen = devices.uniform("some", x.values.shape[1]) < share
        kept = x.keep(chosen)
        size = np.minimum(x.n, batch)
        counts = np.arange(batch) < size[:, None]
        order = np.argsort(np.where(x.mask(), devices.uniform("order", x.shape[1]), 2), axis=1)
        at = np.take_along_axis(order, np.where(counts, np.arange(batch), 0), 1)
        flat = x.values.reshape(*x.values.shape[:2], -1)
        return {
            "kept": kept, "both": kept.concat(x), "batch": y.take(at, size),
            "mean": flat.sum(1) / x.n[:, None], "n": len(x.n) * x.values.shape[1],
        }  # fmt: skip

    plan, here = recorded(code), session(rows)
    assert apart(code({}, here), ran(plan, rows)) == 0


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_every_collaboration(kind: str, name: str) -> None:
    """Recorded from three devices; all twelve of the rehearsal, of 1 to 30 rows, come out of the
    plan to the bit (`plans` raises otherwise). Its calls are all that its device half may do."""
    task = tiny.task(kind)
    collaboration = tiny.collaboration(name)
    pool = bool(task.users.pool)
    found = rehearse(collaboration, schema(task), tiny.compute(kind, "sequential"), pool)
    made, calls = plans(collaboration, found.scenes)
    asked = {n for n, scenes in found.scenes.items() if len(scenes) >= 3}
    assert {"install", "decide"} <= asked
    assert asked <= made.keys()
    assert {c.primitive for c in calls} <= set(PRIMITIVES)
    assert all(len(json.dumps(encode(p))) < 20_000 for p in made.values())


def test_primitives_and_their_settings() -> None:
    """A recipe travels whole, and a fit in the plan is the fit of the code, to the bit."""
    recipe = Recipe(0.1, 2, 3, momentum=0.9, clip=0.5, mu=0.1, train=("back",))

    def code(given: Any, devices: Any) -> Any:
        w = devices.initial("small")
        centre = Tree({k: a * 0.5 for k, a in w.pick("back").items()})
        fit = devices.fit("small", w, devices.data, recipe, centre=centre, tag="again")
        loss, slope, _ = devices.backward("small", fit.parameters, devices.data)
        return {"w": fit.parameters, "loss": fit.loss, "steps": fit.steps, "d": slope, "l": loss}

    plan = recorded(code)
    assert [s.op for s in plan.steps] == ["initial", *["multiply"] * 2, "fit", "backward"]
    for rows in (1, 5, 12):
        assert apart(code({}, session(rows)), ran(plan, rows)) == 0


def test_what_nothing_needs_is_left_out() -> None:
    def code(given: Any, devices: Any) -> Any:
        np.sort(devices.data["x"].values, axis=1)
        return {"n": devices.data["y"].n}

    plan = recorded(code)
    assert plan.steps == ()
    assert plan.inputs["dict"].keys() == {"own"}
    assert plan.inputs["dict"]["own"]["dict"].keys() == {"y"}


def _assigns(given: Any, devices: Any) -> Any:
    given["a"][0] = 1
    return {}


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (lambda g, d: {"b": 1 if g["a"].sum() > 2 else 0}, "needs a value"),
        (lambda g, d: {"b": int(g["a"].sum())}, "needs a value"),
        (lambda g, d: {"b": [float(v) for v in d.data["x"].n]}, "needs a value"),
        (lambda g, d: {"b": np.arange(d.data["x"].values.shape[1])}, "needs a value"),
        (lambda g, d: {"b": min(4, d.data["x"].values.shape[1])}, "needs a value"),
        (lambda g, d: {"b": np.asarray(g["a"])}, "needs a value"),
        (lambda g, d: {"b": g["a"][g["a"] > 5]}, "picks by a mask"),
        (lambda g, d: {"b": [v for v in d.data["x"].values[0]]}, "needs a value"),
        (_assigns, "assigns to a part"),
        (lambda g, d: {"b": np.linalg.svd(g["a"])}, "no plan has np.svd"),
        (lambda g, d: {"b": np.add.reduce(g["a"], 1)}, "no plan has add.reduce"),
        (lambda g, d: {"b": np.add(g["a"], 1, out=np.zeros((1, 3)))}, "no plan has add"),
        (lambda g, d: {"b": g["a"] + np.zeros((1, 70_000))[:, :3].repeat(1, 0).sum() * 0
                       + np.zeros((70_000, 1, 1))}, "a constant of 70000 numbers"),
        (lambda g, d: {"b": object()}, "object has no place"),
    ],
)  # fmt: skip
def test_what_cannot_be_recorded_is_refused(code: Any, says: str) -> None:
    """In one line, with the line of code that did it and what to do instead."""
    with pytest.raises(TaskError, match=says) as caught:
        recorded(code)
    assert "test_plan.py" in str(caught.value)
    assert caught.value.mend


def test_a_plan_that_depends_on_how_many_rows_there_were_is_refused() -> None:
    """Hidden in Python: here by a global; nothing in the recording shows it."""

    class Odd(type(tiny.collaboration("fedavg"))):  # type: ignore[misc]
        def reply(self, verb: str, message: Any, devices: Any) -> Any:
            up, after = super().reply(verb, message, devices)
            many = getattr(devices, "_ids", np.zeros(1))[0] % 2 == 1
            return (up if not many else type(up)(up.data, up.features, up.parameters * 2.0,
                                                 up.scalars)), after  # fmt: skip

    found = rehearse(Odd(rounds=2), COLUMNS, tiny.compute(), True)
    with pytest.raises(TaskError, match="gives something else than the code"):
        plans(Odd(rounds=2), found.scenes)


def test_devices_that_are_sent_different_leaves_are_refused() -> None:
    sessions = [session(n) for n in (3, 5)]
    with pytest.raises(TaskError, match="devices differ in b"):
        record("test", lambda g, d: {}, sessions, [{"a": {"b": np.ones(1)}}, {"a": {}}])


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        ({"name": "p", "inputs": {}, "steps": [["load", [], {}, {"$": 0}]], "outputs": {}},
         "unknown operation 'load'"),
        ({"name": "p", "inputs": {}, "steps": [["add", []]], "outputs": {}}, "a plan is not one"),
        ({"name": "p"}, "a plan is not one"),
        ([], "a plan is not one"),
        (7, "a plan is not one"),
    ],
)  # fmt: skip
def test_foreign_plans_are_refused_before_anything_runs(plan: Any, says: str) -> None:
    with pytest.raises(PackageError, match=says):
        decode(plan)


def whole(**parts: Any) -> dict[str, Any]:
    """A plan in JSON: the input's two values, a step that adds them, what it makes."""
    inputs = {"dict": {"a": {"$": 0}, "b": {"$": 1}}}
    steps = [["add", [{"$": 0}, {"$": 1}], {}, {"$": 2}]]
    return {"name": "p", "inputs": inputs, "steps": steps, "outputs": {"$": 2}, **parts}


def deep(depth: int) -> Any:
    found: Any = 0
    for _ in range(depth):
        found = [found]
    return found


def test_a_whole_plan_is_run() -> None:
    """So that what is refused below is refused for what was changed."""
    assert run(decode(whole()), {"a": 2, "b": 3}, session(1)) == 5


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ({"steps": [["abs", [{"$": 3}], {}, {"$": 2}]]}, r"step 0 \(abs\) uses value 3, which"),
        ({"steps": [["abs", [{"$": 2}], {}, {"$": 2}]]}, r"step 0 \(abs\) uses value 2, which"),
        ({"steps": [["abs", [[{"rows": [{"$": 0}, {"$": 9}]}]], {}, {"$": 2}]]}, "uses value 9"),
        ({"steps": [["abs", [{"$": 0}], {"axis": {"$": 9}}, {"$": 2}]]}, "uses value 9"),
        ({"outputs": {"dict": {"x": {"$": 4}}}}, "the output uses value 4"),
        ({"steps": [["abs", "a", {}, {"$": 2}]]}, "is not given a list and a dictionary"),
        ({"steps": [["abs", [{"$": 0}], 7, {"$": 2}]]}, "is not given a list and a dictionary"),
        ({"steps": [[["abs"], [{"$": 0}], {}, {"$": 2}]]}, "a plan is not one"),
        ({"steps": [["abs", [{"$": 0}], {}, 7]]}, "has values in no form that is known"),
        ({"steps": [["abs", [{"$": 0}], {}, {"slice": [0, 1, 2]}]]}, "in no form that is known"),
        ({"inputs": [{"$": 0}]}, "the input has values in no form"),
        ({"inputs": {}}, "the input has nothing in a form that is not known"),
        ({"outputs": {"a": 1, "b": 2}}, "the output has a, b in a form that is not known"),
        ({"outputs": {"code": "x"}}, "the output has code in a form that is not known"),
        ({"outputs": {"$": "2"}}, "in a form that is not known"),
        ({"outputs": {"$": True}}, "in a form that is not known"),
        ({"outputs": {"rows": [{"$": 2}]}}, "in a form that is not known"),
        ({"outputs": {"dict": [{"$": 2}]}}, "in a form that is not known"),
        ({"outputs": {"slice": [0, 1]}}, "in a form that is not known"),
        ({"outputs": {"number": "x"}}, "in a form that is not known"),
        ({"outputs": {"array": [1], "shape": [1]}}, "in a form that is not known"),
        ({"outputs": {"array": [1], "shape": [-1], "dtype": "int64"}}, "form that is not known"),
        ({"outputs": {"dict": {}, "dtype": "int64"}}, "in a form that is not known"),
        ({"outputs": deep(5000)}, "a plan is not one"),
    ],
)  # fmt: skip
def test_a_plan_that_no_device_could_run_is_refused(parts: Any, says: str) -> None:
    with pytest.raises(PackageError, match=says):
        decode(whole(**parts))


ONE = {"array": [1], "shape": [1], "dtype": "uint8"}


@pytest.mark.parametrize(
    ("op", "args"),
    [
        ("astype", [3, "float32"]),  # AttributeError
        ("add", [ONE, 1000]),  # OverflowError
        ("tile", [ONE, [10**15]]),  # MemoryError
        ("abs", [{"array": [1, 2], "shape": [3], "dtype": "uint8"}]),  # a constant that is none
        ("abs", [{"array": [1], "shape": [1], "dtype": "nothing"}]),
        ("fit", ["small", 1, 2]),
        ("fit", ["small", {"dict": {}}, {"dict": {}}]),
    ],
)  # fmt: skip
def test_whatever_fails_in_a_step_is_told(op: str, args: Any) -> None:
    plan = decode(whole(steps=[[op, args, {}, {"$": 2}]]))
    with pytest.raises(PackageError, match=rf"plan p: step 0 \({op}\) fails: "):
        run(plan, {"a": 2, "b": 3}, session(1))


def test_an_output_that_fails_is_told() -> None:
    plan = decode(whole(outputs={"array": [1, 2], "shape": [3], "dtype": "uint8"}))
    with pytest.raises(PackageError, match="plan p: its output fails: "):
        run(plan, {"a": 2, "b": 3}, session(1))


def test_no_operation_reaches_beyond_arrays() -> None:
    """Names of numpy that read, write or run things; and what is called is what numpy has."""
    reaching = "load save fromfile tofile memmap genfromtxt loadtxt vectorize frompyfunc apply"
    assert not any(word in name for word in reaching.split() for name in OPERATIONS)
    ours = {"index", "astype", "size", "real", "fullest"}
    assert all(OPERATIONS[n] is getattr(np, n) for n in OPERATIONS.keys() - ours)


def test_wrong_inputs_and_failing_steps_are_told() -> None:
    plan = recorded(lambda g, d: {"b": g["a"] @ np.ones((3, 2))})
    with pytest.raises(PackageError, match="input lacks a"):
        run(plan, {}, session(3))
    with pytest.raises(PackageError, match=r"step 0 \(matmul\) fails"):
        run(plan, {"a": np.ones((1, 4))}, session(3))
    rows = recorded(lambda g, d: {"b": d.data["x"].keep(d.data["x"].mask())})
    with pytest.raises(PackageError, match=r"own.x is not rows"):
        run(rows, {"own": {"x": np.ones(3)}}, session(3))


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-9, 9) | st.floats(allow_nan=False) | WORDS,
        lambda part: st.lists(part, max_size=3) | st.dictionaries(WORDS, part, max_size=3),
        max_leaves=8,
    )
)
def test_what_is_given_survives_json(thing: Any) -> None:
    """Lists come back as tuples, which numpy takes for the same."""

    def frozen(t: Any) -> Any:
        if isinstance(t, dict):
            return {k: frozen(v) for k, v in t.items()}
        return tuple(frozen(v) for v in t) if isinstance(t, list) else t

    there = json.loads(json.dumps(language.given(thing)))
    plan = Plan("p", {"dict": {}}, (), there)
    assert frozen(run(plan, {}, session(1))) == frozen(thing)


def test_constants_keep_dtype_shape_and_bits() -> None:
    some = [np.float32(0.1), np.arange(6, dtype=np.int64).reshape(2, 3), np.array([True]),
            np.array([np.inf, -np.inf, 1e-45], np.float32), slice(None, 3), ..., None]  # fmt: skip
    there = json.loads(json.dumps(language.given(some)))
    back = run(Plan("p", {"dict": {}}, (), there), {}, session(1))
    for a, b in zip(some[:4], back[:4], strict=True):
        assert np.asarray(a).dtype == b.dtype
        assert np.asarray(a).tobytes() == b.tobytes()
    assert back[4:] == (slice(None, 3), ..., None)


def test_values_are_let_go_after_their_last_use() -> None:
    """A plan of a thousand steps on a megabyte holds a few of them at a time."""
    import tracemalloc

    steps = tuple(Step("add", ({"$": i}, 1.0), {}, {"$": i + 1}) for i in range(1000))
    plan = Plan("p", {"dict": {"a": {"$": 0}}}, steps, {"dict": {"b": {"$": 1000}}})
    tracemalloc.start()
    found = run(plan, {"a": np.zeros(2**17)}, session(1))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (found["b"] == 1000).all()
    assert peak < 8 * 2**20


def test_rows_have_one_shape_for_all() -> None:
    rows = Rows(np.zeros((1, 2, 3)), np.array([2]))
    assert language.given(rows) == {
        "rows": [language.given(rows.values), language.given(rows.n)]
    }  # fmt: skip
