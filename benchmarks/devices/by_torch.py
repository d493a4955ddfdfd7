"""Plain torch: the module, eagerly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cases
import child
import models
import torch
from torch import Tensor


class Torch:
    def __init__(self, case: cases.Case, folder: Path) -> None:
        torch.set_num_threads(1)
        self.case, self.folder = case, folder
        self.label = f"torch {torch.__version__}"
        if case.train:
            torch.optim.SGD([torch.zeros(1)])  # the first optimiser imports much

    def load(self) -> None:
        case = self.case
        self.net = models.make(case.model, case.train or "all").train(bool(case.train))
        found = cases.rows(case.model, case.rows * (cases.STEPS if case.train else 1))
        self.x, self.y = torch.from_numpy(found["x"]), torch.from_numpy(found["y"])
        self.trained = {k: p for k, p in self.net.named_parameters() if p.requires_grad}
        if case.train:
            self.optimiser = torch.optim.SGD(self.trained.values(), cases.LR)

    def run(self) -> None:
        if self.case.train:
            self._epoch(torch.randperm(len(self.x)))
        else:
            self._predict()

    def _predict(self) -> Any:
        with torch.inference_mode():
            return self.net(self.x).numpy()

    def _epoch(self, order: Tensor) -> None:
        total = 0.0
        for rows in order.split(self.case.rows):
            self.optimiser.zero_grad()
            found = models.loss(self.net(self.x[rows]), self.y[rows])
            found.backward()
            self.optimiser.step()
            total += found.item()

    def after(self) -> dict[str, Any]:
        self.load()
        if not self.case.train:
            return {"out": self._predict()}
        first = {f"first {k}": p.detach().numpy().copy() for k, p in self.trained.items()}
        self._epoch(torch.arange(cases.CHECKED * self.case.rows))
        return {**first, **{k: p.detach().numpy() for k, p in self.trained.items()}}


if __name__ == "__main__":
    child.serve(Torch)
