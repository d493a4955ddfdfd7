"""The three primitives on a device without torch: which graph is taken, what is told when there is
none, devices without rows, threads, and that nothing is copied or made twice."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from exported import PLAIN, Beside, Case, case, near, numbers, runtime, tokens, torch_of
from kitestring import dice
from kitestring.core import Recipe, Rows, Tree
from kitestring.devices.fit.compute import TorchCompute
from kitestring.devices.fit.programs import Program
from kitestring.devices.runtime import compute as runtime_compute
from kitestring.devices.runtime import session as runtime_session
from kitestring.devices.runtime.compute import OrtCompute
from kitestring.devices.runtime.graph import Graph
from kitestring.devices.runtime.settled import settled
from kitestring.devices.session import DeviceSession, broadcast, frozen
from kitestring.errors import DataError, PackageError, SettingError, TaskError
from kitestring.export.graphs import backward_graph, predict_graph, step_graph
from modules import device, devices, keys
from told import told

N = [5, 1, 0, 7]


def of(kind: str, n: list[int] | None = None) -> Case:
    return Case(*devices(kind, n or N))


def all_three(c: Case) -> OrtCompute:
    return runtime(c.program, *_graphs(c))


def _graphs(c: Case) -> list[Graph]:
    """Each program's are exported once: those of `of` are alike whatever the rows."""
    name = repr(c.program.module)
    if name not in _KNOWN:
        _KNOWN[name] = [
            predict_graph(c.program, c.rows), step_graph(c.program, c.rows, PLAIN),
            backward_graph(c.program, c.rows),
        ]  # fmt: skip
    return _KNOWN[name]


_KNOWN: dict[str, list[Graph]] = {}


# --- one graph for all sizes


def test_one_graph_serves_every_number_of_rows_and_every_rate() -> None:
    """Batches of 1 to 9 of up to 7 rows, several epochs, in order and shuffled."""
    c = of("mlp")
    ort, plain = all_three(c), torch_of(c)
    for batch in (1, 2, 3, 9):
        for shuffle in (True, False):
            recipe = replace(PLAIN, batch=batch, lr=0.3 / batch, epochs=3, shuffle=shuffle)
            one, other = (m.fit("p", c.weights, c.rows, recipe, key=keys(4)) for m in (ort, plain))
            assert list(one.steps) == list(other.steps)
            near(one.parameters, other.parameters)
            near(one.loss, other.loss)


def test_rows_are_predicted_a_block_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    c = of("mlp")
    ort = all_three(c)
    whole = ort.predict("p", c.weights, c.rows)["out"]
    monkeypatch.setattr(runtime_compute, "_BLOCK", 2)
    parts = ort.predict("p", c.weights, c.rows)["out"]
    near(Tree(out=parts), Tree(out=whole))


def test_devices_do_not_see_one_another() -> None:
    c = of("norm")
    ort = all_three(c)
    fit = ort.fit("p", c.weights, c.rows, PLAIN, key=keys(4))
    found = ort.predict("p", c.weights, c.rows)
    for d in range(4):
        own, rows = device(c.weights, d), device(c.rows, d)
        alone = ort.fit("p", own, rows, PLAIN, key=keys(4)[d : d + 1])
        assert all(np.array_equal(a[0], fit.parameters[k][d]) for k, a in alone.parameters.items())
        mine = ort.predict("p", own, rows)["out"]
        n = int(c.rows["x"].n[d])
        assert np.array_equal(mine.values[0, :n], found["out"].values[d, :n])


def test_a_device_without_rows() -> None:
    c = of("mlp", [0, 0])
    ort = all_three(c)
    out = ort.predict("p", c.weights, c.rows)["out"]
    assert out.values.shape == (2, 1, 3)
    assert out.values.dtype == np.float32
    fit = ort.fit("p", c.weights, c.rows, PLAIN, key=keys(2))
    assert all(np.array_equal(a, c.weights[k]) for k, a in fit.parameters.items())
    assert list(fit.steps) == [0, 0]
    assert not fit.loss.any()
    loss, by_weights, by_columns = ort.backward("p", c.weights, c.rows)
    assert not loss.any()
    assert not any(a.any() for a in by_weights.values())
    assert by_columns["x"].values.shape == (2, 1, 4)


def test_a_shared_model_is_not_written_to() -> None:
    """Weights that all devices share are one memory, which may not be written to either."""
    c = of("mlp")
    one = Tree({k: a[:1].copy() for k, a in c.weights.items()})
    wide = Tree({k: np.broadcast_to(a, (4, *a.shape[1:])) for k, a in one.items()})
    full = Tree({k: a.copy() for k, a in wide.items()})
    ort = all_three(c)
    a, b = (ort.fit("p", w, c.rows, PLAIN, key=keys(4)).parameters for w in (wide, full))
    assert all(np.array_equal(a[k], b[k]) for k in a)
    assert all(np.array_equal(wide[k], full[k]) for k in wide)


# --- which graph


def test_columns_and_forms_choose_the_graph() -> None:
    """Two lengths of a sequence, and two recipes: each call finds its own."""
    five = case(Beside([nn.Embedding(7, 4)]), {"x": tokens(7, 5)})
    three = Case(five.program, five.weights, {"x": _cut(five.rows["x"], 3)})
    momentum = replace(PLAIN, momentum=0.5)
    ort = runtime(
        five.program, predict_graph(five.program, five.rows),
        predict_graph(three.program, three.rows), step_graph(five.program, five.rows, PLAIN),
        step_graph(five.program, five.rows, momentum),
    )  # fmt: skip
    for c in (five, three):
        near(ort.predict("p", c.weights, c.rows), torch_of(c).predict("p", c.weights, c.rows))
    for recipe in (PLAIN, momentum):
        near(
            ort.fit("p", five.weights, five.rows, recipe, key=keys(4)).parameters,
            torch_of(five).fit("p", five.weights, five.rows, recipe, key=keys(4)).parameters,
        )


def _cut(rows: Rows, length: int) -> Rows:
    return Rows(np.where(rows.mask()[..., None], rows.values, 0)[..., :length], rows.n)


def test_columns_that_nothing_reads_do_not_matter() -> None:
    c = of("mlp")
    more = {**c.rows, "extra": Rows(c.rows["x"].values[..., :1], c.rows["x"].n)}
    ort = all_three(c)
    a = ort.fit("p", c.weights, more, PLAIN, key=keys(4)).parameters
    b = ort.fit("p", c.weights, c.rows, PLAIN, key=keys(4)).parameters
    assert all(np.array_equal(a[k], b[k]) for k in a)
    back = ort.backward("p", c.weights, more)[2]
    assert not back["extra"].values.any()
    assert back["x"].values.any()


def test_a_graph_that_is_not_there() -> None:
    c = of("mlp")
    ort = runtime(c.program, _graphs(c)[0])
    with told(PackageError, "no graph for fit (sgd of 4 weights) of 'p'", "y int64[]",
              mend="predict of 'p' on x float32[4]"):  # fmt: skip
        ort.fit("p", c.weights, c.rows, PLAIN, key=keys(4))
    with told(PackageError, "no graph for backward by out of 'p'"):
        ort.backward("p", c.weights, c.rows, cotangent={"out": c.rows["x"]})
    with told(PackageError, "no graph for predict of 'p' on x float32[2]"):
        ort.predict("p", c.weights, {"x": Rows(c.rows["x"].values[..., :2], c.rows["x"].n)})
    with told(PackageError, "no graph for predict of 'q'", mend="There are programs: p"):
        ort.predict("q", c.weights, c.rows)
    with told(PackageError, "no graph for fit of 'q'", mend="There are programs: p"):
        ort.fit("q", c.weights, c.rows, PLAIN, key=keys(4))
    with told(SettingError, "unknown program 'q'"):
        ort.initial("q")


def test_a_centre_that_is_named_and_one_that_is_not() -> None:
    """Without one, weights are pulled to where they started; with an empty one, nowhere."""
    c = of("mlp")
    recipe = replace(PLAIN, mu=0.7)
    ort = runtime(
        c.program, step_graph(c.program, c.rows, recipe), step_graph(c.program, c.rows, PLAIN)
    )
    for centre in (None, c.weights, Tree()):
        one, other = (
            m.fit("p", c.weights, c.rows, recipe, centre=centre, key=keys(4)).parameters
            for m in (ort, torch_of(c))
        )
        near(one, other)


# --- what is told


BAD: tuple[Recipe, ...] = (
    replace(PLAIN, lr=0), replace(PLAIN, lr=float("nan")), replace(PLAIN, epochs=0),
    replace(PLAIN, batch=0), replace(PLAIN, momentum=1.0), replace(PLAIN, decay=-1.0),
    replace(PLAIN, clip=0.0), replace(PLAIN, mu=-1.0), replace(PLAIN, optimiser="lion"),
    replace(PLAIN, optimiser="adam", momentum=0.5), replace(PLAIN, train=("head",)),
    replace(PLAIN, train=()),
)  # fmt: skip


@pytest.mark.parametrize("recipe", BAD)
def test_nonsense_is_told_as_everywhere(recipe: Recipe) -> None:
    c = of("mlp")
    lines = []
    for compute in (all_three(c), torch_of(c)):
        with pytest.raises((TaskError, SettingError)) as caught:
            compute.fit("p", c.weights, c.rows, recipe, key=keys(4))
        lines.append(str(caught.value))
    assert lines[0] == lines[1]


def test_weights_that_do_not_fit() -> None:
    c = of("mlp")
    ort = all_three(c)
    with told_so("is not given the weight 'inner.0.bias'"):
        ort.predict("p", Tree({k: a for k, a in c.weights.items() if k != "inner.0.bias"}), c.rows)
    with told_so("does not take the weight 'more'"):
        ort.predict("p", Tree({**c.weights, "more": c.weights["inner.0.bias"]}), c.rows)
    wrong = Tree({**c.weights, "inner.0.bias": c.weights["inner.0.bias"][:, :2]})
    with told(TaskError, "the weight 'inner.0.bias' is [2]", mend="Give [6]"):
        ort.backward("p", wrong, c.rows)


def told_so(part: str) -> Any:
    return pytest.raises(TaskError, match=part)


def test_tokens_beyond_their_table(capfd: pytest.CaptureFixture[str]) -> None:
    """One line, and nothing printed behind our back."""
    c = case(Beside([nn.Embedding(7, 4)]), {"x": tokens(70, 5)})
    ort = all_three(c)
    with told(DataError, "cannot be computed on these rows", where="predict", mend="tokens"):
        ort.predict("p", c.weights, c.rows)
    with told(DataError, "cannot be computed on these rows", where="step"):
        ort.fit("p", c.weights, c.rows, PLAIN, key=keys(4))
    assert capfd.readouterr() == ("", "")


def test_providers_must_be_there() -> None:
    c = of("mlp")
    graph = _graphs(c)[0].model
    there = onnxruntime.get_available_providers()
    missing = next(p for p in onnxruntime.get_all_providers() if p not in there)
    with told(SettingError, missing, mend="CPUExecutionProvider"):
        OrtCompute({"": graph}, {}, providers=(missing,))
    OrtCompute({"": graph}, {}, providers=("CPUExecutionProvider",))


def test_what_is_no_graph() -> None:
    with pytest.raises(PackageError, match="not an ONNX model"):
        OrtCompute({"": b"rubbish"}, {})


def test_a_graph_that_onnx_runtime_does_not_know() -> None:
    c = of("mlp")
    model = onnx.load_from_string(predict_graph(c.program, c.rows).model)
    model.graph.node[0].op_type = "Conjure"
    ort = OrtCompute({"": model.SerializeToString()}, {})
    with told(PackageError, "cannot load it", mend="Update onnxruntime"):
        ort.predict("p", c.weights, c.rows)


# --- what it takes


def test_a_session_is_made_once_and_when_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    real = onnxruntime.InferenceSession

    def counted(*args: Any, **kwargs: Any) -> Any:
        made.append(args)
        return real(*args, **kwargs)

    monkeypatch.setattr(runtime_session.ort, "InferenceSession", counted)
    c = of("mlp")
    ort = all_three(c)
    assert not made
    for _ in range(3):
        ort.fit("p", c.weights, c.rows, PLAIN, key=keys(4))
    assert len(made) == 1
    ort.predict("p", c.weights, c.rows)
    assert len(made) == 2


def test_a_frozen_base_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime reads what does not train where it lies."""
    seen = {}
    real = runtime_session._held

    def noted(array: Any) -> Any:
        held = real(array)
        seen[array.ctypes.data] = held.data_ptr()
        return held

    monkeypatch.setattr(runtime_session, "_held", noted)
    c = of("mlp", [4])
    frozen = c.weights["inner.0.weight"]
    recipe = replace(PLAIN, train=("inner.2.",))
    ort = runtime(c.program, step_graph(c.program, c.rows, recipe))
    ort.fit("p", c.weights, c.rows, recipe, key=keys(1))
    assert seen[frozen.ctypes.data] == frozen.ctypes.data


class Indexed(nn.Module):
    """A table that is indexed, with a second index."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.ones(3, 4, 64))

    def forward(self, x: Tensor) -> Tensor:
        return self.table[x, x.flip(1)]


@pytest.mark.parametrize("threads", [1, 4])
def test_threads_do_not_change_what_adds_up(threads: int) -> None:
    """Many rows add to the same few of a table: nothing is lost between threads."""
    c = case(Beside([nn.Embedding(3, 64), Indexed()]), {"x": tokens(3, 50)}, n=(400,))
    graph = backward_graph(c.program, c.rows)
    ort = OrtCompute({"": graph.model}, {}, threads=threads)
    plain = torch_of(c).backward("p", c.weights, c.rows)
    for _ in range(3):
        near(ort.backward("p", c.weights, c.rows)[1], plain[1])


def test_several_may_call_at_once() -> None:
    c = of("mlp")
    ort = all_three(c)
    assert ort.concurrent

    def fit(i: int) -> Any:
        return ort.fit("p", c.weights, c.rows, replace(PLAIN, lr=0.01 * (i + 1)), key=keys(4))

    alone = [fit(i).parameters for i in range(8)]
    with ThreadPoolExecutor(4) as pool:
        together = [f.parameters for f in pool.map(fit, range(8))]
    for a, b in zip(alone, together, strict=True):
        assert all(np.array_equal(a[k], b[k]) for k in a)


def test_several_may_predict_at_once_each_with_weights_of_its_own() -> None:
    """Both are built into the one graph in turn; nobody gets the other's answer."""
    program = Program("net", Net())
    rows = {"x": Rows(np.ones((1, 3, 4), np.float32), np.array([3]))}
    compute = OrtCompute({"graph": predict_graph(program, rows).model}, {})
    some = [broadcast(frozen(program.initial() * np.float32(s)), 1) for s in (1, -2, 3)]
    alone = [TorchCompute({"net": program}).predict("net", w, rows)["out"].values for w in some]

    def often(i: int) -> float:
        found = [compute.predict("net", some[i], rows)["out"].values for _ in range(200)]
        return float(max(np.abs(f - alone[i]).max() for f in found))

    with ThreadPoolExecutor(6) as pool:
        far = list(pool.map(often, [0, 1, 2, 0, 1, 2]))
    assert max(far) < 1e-5 * max(np.abs(a).max() for a in alone)


def test_operations_are_billed_as_by_torch() -> None:
    """What a device's session counts."""
    c = of("mlp")
    spent = []
    for compute in (all_three(c), torch_of(c)):
        session = DeviceSession(compute, np.arange(4), 0, 1, c.rows, Tree())
        session.predict("p", c.weights, {"x": c.rows["x"]})
        session.fit("p", c.weights, c.rows, replace(PLAIN, epochs=2))
        session.backward("p", c.weights, c.rows)
        spent.append(session.flops)
    assert np.array_equal(*spent)
    assert spent[0].any()


def test_initial_weights_are_given_out_as_copies() -> None:
    c = of("mlp")
    ort = all_three(c)
    ort.initial("p")["inner.0.bias"][:] = 7
    assert all(np.array_equal(a, c.program.initial()[k]) for k, a in ort.initial("p").items())


def test_dropout_is_drawn_from_the_key() -> None:
    """Another key keeps others; the same key keeps the same, whoever else is computed."""
    dropped = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3))
    c = case(Beside([dropped]), {"x": numbers(6)}, n=(4, 4))
    whole = replace(PLAIN, batch=4, shuffle=False)
    ort = runtime(c.program, step_graph(c.program, c.rows, whole))
    same = Tree({k: np.repeat(a[:1], 2, 0) for k, a in c.weights.items()})
    rows = {"x": Rows(np.repeat(c.rows["x"].values[:1], 2, 0), c.rows["x"].n)}
    key = dice.keys(3, np.array([0, 1]), 1, "fit")
    found = ort.fit("p", same, rows, whole, key=key).parameters
    again = ort.fit("p", same, rows, whole, key=key[[0, 0]]).parameters
    name = "layers.0.0.weight"
    assert not np.array_equal(found[name][0], found[name][1])
    assert np.array_equal(found[name][0], again[name][0])
    assert np.array_equal(again[name][0], again[name][1])


_ALONE = """
import os, sys
sys.modules["torch"] = None  # importing it is an error
import numpy as np
from kitestring.core import Recipe, Rows, Tree
from kitestring.devices.runtime.compute import OrtCompute
from kitestring.devices.runtime.graph import Graph
assert os.environ["ORT_DISABLE_TELEMETRY"] == "1"
compute = OrtCompute({name: open(name, "rb").read() for name in sys.argv[1:]}, {})
w = {k: np.zeros((1, *leaf.shape), leaf.dtype)
     for k, leaf in compute._graphs[0].about.weights.items()}
rows = {"x": Rows(np.ones((1, 5, 4), np.float32), np.array([5])),
        "y": Rows(np.ones((1, 5), np.int64), np.array([5]))}
fit = compute.fit("p", Tree(w), rows, Recipe(0.1, batch=2), key=np.zeros(1, np.uint64))
print(float(fit.loss[0]), bool(fit.parameters["inner.2.bias"].any()))
assert not any(name == "onnx" or name.startswith("kitestring.devices.fit") for name in sys.modules)
"""


def test_a_device_needs_no_torch(tmp_path: Path) -> None:
    """Three classes, weights of nothing: the first loss is log 3, and falls from there."""
    c = of("mlp", [5])
    file = tmp_path / "step.onnx"
    file.write_bytes(step_graph(c.program, c.rows, PLAIN).model)
    out = subprocess.run(
        [sys.executable, "-c", _ALONE, str(file)], capture_output=True, text=True, check=False,
        env={"PYTHONPATH": str(Path(runtime_compute.__file__).parents[3])},
    )  # fmt: skip
    assert out.returncode == 0, out.stderr
    loss, moved = out.stdout.split()
    assert 0.9 < float(loss) < np.log(3)
    assert moved == "True"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, batch: Any) -> dict[str, Tensor]:
        return {"out": self.layers(batch["x"])}


def test_weights_that_stay_are_built_in_and_others_are_not() -> None:
    """Read-only weights that come again give what they gave; others under the same names, written
    to in place or not, are never taken for them."""
    program = Program("net", Net())
    x = np.random.default_rng(0).normal(size=(1, 5, 4)).astype(np.float32)
    rows = {"x": Rows(x, np.array([5]))}
    model = predict_graph(program, rows).model
    compute = OrtCompute({"graph": model}, {"net": program.initial()})
    reference = TorchCompute({"net": program}, "sequential")
    built_in = 0
    for scale in (1.0, -2.0):
        still = broadcast(frozen(program.initial() * np.float32(scale)), 1)
        moving = Tree({k: np.array(a) for k, a in still.items()})
        for _ in range(3):
            for weights in (still, still, moving):
                found = compute.predict("net", weights, rows)["out"].values
                wanted = reference.predict("net", weights, rows)["out"].values
                assert np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()
            moving["layers.0.weight"] += 1
        built_in += sum(s.session is not None for s in compute._settled.values())
    assert built_in == 2
    # Not these: whoever has the other name can write to them.
    first = Tree({k: np.array(a) for k, a in program.initial().items()})
    for _ in range(3):
        weights = broadcast(first, 1)
        found = compute.predict("net", weights, rows)["out"].values
        wanted = reference.predict("net", weights, rows)["out"].values
        assert np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()
        first["layers.0.weight"] += 1
    ends = onnx.load_from_string(settled(model, {"w:layers.0.bias": np.ones(8, np.float32)}))
    assert "w:layers.0.bias" in [t.name for t in ends.graph.initializer]
    assert "w:layers.0.bias" not in [i.name for i in ends.graph.input]
    onnx.checker.check_model(ends)
