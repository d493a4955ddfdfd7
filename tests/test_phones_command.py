"""`kitestring export`: what it takes, writes and says."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

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


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["NET:Net"], "0 inputs given, and forward takes tokens, mask"),
        (["NET:Net", "--input", "5:int64", "--input", "5", "--input", "5"], "3 inputs given"),
        (["NET:Net", "--input", "a=5", "--input", "a=5"], "two inputs have the same name"),
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
