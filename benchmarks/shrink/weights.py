"""What pruning and quantising do to a language model and to a CNN, beside libraries of others.

    KITESTRING_DATA=DIR python benchmarks/shrink/weights.py

The language model is that of language.py, the CNN the large model of qmnist, trained here. Each
method is handed the same model and, where it calibrates, the same rows; with each seed others are
drawn. What comes out is written as one ONNX file, by us or by the library, and that file is timed
in ONNX Runtime: in a fresh process, one thread, one row, run for run in turn with the float model.
Of what cannot be written as such a file (torchao) the quality alone is given.
"""

from __future__ import annotations

import copy
import importlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from images import BATCH, by_user, pool, teacher
from jobs import KEPT
from language import Recipe, held_out, large, windows
from torch import Tensor, nn

from kitestring.compress.distil.batches import rows
from kitestring.compress.distil.response import Response
from kitestring.compress.distil.text import divergences
from kitestring.compress.distil.text.measure import perplexity
from kitestring.compress.distil.text.on_policy import text
from kitestring.compress.distil.train import Settings, distil
from kitestring.compress.prune.magnitude import magnitude
from kitestring.compress.prune.sparsegpt import sparsegpt
from kitestring.compress.prune.structured import slim
from kitestring.compress.prune.wanda import wanda
from kitestring.compress.quantise import qat
from kitestring.compress.quantise.awq import awq
from kitestring.compress.quantise.dynamic import dynamic
from kitestring.compress.quantise.gptq import gptq
from kitestring.compress.quantise.nearest import nearest
from kitestring.compress.quantise.static import static
from kitestring.core import Rows
from kitestring.devices.fit.programs import Batch, Program
from kitestring.devices.runtime.graph import Graph
from kitestring.devices.runtime.settled import settled
from kitestring.export.graphs import predict_graph

CALIBRATED, SEEDS = 128, 3  # windows, and draws of them
RECOVERY = 300  # steps of distillation after structured pruning
PEERS = KEPT / "peers"
"""torchao and torch-pruning, installed here without what they depend on."""
Made = Callable[[nn.Module, list[Tensor], int], nn.Module]


def _recovered(model: nn.Module, original: nn.Module, seed: int) -> nn.Module:
    data = text(windows("train", RECOVERY * 32, 77 + seed), batch=32, seed=seed)
    how = Settings(RECOVERY, 32, 5e-4, "adamw", 0.01, 20, seed=seed)
    objective = divergences.Divergence(divergences.forward_kl)
    return distil(model, original, data, objective, how).module


PRUNED: dict[str, Made] = {
    "magnitude, 50 %": lambda m, b, s: magnitude(m, 0.5),
    "Wanda, 50 %": lambda m, b, s: wanda(m, b, 0.5),
    "SparseGPT, 50 %": lambda m, b, s: sparsegpt(m, b, 0.5),
    "magnitude, 2:4": lambda m, b, s: magnitude(m, pattern=(2, 4)),
    "Wanda, 2:4": lambda m, b, s: wanda(m, b, pattern=(2, 4)),
    "SparseGPT, 2:4": lambda m, b, s: sparsegpt(m, b, pattern=(2, 4)),
    "heads and neurons, 3/4, recovered": lambda m, b, s: _recovered(slim(m, b[0], 0.75), m, s),
    "heads and neurons, 1/2, recovered": lambda m, b, s: _recovered(slim(m, b[0], 0.5), m, s),
}
QUANTISED: dict[str, Made] = {
    "8-bit weights, nearest": lambda m, b, s: nearest(m, 8, 32),
    "8 bits, dynamic": lambda m, b, s: dynamic(m),
    "8 bits, static": lambda m, b, s: static(m, b),
    "4-bit weights, nearest": lambda m, b, s: nearest(m, 4, 32),
    "4-bit weights, GPTQ": lambda m, b, s: gptq(m, b, 4, 32),
    "4-bit weights, AWQ": lambda m, b, s: awq(m, b, 4, 32),
    "3-bit weights, nearest": lambda m, b, s: nearest(m, 3, 32),
    "3-bit weights, GPTQ": lambda m, b, s: gptq(m, b, 3, 32),
    "3-bit weights, AWQ": lambda m, b, s: awq(m, b, 3, 32),
}


class _Answer(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return {"answer": self.model(batch["x"])}


def file_of(model: nn.Module, x: Tensor) -> bytes:
    """One ONNX graph with the weights inside."""
    program = Program("model", _Answer(model.eval()))
    columns = {"x": Rows(x[None].numpy(), np.array([len(x)]))}
    graph = predict_graph(program, columns).model
    weights, about = program.initial(), Graph(graph).about
    read = about.weights.keys() - about.tied.keys() - set(about.unused)
    return settled(graph, {f"w:{k}": np.asarray(weights[k]) for k in sorted(read)})


def kept(name: str, blob: bytes) -> str:
    folder = KEPT / "models"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ("".join(c if c.isalnum() else "-" for c in name) + ".onnx")
    path.write_bytes(blob)
    return str(path)


@cache
def language_model() -> nn.Module:
    return large(Recipe())[0]


def calibration(seed: int) -> list[Tensor]:
    return list(windows("train", CALIBRATED, 1000 + seed)[:, :-1].split(16))


def of_text(name: str, seed: int) -> dict[str, Any]:
    """The language model, pruned or quantised."""
    model = language_model()
    made = {"float32": lambda m, b, s: m, **PRUNED, **QUANTISED}[name]
    found = made(model, calibration(seed), seed)
    result = {
        "quality": perplexity(found, held_out("test", 512)),
        "parameters": sum(p.numel() for p in found.parameters()),
    }
    if seed == 0:
        x = held_out("test", 2)[:2, :-1]
        result["file"] = kept(f"text-{name}", file_of(found, x))
    return result


# The CNN


def _recovered_cnn(model: nn.Module, original: nn.Module, seed: int) -> nn.Module:
    x, y = pool("qmnist")
    how = Settings(RECOVERY, BATCH, 1e-3, seed=seed)
    return distil(model, original, rows(x, y, batch=BATCH, seed=seed), Response(), how).module


def _trained_with_rounding(model: nn.Module, batches: list[Tensor], seed: int) -> nn.Module:
    x, y = pool("qmnist")
    how = Settings(RECOVERY, BATCH, 1e-4, seed=seed)
    data = rows(x, y, batch=BATCH, seed=seed)
    return qat.convert(distil(qat.prepare(model, batches), model, data, Response(), how).module)


CNN: dict[str, Made] = {
    "8 bits, static": lambda m, b, s: static(m, b),
    "8 bits, static, trained with rounding": _trained_with_rounding,
    "8-bit weights, nearest": lambda m, b, s: nearest(m, 8, 32),
    "4-bit weights, nearest": lambda m, b, s: nearest(m, 4, 32),
    "channels, 1/2": lambda m, b, s: slim(m, b[0], 0.5),
    "channels, 1/2, recovered": lambda m, b, s: _recovered_cnn(slim(m, b[0], 0.5), m, s),
    "channels, 1/4, recovered": lambda m, b, s: _recovered_cnn(slim(m, b[0], 0.25), m, s),
    "channels, 1/4, recovered, 8 bits": lambda m, b, s: static(
        _recovered_cnn(slim(m, b[0], 0.25), m, s), b
    ),
}


def of_images(name: str, seed: int) -> dict[str, Any]:
    """The large model of qmnist, pruned or quantised."""
    model, (x, _) = teacher("qmnist"), pool("qmnist")
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(x))[:256])
    made = {"float32": lambda m, b, s: m, **CNN}[name]
    found = made(model, list(x[order].split(32)), seed)
    scores = by_user("qmnist", found)
    result = {
        "quality": float(scores.mean()),
        "parameters": sum(p.numel() for p in found.parameters()),
    }
    if seed == 0:
        result["file"] = kept(f"images-{name}", file_of(found, x[:2]))
    return result


# Others


def ort_text(name: str, seed: int) -> dict[str, Any]:
    """ONNX Runtime's own quantisation of the language model's file."""
    from onnx import load, save
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.matmul_nbits_quantizer import (
        DefaultWeightOnlyQuantConfig,
        MatMulNBitsQuantizer,
    )

    x = held_out("test", 2)[:2, :-1]
    whole = kept("text-float32-for-ort", file_of(language_model(), x))
    path = whole.replace("float32-for-ort", f"ort-{''.join(filter(str.isalnum, name))}")
    if name == "8 bits, dynamic":
        quantize_dynamic(whole, path, per_channel=True, weight_type=QuantType.QInt8)
    else:
        config = DefaultWeightOnlyQuantConfig(
            block_size=32, is_symmetric=True, accuracy_level=4, bits=4
        )
        made = MatMulNBitsQuantizer(load(whole), bits=4, algo_config=config)
        made.process()
        save(made.model.model, path)
    return {"quality": _perplexity(path), "file": path}


def _session(path: str) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _asked(session: Any, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    found: np.ndarray[Any, Any] = session.run(None, {session.get_inputs()[0].name: x})[0]
    return found


def _perplexity(path: str) -> float:
    session, total = _session(path), 0.0
    ids = held_out("test", 512)
    for part in ids.split(16):
        out = torch.from_numpy(_asked(session, part[:, :-1].numpy()))
        losses = nn.functional.cross_entropy(out.flatten(0, 1), part[:, 1:].flatten())
        total += float(losses) * len(part)
    return float(np.exp(total / len(ids)))


def ort_images(seed: int) -> dict[str, Any]:
    """ONNX Runtime's static quantisation of the CNN's file."""
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    model, (x, _) = teacher("qmnist"), pool("qmnist")
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(x))[:256])
    whole = kept("images-float32-for-ort", file_of(model, x[:2]))
    name = _session(whole).get_inputs()[0].name

    class Rows32(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.parts = iter([{name: part.numpy()} for part in x[order].split(32)])

        def get_next(self) -> Any:
            return next(self.parts, None)

    path = whole.replace("float32-for-ort", f"ort-static-{seed}")
    prepared = whole.replace("float32-for-ort", f"ort-prepared-{seed}")
    quant_pre_process(whole, prepared)
    quantize_static(
        prepared, path, Rows32(), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip
    session = _session(path)

    class Runs(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.from_numpy(_asked(session, x.numpy()))

    return {"quality": float(by_user("qmnist", Runs()).mean()), "file": path}


def torchao_text(name: str, seed: int) -> dict[str, Any]:
    with peer("torchao.quantization") as ao:
        model = copy.deepcopy(language_model())
        config = {
            "8-bit weights": ao.Int8WeightOnlyConfig,
            "8 bits, dynamic": ao.Int8DynamicActivationInt8WeightConfig,
        }[name]
        ao.quantize_(model, config())
        return {"quality": perplexity(model, held_out("test", 512))}


def torch_pruning_images(seed: int) -> dict[str, Any]:
    """Half of the channels by torch-pruning's magnitude, with our recovery."""
    with peer("torch_pruning") as tp:
        original, (x, _) = teacher("qmnist"), pool("qmnist")
        model = copy.deepcopy(original)
        last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
        pruner = tp.pruner.MagnitudePruner(
            model, x[:2], importance=tp.importance.MagnitudeImportance(p=2), pruning_ratio=0.5,
            ignored_layers=[last],
        )  # fmt: skip
        pruner.step()
        found = _recovered_cnn(model, original, seed)
    result = {
        "quality": float(by_user("qmnist", found).mean()),
        "parameters": sum(p.numel() for p in found.parameters()),
    }
    if seed == 0:
        result["file"] = kept("images-torch-pruning", file_of(found, x[:2]))
    return result


@contextmanager
def peer(name: str) -> Iterator[Any]:
    """A library of PEERS, imported."""
    sys.path.insert(0, str(PEERS))
    try:
        yield importlib.import_module(name)
    finally:
        sys.path.remove(str(PEERS))


def install() -> None:
    """The peers, without what they depend on: torch and numpy are here."""
    wanted = ["torchao==0.18.0", "torch-pruning==1.6.1"]
    stamp = PEERS / "installed.txt"
    if stamp.is_file() and stamp.read_text().split() == wanted:
        return
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "install"]
    subprocess.run([*pip, "--no-deps", "--upgrade", "--target", str(PEERS), *wanted], check=True)
    stamp.write_text("\n".join(wanted))
