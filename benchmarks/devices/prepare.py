"""Export one model for every contender, timed: `prepare.py MODEL FOLDER`, one JSON line at the end.

A fresh process for each model. What exporters import when first used is imported beforehand.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import cases
import models
import numpy as np
import torch
from safetensors.numpy import save as save_tensors
from torch import Tensor, nn

from kitestring.compress.distil.objective import cross_entropy
from kitestring.core import Recipe, Rows
from kitestring.devices.fit.programs import Program
from kitestring.export.graphs import predict_graph, step_graph
from kitestring.package import archive, keys

OPSET = 14  # of ONNX Runtime's own example of training on a device
TIMES, ENOUGH = 3, 5.0  # each export so often, unless that many seconds are spent


class Columns(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"out": self.net(batch["x"])}


class Flat(nn.Module):
    """[n, ..., C] -> [n ..., C]: the peer's cross-entropy wants the classes second."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).flatten(0, -2)


class WrittenOut(nn.Module):
    """A frozen BatchNorm as a product and a sum."""

    def __init__(self, norm: models.Frozen) -> None:
        super().__init__()
        scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
        shift = norm.bias - norm.running_mean * scale
        self.register_buffer("scale", scale.detach()[:, None, None])
        self.register_buffer("shift", shift.detach()[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


def written_out(module: nn.Module) -> nn.Module:
    """onnxruntime-training 1.19.2 takes the statistics of the batch for any BatchNormalization,
    frozen or not, and trains something else without a word."""
    for name, child in module.named_children():
        if isinstance(child, models.Frozen):
            setattr(module, name, WrittenOut(child))
        else:
            written_out(child)
    return module


def program(net: nn.Module) -> Program:
    """As the built-in tasks train it."""
    return Program("small", Columns(net), lambda out, rows: cross_entropy(out["out"], rows["y"]))


def columns(model: str, *names: str) -> dict[str, Rows]:
    found = cases.rows(model, 2)
    return {k: Rows(found[k][None], np.array([2])) for k in names}


def kitestring(model: str, train: str, folder: Path) -> None:
    """The package: how it predicts, its step, and its weights."""
    whole = program(models.make(model, train))
    graphs = {"graphs/0 predict.onnx": predict_graph(whole, columns(model, "x")).model}
    if train:
        step = step_graph(whole, columns(model, "x", "y"), Recipe(cases.LR))
        graphs["graphs/1 step.onnx"] = step.model
    pack(whole, graphs, folder / f"{model}-{train or 'predict'}.kite", folder)


def pack(whole: Program, graphs: Mapping[str, bytes], path: Path, folder: Path) -> None:
    key = folder / "kitestring.key"
    if not key.exists():
        keys.create(key)
    weights = save_tensors(dict(whole.initial()))
    archive.write(path, {}, {**graphs, "weights.safetensors": weights}, keys.load(key))


def onnx_predict(model: str, train: str, folder: Path) -> None:
    """As ONNX Runtime's tutorial does: torch's exporter, weights inside."""
    net = models.make(model).eval()
    x = torch.from_numpy(cases.rows(model, 3)["x"])
    made = torch.onnx.export(
        net, (x,), dynamo=True, verbose=False, input_names=["x"], output_names=["out"],
        dynamic_shapes=({0: torch.export.Dim("rows")},),
    )  # fmt: skip
    assert made is not None
    made.save(str(folder / f"{model}-predict.onnx"), external_data=False)


def onnx_forward(model: str, train: str, folder: Path) -> None:
    """As ONNX Runtime's example of training does: torch's older exporter, which keeps the names of
    all weights. Through parts of what the newer one writes it has no gradients (CastLike,
    SplitToSequence)."""
    net = written_out(models.make(model, train))
    x = torch.from_numpy(cases.rows(model, 3)["x"])
    torch.onnx.export(
        Flat(net), (x,), folder / f"{model}-{train}-forward.onnx", dynamo=False,
        input_names=["x"], output_names=["out"], opset_version=OPSET, do_constant_folding=False,
        training=torch.onnx.TrainingMode.TRAINING,
        dynamic_axes={"x": {0: "rows"}, "out": {0: "places"}},
    )  # fmt: skip
    trained = [f"net.{name}" for name, p in net.named_parameters() if p.requires_grad]
    (folder / f"{model}-{train}-trained.json").write_text(json.dumps(trained))


def plain(model: str, train: str, folder: Path) -> None:
    """A file of weights: the code of the module travels apart."""
    torch.save(models.make(model, train).state_dict(), folder / f"{model}-{train}.pt")


def warm(folder: Path) -> None:
    """Each exporter once, on something small."""
    net, x = nn.Linear(2, 2), torch.zeros(2, 2)
    torch.onnx.export(net, (x,), dynamo=True, verbose=False)
    torch.onnx.export(net, (x,), folder / "warm.onnx", dynamo=False)
    some = {k: Rows(np.zeros((1, 2, *s), t), np.array([2]))
            for k, s, t in (("x", (2,), np.float32), ("y", (), np.int64))}  # fmt: skip
    step_graph(program(net), some, Recipe(cases.LR))


def timed(export: Callable[[str, str, Path], None], model: str, train: str, folder: Path) -> Any:
    seconds: list[float] = []
    while len(seconds) < TIMES and sum(seconds) < ENOUGH:
        started = time.perf_counter()
        export(model, train, folder)
        seconds.append(time.perf_counter() - started)
    return {"what": export.__name__, "train": train, "seconds": seconds}


def main() -> None:
    warnings.simplefilter("ignore")
    model, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    warm(folder)
    ways = [c.train for c in cases.CASES if c.model == model and c.train]
    found = [timed(onnx_predict, model, "", folder), timed(kitestring, model, "", folder)]
    for train in ways:
        plain(model, train, folder)
        found += [timed(export, model, train, folder) for export in (kitestring, onnx_forward)]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
