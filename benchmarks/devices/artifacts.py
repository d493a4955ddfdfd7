"""ONNX Runtime's training artifacts of one model: `artifacts.py MODEL TRAIN FOLDER`.

In the environment of onnxruntime-training; one JSON line at the end.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import onnx
from onnxruntime.training import artifacts


def main() -> None:
    model, train, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    name = f"{model}-{train}"
    trained = json.loads((folder / f"{name}-trained.json").read_text())
    there = folder / f"{name}-artifacts"
    there.mkdir()
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        forward = onnx.load(folder / f"{name}-forward.onnx")
        held = [i.name for i in forward.graph.initializer if i.name not in trained]
        artifacts.generate_artifacts(
            forward, requires_grad=trained, frozen_params=held,
            loss=artifacts.LossType.CrossEntropyLoss, optimizer=artifacts.OptimType.SGD,
            artifact_directory=there,
        )  # fmt: skip
        seconds.append(time.perf_counter() - started)
    print(json.dumps({"what": "artifacts", "train": train, "seconds": seconds}))


if __name__ == "__main__":
    main()
