"""What pruning and quantising do to a language model and to a CNN.

The language model is that of language.py, the CNN the large model of qmnist, trained here. Each
method is handed the same model and, where it calibrates, the same rows; with each seed others are
drawn, and the steps that follow are drawn by it too. The first seed's result is kept as one ONNX
file for timed.py; others.py has the methods of other libraries.
"""

from __future__ import annotations

import time
from collections.abc import Callable
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
RECOVERY = 300  # steps of distillation after structured pruning, of the CNN
OF_TEXT = 100  # the same of the language model
Made = Callable[[nn.Module, list[Tensor], int], nn.Module]


def _recovered(model: nn.Module, original: nn.Module, seed: int) -> nn.Module:
    data = text(windows("train", OF_TEXT * 32, 77 + seed), batch=32, seed=seed)
    how = Settings(OF_TEXT, 32, 1e-3, "adamw", 0.01, 10, seed=seed)
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
    batches, began = calibration(seed), time.process_time()
    found = made(model, batches, seed)
    result = {
        "seconds": time.process_time() - began,
        "quality": perplexity(found, held_out("test", 512)),
    }
    if seed == 0:
        result["file"] = kept(f"text {name}", file_of(found, held_out("test", 2)[:, :-1]))
    return result


# The CNN


def calibrated(seed: int) -> list[Tensor]:
    x, _ = pool("qmnist")
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(x))[:256])
    return list(x[order].split(32))


def recovered_cnn(model: nn.Module, original: nn.Module, seed: int) -> nn.Module:
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
    "channels, 1/2, recovered": lambda m, b, s: recovered_cnn(slim(m, b[0], 0.5), m, s),
    "channels, 1/4, recovered": lambda m, b, s: recovered_cnn(slim(m, b[0], 0.25), m, s),
    "channels, 1/4, recovered, 8 bits": lambda m, b, s: static(
        recovered_cnn(slim(m, b[0], 0.25), m, s), b
    ),
}


def of_images(name: str, seed: int) -> dict[str, Any]:
    """The large model of qmnist, pruned or quantised."""
    model, batches = teacher("qmnist"), calibrated(seed)
    made, began = {"float32": lambda m, b, s: m, **CNN}[name], time.process_time()
    found = made(model, batches, seed)
    result = {
        "seconds": time.process_time() - began,
        "quality": float(by_user("qmnist", found).mean()),
    }
    if seed == 0:
        result["file"] = kept(f"images {name}", file_of(found, batches[0][:2]))
    return result
