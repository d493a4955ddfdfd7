"""What a model takes, measured: counts by hand, limits that hold, processes that take turns.

No test asks how fast this machine is: a loaded one must pass too."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from kitestring.errors import PackageError, SettingError, TaskError
from kitestring.measure import bench, command, energy, limits, runtimes
from kitestring.measure import inputs as drawing
from kitestring.measure.bench import Setting, measure
from kitestring.measure.operations import Counted, count
from kitestring.measure.process import Exhausted, Process
from kitestring.measure.subject import Inputs, Subject, subjects
from told import told

MB = 10**6


def graph(
    path: Path,
    nodes: list[Any],
    inputs: list[Any],
    outputs: list[str],
    weights: dict[str, np.ndarray] | None = None,
    about: dict[str, str] | None = None,
) -> str:
    """An ONNX file of these nodes; inputs are (name, type, shape)."""
    kept = [onnx.numpy_helper.from_array(w, name) for name, w in (weights or {}).items()]
    made = helper.make_model(
        helper.make_graph(
            nodes, "g", [helper.make_tensor_value_info(*i) for i in inputs],
            [onnx.ValueInfoProto(name=name) for name in outputs], kept,
        ),
        opset_imports=[helper.make_opsetid("", 17)], ir_version=9,
    )  # fmt: skip
    for key, value in (about or {}).items():
        helper.set_model_props(made, {key: value})
    onnx.save(made, path)
    return str(path)


def floats(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


def linear(path: Path, size: int = 8) -> str:
    """x [n, size] @ w [size, size]."""
    return graph(
        path, [helper.make_node("MatMul", ["x", "w"], ["y"])],
        [("x", TensorProto.FLOAT, ["n", size])], ["y"], {"w": floats(size, size)},
    )  # fmt: skip


def hungry(path: Path, megabytes: int) -> str:
    """Makes one array of so many million bytes, and sums it."""
    return graph(
        path,
        [helper.make_node("Expand", ["x", "s"], ["y"]),
         helper.make_node("Exp", ["y"], ["z"]),
         helper.make_node("ReduceSum", ["z"], ["t"], keepdims=0)],
        [("x", TensorProto.FLOAT, ["n", 1])], ["t"],
        {"s": np.array([1, megabytes * MB // 4], np.int64)},
    )  # fmt: skip


def counted(path: str, **how: Any) -> Counted:
    found = asked(path, "count", **how)
    return Counted(**{**found, "skipped": tuple(found["skipped"])})


# Operations, by hand: 2 for each multiply-add


def _lstm(gates: int, operator: str) -> tuple[list[Any], dict[str, np.ndarray]]:
    weights = {"w": floats(1, gates * 3, 4), "r": floats(1, gates * 3, 3)}
    return [helper.make_node(operator, ["x", "w", "r"], ["y"], hidden_size=3)], weights


@pytest.mark.parametrize(
    ("nodes", "shape", "weights", "operations"),
    [
        # 5 rows x 2 x 3 sums of 4 products
        ([helper.make_node("MatMul", ["x", "w"], ["y"])], ["n", 2, 4], {"w": floats(4, 3)},
         2 * 5 * 2 * 3 * 4),
        # the left matrix [4, n] transposed: n x 3 sums of 4
        ([helper.make_node("Gemm", ["x", "w"], ["y"], transA=1)], [4, 5], {"w": floats(4, 3)},
         2 * 5 * 3 * 4),
        # 3x3 kernel over 6x6 with a border: 5 x 8 x 36 sums of (4 / 2 groups) x 9
        ([helper.make_node("Conv", ["x", "w"], ["y"], group=2, pads=[1, 1, 1, 1])],
         ["n", 4, 6, 6], {"w": floats(8, 2, 3, 3)}, 2 * 5 * 8 * 36 * 2 * 9),
        # depthwise, stride 2, no border: 5 x 4 x 2 x 2 sums of 9
        ([helper.make_node("Conv", ["x", "w"], ["y"], group=4, strides=[2, 2])],
         ["n", 4, 6, 6], {"w": floats(4, 1, 3, 3)}, 2 * 5 * 4 * 4 * 9),
        # each of 5 x 4 x 36 input elements is spread over 3 x 2 x 2
        ([helper.make_node("ConvTranspose", ["x", "w"], ["y"], strides=[2, 2])],
         ["n", 4, 6, 6], {"w": floats(4, 3, 2, 2)}, 2 * 5 * 4 * 36 * 12),
        # 7 steps, 5 rows, hidden 3, from 4: four gates, three gates
        (_lstm(4, "LSTM")[0], [7, "n", 4], _lstm(4, "LSTM")[1], 2 * 7 * 5 * 12 * (4 + 3)),
        (_lstm(3, "GRU")[0], [7, "n", 4], _lstm(3, "GRU")[1], 2 * 7 * 5 * 9 * (4 + 3)),
        # what is no product counts nothing
        ([helper.make_node("Relu", ["x"], ["y"])], ["n", 4], {}, 0),
    ],
)  # fmt: skip
def test_operations_are_those_counted_by_hand(
    tmp_path: Path, nodes: list[Any], shape: list[Any], weights: Any, operations: int
) -> None:
    path = graph(tmp_path / "m.onnx", nodes, [("x", TensorProto.FLOAT, shape)], ["y"], weights)
    found = counted(path, rows=5, dims={"n": 5})
    assert found.flops == operations
    assert found.skipped == ()


def test_bytes_moved_are_read_and_written_once_by_each_node(tmp_path: Path) -> None:
    """MatMul reads x [5, 8] and w [8, 8] and writes y [5, 8]; Relu reads and writes y; a Reshape
    moves nothing. 4 bytes each."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["y"]), helper.make_node("Relu", ["y"], ["z"]),
        helper.make_node("Reshape", ["z", "s"], ["f"]),
    ]  # fmt: skip
    path = graph(
        tmp_path / "m.onnx", nodes, [("x", TensorProto.FLOAT, ["n", 8])], ["f"],
        {"w": floats(8, 8), "s": np.array([-1])},
    )  # fmt: skip
    assert counted(path, rows=5).moved == 4 * (40 + 64 + 40 + 40 + 40)


def test_operators_that_cannot_be_counted_are_named(tmp_path: Path) -> None:
    node = helper.make_node("Einsum", ["x", "x"], ["y"], equation="ij,ik->jk")
    path = graph(tmp_path / "m.onnx", [node], [("x", TensorProto.FLOAT, ["n", 3])], ["y"])
    assert counted(path).skipped == ("Einsum",)


def test_events_of_anything_but_nodes_count_nothing() -> None:
    event = {
        "cat": "Node", "name": "mm_fence_before",
        "args": {"op_name": "MatMul", "input_type_shape": [], "output_type_shape": []},
    }  # fmt: skip
    assert count([event, {"cat": "Session", "name": "model_run"}]) == Counted(0.0, 0.0, None, ())


def test_energy_by_hand() -> None:
    """1000 operations and 80 bytes: 10 words of 64 bits, of 10 pJ or 2.6 nJ each."""
    low, high = energy.joules(1000, 80)
    assert low == pytest.approx(1000 * 2.3e-12 + 10 * 10e-12)
    assert high == pytest.approx(1000 * 70e-12 + 10 * 2.6e-9)


# Inputs


def test_inputs_are_drawn_by_type_shape_and_range(tmp_path: Path) -> None:
    """What is drawn here is what the process feeds: an index beyond the table would fail."""
    ranges = {"tokens": {"low": 30, "high": 50}, "scale": {"low": -1.0, "high": 1.0}}
    wanted = [
        ("tokens", "tensor(int64)", ["batch", "length"]),
        ("scale", "tensor(float)", ["batch"]),
        ("w:frozen", "tensor(float16)", [3, 2]),
        ("flag", "tensor(bool)", []),
        ("step", "tensor(int64)", []),
    ]
    found = drawing.drawn(wanted, ranges, Inputs(rows=4, dims={"length": 9}))
    assert {k: (a.shape, str(a.dtype)) for k, a in found.items()} == {
        "tokens": ((4, 9), "int64"), "scale": ((4,), "float32"), "w:frozen": ((3, 2), "float16"),
        "flag": ((), "bool"), "step": ((), "int64"),
    }  # fmt: skip
    assert found["tokens"].min() >= 30
    assert found["tokens"].max() < 50
    assert found["scale"].min() < 0 < found["scale"].max()
    assert (found["w:frozen"] >= 0).all()  # as squares that an optimiser keeps must be
    assert found["step"] == 1
    again = drawing.drawn(wanted, ranges, Inputs(rows=4, dims={"length": 9}))
    assert all((found[k] == again[k]).all() for k in found)


def test_a_range_in_the_metadata_reaches_the_graph(tmp_path: Path) -> None:
    """Gather from 10 rows takes any of 0..9 without complaint, and refuses 10 and more."""
    node = helper.make_node("Gather", ["table", "i"], ["y"])
    given = [("i", TensorProto.INT64, ["n"])]
    for low, high in ((0, 10), (10, 20)):
        about = {"kitestring": json.dumps({"inputs": {"i": {"low": low, "high": high}}})}
        path = graph(
            tmp_path / "m.onnx", [node], given, ["y"], {"table": floats(10, 3)}, about
        )  # fmt: skip
        with Process(subjects(path)[0], Inputs(rows=50), 1, None) as process:
            process.begin()
            process.ask("load")
            if high == 10:
                process.ask("run")
            else:
                with told(TaskError, "out of data bounds"):
                    process.ask("run")


def test_real_inputs_from_a_file(tmp_path: Path) -> None:
    path = linear(tmp_path / "m.onnx")
    values = tmp_path / "x.npz"
    np.savez(values, x=floats(6, 8))
    (subject,) = subjects(path, str(values))
    with Process(subject, Inputs(), 1, None) as process:
        process.begin()
        assert process.ask("count")["flops"] == 2 * 6 * 8 * 8  # six rows: those of the file
    np.savez(values, z=floats(6, 8))
    with Process(subject, Inputs(), 1, None) as process, told(SettingError, "'x' is missing", "z"):
        process.begin()
        process.ask("load")


@pytest.mark.parametrize(
    ("shapes", "says"),
    [
        ("1x28x", "1x28x"),
        ("a", "no shape"),
        ("3:float8", "float8"),
        ("-1x3", "-1x3"),
        ("6:int64:0", "below 0"),
        (f"6:int64:{2**63}", "below 9"),
    ],
)
def test_shapes_that_are_none(shapes: str, says: str) -> None:
    with told(SettingError, says, mend="Write 1x28x28"):
        drawing.row(shapes)


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=4), st.sampled_from(["float32", "int64"]),
    st.integers(1, 9),
)  # fmt: skip
def test_shapes_are_read_as_they_are_written(shape: list[int], dtype: str, below: int) -> None:
    text = "x".join(map(str, shape)) + f":{dtype}:{below}"
    assert drawing.row(text) == drawing.Row(tuple(shape), dtype, below)


def test_an_open_size_must_be_given(tmp_path: Path) -> None:
    wanted = [("x", "tensor(float)", ["n", "length", "n", None])]
    with told(SettingError, "axis 1", mend="--dim length=N"):
        drawing.drawn(wanted, {}, Inputs())
    with told(SettingError, "axis 3", mend="--dim x.3=N"):
        drawing.drawn(wanted, {}, Inputs(dims={"length": 2}))
    found = drawing.drawn(wanted, {}, Inputs(rows=5, dims={"length": 2, "x.3": 7}))
    assert found["x"].shape == (5, 2, 5, 7)


# Times


def test_percentiles_by_hand() -> None:
    """Of 1..100: halfway between 50 and 51; 95 and a twentieth of the way to 96."""
    found = bench.spread([float(x) for x in range(100, 0, -1)])
    assert (found.p50, found.p95, found.mean) == pytest.approx((50.5, 95.05, 50.5))


def test_a_ratio_is_that_of_runs_side_by_side() -> None:
    """A machine that slows down by 10 in the middle slows both: the ratio stays."""
    ours, theirs = [1.0, 1.0, 10.0, 10.0, 1.0], [2.0, 2.0, 20.0, 20.0, 2.0]
    assert bench.ratio(ours, theirs) == bench.Ratio(0.5, 0.5, 0.5)


class Scripted:
    """A process that says what it is told to say, and notes when it was asked."""

    def __init__(self, name: str, seconds: list[float], log: list[str]) -> None:
        self.name, self.seconds, self.log = name, iter(seconds), log

    def ask(self, what: str, **how: Any) -> dict[str, Any]:
        if what != "run":
            return {"seconds": 0.25, "bytes": 1234}
        if "untimed" not in how:
            return {}  # to warm up
        self.log.append(f"{self.name}{how['untimed']}")
        seconds = next(self.seconds)
        if seconds < 0:
            raise Exhausted
        return {"wall": seconds, "cpu": seconds / 2}


def turns(ours: list[float], theirs: list[float], runs: int) -> tuple[list[Any], list[str]]:
    log: list[str] = []
    made: list[Any] = []
    for name, seconds in (("a", ours), ("b", theirs)):
        process: Any = Scripted(name, seconds, log)
        made.append(bench._Worker(process, Subject(name, "onnx", name)))
    bench._turns(made, Setting(runs=runs, memory=20 * MB), lambda *_: None)
    return made, log


def test_processes_take_turns_and_each_is_first_as_often() -> None:
    """Runs under 5 ms are timed after one that is not, from the second on."""
    (ours, theirs), log = turns([0.001, 0.002, 0.003, 0.004], [1.0, 2.0, 3.0, 4.0], 4)
    assert [entry[0] for entry in log] == list("abbaabba")
    assert [entry for entry in log if entry[0] == "a"] == ["a0", "a1", "a1", "a1"]
    assert [entry for entry in log if entry[0] == "b"] == ["b0"] * 4
    found = ours.measured(Counted(6e6, 0.0), Setting())
    assert found.wall.p50 == pytest.approx(0.0025)
    assert found.cpu.p50 == pytest.approx(0.00125)
    assert found.rate == pytest.approx(6e6 / 0.0025)
    assert (found.load, found.peak) == (0.25, 1234)
    assert theirs.walls == [1.0, 2.0, 3.0, 4.0]


def test_one_that_is_killed_is_a_result_and_the_other_goes_on() -> None:
    (ours, theirs), _ = turns([1.0, -1.0], [1.0] * 4, 4)
    assert ours.failed == "needs more than the limit of 20.0 MB"
    assert ours.measured(Counted(1.0, 1.0), Setting()).wall is None
    assert len(theirs.walls) == 4


@pytest.fixture(autouse=True)
def left_as_it_was() -> Iterator[None]:
    """What a measured process may do to itself, where a test does it in this one."""
    paths, modules, torch = list(sys.path), set(sys.modules), sys.modules.get("torch")
    threads = torch.get_num_threads() if torch else None
    yield
    sys.path[:] = paths
    for name in set(sys.modules) - modules:
        if "pytest-of" in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]
    if threads:
        sys.modules["torch"].set_num_threads(threads)


def asked(path: str, *what: str, **how: Any) -> dict[str, Any]:
    """The last answer of a measured process's work, done in this one: torch is imported once."""
    from kitestring.measure.child import Work, answer

    subject, work = subjects(path)[0], Work()
    first = {"subject": vars(subject), "inputs": vars(Inputs(**how)), "threads": 1, "core": None}
    found = answer(work, {"do": "begin", **first})
    for request in what:
        found = found if "error" in found else answer(work, {"do": request})
    return found


def test_wall_and_processor_time_are_told_apart(tmp_path: Path) -> None:
    """A module that sleeps 30 ms takes that long on the wall, and of the processor less."""
    (tmp_path / "sleepy.py").write_text(
        "import time\nfrom torch import nn\n"
        "class Sleepy(nn.Module):\n"
        "    def forward(self, x):\n"
        "        time.sleep(0.03)\n"
        "        return x\n"
    )
    done = asked(f"{tmp_path / 'sleepy.py'}:Sleepy", "load", "run", "run", shapes=("3",))
    assert done["wall"] >= 0.03
    assert done["cpu"] < done["wall"]


def test_operations_of_a_module_are_those_counted_by_hand(tmp_path: Path) -> None:
    """4 rows: [12] @ [12, 3]; and an LSTM of 7 steps, hidden 5, from 6, which torch itself does
    not count. Weights in bytes: 4 for each of 12 * 3 + 3. Linear reads x, weights and bias, and
    writes y; the view of the weights that it takes moves nothing."""
    (tmp_path / "mod.py").write_text(
        "from torch import nn\nline = nn.Linear(12, 3)\n"
        "class Steps(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.inner = nn.LSTM(6, 5, batch_first=True)\n"
        "    def forward(self, x): return self.inner(x)[0]\n"
    )
    found = asked(f"{tmp_path / 'mod.py'}:line", "count", rows=4)
    assert found["flops"] == 2 * 4 * 12 * 3
    assert found["weights"] == 4 * (12 * 3 + 3)
    assert found["moved"] == 4 * (4 * 12 + 12 * 3 + 3 + 4 * 3)
    found = asked(f"{tmp_path / 'mod.py'}:Steps", "count", rows=4, shapes=("7x6",))
    assert found["flops"] == 2 * 4 * 7 * (20 * 6 + 20 * 5)


def test_attention_and_single_rows_are_counted(tmp_path: Path) -> None:
    """5 tokens of 16 through a layer with 32 hidden: queries, keys and values 16 x 48, both
    products of attention 5 x 16 x 5, its output 16 x 16, 16 x 32 and back. A matrix by a vector:
    12 x 9. In evaluation torch would fuse the first and count neither."""
    (tmp_path / "heads.py").write_text(
        "import torch\nfrom torch import nn\n"
        "layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)\n"
        "class Vector(nn.Module):\n"
        "    def forward(self, x): return torch.ones(9, 12) @ x[0] + x.sum()\n"
    )
    found = asked(f"{tmp_path / 'heads.py'}:layer", "count", shapes=("5x16",))
    assert found["flops"] == 2 * 5 * (16 * 48 + 2 * 5 * 16 + 16 * 16 + 2 * 16 * 32)
    assert asked(f"{tmp_path / 'heads.py'}:Vector", "count", shapes=("12",))["flops"] == 2 * 12 * 9


def test_inputs_of_a_file_go_to_the_arguments_that_they_name(tmp_path: Path) -> None:
    from torch import nn

    from kitestring.measure.modules import ordered

    class Two(nn.Module):
        def forward(self, x: Any, mask: Any = None, scale: Any = None) -> Any:
            return x

    a, b = np.zeros(1), np.ones(1)
    assert ordered(Two(), {"mask": b, "x": a}, "f.npz") == [a, b]
    assert ordered(Two(), {"arr_0": b, "arr_1": a}, "f.npz") == [b, a]
    for odd in ({"y": a}, {"x": a, "scale": b}):
        with told(SettingError, "forward takes x, mask, scale", "f.npz", "before the last"):
            ordered(Two(), odd, "f.npz")


def test_what_speaks_of_seats_is_no_want_of_memory() -> None:
    assert not runtimes.starved(ValueError("no allocation of seats"))
    for said in ("std::bad_alloc", "Failed to allocate memory for requested buffer of size 9",
                 "DefaultCPUAllocator: can't allocate memory"):  # fmt: skip
        assert runtimes.starved(RuntimeError(said))


# Memory


def test_peak_memory_of_a_known_amount(tmp_path: Path) -> None:
    """64 MB of ones, let go again; what else a run takes is little beside it."""
    (tmp_path / "large.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class Large(nn.Module):\n"
        "    def forward(self, x): return torch.ones(16_000_000).sum() + x\n"
    )
    (subject,) = subjects(f"{tmp_path / 'large.py'}:Large")
    with Process(subject, Inputs(shapes=("3",)), 1, None) as process:
        assert process.begin().startswith("torch ")
        process.ask("load")
        before = process.ask("peak")["bytes"]
        process.ask("run")
        peak = process.ask("peak")["bytes"]
    assert before < 40 * MB
    assert 64 * MB <= peak < 64 * MB + 40 * MB


def test_weights_that_are_there_at_import_count_as_memory_too() -> None:
    """They are copied when the module is loaded, after the imports."""
    from torch import nn

    from kitestring.measure.modules import made

    held = nn.Sequential(nn.Linear(3, 2), nn.Dropout())
    copy = made(held, "held")
    assert not copy.training
    assert held.training
    assert copy[0].weight.data_ptr() != held[0].weight.data_ptr()
    assert bool((copy[0].weight == held[0].weight).all())


@pytest.fixture(params=["group", "address space"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How memory is limited: by a control group, or, where there is none, by RLIMIT_AS."""
    if request.param == "group":
        try:
            limits.room(64 * MB).close()
        except limits.Unavailable as problem:
            pytest.skip(str(problem))
    else:

        def none(bytes: int) -> limits.Group:
            raise limits.Unavailable("there is none")

        monkeypatch.setattr(limits, "room", none)
    return str(request.param)


def test_more_than_the_memory_limit_is_a_result(tmp_path: Path, way: str) -> None:
    """300 MB under a limit of 150 MB is killed or refused; 10 MB are not."""
    setting = Setting(runs=2, memory=150 * MB)
    (large,) = subjects(hungry(tmp_path / "large.onnx", 300))
    (small,) = subjects(hungry(tmp_path / "small.onnx", 10))
    report = measure([large], [small], setting)
    pair = report.pairs[0]
    assert pair.subject.failed == "needs more than the limit of 150 MB"
    assert pair.subject.wall is None
    assert pair.subject.flops == 0  # counted in a process without the limit
    assert pair.baseline is not None
    assert pair.baseline.failed == ""
    assert pair.wall is None
    assert any("address space" in note for note in report.notes) is (way != "group")
    assert leftovers() == []


def leftovers() -> list[str]:
    """Control groups of ours that are still there."""
    found = []
    for controller in ("cpu", "memory"):
        try:
            folder = limits.home(controller).folder  # type: ignore[arg-type]
        except limits.Unavailable:
            continue
        found += [str(p) for p in folder.glob(f"kitestring-{os.getpid()}-*")]
    return found


# A share of the processor


@pytest.mark.parametrize(("share", "most"), [(0.5, 0.75), (0.1, 0.3)])
def test_a_share_of_a_core_is_that_share_of_the_time(
    tmp_path: Path, share: float, most: float
) -> None:
    """Two processes in turn, without a pause, on one core, under half of it or a tenth of it
    together, for 0.6 s: they get no more. Less, where others want the core too: that the kernel
    holds them back is looked at for the tenth alone."""
    try:
        group = limits.quota(share)
    except limits.Unavailable as problem:
        pytest.skip(str(problem))
    (subject,) = subjects(linear(tmp_path / "m.onnx", 512))
    core = max(os.sched_getaffinity(0))
    with (
        group,
        Process(subject, Inputs(rows=64), 1, core) as one,
        Process(subject, Inputs(rows=64), 1, core) as other,
    ):
        for process in (one, other):
            process.begin()
            process.ask("load")
            group.add(process.id)
        cpu, start = 0.0, time.monotonic()
        while time.monotonic() - start < 0.6:
            for process in (one, other):
                cpu += process.ask("run", untimed=0)["cpu"]
        found = cpu / (time.monotonic() - start)
        said = (group.folder / "cpu.stat").read_text().split()
    assert 0 < found < most
    if share == 0.1:
        assert int(said[said.index("nr_throttled") + 1]) > 0
    assert not group.folder.exists()


def groups(tmp_path: Path, mounts: str, own: str) -> tuple[Path, Path]:
    (tmp_path / "mounts").write_text(mounts)
    (tmp_path / "own").write_text(own)
    return tmp_path / "mounts", tmp_path / "own"


def test_version_one_is_found_below_our_own_group(tmp_path: Path) -> None:
    (tmp_path / "cpu" / "mine").mkdir(parents=True)
    where = groups(
        tmp_path, f"cgroup {tmp_path}/cpu cgroup rw,cpu,cpuacct 0 0\n",
        "4:memory:/other\n3:cpu,cpuacct:/mine\n0::/\n",
    )  # fmt: skip
    assert limits.home("cpu", *where) == limits.Home(tmp_path / "cpu" / "mine", 1)
    with pytest.raises(limits.Unavailable, match="memory is mounted"):
        limits.home("memory", *where)


def test_version_two_is_found_where_the_controller_is_handed_down(tmp_path: Path) -> None:
    """A group that has processes hands nothing down: its parent may."""
    (tmp_path / "two" / "user" / "me").mkdir(parents=True)
    (tmp_path / "two" / "cgroup.subtree_control").write_text("cpuset cpu memory\n")
    (tmp_path / "two" / "user" / "cgroup.subtree_control").write_text("memory\n")
    (tmp_path / "two" / "user" / "me" / "cgroup.subtree_control").write_text("\n")
    where = groups(tmp_path, f"cgroup2 {tmp_path}/two cgroup2 rw 0 0\n", "0::/user/me\n")
    assert limits.home("cpu", *where) == limits.Home(tmp_path / "two", 2)
    assert limits.home("memory", *where) == limits.Home(tmp_path / "two" / "user", 2)
    (tmp_path / "two" / "cgroup.subtree_control").write_text("memory\n")
    with pytest.raises(limits.Unavailable, match="no control group for cpu can be made"):
        limits.home("cpu", *where)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands in for a control group's: files that are written there are kept."""
    monkeypatch.setattr(limits.Group, "close", lambda self: None)
    return tmp_path


def test_what_is_written_into_a_group(folder: Path) -> None:
    """By the kernel's documents: microseconds of quota in a period; bytes; the quota is at least
    a millisecond, so small shares have a longer period."""

    def kept(group: limits.Group) -> dict[str, str]:
        return {p.name: p.read_text() for p in group.folder.iterdir()}

    assert kept(limits.quota(0.5, limits.Home(folder, 2))) == {"cpu.max": "5000 10000"}
    assert kept(limits.quota(0.05, limits.Home(folder, 2))) == {"cpu.max": "1000 20000"}
    assert kept(limits.quota(2, limits.Home(folder, 1))) == {
        "cpu.cfs_period_us": "10000", "cpu.cfs_quota_us": "20000",
    }  # fmt: skip
    assert kept(limits.room(10 * MB, limits.Home(folder, 2))) == {
        "memory.max": "10000000", "memory.swap.max": "0",
    }  # fmt: skip
    assert kept(limits.room(10 * MB, limits.Home(folder, 1))) == {
        "memory.limit_in_bytes": "10000000"
    }


def test_without_control_groups_the_quota_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: Any) -> limits.Home:
        raise limits.Unavailable("no control group for cpu is mounted")

    monkeypatch.setattr(limits, "home", none)
    with told(SettingError, "no control group for cpu is mounted", mend="leave --cpu-quota out"):
        measure(subjects(linear(tmp_path / "m.onnx")), [], Setting(runs=1, quota=0.5))


# A package


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FedAvg on the tiny task, signed: its step and its answers. The key is beside it."""
    import tiny
    from kitestring.collaborate.parameters.fedavg import FedAvg
    from kitestring.pack.build import Source, build
    from kitestring.package import archive, keys

    folder = tmp_path_factory.mktemp("package")
    keys.create(folder / "mine")
    keys.create(folder / "other")
    made = build(Source(tiny.task(), FedAvg.trials(tiny.BUDGET)[0]))
    archive.write(folder / "it.kite", made.manifest, made.files, keys.load(folder / "mine"))
    return folder


def test_the_graphs_of_a_package_are_measured_one_by_one(package: Path, tmp_path: Path) -> None:
    """The small model is 8-6-3. A row's answer: 2 (48 + 18) operations; a step on it goes there
    and, for both layers' weights and the inner activations, back: 2 (48 + 18 + 18)."""
    kept = tmp_path / "all.json"
    words = [package / "it.kite", "--trust", package / "mine.pub", "--rows", 7, "--runs", 2]
    command.run(kitestring(*words, "--baseline", package / "it.kite", "--json", kept), "")
    pairs = json.loads(kept.read_text())["pairs"]
    found = {p["subject"]["name"]: p["subject"]["flops"] for p in pairs}
    assert found == {"predict small.answer": 7 * 132, "step small": 7 * (132 + 168)}
    assert all(p["baseline"]["name"] == p["subject"]["name"] for p in pairs)
    assert all(len(p["subject"]["walls"]) == 2 for p in pairs)


def test_a_package_is_not_run_before_it_is_verified(package: Path, tmp_path: Path) -> None:
    path = str(package / "it.kite")
    with told(SettingError, "signature", where="it.kite", mend="--trust"):
        subjects(path)
    with pytest.raises(PackageError):
        subjects(path, "", 1, (package / "other.pub",), tmp_path)
    with told(SettingError, "brings its own inputs", mend="--inputs"):
        subjects(path, "x.npz", 1, (package / "mine.pub",), tmp_path)
    assert list(tmp_path.iterdir()) == []


# The command


def kitestring(*words: object) -> argparse.Namespace:
    top = argparse.ArgumentParser()
    command.add(top.add_subparsers(dest="command", required=True))
    return top.parse_args(["measure", *map(str, words)])


def test_a_measurement_with_a_baseline(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hand counts: [3, 8] @ [8, 8] and [3, 64] @ [64, 64]."""
    monkeypatch.setenv("COLUMNS", "120")
    small, large = linear(tmp_path / "small.onnx", 8), linear(tmp_path / "large.onnx", 64)
    kept = tmp_path / "all.json"
    words = [small, "--baseline", large, "--rows", 3, "--runs", 7, "--json", kept]
    command.run(kitestring(*words), "")
    said = capsys.readouterr().out
    for part in ("3 rows, 1 thread, 7 runs, in turn with the baseline", "energy~", "small",
                 "large", "ONNX Runtime", "baseline", "×"):  # fmt: skip
        assert part in said
    (pair,) = json.loads(kept.read_text())["pairs"]
    assert pair["subject"]["flops"] == 2 * 3 * 8 * 8
    assert pair["baseline"]["flops"] == 2 * 3 * 64 * 64
    for found in (pair["subject"], pair["baseline"]):
        assert len(found["walls"]) == len(found["cpus"]) == 7
        assert found["wall"]["p50"] == pytest.approx(np.median(found["walls"]))
        assert found["size"] == Path(small if found is pair["subject"] else large).stat().st_size
        assert 0 < found["joules"][0] < found["joules"][1]
    walls = [pair[which]["walls"] for which in ("subject", "baseline")]
    assert pair["wall"]["median"] == pytest.approx(np.median(np.divide(*walls)))


def test_a_device_without_rich_prints_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)
    command.run(kitestring(linear(tmp_path / "m.onnx"), "--runs", 2), "")
    assert json.loads(capsys.readouterr().out)["pairs"][0]["subject"]["flops"] == 2 * 8 * 8
    with told(SettingError, "needs rich", mend="pip install"):
        command.run(kitestring("--profiles"), "")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "no model named"),
        (["no.onnx"], "no such file"),
        (["model.h5"], "'model.h5' is no model"),
        (["nothere.py:net"], "no such file"),
        (["broken.onnx"], "ONNX Runtime cannot load it"),
        (["fine.onnx", "--runs", "0"], "--runs 0"),
        (["fine.onnx", "--rows", "0"], "--rows 0"),
        (["fine.onnx", "--memory", "much"], "'much' is no size"),
        (["fine.onnx", "--memory", "5kB"], "too small"),
        (["fine.onnx", "--cpu-quota", "900"], "--cpu-quota 900"),
        (["fine.onnx", "--dim", "n"], "--dim 'n'"),
        (["fine.onnx", "--like", "fone"], "Did you mean 'phone'"),
        (["fine.onnx", "--json", "no/such/folder.json"], "cannot be written"),
        (["fine.onnx", "--json", "a.toml", "--save-profile", "./a.toml"], "name one file"),
        (["fine.onnx", "--inputs", "no.npz"], "no .npz file of inputs"),
        (["fine.onnx", "--baseline", "no.onnx"], "no such file"),
        (["relu.onnx", "--save-profile", "p.toml"], "no profile can be saved"),
    ],
)
def test_what_is_wrong_is_one_line(
    words: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if "broken.onnx" in words:
        Path("broken.onnx").write_bytes(b"not a graph")
    linear(Path("fine.onnx"))
    relu = helper.make_node("Relu", ["x"], ["y"])
    graph(Path("relu.onnx"), [relu], [("x", TensorProto.FLOAT, ["n", 3])], ["y"])
    extra = [] if "--runs" in words else ["--runs", "1"]
    with pytest.raises(SettingError) as caught:
        command.run(kitestring(*words, *extra), "")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not Path("p.toml").exists()


@pytest.mark.parametrize(
    ("body", "kind", "says"),
    [
        ("raise ValueError('my mistake')", TaskError, "mine.py:1"),
        ("def net(): return 3", TaskError, "gives int, not a module"),
        ("def net(): raise KeyError('my mistake')", TaskError, "KeyError"),
        ("import torch\nnet = torch.nn.Conv2d(3, 4, 3)", SettingError, "--input 1x28x28"),
        ("import torch\nnet = torch.nn.Sequential(*[torch.nn.Linear(4, 3) for _ in 'ab'])",
         SettingError, "(2, 4)"),
        ("import threading, torch\nnet = torch.nn.Linear(4, 3)\nnet.lock = threading.Lock()",
         TaskError, "it cannot be copied"),
        ("other = 1", SettingError, "no 'net' there"),
    ],
)  # fmt: skip
def test_a_fault_in_a_users_module_is_one_line_too(
    tmp_path: Path, body: str, kind: type[Any], says: str
) -> None:
    (tmp_path / "mine.py").write_text(body)
    name, *parts = asked(f"{tmp_path / 'mine.py'}:net", "load", "run", rows=2)["error"]
    assert name == kind.__name__
    assert says in " ".join(parts)
    assert not any("\n" in part for part in parts)


def test_a_module_that_is_not_there() -> None:
    name, what, *_ = asked("no.such.module:net")["error"]
    assert (name, what) == ("SettingError", "no module 'no'")


def test_a_process_that_dies_says_how(tmp_path: Path) -> None:
    (subject,) = subjects(linear(tmp_path / "m.onnx"))
    with Process(subject, Inputs(), 1, None) as process:
        process.begin()
        os.kill(process.id, signal.SIGSEGV)
        with told(TaskError, "SIGSEGV", where="m.onnx", mend="by itself"):
            process.ask("load")
    with Process(subject, Inputs(), 1, None) as process:
        process.begin()
        os.kill(process.id, signal.SIGKILL)  # as the kernel does where there is no more memory
        with pytest.raises(Exhausted):
            process.ask("load")


@pytest.mark.parametrize(
    ("name", "package"),
    [("m.pte", "executorch"), ("m.gguf", "llama-cpp-python"), ("m.onnx", "onnxruntime")],
)
def test_a_runtime_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str
) -> None:
    from kitestring.measure.runtimes import runner

    for module in ("executorch", "llama_cpp", "onnxruntime"):
        monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / name).write_bytes(b"")
    (subject,) = subjects(str(tmp_path / name))
    with told(SettingError, package, mend=f"pip install {package}"):
        runner(subject, Inputs(), 1)


def test_onnx_is_measured_without_torch(tmp_path: Path) -> None:
    """As on a device: what is heavy cannot be imported in the command's process."""
    path = linear(tmp_path / "m.onnx")
    code = (
        "import sys\n"
        "for heavy in ('torch', 'onnx', 'rich', 'scipy', 'matplotlib'): sys.modules[heavy] = None\n"
        "from kitestring.measure import child, packaged, runtimes\n"
        "from kitestring.measure.command import main\n"
        f"sys.exit(main(['measure', {path!r}, '--runs', '1']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["pairs"][0]["subject"]["flops"] == 2 * 8 * 8


def test_each_subject_finds_the_baseline_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several; and none, where no name is the same."""
    met: list[tuple[str, str | None]] = []

    def noted(subject: Subject, against: Subject | None, *_: Any) -> bench.Pair:
        met.append((subject.name, against.name if against else None))
        return bench.Pair(bench.Measured(subject.name, "", 0))

    monkeypatch.setattr(bench, "_pair", noted)
    a, b, c = (Subject(name, "onnx", name) for name in "abc")
    measure([a, b], [b, c], Setting())
    measure([a, b], [c], Setting())
    assert met == [("a", None), ("b", "b"), ("a", "c"), ("b", "c")]


def test_sizes_as_people_write_them() -> None:
    found = [command.size(text) for text in ("256MB", "1.5 GB", "64MiB", "2097152B")]
    assert found == [256 * MB, 1500 * MB, 64 * 2**20, 2**21]


def test_weights_beside_an_onnx_file_count_as_its_size(tmp_path: Path) -> None:
    path = Path(linear(tmp_path / "m.onnx"))
    alone = subjects(str(path))[0].size
    assert alone == path.stat().st_size
    (tmp_path / "m.onnx.data").write_bytes(b"x" * 1000)
    assert subjects(str(path))[0].size == alone + 1000


def test_settings_are_replaced_whole() -> None:
    """The checks of a setting hold for every copy of it."""
    with pytest.raises(SettingError, match="--threads 0"):
        replace(Setting(), threads=0)
