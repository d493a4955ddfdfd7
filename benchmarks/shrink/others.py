"""The same by the libraries' own methods: ONNX Runtime's quantisation, torchao, torch-pruning.

Each is handed the model, and the rows to calibrate on, that weights.py hands to ours, and judged as
ours are. What a library writes as an ONNX file is kept for timed.py; what torchao makes is not
written as one, and has its quality alone.
"""

from __future__ import annotations

import copy
import importlib
import logging
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from images import by_user, pool, teacher
from jobs import KEPT
from language import held_out, nats
from onnx import ModelProto, load, numpy_helper, save
from onnxruntime import InferenceSession, SessionOptions
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization.matmul_nbits_quantizer import (
    DefaultWeightOnlyQuantConfig,
    MatMulNBitsQuantizer,
)
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor, nn
from weights import calibrated, file_of, kept, language_model, recovered_cnn

PEERS = KEPT / "peers"
"""torchao and torch-pruning, installed here without what they depend on."""
WANTED = ("torchao==0.18.0", "torch-pruning==1.6.1")
TEXT = ("ONNX Runtime: 8 bits, dynamic", "ONNX Runtime: 4-bit weights",
        "torchao: 8-bit weights", "torchao: 8 bits, dynamic")  # fmt: skip
logging.disable(logging.WARNING)  # ONNX Runtime's quantisers tell each node that they pass
IMAGES = ("ONNX Runtime: 8 bits, static", "torch-pruning: channels, 1/2, recovered")


class Runs(nn.Module):
    """A file, as a module: in ONNX Runtime, on one thread."""

    def __init__(self, path: str) -> None:
        super().__init__()
        options = SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self.session = InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.name = self.session.get_inputs()[0].name

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(self.session.run(None, {self.name: x.numpy()})[0])


def of_text(name: str) -> dict[str, Any]:
    """None of them calibrates: one run is all there is."""
    model, result = language_model(), {}
    if name.startswith("torchao"):
        with peer("torchao.quantization") as ao:
            config = ao.Int8WeightOnlyConfig
            if name.endswith("dynamic"):
                config = ao.Int8DynamicActivationInt8WeightConfig
            made: nn.Module = copy.deepcopy(model)
            began = time.process_time()
            ao.quantize_(made, config())
            took = time.process_time() - began
    else:
        whole = kept("text float32 for others", file_of(model, held_out("test", 2)[:, :-1]))
        result["file"] = path = kept(f"text {name}", b"")
        began = time.process_time()
        if name.endswith("dynamic"):
            quantize_dynamic(whole, path, per_channel=True, weight_type=QuantType.QInt8)
        else:
            config = DefaultWeightOnlyQuantConfig(block_size=32, is_symmetric=True, bits=4)
            found = MatMulNBitsQuantizer(as_matmul(load(whole)), bits=4, algo_config=config)
            found.process()
            save(found.model.model, path)
        took = time.process_time() - began
        made = Runs(path)
    return {**result, "seconds": took, "quality": math.exp(nats(made, held_out("test", 512)))}


def as_matmul(model: ModelProto) -> ModelProto:
    """Gemm as MatMul, with the weight turned: the library's 4 bits pass by any other."""
    weights = {w.name: numpy_helper.to_array(w) for w in model.graph.initializer}
    for node in model.graph.node:
        turned = {a.name: a.i for a in node.attribute} == {"transB": 1}
        if node.op_type == "Gemm" and turned and len(node.input) == 2:
            name = f"{node.input[1]} turned"
            turned_weight = np.ascontiguousarray(weights[node.input[1]].T)
            model.graph.initializer.append(numpy_helper.from_array(turned_weight, name))
            node.op_type, node.input[1] = "MatMul", name
            del node.attribute[:]
    read = {name for node in model.graph.node for name in node.input}
    kept = [w for w in model.graph.initializer if w.name in read]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    return model


def of_images(name: str, seed: int) -> dict[str, Any]:
    made = torch_pruned if name.startswith("torch-pruning") else ort_static
    began = time.process_time()
    path, found = made(seed)
    took = time.process_time() - began
    result = {"seconds": took, "quality": float(by_user("qmnist", found).mean())}
    return {**result, "file": path} if seed == 0 else result


def ort_static(seed: int) -> tuple[str, nn.Module]:
    x = pool("qmnist")[0]
    whole = kept(f"images float32 for others {seed}", file_of(teacher("qmnist"), x[:2]))
    path, prepared = (kept(f"images ONNX Runtime {what} {seed}", b"") for what in ("8", "prepared"))
    name = Runs(whole).name

    class Parts(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter(calibrated(seed))

        def get_next(self) -> dict[str, np.ndarray[Any, Any]] | None:
            part = next(self.left, None)
            return None if part is None else {name: part.numpy()}

    quant_pre_process(whole, prepared)
    quantize_static(
        prepared, path, Parts(), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip
    return path, Runs(path)


def torch_pruned(seed: int) -> tuple[str, nn.Module]:
    """Half of the channels by the library's magnitude, with the recovery of ours."""
    original, x = teacher("qmnist"), pool("qmnist")[0]
    model = copy.deepcopy(original)
    with peer("torch_pruning") as tp:
        last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
        pruner = tp.pruner.MagnitudePruner(
            model, x[:2], importance=tp.importance.MagnitudeImportance(p=2), pruning_ratio=0.5,
            ignored_layers=[last],
        )  # fmt: skip
        pruner.step()
    found = recovered_cnn(model, original, seed)
    return kept(f"images torch-pruning {seed}", file_of(found, x[:2])), found


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
    stamp = PEERS / "installed.txt"
    if stamp.is_file() and stamp.read_text().split() == list(WANTED):
        return
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "install"]
    subprocess.run([*pip, "--no-deps", "--upgrade", "--target", str(PEERS), *WANTED], check=True)
    stamp.write_text("\n".join(WANTED))
