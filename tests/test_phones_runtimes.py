"""GGUF and ExecuTorch files, in llama.cpp and in ExecuTorch's runtime where they are installed."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from kitestring.errors import ExportError, SettingError
from kitestring.export import gguf
from kitestring.export.checked import Input
from test_package import ROOT, must
from test_phones import MODELS, Function, llama, within


def missing(*modules: str) -> bool:
    return any(importlib.util.find_spec(m) is None for m in modules)


need_gguf = pytest.mark.skipif(
    missing("gguf", "llama_cpp"), reason="gguf and llama-cpp-python are not installed"
)
need_executorch = pytest.mark.skipif(missing("executorch"), reason="executorch is not installed")


# --- GGUF


def test_rotated_halves_become_neighbours() -> None:
    """Two heads of four rows: 0 1 | 2 3 are halves, so 0 2 and 1 3 turn together."""
    rows = np.arange(8, dtype=np.float32)[:, None]
    assert gguf._neighbours(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_the_longest_token_is_cut_first() -> None:
    vocabulary = ["a", "ab", "abc", "d", None, "é"]
    assert gguf._cut(b"abcabdaz", vocabulary) == [2, 1, 3, 0, 4]
    assert gguf._cut("éè".encode(), vocabulary) == [5, 4, 4], "two bytes that begin no token"


TEXTS = [*"\n !&'(),-.:;?\\é", *"abcdefghijklmnopqrstuvw", "the ", None]


@need_gguf
@pytest.mark.parametrize(("kind", "tied"), [("f32", False), ("f16", True), ("q8_0", False)])
def test_a_gguf_file_gives_torch_s_logits(kind: str, tied: bool, tmp_path: Path) -> None:
    export = gguf.to_gguf(llama(len(TEXTS), tied=tied), tmp_path / "m.gguf", kind, TEXTS)
    kinds = [c.runtime.rpartition(" ")[2] for c in export.checks]
    assert kinds == list(dict.fromkeys(["f32", kind]))
    for check, each in zip(export.checks, kinds, strict=True):
        assert check.off[0].share < gguf.TOLERANCES[each]
    if kind != "f32":
        assert export.checks[1].off[0].share > 1e-4, "it is rounded"
    assert "its tokeniser gives back drawn text" in export.notes
    # 4, 2 or 34/32 bytes for each number of a matrix, 32-bit vectors, and some kB of names.
    model = llama(len(TEXTS), tied=tied)
    matrices = sum(p.numel() for p in model.parameters() if p.ndim > 1)
    expected = matrices * {"f32": 4, "f16": 2, "q8_0": 34 / 32}[kind]
    assert expected < export.path.stat().st_size < expected + 12_000


@need_gguf
def test_a_gguf_file_with_unturned_rows_is_refused_in_any_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights as small as a fresh model's: the mistake is within q8_0's tolerance, not f32's."""
    monkeypatch.setattr(gguf, "_neighbours", lambda weight, heads: weight)
    with pytest.raises(ExportError, match=r"out is off by .*, f32 with 2 rows"):
        gguf.to_gguf(llama(scale=0.05), tmp_path / "m.gguf", "q8_0")
    assert list(tmp_path.iterdir()) == []


@need_gguf
def test_rows_that_make_no_block_stay_f16(tmp_path: Path) -> None:
    """Rows of 48 are no blocks of 32: those of all matrices but down_proj, whose rows are of 64."""
    export = gguf.to_gguf(llama(hidden_size=48, head_dim=12), tmp_path / "m.gguf", "q8_0")
    assert any(note.startswith("8 matrices are f16") for note in export.notes)


@need_gguf
@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (TEXTS[:-2], "38 entries, and the model 40 tokens"),
        ([*TEXTS[:-1], "z"], "has 0 nulls"),
        ([*TEXTS[:-2], "a", None], "has a text twice"),
        ([*TEXTS[:-2], "", None], "has an empty text"),
        ([*TEXTS[:-2], "<unk>", None], "has '<unk>', which is what null is called"),
    ],
)
def test_a_vocabulary_that_does_not_fit_is_refused(texts: Any, said: str, tmp_path: Path) -> None:
    assert len(TEXTS) == 40
    with pytest.raises(SettingError, match=said):
        gguf.to_gguf(llama(), tmp_path / "m.gguf", vocabulary=texts)


@need_gguf
def test_other_models_are_no_gguf(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="not a Llama-like language model: Linear"):
        gguf.to_gguf(nn.Linear(2, 2), tmp_path / "m.gguf")
    odd = llama()
    odd.lm_head.bias = nn.Parameter(torch.zeros(40))  # type: ignore[union-attr]
    with pytest.raises(ExportError, match=r"no counterpart of the parameter lm_head\.bias"):
        gguf.to_gguf(odd, tmp_path / "m.gguf")


# --- ExecuTorch


@need_executorch
@pytest.mark.parametrize("kind", ["cnn", "lstm", "llama"])
def test_an_executorch_program_gives_what_torch_gives(kind: str, tmp_path: Path) -> None:
    from kitestring.export.executorch import to_executorch

    factory, given = MODELS[kind]
    export = to_executorch(factory(), [given], tmp_path / "m.pte", most=20)
    assert [len(c["x"]) for c in export.cases] == [1, 2, 3, 20]
    assert max(o.share for o in export.checks[0].off) < 1e-5
    assert int(export.notes[0].split()[0]) > 0, "XNNPACK runs some of it"


@need_executorch
@pytest.mark.parametrize(
    ("module", "said"),
    [
        (within(Function(torch.lgamma)), r"ExecuTorch has no aten\.lgamma \(in 1\.1, Function\)"),
        (Function(lambda x: torch.nonzero(x > 0)), "disagrees with its source"),
    ],
    ids=["operator", "wrong"],
)
def test_what_executorch_lacks_or_computes_wrongly(
    module: nn.Module, said: str, tmp_path: Path
) -> None:
    """Its nonzero (1.5.1) gives other indices than torch's, and no error."""
    from kitestring.export.executorch import to_executorch

    with pytest.raises(ExportError, match=said):
        to_executorch(module, [Input("x", (4,), "float32", 1)], tmp_path / "m.pte")
    assert list(tmp_path.iterdir()) == []


# --- from the registry


LINEAR = "from torch import nn\nnet = nn.Linear(8, 2)\n"
LLAMA = """
from kitestring.tasks.llama import Llama, LlamaConfig

net = Llama(LlamaConfig(40, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                        num_attention_heads=4, num_key_value_heads=2, head_dim=8,
                        max_position_embeddings=160))
"""
# llama.cpp's library alone, for any processor of this kind: minutes instead of many.
LIBRARY = "GGML_NATIVE LLAMA_CURL LLAVA_BUILD LLAMA_BUILD_TESTS LLAMA_BUILD_EXAMPLES"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("extra", "model", "options", "says"),
    [
        ("executorch", LINEAR, ("--input", "8", "--rows", "4"), "XNNPACK: out is off by"),
        ("gguf", LLAMA, (), "f32: out is off by"),
    ],
    ids=["executorch", "gguf"],
)
def test_an_extra_installs_with_our_pins_and_exports(
    extra: str,
    model: str,
    options: tuple[str, ...],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As a person does it: a new environment, the wheel with its extra, the command. llama.cpp is
    built on the way, which takes a compiler."""
    if extra == "gguf" and not shutil.which("c++"):
        pytest.skip("no C++ compiler to build llama.cpp with")
    flags = [f"-D{name}=OFF" for name in (*LIBRARY.split(), "LLAMA_BUILD_TOOLS")]
    monkeypatch.setenv("CMAKE_ARGS", " ".join([*flags, "-DLLAMA_BUILD_SERVER=OFF"]))
    build = ("-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path)
    must(sys.executable, *build, cwd=ROOT)
    (wheel,) = tmp_path.glob("kitestring-*.whl")
    must(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    bin = tmp_path / "venv" / "bin"
    pip = ("-m", "pip", "install", "-qq", "-c", ROOT / "constraints.txt")
    must(bin / "python", *pip, f"{wheel}[{extra}]", cwd=tmp_path, patience=1500)
    (tmp_path / "net.py").write_text(model)
    said = must(bin / "kitestring", "export", "net.py:net", *options, "--to", extra, cwd=tmp_path)
    assert says in said
    assert list(tmp_path.glob("net.pte" if extra == "executorch" else "net.gguf"))
