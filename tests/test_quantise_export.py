"""Quantised layers in ONNX Runtime, held against torch; on a device without torch; in files.

Float error where weights alone are rounded: 1e-5 of a leaf's largest value, as of other modules.
Where activations are, one that lies between two steps may go either way: those tests start from the
same numbers, so that none does, or allow for it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tiny
from exported import CLOSE, PLAIN, curved, near
from kitestring.compress.quantise.dynamic import dynamic
from kitestring.compress.quantise.grid import nearest_codes
from kitestring.compress.quantise.layers import WeightOnlyEmbedding, WeightOnlyLinear
from kitestring.compress.quantise.nearest import nearest
from kitestring.compress.quantise.static import static
from kitestring.core import Recipe, Rows, Tree
from kitestring.devices.fit.compute import TorchCompute
from kitestring.devices.fit.programs import Program
from kitestring.devices.runtime import golden
from kitestring.devices.runtime.compute import OrtCompute
from kitestring.devices.runtime.golden import Golden
from kitestring.devices.runtime.graph import Graph
from kitestring.devices.session import broadcast, frozen
from kitestring.engines.pipe import Pipe
from kitestring.engines.strict import OtherProcess
from kitestring.errors import PackageError
from kitestring.export.checked import Input
from kitestring.export.graphs import backward_graph, predict_graph, step_graph
from kitestring.export.onnx_file import to_onnx
from kitestring.measure.runtimes import runner
from kitestring.measure.subject import Inputs, Subject
from kitestring.pack.build import Source, build
from kitestring.package import archive, keys
from kitestring.tasks.adapters import low_rank
from kitestring.tasks.layers import Transformer
from kitestring.tasks.task import Task

DICE = np.random.default_rng(0)


class Parts(nn.Module):
    """A quantised `body`, and a `head` that is trained."""

    def __init__(self, body: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.body, self.head = body, head

    def forward(self, batch: Any) -> dict[str, Tensor]:
        return {"out": self.head(self.body(batch["x"]))}


def numbers(*row: int, n: int = 8) -> dict[str, Rows]:
    dice = np.random.default_rng(4)
    return {"x": Rows(dice.normal(size=(1, n, *row)).astype(np.float32), np.array([n]))}


def tokens(below: int, *row: int, n: int = 5) -> dict[str, Rows]:
    return {"x": Rows(np.random.default_rng(4).integers(0, below, (1, n, *row)), np.array([n]))}


def _linear(make: Any, *row: int) -> tuple[Any, dict[str, Rows]]:
    torch.manual_seed(2)
    body = nn.Sequential(nn.Linear(row[-1], 24), nn.ReLU())
    return Parts(make(body), nn.Linear(24, 3)), numbers(*row)


def _image(make: Any) -> tuple[Any, dict[str, Rows]]:
    torch.manual_seed(2)
    body = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 6, (2, 3), groups=2, stride=(1, 2), bias=False), nn.ReLU(), nn.Flatten(),
    )  # fmt: skip
    return Parts(make(body), nn.Linear(18, 3)), numbers(2, 8, 6)


def _words(bits: int) -> tuple[Any, dict[str, Rows]]:
    """With a head that reads the table's own weights."""
    torch.manual_seed(2)

    def kept(layer: Any) -> Any:
        return nearest_codes(layer.weight, bits, 16, symmetric=bits == 8)

    model = Transformer(30, 6, 32, 2, 1, tied=True)
    made: Any = nearest(model, bits, 16, symmetric=bits == 8)
    made.tokens = WeightOnlyEmbedding.of(kept(model.tokens))
    made.bias = nn.Parameter(made.bias.detach().clone())
    return Parts(made, nn.Identity()), tokens(30, 6)


def _calibrated(body: nn.Module, row: tuple[int, ...]) -> nn.Module:
    return static(body, [torch.from_numpy(numbers(*row, n=50)["x"].values[0])])


MADE: dict[str, Any] = {
    "8 bits": lambda: _linear(partial(nearest, bits=8), 40),
    "8 bits in groups": lambda: _linear(partial(nearest, bits=8, group=12, symmetric=False), 5, 40),
    "4 bits": lambda: _linear(partial(nearest, bits=4, group=32), 40),
    "4 bits, whole rows": lambda: _linear(partial(nearest, bits=4, symmetric=False), 5, 40),
    "4 bits in odd groups": lambda: _linear(partial(nearest, bits=4, group=7), 40),
    "words of 8 bits": lambda: _words(8),
    "words of 4 bits": lambda: _words(4),
    "dynamic": lambda: _linear(dynamic, 40),
    "dynamic, positions": lambda: _linear(dynamic, 5, 40),
    "static": lambda: _linear(lambda body: _calibrated(body, (40,)), 40),
    "static, images": lambda: _image(lambda body: _calibrated(body, (2, 8, 6))),
}


@cache
def made(kind: str) -> tuple[Program, dict[str, Rows], Tree]:
    """A program, rows of one device, and weights that nobody can write to."""
    module, rows = MADE[kind]()
    program = Program("p", module.eval(), curved)
    return program, rows, broadcast(frozen(program.initial()), 1)


def ort(program: Program, *graphs: Graph) -> OrtCompute:
    for graph in graphs:
        onnx.checker.check_model(onnx.load_from_string(graph.model))
    return OrtCompute({str(i): g.model for i, g in enumerate(graphs)}, {"p": program.initial()})


def operators(graph: Graph) -> set[str]:
    return {node.op_type for node in onnx.load_from_string(graph.model).graph.node}


# The same numbers


@pytest.mark.parametrize("kind", MADE)
def test_predictions(kind: str) -> None:
    """With weights as inputs, and again with weights built in. Nothing comes before the rounding of
    activations but what goes in."""
    program, rows, weights = made(kind)
    compute = ort(program, predict_graph(program, rows))
    wanted = TorchCompute({"p": program}, "sequential").predict("p", weights, rows)
    for _ in range(3):
        near(compute.predict("p", weights, rows), wanted)
    assert [s.session is not None for s in compute._settled.values()] == [True]


def test_a_convolution_in_whole_numbers_is_equal_to_the_bit() -> None:
    program, rows, weights = made("static, images")
    body = Program("p", Parts(program.module.body, nn.Identity()).eval())  # type: ignore[arg-type]
    compute = ort(body, predict_graph(body, rows))
    weights = broadcast(frozen(body.initial()), 1)
    wanted = TorchCompute({"p": body}, "sequential").predict("p", weights, rows)["out"]
    for _ in range(3):
        found = compute.predict("p", weights, rows)["out"]
        assert np.array_equal(found.values, wanted.values)
    assert len(np.unique(wanted.values)) > 20


@pytest.mark.parametrize(
    "kind",
    [pytest.param(k, marks=pytest.mark.slow if k == "words of 8 bits" else []) for k in MADE],
)
def test_training_what_comes_after(kind: str) -> None:
    """Codes and scales stay as they are, to the bit."""
    program, rows, weights = made(kind)
    compute = ort(program, step_graph(program, rows, PLAIN))
    key = np.zeros(1, np.uint64)
    wanted = TorchCompute({"p": program}, "sequential").fit("p", weights, rows, PLAIN, key=key)
    found = compute.fit("p", weights, rows, PLAIN, key=key)
    near(found.parameters, wanted.parameters)
    near(found.loss, wanted.loss)
    moved = {k for k, a in found.parameters.items() if not np.array_equal(a, weights[k])}
    assert moved == set(program.trained)
    assert any(k.endswith("codes") for k in weights.keys() - moved)


@pytest.mark.parametrize("kind", [k for k in MADE if "words" not in k])
def test_slopes_through_it(kind: str) -> None:
    """By the column, which lies before everything that is quantised."""
    program, rows, weights = made(kind)
    compute = ort(program, backward_graph(program, rows))
    found = compute.backward("p", weights, rows)
    wanted = TorchCompute({"p": program}, "sequential").backward("p", weights, rows)
    for one, other in zip(found, wanted, strict=True):
        near(one, other)
    assert np.abs(found[2]["x"].values).max() > 1e-3


@pytest.mark.parametrize("kind", ["4 bits", "8 bits", "dynamic"])
def test_training_adapters_beside_it(kind: str) -> None:
    """QLoRA: slopes go through quantised layers to the adapters before them."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(40, 32), nn.Tanh(), nn.Linear(32, 24))
    make = dynamic if kind == "dynamic" else partial(nearest, bits=int(kind[0]), group=16)
    whole = Parts(make(body), nn.Linear(24, 3).requires_grad_(False))
    module = low_rank(whole, 2, targets=["body.*"])
    with torch.no_grad():
        for name, p in module.named_parameters():
            if name.endswith("up"):
                p.normal_(generator=torch.Generator().manual_seed(1))
    program, rows = Program("p", module.eval(), curved), numbers(40)
    assert program.trained == {f"body.{i}.{half}" for i in (0, 2) for half in ("down", "up")}
    weights = broadcast(frozen(program.initial()), 1)
    recipe, key = Recipe(0.02, epochs=2, batch=3, optimiser="adam"), np.zeros(1, np.uint64)
    compute = ort(program, step_graph(program, rows, recipe))
    wanted = TorchCompute({"p": program}, "sequential").fit("p", weights, rows, recipe, key=key)
    found = compute.fit("p", weights, rows, recipe, key=key)
    close = CLOSE if kind != "dynamic" else golden.ROUNDED_CHANGE
    near(found.parameters, wanted.parameters, close)
    assert not np.array_equal(found.parameters["body.0.down"], weights["body.0.down"])


@pytest.mark.parametrize(
    "kind", ["8 bits", "4 bits", "words of 4 bits", "dynamic", "static, images"]
)
def test_all_ways_to_compute_agree(kind: str) -> None:
    """Three devices with rows and trained weights of their own; codes are the same for all, or each
    has its own."""
    program, rows, first = made(kind)
    many = {k: Rows(np.concatenate([r.values] * 3), np.array([5, 2, 4])) for k, r in rows.items()}
    dice = np.random.default_rng(1)
    for copies in (False, True):
        weights = Tree()
        for k, a in first.items():
            wide = np.broadcast_to(a[:1], (3, *a.shape[1:]))
            moved = wide + dice.normal(0, 0.1, wide.shape).astype(np.float32) if k in \
                program.trained else wide  # fmt: skip
            if copies and k.endswith("codes"):
                moved = np.stack([np.roll(moved[d], d + 1, -1) for d in range(3)])
            weights[k] = np.ascontiguousarray(moved) if copies else moved
        results = []
        for how in ("sequential", "vmap", "auto"):
            compute = TorchCompute({"p": program}, how)  # type: ignore[arg-type]
            key = np.arange(3, dtype=np.uint64)
            fit = compute.fit("p", weights, many, PLAIN, key=key).parameters
            results.append((fit, compute.predict("p", weights, many)))
            told = compute.explain("p")
            if how == "auto":
                assert "quantised weights have no kernel" in told, told
            if how == "vmap":
                assert told == "vmap" or "static" in kind, told
        for other in results[1:]:
            near(other[0], results[0][0])
            near(other[1], results[0][1])


# Rows


@cache
def computes() -> dict[str, tuple[OrtCompute, Tree]]:
    found = {}
    for kind in ("8 bits", "4 bits", "dynamic", "static"):
        program, rows, weights = made(kind)
        found[kind] = ort(program, predict_graph(program, rows)), weights
    return found


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 6), st.floats(1e-2, 1e2))
def test_a_row_does_not_see_the_others(seed: int, n: int, far: float) -> None:
    """In ONNX Runtime: alone, and beside rows of another size. Sums of whole numbers are the same
    to the bit, and what is float around them in its own sums to float error."""
    x = np.random.default_rng(seed).normal(size=(n + 3, 40)).astype(np.float32)
    x[:3] *= far
    for kind, (compute, weights) in computes().items():
        together = _asked(compute, weights, x)[3:]
        alone = np.concatenate([_asked(compute, weights, row[None]) for row in x[3:]])
        assert np.abs(together - alone).max() < 1e-5 * np.abs(alone).max(), kind


def _asked(compute: OrtCompute, weights: Tree, x: Any) -> Any:
    return compute.predict("p", weights, {"x": Rows(x[None], np.array([len(x)]))})["out"].values[0]


# What the graphs are


def test_what_each_is_computed_by() -> None:
    wanted = {
        "8 bits": "DequantizeLinear", "4 bits": "MatMulNBits", "dynamic": "MatMulInteger",
        "static": "MatMulInteger", "static, images": "QLinearConv",
        "4 bits in odd groups": "BitShift",
    }  # fmt: skip
    for kind, operator in wanted.items():
        program, rows, _ = made(kind)
        graph = predict_graph(program, rows)
        assert operator in operators(graph)
        assert "DynamicQuantizeLinear" not in operators(graph)
        imports = {o.domain for o in onnx.load_from_string(graph.model).opset_import}
        assert imports == ({"", "com.microsoft"} if operator == "MatMulNBits" else {""})
        assert graph.about.rounds is kind.startswith(("dynamic", "static"))
        assert "MatMulNBits" not in operators(step_graph(program, rows, PLAIN))
    assert not predict_graph(Program("p", Parts(nn.Identity(), nn.Linear(4, 2))), numbers(4)) \
        .about.rounds  # fmt: skip


@pytest.mark.parametrize("kind", ["8 bits", "4 bits", "dynamic", "static, images"])
def test_operations_are_those_of_the_float_model(kind: str) -> None:
    """40 x 24 and 24 x 3, 2 for each; the image by torch's own count of its layers."""
    program, rows, _ = made(kind)
    plain = 2 * (40 * 24 + 24 * 3)
    if "images" in kind:  # 4 of 6 x 8 by 2 of 3 x 3, 6 of 3 x 1 by 2 of 2 x 3, 18 x 3
        plain = 2 * (4 * 48 * 18 + 6 * 3 * 12 + 54)
    assert program.flops(rows) == predict_graph(program, rows).about.flops == plain


def test_weights_that_are_built_in_are_made_floats_of_once() -> None:
    """ONNX Runtime's own account of a session: no DequantizeLinear is left in it."""
    program, rows, weights = made("8 bits")
    compute = ort(program, predict_graph(program, rows))
    for _ in range(2):
        compute.predict("p", weights, rows)
    (known,) = compute._settled.values()
    assert known.session is not None
    assert known.session.about.settings == {"session.disable_quant_qdq": "1"}
    import onnxruntime

    options = onnxruntime.SessionOptions()
    for key, value in known.session.about.settings.items():
        options.add_session_config_entry(key, value)
    left = _optimised(known.session._graph.model, options)
    assert left == {"Gemm", "Relu"} or left == {"Gemm"}, left


def _optimised(model: bytes, options: Any) -> set[str]:
    import tempfile

    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "it.onnx")
        options.log_severity_level = 4
        onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        found = onnx.load(options.optimized_model_filepath)
    return {node.op_type.removeprefix("Fused") for node in found.graph.node}


def test_a_module_in_two_places_has_its_weights_once() -> None:
    torch.manual_seed(0)
    layer = WeightOnlyLinear.of(nearest_codes(torch.randn(8, 8), 8), torch.randn(8))
    program = Program("p", Parts(nn.Sequential(layer, nn.Tanh(), layer), nn.Linear(8, 2)), curved)
    rows = numbers(8)
    graph = predict_graph(program, rows)
    assert graph.about.tied == {f"body.2.{k}": f"body.0.{k}" for k in ("codes", "scale", "bias")}
    weights = broadcast(frozen(program.initial()), 1)
    wanted = TorchCompute({"p": program}, "sequential").predict("p", weights, rows)
    for _ in range(2):
        near(ort(program, graph).predict("p", weights, rows), wanted)


# Golden outputs


@pytest.mark.parametrize(("kind", "room"), [("dynamic", golden.ROUNDED), ("8 bits", 1e-3)])
def test_goldens_of_rounded_activations_may_be_a_step_off(kind: str, room: float) -> None:
    """What is allowed is told, and no more: some steps of 1 / 127 of the largest number of a row
    where activations are rounded, else float error."""
    program, rows, _ = made(kind)
    graph = predict_graph(program, rows)
    compute = ort(program, graph)
    asked = Golden("predict", "p", {k: r.values[0] for k, r in rows.items()})
    right = golden.outputs(asked, compute, golden.first(compute, "p"))
    (checked,) = golden.check([replace(asked, out=right)], compute, [graph.about])
    assert checked.tolerance == room
    for share, fine in ((0.9 * room, True), (1.2 * room, False)):
        off = {k: a + np.float32(share) * np.abs(a).max() for k, a in right.items()}
        if fine:
            golden.check([replace(asked, out=off)], compute, [graph.about])
        else:
            with pytest.raises(PackageError, match="does not give its golden outputs"):
                golden.check([replace(asked, out=off)], compute, [graph.about])


# On a device without torch


def small(kind: str, width: int = tiny.WIDTH) -> nn.Module:
    """A frozen front of whole numbers and a back that is trained."""
    torch.manual_seed(5)
    front = nn.Sequential(nn.Linear(width, 6), nn.ReLU())
    x = torch.randn(40, width, generator=torch.Generator().manual_seed(1)) * 3
    make = {
        "8 bits": lambda: nearest(front, 8), "4 bits": lambda: nearest(front, 4, 16),
        "dynamic": lambda: dynamic(front), "static": lambda: static(front, [x]),
    }[kind]  # fmt: skip
    return nn.Sequential(make(), nn.Linear(6, tiny.CLASSES))


_TASK = tiny.task


def task(kind: str) -> Task:
    found = _TASK("classes")
    assert isinstance(found, Task)
    return replace(found, small=partial(small, kind))


DEVICE = """
import sys
for heavy in ("torch", "onnx", "onnxscript", "scipy", "sklearn", "matplotlib", "rich", "llvmlite"):
    sys.modules[heavy] = None  # importing it raises ImportError
from kitestring.devices.runtime import process
from kitestring.engines.strict import Shown
process.DeviceSide = Shown
sys.exit(process.main(sys.argv[1:]))
"""


@contextmanager
def device(package: Path, key: Path) -> Iterator[Pipe]:
    command = [sys.executable, "-c", DEVICE, str(package), "--trust", f"{key}.pub"]
    with Pipe(command) as pipe:
        yield pipe


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("static", "fedavg"), ("dynamic", "shipped"),
        pytest.param("4 bits", "fedavg", marks=pytest.mark.slow),
        pytest.param("8 bits", "device_only", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_packed_and_run_without_torch(
    kind: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in the simulator: states, answers, what devices keep, and bytes."""
    monkeypatch.setattr(tiny, "task", lambda *args, **how: task(kind))
    monkeypatch.setattr(tiny, "compute", cache(lambda *a: TorchCompute(tiny.programs(), "auto")))
    key, package = tmp_path / "maker.key", tmp_path / "it.kite"
    keys.create(key)
    built = build(Source(task(kind), tiny.collaboration(name)))
    archive.write(package, built.manifest, built.files, keys.load(key))
    here = tiny.engine()
    wanted = _finish(here, name)
    with device(package, key) as pipe:

        def hands(compute: Any, population: Any, store: Any) -> OtherProcess:
            return OtherProcess(None, {}, population, pipe)

        there = tiny.engine(hands=hands)
        found = _finish(there, name)
    close = 1e-5 if "bits" in kind else golden.ROUNDED_CHANGE
    for one, other in zip(found, wanted, strict=True):
        for a, b in zip(one, other, strict=True):
            assert tiny.apart(a, b) < close
    assert there.ledger.bytes == here.ledger.bytes
    runtime = built.manifest["runtime"]
    own = [o for o in runtime["operators"] if o.startswith("com.microsoft.")]
    assert own == (["com.microsoft.MatMulNBits"] if kind == "4 bits" else [])
    assert runtime["least"] == ("1.17" if own else "1.14")
    assert runtime["opset"] == 18


def _finish(engine: Any, name: str) -> list[list[Any]]:
    collaboration = tiny.collaboration(name)
    state = tiny.learn(collaboration, engine)
    engine.purpose = "serve"
    answers = tiny.answers(collaboration, state, engine)
    return [[state], answers, [tiny.private(engine, i) for i in range(tiny.DEVICES)]]


def test_codes_that_are_not_trained_come_back_as_they_were() -> None:
    """FedAvg's averages of changes: codes are whole numbers, and none changes by one."""
    compute = TorchCompute(tiny_programs("static"), "auto")
    first = compute.initial("small")
    assert {str(a.dtype) for a in first.values()} == {"float32", "int8", "uint8"}
    from kitestring.devices.profiles import PROFILES
    from kitestring.engines.local import LocalEngine, Setting
    from kitestring.exchange.store import Store

    engine = LocalEngine(
        Setting(tiny.population(), PROFILES["phone"], 4, 0.0, tiny.pool_rows(tiny.users())),
        compute, Store(), None,
    )  # fmt: skip
    state = tiny.learn(tiny.collaboration("fedavg"), engine)
    for k, a in first.items():
        same = np.array_equal(state.weights[k], a)
        assert same is (not k.startswith("back.")), k
        assert state.weights[k].dtype == a.dtype


def tiny_programs(kind: str) -> Any:
    from kitestring.tasks.programs import programs

    found = task(kind)
    return programs(found, 0, found.users.load(0)["train"]["x"][:2])


# Stock files


def big() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(),
                         nn.Linear(256, 10)).eval()  # fmt: skip


def picture() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
                         nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten(),
                         nn.Linear(512, 10)).eval()  # fmt: skip


FILES: dict[str, tuple[Any, float, int]] = {
    "8 bits": (lambda: nearest(big(), 8), 1 / 4, 0),
    "4 bits": (lambda: nearest(big(), 4, 128), 1 / 8, 0),
    # In 256 columns six groups of 25 bytes, with scales of 4 and zeros of half a byte; in 64 two.
    "4 bits in odd groups": (lambda: nearest(big(), 4, 50, symmetric=False), 187 / 1024, 0),
    "dynamic": (lambda: dynamic(big()), 1 / 4, 0),
    "static": (lambda: static(big(), [torch.randn(50, 64)]), 1 / 4, 0),
    # 16 of 25 at 12 x 12, 32 of 144 at 4 x 4, and 512 x 10.
    "images": (lambda: static(picture(), [torch.randn(20, 1, 12, 12)]), 1 / 4,
               16 * 25 * 144 + 32 * 144 * 16 + 5120),
}  # fmt: skip
SLOW = [k for k in FILES if k != "4 bits"]


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=pytest.mark.slow if k in SLOW else []) for k in FILES]
)
def test_a_stock_file_is_a_quarter_or_an_eighth(kind: str, tmp_path: Path) -> None:
    """`to_onnx` holds it against torch. Beside codes there are scales, biases and the graph, some
    9 kB. It counts as a float file would: 2 for each weight, and more for convolutions."""
    make, share, products = FILES[kind]
    torch.manual_seed(1)
    plain, row = (picture(), (1, 12, 12)) if kind == "images" else (big(), (64,))
    path = tmp_path / "it.onnx"
    found = to_onnx(make(), [Input("x", row)], path)
    onnx.checker.check_model(onnx.load(path))
    assert found.checks[0].tolerance == (1e-4 if "bits" in kind else 2e-2)
    weights = sum(p.numel() for p in plain.parameters() if p.ndim > 1)
    assert weights * 4 * share < path.stat().st_size < weights * 4 * share * 1.07 + 9000
    count = runner(Subject("it", "onnx", str(path)), Inputs(rows=3), 1).count()
    assert count.flops == 3 * 2 * (products or weights)
    assert not count.skipped
    assert count.moved is not None
    floats = weights * 4 * (kind in ("8 bits", "4 bits in odd groups"))  # once it is loaded
    if kind != "images":
        assert count.moved < floats + weights * 4 * share * 1.07 + 150_000


@pytest.mark.slow
def test_a_language_model_in_a_stock_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Transformer(50, 8, 32, 2, 1, tied=True).eval()
    for bits in (8, 4):
        made = nearest(model, bits, 16, embeddings=True, symmetric=False)
        found = to_onnx(made, [Input("x", (8,), "int64", 50)], tmp_path / "it.onnx")
        assert found.checks[0].off[0].share < 1e-5


def test_the_graphs_of_a_quantised_package_are_measured(tmp_path: Path) -> None:
    """A prediction with weights built in, as a device runs it when it is asked again."""
    from kitestring.collaborate.parameters.fedavg import FedAvg
    from kitestring.measure.subject import subjects

    keys.create(tmp_path / "mine")
    built = build(Source(task("4 bits"), FedAvg.trials(tiny.BUDGET)[0]))
    archive.write(tmp_path / "it.kite", built.manifest, built.files, keys.load(tmp_path / "mine"))
    found = subjects(str(tmp_path / "it.kite"), "", 4, (tmp_path / "mine.pub",), tmp_path)
    for subject in found:
        one = runner(subject, Inputs(rows=4), 1)
        one.load()
        one.run()
        forward = 4 * 2 * (8 * 6 + 6 * 3)
        wanted = forward if "predict" in subject.name else forward + 4 * 2 * 6 * 3
        assert one.count().flops == wanted
        if "predict" in subject.name:
            given = onnx.load(subject.source).graph.input
            assert [i.name for i in given] == ["x:x"]
    assert json.dumps(built.manifest["runtime"]["operators"]).count("MatMulNBits") == 1
