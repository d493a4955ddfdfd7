"""ONNX Runtime as its tutorials use it: a session on the exported model, or its training API."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cases
import child
import numpy as np
import onnxruntime


def _one_thread() -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return options


class Predict:
    def __init__(self, case: cases.Case, folder: Path) -> None:
        self.case, self.folder = case, folder
        self.label = f"ONNX Runtime {onnxruntime.__version__}"

    def load(self) -> None:
        path = self.folder / f"{self.case.model}-predict.onnx"
        providers = ["CPUExecutionProvider"]
        self.session = onnxruntime.InferenceSession(path, _one_thread(), providers=providers)
        self.x = cases.rows(self.case.model, self.case.rows)["x"]

    def run(self) -> None:
        self._predict()

    def _predict(self) -> Any:
        return self.session.run(None, {"x": self.x})[0]

    def after(self) -> dict[str, Any]:
        self.load()
        return {"out": self._predict()}


class Train:
    """In the environment of onnxruntime-training."""

    def __init__(self, case: cases.Case, folder: Path) -> None:
        from onnxruntime.training import api

        self.api, self.case, self.folder = api, case, folder
        self.label = f"onnxruntime-training {onnxruntime.__version__}"

    def load(self) -> None:
        case = self.case
        there = self.folder / f"{case.model}-{case.train}-artifacts"
        self.state = self.api.CheckpointState.load_checkpoint(there / "checkpoint")
        self.module = self.api.Module(
            there / "training_model.onnx", self.state, session_options=_one_thread()
        )
        self.optimiser = self.api.Optimizer(there / "optimizer_model.onnx", self.module)
        self.optimiser.set_learning_rate(cases.LR)
        self.module.train()
        found = cases.rows(case.model, case.rows * cases.STEPS)
        self.x, self.y, self.dice = found["x"], found["y"], np.random.default_rng(0)

    def run(self) -> None:
        self._epoch(self.dice.permutation(len(self.x)))

    def _epoch(self, order: Any) -> None:
        total = 0.0
        for at in range(0, len(order), self.case.rows):
            rows = order[at : at + self.case.rows]
            total += float(self.module(self.x[rows], self.y[rows].reshape(-1)))
            self.optimiser.step()
            self.module.lazy_reset_grad()

    def after(self) -> dict[str, Any]:
        self.load()
        self._epoch(np.arange(cases.CHECKED * self.case.rows))
        path = self.folder / f"{self.case.model}-{self.case.train}-trained.json"
        names = json.loads(path.read_text())
        return {k.removeprefix("net."): np.array(self.state.parameters[k].data) for k in names}


def make(case: cases.Case, folder: Path) -> child.Contender:
    return Train(case, folder) if case.train else Predict(case, folder)


if __name__ == "__main__":
    child.serve(make)
