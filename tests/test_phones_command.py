"""`kitestring export`: what it takes, writes and says."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kitestring.errors import KitestringError, SettingError
from kitestring.export import checked, command


def cli(*words: str) -> None:
    top = argparse.ArgumentParser()
    command.add(top.add_subparsers())
    command.run(top.parse_args(["export", *words]), "kitestring export")


NET = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.out = nn.Embedding(9, 4), nn.Linear(4, 2)

    def forward(self, tokens, mask):
        return self.out((self.table(tokens) * mask[..., None]).mean(1))

net = Net()

class Odd(nn.Module):
    def forward(self, x, kind, *rest):
        return {"turned": x.transpose(0, 1), "twice": x.reshape(-1), "mean": x.mean(), "k": kind,
                "loose": x[:, :1].squeeze()}

class Star(nn.Module):
    def forward(self, *x):
        return x[0]

class Late(nn.Module):
    def forward(self, x, *, scale):
        return x * scale

class Fixed(nn.Module):
    def forward(self):
        return 0

class Sized(nn.Module):
    def __init__(self, size):
        super().__init__()

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.out = nn.Embedding(9, 4), nn.Linear(4, 9)
        self.out.weight = self.table.weight

    def forward(self, tokens):
        return self.out(self.table(tokens).mean(1))
"""


@pytest.fixture
def net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "phone_net", raising=False)
    (tmp_path / "phone_net.py").write_text(NET)
    return str(tmp_path / "phone_net.py")


def test_the_command_exports_a_file_s_module_with_trained_weights(
    net: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The golden file holds what the *given* weights give: a bias alone, as all others are 0."""
    from safetensors.torch import save_file

    weights = {
        "table.weight": torch.zeros(9, 4), "out.weight": torch.zeros(2, 4),
        "out.bias": torch.tensor([3.0, -1.0]),
    }  # fmt: skip
    save_file(weights, tmp_path / "w.safetensors")
    monkeypatch.chdir(tmp_path)
    cli(f"{net}:Net", "--input", "5:int64", "--input", "5", "--golden", "g.json",
        "--weights", "w.safetensors")  # fmt: skip
    said = capsys.readouterr().out
    assert "Net.onnx" in said
    assert "in   tokens int64 [rows, 5]" in said
    assert "in   mask float32 [rows, 5]" in said
    assert "out  out float32 [rows, 2]" in said
    assert "drawn inputs of 1, 2, 3 and 16 rows" in said
    golden = json.loads((tmp_path / "g.json").read_text())
    assert (tmp_path / golden["model"]).is_file()
    assert golden["tolerance"] == checked.TOLERANCE
    first = golden["cases"][0]
    assert first["outputs"]["out"] == {"dtype": "float32", "shape": [1, 2], "values": [3.0, -1.0]}
    assert first["inputs"]["tokens"]["shape"] == [1, 5]
    assert max(first["inputs"]["tokens"]["values"]) < 9, "the table's rows bound what is drawn"


def test_the_command_exports_a_task_s_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cli("digits:small")
    said = capsys.readouterr().out
    assert "in   x uint8 [rows, 1, 16, 16]" in said
    assert "--weights gives trained ones" in said
    assert [p.name for p in tmp_path.iterdir()] == ["digits-small.onnx"]


def test_shapes_say_which_axis_is_the_rows(
    net: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cli(f"{net}:Odd", "--input", "3", "--input", "kind=:int64:5", "--golden", "g.json")
    said = capsys.readouterr().out
    assert "in   kind int64 [rows]\n" in said
    assert "out  turned float32 [3, rows]\n" in said
    assert "out  twice float32 [3 rows]\n" in said
    assert "out  mean float32 []\n" in said
    assert "out  loose float32 [] of 1 row, [2] of 2 rows, [3] of 3 rows, [16] of 16 rows" in said
    assert said.count("has no axis of rows") == 1
    assert "  mean has no axis of rows: it is one answer for all rows together\n" in said
    drawn = [case["inputs"]["kind"] for case in json.loads(Path("g.json").read_text())["cases"]]
    assert [kind["shape"] for kind in drawn] == [[1], [2]]
    assert all(0 <= value < 5 for kind in drawn for value in kind["values"])


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ((4, 4, 4, 4), "4"),
        ((1, 2, 3, 16), "rows"),
        ((2, 4, 6, 32), "2 rows"),
        ((3, 5, 7, 33), "2 rows +1"),
        ((0, 1, 2, 15), "rows -1"),
        ((1, 2, 3, 7), "1 or 2 or 3 or 7"),
    ],
)
def test_an_axis_by_its_sizes(sizes: tuple[int, ...], said: str) -> None:
    assert command._axis(sizes, (1, 2, 3, 16)) == said


def test_a_language_model_s_cases_differ_in_tokens_and_not_in_rows(tmp_path: Path) -> None:
    """Whatever its file is called."""
    path = tmp_path / "m.bin"
    path.write_bytes(b"whole")
    lengths = (1, 7)
    cases = tuple({"tokens": np.zeros((2, n), np.int64)} for n in lengths)
    wanted = tuple({"out": np.zeros((2, n, 5), np.float32)} for n in lengths)
    check = checked.Check("it", 1e-4, (checked.Off("out", 0.0, 0.0, 2),))
    export = checked.Export(path, (check,), (), cases, wanted)
    said = command._told(export, "gguf")
    assert "  out  logits of the next token" in said
    assert "checked against torch on drawn tokens:" in said


def test_inputs_by_name_need_no_order(
    net: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cli(f"{net}:Net", "--input", "mask=5", "--input", "5:int64")
    said = capsys.readouterr().out
    assert "in   tokens int64 [rows, 5]\n  in   mask float32 [rows, 5]\n" in said
    cli(f"{net}:Late", "--input", "scale=1", "--input", "5")
    assert "in   x float32 [rows, 5]\n  in   scale float32 [rows, 1]\n" in capsys.readouterr().out


def test_files_that_would_be_lost_are_refused_before_the_work(
    net: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.safetensors").write_bytes(b"mine")
    (tmp_path / "folder").mkdir()
    asked = [
        (["--out", "m", "--golden", "folder/../m"], "--out and --golden are the same file"),
        (["--weights", "w.safetensors", "--out", "w.safetensors"], "--weights and --out are the"),
        (["--golden", net], "MODEL and --golden are the same file"),
        (["--out", "."], ".: --out is a folder. Name a file in it"),
        (["--golden", "folder"], "folder: --golden is a folder"),
    ]
    before = sorted(tmp_path.rglob("*"))
    for words, said in asked:
        with pytest.raises(SettingError) as found:
            cli(f"{net}:absent", *words)
        assert said in str(found.value)
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "w.safetensors").read_bytes() == b"mine"


def test_trained_weights_of_a_tied_model_load(
    net: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file has one of the two names; logits are the table's products with its own rows."""
    from safetensors.torch import save_model

    monkeypatch.chdir(tmp_path)
    tied = torch.nn.ModuleDict({"table": torch.nn.Embedding(9, 4), "out": torch.nn.Linear(4, 9)})
    tied["out"].weight = tied["table"].weight  # type: ignore[assignment]
    save_model(tied, "w.safetensors")
    cli(f"{net}:Tied", "--input", "1:int64", "--weights", "w.safetensors", "--golden", "g.json")
    case = json.loads(Path("g.json").read_text())["cases"][0]
    table, bias = tied["table"].weight.detach(), tied["out"].bias.detach()  # type: ignore[union-attr]
    (token,) = case["inputs"]["tokens"]["values"]
    wanted = (table @ table[token] + bias).tolist()  # type: ignore[operator]
    assert case["outputs"]["out"]["values"] == pytest.approx(wanted, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["NET:Net"], "0 inputs given, and forward takes tokens, mask"),
        (["NET:Net", "--input", "5:int64", "--input", "5", "--input", "5"], "3 inputs given"),
        (["NET:Net", "--input", "mask=5", "--input", "mask=5"], "two inputs have the same name"),
        (["NET:Net", "--input", "mask=5", "--input", "maks=5"], "'maks'. Did you mean 'mask'?"),
        (["NET:Net", "--input", "mask=5"], "1 input given, and forward takes tokens, mask"),
        (["NET:Star", "--input", "5"], "takes *x without a name. Write forward with one argument"),
        (["NET:Star", "--input", "x=5"], "unknown argument of forward 'x'. Write forward with"),
        (["NET:Star"], "0 inputs given, and forward takes *x"),
        (["NET:Fixed"], "0 inputs given, and forward takes none. Write forward with one argument"),
        (["NET:Fixed", "--input", "5"], "1 input given, and forward takes none"),
        (
            ["NET:Late", "--input", "5", "--input", "5"],
            "2 inputs given, and forward takes x, scale",
        ),
        (["NET:Net", "--input", "5:int64:0", "--input", "5"], "input tokens: int64 values below 0"),
        (["NET:Net", "--input", "", "--input", "5"], "'' is no shape"),
        (["NET:Net", "--input", "3x0", "--input", "5"], "'3x0' is no shape"),
        (["NET:Sized"], "it fails with TypeError: Sized.__init__() missing 1"),
        ([":Net"], "no model named in ':Net'"),
        (["NET:Net", "--input", "5q", "--input", "5"], "'5q' is no shape"),
        (["NET:Net", "--input", "5:complex64", "--input", "5"], "is no shape"),
        (["NET:Nte"], "no 'Nte' there"),
        (["digits:small", "--rows", "3"], "--rows belongs to --to executorch"),
        (["digits:small", "--quantize", "f16"], "--quantize belongs to --to gguf"),
        (["digits:small", "--out", "absent/m.onnx"], "no such folder"),
        (["digits:small", "--input", "1x16x16:uint8", "--weights", "NET"], "cannot be read"),
        (["digits:tiny"], "has two models, small and large"),
        (["nothing"], "no model named in 'nothing'"),
        (["NET:Net", "--to", "gguf", "--input", "5"], "a language model takes tokens"),
    ],
)
def test_bad_orders_are_one_line(words: list[str], said: str, net: str) -> None:
    with pytest.raises(KitestringError) as found:
        cli(*(word.replace("NET", net) for word in words))
    assert said in str(found.value)
    assert "\n" not in str(found.value)


def test_weights_of_another_model_are_named(net: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"out.bias": torch.zeros(2)}, tmp_path / "w.safetensors")
    with pytest.raises(KitestringError, match=r"lacks out\.weight, table\.weight"):
        cli(f"{net}:Net", "--input", "5:int64", "--input", "5", "--weights",
            str(tmp_path / "w.safetensors"))  # fmt: skip


@pytest.mark.parametrize(
    ("lacking", "to", "extra"),
    [
        ("onnxscript", "onnx", "compare"),
        ("executorch", "executorch", "executorch"),
        ("llama_cpp", "gguf", "gguf"),
        ("torch", "onnx", "compare"),
    ],
)
def test_a_missing_extra_is_named_before_the_work(
    lacking: str, to: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = importlib.util.find_spec
    present = {"gguf", "executorch"} - {lacking}

    def find(name: str, *rest: Any) -> Any:
        return None if name == lacking else true("json" if name in present else name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    out = tmp_path / "m"
    with pytest.raises(SettingError) as found:
        cli("digits:small", "--to", to, "--out", str(out))
    assert f"needs {lacking}, which is not installed" in str(found.value)
    assert found.value.mend == f"Run: pip install 'kitestring[{extra}]'"
    assert not out.exists()
