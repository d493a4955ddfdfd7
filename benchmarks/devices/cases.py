"""What is measured: three models, each predicting and training. numpy only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

STEPS = 8  # minibatches of one training run
LR = 0.01  # plain SGD: its updates can be held against each other
CHECKED = 3  # steps before the updates are compared


@dataclass(frozen=True)
class Case:
    """`rows`: of a prediction, or of a minibatch. `train`: which weights are trained."""

    model: str
    rows: int
    train: str = ""

    @property
    def name(self) -> str:
        what = f"train-{self.train}" if self.train else f"predict-{self.rows}"
        return f"{self.model}-{what}"

    @property
    def title(self) -> str:
        rows = f"{self.rows} row{'s' if self.rows > 1 else ''}"
        return f"a step, {TRAINED[self.train]}, {rows}" if self.train else f"predict, {rows}"


TRAINED = {"all": "all weights", "adapters": "rank-8 adapters", "last": "last layer"}
MODELS = {
    "cnn": "ResNet-8 with frozen BatchNorm, 32 x 32 x 3 pixels, 10 classes",
    "recommender": "the movielens task's small model: 1,682 items, windows of 20",
    "llama": "Llama, 4 layers of 256, 2,048 tokens, windows of 64",
}
CASES = (
    Case("cnn", 1), Case("cnn", 32), Case("cnn", 16, "all"),
    Case("recommender", 1), Case("recommender", 32), Case("recommender", 8, "all"),
    Case("llama", 1), Case("llama", 8),
    Case("llama", 4, "adapters"), Case("llama", 4, "last"), Case("llama", 4, "all"),
)  # fmt: skip


def rows(model: str, count: int) -> dict[str, Any]:
    """Drawn: x and y of so many rows, the same each time."""
    dice = np.random.default_rng(0)
    if model == "cnn":
        x = dice.standard_normal((count, 3, 32, 32), np.float32)
        return {"x": x, "y": dice.integers(0, 10, count)}
    shape, below = {"recommender": ((20,), 1683), "llama": ((64,), 2048)}[model]
    return {name: dice.integers(1, below, (count, *shape)) for name in ("x", "y")}
