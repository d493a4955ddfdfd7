"""Exports for phones: each is run in its target's own runtime, and a wrong one is never kept."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from kitestring.apps.recommender import movielens
from kitestring.errors import ExportError, SettingError
from kitestring.export import checked, onnx_file
from kitestring.export.checked import Input, held, unproven
from kitestring.export.onnx_file import to_onnx
from kitestring.tasks import digits
from kitestring.tasks.layers import Transformer
from kitestring.tasks.llama import Llama, LlamaConfig


class Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 8, 2, batch_first=True)
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.lstm(x)[0][:, -1])  # type: ignore[no-any-return]


def llama(words: int = 40, scale: float = 0.2, tied: bool = False, **settings: Any) -> Llama:
    """Weights larger than a fresh model's: where every position looks alike, rotation is unseen."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
             "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}  # fmt: skip
    model = Llama(
        LlamaConfig(words, **(sizes | settings), max_position_embeddings=160,
                    tie_word_embeddings=tied)
    )  # fmt: skip
    for p in model.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=scale)
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], Input]] = {
    "cnn": (digits._large, Input("x", (1, 16, 16), "uint8")),
    "recommender": (movielens._small, Input("x", (50,), "int64", 1683)),
    "transformer": (
        lambda: Transformer(30, 12, 16, 2, 1, dropout=0.3, padding=True),
        Input("x", (12,), "int64", 30),
    ),
    "lstm": (Lstm, Input("x", (5, 6))),
    "llama": (llama, Input("x", (9,), "int64", 40)),
}


# --- ONNX


@pytest.mark.parametrize(
    "kind",
    ["cnn", "recommender", "transformer", "lstm", pytest.param("llama", marks=pytest.mark.slow)],
)
def test_an_onnx_file_gives_what_torch_gives(kind: str, tmp_path: Path) -> None:
    """Asked once more here: another number of rows, other numbers, ONNX Runtime by itself."""
    import onnx
    import onnxruntime

    torch.manual_seed(1)
    factory, given = MODELS[kind]
    module = factory().train()
    export = to_onnx(module, [given], tmp_path / "m.onnx")
    assert module.training, "as it was"
    assert all(part.training for part in module.modules())
    assert [c.runtime.split(", ")[1] for c in export.checks] == ["CPU"]
    assert max(o.share for o in export.checks[0].off) < checked.TOLERANCE

    rng = np.random.default_rng(5)
    shape = (5, *given.shape)
    draw = rng.normal(size=shape) if given.high is None else rng.integers(0, int(given.high), shape)
    x = np.asarray(draw, given.dtype)
    module.eval()
    with torch.no_grad():
        wanted = module(torch.from_numpy(x)).numpy()
    session = onnxruntime.InferenceSession(export.path, providers=["CPUExecutionProvider"])
    (found,) = session.run(["out"], {"x": x})
    # float32 in another order: some 1e-7 for each of a few layers.
    assert np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()

    model = onnx.load(export.path)
    onnx.checker.check_model(model)
    assert (model.ir_version, model.opset_import[0].version) == (8, 18), "old runtimes read it"
    assert {n.domain for n in model.graph.node} == {""}, "ordinary operators only"
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "rows"
    content = export.path.read_bytes()
    assert b"site-packages" not in content, "nothing of the machine that exported"
    assert str(Path(__file__).parents[1]).encode() not in content


def test_inputs_and_outputs_keep_their_names(tmp_path: Path) -> None:
    import onnxruntime

    class Two(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> dict[str, Any]:
            return {"sum": a + b, "both": (a, 2 * b)}

    inputs = [Input("left", (2,), "float32", 7), Input("right", (2,))]
    export = to_onnx(Two(), inputs, tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(export.path, providers=["CPUExecutionProvider"])
    left, right = np.float32([[1, 2]]), np.float32([[10, 20]])
    found = session.run(["sum", "both0", "both1"], {"left": left, "right": right})
    assert [a.tolist() for a in found] == [[[11, 22]], [[1, 2]], [[20, 40]]]
    kept = session.get_modelmeta().custom_metadata_map["kitestring.drawn"]
    assert json.loads(kept) == {"inputs": {"left": {"low": 0, "high": 7}}}, "as they were drawn"


class Shifted(nn.Module):
    def forward(
        self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None
    ) -> Tensor:
        x = x if scale is None else x * scale
        return x if shift is None else x + shift


def test_inputs_called_like_arguments_are_those_arguments(tmp_path: Path) -> None:
    """In whatever order they are given, and though one between them is left out."""
    import onnxruntime

    class Minus(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x - 2 * y

    one, ten = np.float32([[1, 1]]), np.float32([[10, 10]])
    for module, other, wanted in ((Minus(), "y", -19), (Shifted(), "shift", 11)):
        inputs = [Input(other, (2,)), Input("x", (2,))]
        export = to_onnx(module, inputs, tmp_path / "m.onnx")
        assert [i.name for i in export.inputs] == ["x", other], "in the order of arguments"
        session = onnxruntime.InferenceSession(export.path, providers=["CPUExecutionProvider"])
        assert session.run(None, {"x": one, other: ten})[0].tolist() == [[wanted, wanted]]


def test_an_argument_that_goes_by_position_needs_those_before_it(tmp_path: Path) -> None:
    class Position(nn.Module):
        def forward(self, x: Tensor, a: Any = None, b: Any = None, /) -> Tensor:
            return x

    with pytest.raises(SettingError, match="b goes by position, and a before it is left out"):
        to_onnx(Position(), [Input("x", (2,)), Input("b", (2,))], tmp_path / "m.onnx")


class Changing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x -= 0.5
        return x.relu_()


def test_a_module_that_changes_its_input_is_checked_on_what_was_drawn(tmp_path: Path) -> None:
    given = [Input("x", (3,))]
    export = to_onnx(Changing(), given, tmp_path / "m.onnx")
    for kept, fresh, wanted in zip(export.cases, checked.drawn(given), export.wanted, strict=True):
        assert np.array_equal(kept["x"], fresh["x"])
        assert np.array_equal(wanted["out"], np.maximum(kept["x"] - np.float32(0.5), 0))


def test_executorch_refuses_a_module_that_changes_its_input(tmp_path: Path) -> None:
    """Its program would return the changed input before the outputs."""
    pytest.importorskip("executorch")
    from kitestring.export.executorch import to_executorch

    with pytest.raises(ExportError, match=r"changes its input x, .*x\.clone\(\)"):
        to_executorch(Changing(), [Input("x", (3,))], tmp_path / "m.pte")
    assert list(tmp_path.iterdir()) == []


class Counting(nn.Module):
    """Gives its own memory, which the next call changes."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += 1
        return x, self.calls


def spoil(monkeypatch: pytest.MonkeyPatch, by: float) -> None:
    """The translation as if it were wrong: a bias is off."""
    true = onnx_file._stripped

    def spoiled(model: Any) -> dict[str, str]:
        import onnx

        (bias,) = (t for t in model.graph.initializer if t.name.endswith("bias"))
        array = onnx.numpy_helper.to_array(bias) + np.float32([by, 0])
        bias.CopyFrom(onnx.numpy_helper.from_array(array, bias.name))
        return true(model)

    monkeypatch.setattr(onnx_file, "_stripped", spoiled)


def test_a_wrong_export_is_refused_and_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, given = nn.Sequential(nn.Linear(3, 2)), [Input("x", (3,))]
    path = tmp_path / "m.onnx"
    to_onnx(module, given, path)
    before = path.read_bytes()
    spoil(monkeypatch, 0.5)
    with pytest.raises(ExportError, match=r"out is off by 0\.5 in ONNX Runtime .* with \d+ rows"):
        to_onnx(module, given, path)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == before, "the earlier export stands"


def test_providers_that_are_there_are_run_or_said_not_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that does not start is told, and none that calls a network is tried."""
    import onnxruntime

    present = ["CUDAExecutionProvider", "AzureExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: present)
    export = to_onnx(nn.Linear(3, 2), [Input("x", (3,))], tmp_path / "m.onnx")
    assert len(export.checks) == 1
    cuda, azure = export.notes
    assert "CUDA: RuntimeError: CUDAExecutionProvider does not start on this machine" in cuda
    assert "Azure: it calls a network service" in azure


# --- what cannot be exported


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


class Fixed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.ones(3, 1) if len(x) == 3 else x


class Singular(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.svdvals(x[:, :, None] * torch.eye(4))


class Double(nn.Module):
    """Operators that ONNX has, and ONNX Runtime only in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x[:, None].double())  # type: ignore[no-any-return]


class Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


class Keyed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"0.w": x * self.w}


def within(module: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Identity(), module))


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (within(Branch()), r"1\.1 \(Branch\), .*test_phones\.py:\d+: .* decides in Python .*where"),
        (Fixed(), r"test_phones\.py:\d+: the module fixes the number of rows.*x\.shape\[0\]"),
        (within(Singular()), r"ONNX has no aten\._linalg_svd \(in 1\.1, Singular\)\. Compute it"),
        (within(Double()), r"no Conv for these types \(in 1\.1\.conv, Conv1d\)"),
        (Function(lambda x: functional.dropout(x, 0.5, True)), "another one each time"),
        (Function(torch.log), r"not finite on drawn inputs.*--input 8:float32:1"),
        (Function(lambda x: torch.fft.rfft(x)), "is complex"),
        (Function(lambda x: {"a": None}), "an output is NoneType, not a tensor"),
        (Function(lambda x: x.bfloat16()), r"output out is bfloat16.*\.float\(\)"),
        (Function(lambda x: x.to_sparse()), "output out is sparse_coo"),
        (Function(lambda x: ()), "the module returns nothing"),
        (Function(lambda x: {"x": x + 1}), "an input and an output are both called x"),
        (nn.Sequential(Keyed()), "a weight and an output are both called 0.w"),
        (Function(lambda x: {"a.b": x, "a": {"b": -x}}), "two outputs would have the same name"),
        (Function(lambda x: (x,) * min(len(x), 2)), "outputs are others from call to call"),
        (Counting(), "output out1 is another one each time"),
        (nn.Linear(5, 2), r"fails on x float32 \[1, 4\]: RuntimeError: mat1 and mat2"),
    ],
    ids=lambda p: "" if isinstance(p, str) else type(p).__name__,
)
def test_what_cannot_be_exported_is_one_line(module: nn.Module, said: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError) as found:
        to_onnx(module, [Input("x", (4,))], tmp_path / "m.onnx")
    line = str(found.value)
    assert re.search(said, line), line
    assert "\n" not in line
    assert found.value.mend
    assert list(tmp_path.iterdir()) == []


def test_a_model_above_the_size_of_a_file_is_refused_before_the_work(tmp_path: Path) -> None:
    with torch.device("meta"):
        module = nn.Linear(30000, 30000)  # 3.6 GB in float32, and none of it here
    with pytest.raises(ExportError, match=r"3\.6 GB of weights do not fit into one ONNX file"):
        to_onnx(module, [Input("x", (30000,))], tmp_path / "m.onnx")


# --- what is checked


def case(*values: float) -> list[dict[str, Any]]:
    return [{"out": np.float32([values])}]


GIVEN = [{"x": np.zeros((1, 2), np.float32)}]


def test_errors_are_of_the_largest_value() -> None:
    """0.004 of 8 is 5e-4."""
    wanted, found = case(8, -2), [[np.float32([[8, -2.004]])]]
    check = held(GIVEN, wanted, found, Path("m"), "it", 1e-3)
    assert check.off[0].error == pytest.approx(0.004, rel=1e-4)
    assert check.off[0].share == pytest.approx(5e-4, rel=1e-4)
    with pytest.raises(ExportError, match=r"5\.0e-04 of its largest value, and 0\.0001 is allowed"):
        held(GIVEN, wanted, found, Path("m"), "it", 1e-4)


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        (case(1, 2), [[np.float32([[1, np.nan]])]]),
        (case(1, 2), [[np.float32([[1, np.inf]])]]),
        (case(1, 2), [[np.float32([[1, 2, 3]])]]),
        (case(1, 2), [[np.float32([[1, 2]]), np.float32([[1, 2]])]]),
        ([{"out": np.array([[10**6, 1]])}], [[np.array([[10**6, 2]])]]),
        (case(0, 0), [[np.float32([[0, 2e-7]])]]),
    ],
    ids=["nan", "infinite", "shape", "outputs", "whole numbers", "of nothing"],
)
def test_what_is_not_equal_is_refused(wanted: Any, found: Any) -> None:
    with pytest.raises(ExportError, match="disagrees with its source"):
        held(GIVEN, wanted, found, Path("m"), "it")


def test_drawn_inputs_keep_to_their_ranges_and_are_the_same_each_time() -> None:
    inputs = [
        Input("tokens", (4,), "int64", 3), Input("pixels", (50,), "uint8"),
        Input("flag", (9,), "bool"), Input("share", (50,), "float32", 0.5), Input("x", (2, 3)),
    ]  # fmt: skip
    cases = checked.drawn(inputs)
    assert [len(c["x"]) for c in cases] == [1, 2, 3, 16]
    assert [len(c["x"]) for c in checked.drawn(inputs, most=2)] == [1, 2]
    whole = {k: np.concatenate([c[k] for c in cases]) for k in cases[0]}
    assert {k: str(a.dtype) for k, a in whole.items()} == {i.name: i.dtype for i in inputs}
    assert set(np.unique(whole["tokens"])) == {0, 1, 2}
    assert whole["pixels"].max() > 250, "of 1100 numbers below 256"
    assert set(np.unique(whole["flag"])) == {False, True}
    assert 0 <= whole["share"].min() < whole["share"].max() < 0.5
    assert whole["x"].min() < 0 < whole["x"].max()
    again = checked.drawn(inputs)
    assert all(np.array_equal(a[k], b[k]) for a, b in zip(cases, again, strict=True) for k in a)


@pytest.mark.parametrize(
    ("dtype", "below", "most"),
    [
        ("int8", 129, "128, and a whole number"),
        ("uint8", 257, "256, and a whole number"),
        ("int64", 0, "9223372036854775808, and"),
        ("int64", 0.5, "9223372036854775808, and"),
        ("int32", 2.5, "2147483648, and"),
        ("bool", 3, "2, and"),
        ("float16", 7e4, "65504"),
        ("float32", 0, "3.40282e+38"),
    ],
)
def test_a_bound_that_the_type_cannot_hold_is_refused(dtype: str, below: float, most: str) -> None:
    with pytest.raises(SettingError) as found:
        Input("x", (4,), dtype, below)
    assert str(found.value).startswith(f"input x: {dtype} values below {below:g} cannot be drawn")
    assert f"at most {most}" in found.value.mend


def test_all_that_a_type_holds_can_be_drawn() -> None:
    """Its largest number is one below the bound; half of 4 bits are ones."""
    for dtype, below in (("int8", 128), ("uint8", 256), ("int64", 2**63), ("bool", 2)):
        (case, *_) = checked.drawn([Input("x", (4000,), dtype, below)])
        assert case["x"].min() >= 0
        assert case["x"].max() > 0.99 * (below - 1)


def test_a_model_without_inputs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="no inputs, so the outputs would never change"):
        to_onnx(Function(lambda: torch.ones(3)), [], tmp_path / "m.onnx")  # type: ignore[misc, arg-type]


def test_nothing_half_written_gets_the_name(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"

    def interrupted() -> None:
        with unproven(path) as part:
            part.write_bytes(b"half")
            assert not path.exists()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []
    with unproven(path) as part:
        part.write_bytes(b"whole")
    assert path.read_bytes() == b"whole"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "absent" / "m.onnx"
    with pytest.raises(SettingError, match=r"m\.onnx: cannot be written: No such file"):
        to_onnx(nn.Linear(3, 2), [Input("x", (3,))], path)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("import os; os.abort()", "its process ended with signal 6"),
        ("raise ValueError('no such kernel')", "ValueError: no such kernel"),
    ],
)
def test_a_runtime_that_dies_takes_nobody_with_it(
    body: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dying.py").write_text(f"def run(path, how, cases):\n    {body}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(checked.Died) as found:
        checked.apart("dying", tmp_path / "m", "", GIVEN)
    assert str(found.value) == said


def test_what_crosses_to_the_runtimes_process_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names with any sign, types, shapes without a number, the order; and telemetry is off."""
    (tmp_path / "echo.py").write_text(
        "import os\n"
        "def run(path, how, cases):\n"
        "    assert (path, how) == ('/m', 'so')\n"
        "    assert os.environ['ORT_DISABLE_TELEMETRY'] == '1'\n"
        "    return [[c['x:b/c'], c['a']] for c in cases]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    cases = [
        {"a": np.arange(n, dtype=np.uint8), "x:b/c": np.zeros((n, 0), np.float16)}
        for n in range(12)
    ]
    found = checked.apart("echo", Path("/m"), "so", cases)
    assert [(b.shape, str(b.dtype), a.tolist()) for b, a in found] == [
        ((n, 0), "float16", list(range(n))) for n in range(12)
    ]
