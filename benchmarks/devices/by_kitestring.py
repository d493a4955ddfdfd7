"""Kitestring's device runtime, from a signed package, as a device calls it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cases
import child
import numpy as np
import onnxruntime
from safetensors.numpy import load

from kitestring.core import Recipe, Rows, Tree
from kitestring.devices.runtime.compute import OrtCompute
from kitestring.devices.session import broadcast, frozen
from kitestring.package import archive, keys


class Kitestring:
    def __init__(self, case: cases.Case, folder: Path) -> None:
        self.case, self.folder = case, folder
        self.label = f"Kitestring on ONNX Runtime {onnxruntime.__version__}"

    def load(self) -> None:
        case, self.turn = self.case, 0
        known = keys.trusted([self.folder / "kitestring.key.pub"])
        path = self.folder / f"{case.model}-{case.train or 'predict'}.kite"
        files = archive.read(path, known).files
        tensors = load(files["weights.safetensors"])
        self.weights = broadcast(frozen(Tree(tensors)), 1)  # as they are deployed
        graphs = {k: v for k, v in files.items() if k.startswith("graphs/")}
        self.compute = OrtCompute(graphs, {})
        found = cases.rows(case.model, case.rows * (cases.STEPS if case.train else 1))
        n = np.array([len(found["x"])])
        self.rows = {k: Rows(v[None], n) for k, v in found.items()}

    def run(self) -> None:
        if self.case.train:
            self._fit(self.rows, True)
        else:
            self._predict()

    def _predict(self) -> Any:
        found = self.compute.predict("small", self.weights, {"x": self.rows["x"]})
        return found["out"].values

    def _fit(self, rows: dict[str, Rows], shuffle: bool) -> None:
        recipe = Recipe(cases.LR, batch=self.case.rows, shuffle=shuffle)
        key = np.array([self.turn], np.uint64)
        self.weights = self.compute.fit("small", self.weights, rows, recipe, key=key).parameters
        self.turn += 1

    def after(self) -> dict[str, Any]:
        self.load()
        if not self.case.train:
            return {"out": self._predict()[0]}
        count = cases.CHECKED * self.case.rows
        few = {k: Rows(r.values[:, :count], np.array([count])) for k, r in self.rows.items()}
        self._fit(few, False)
        return {k.removeprefix("net."): v[0] for k, v in self.weights.items()}


if __name__ == "__main__":
    child.serve(Kitestring)
