"""What a collaboration says of itself, beside what its declarations prove."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Need = Literal["pool", "models", "split", "confidence", "entropy"]
NEEDS: dict[Need, str] = {
    "pool": "a pool: users whose rows the cloud has",
    "models": "models that train: this task brings recorded answers",
    "split": "differentiable features: a small model with children `front` and `back`",
    "confidence": "a confidence: classes, a binary logit, or a task that gives its own",
    "entropy": "class probabilities: classes or a binary logit, with the loss of that name",
}


@dataclass(frozen=True)
class About:
    title: str
    family: Literal["baseline", "parameters", "features", "data", "request"]
    paper: str
    says: str  # one plain sentence
    needs: tuple[Need, ...]
    large: Literal["", "large", "joint"] = (
        ""  # the pool-trained large model that gains, if one does
    )


@dataclass(frozen=True)
class Budget:
    """What every collaboration is given to spend, and the learning rates it may try."""

    local_epochs: int
    rounds: int
    batch: int
    optimiser: str
    lrs: tuple[float, ...]
    rows: int  # of a typical (median) device
    cloud_epochs: int
    cloud_batch: int
    cloud_optimiser: str
    cloud_lrs: tuple[float, ...]
    gift: int
    cloud_share: float

    @property
    def epochs(self) -> int:
        """Local epochs a round, so that the rounds make up the local epochs."""
        return max(1, self.local_epochs // self.rounds)

    @property
    def last_layer_lrs(self) -> tuple[float, ...]:
        """As many rates as `lrs`, evenly in the logarithm, from a tenth of the least: what a last
        layer bears depends on how large the features are that it stands on."""
        low, high, count = min(self.lrs) / 10, max(self.lrs), len(self.lrs)
        steps = [0.5] if count == 1 else [i / (count - 1) for i in range(count)]
        return tuple(float(f"{low * (high / low) ** step:.3g}") for step in steps)

    @property
    def in_cloud(self) -> list[tuple[int, int, int, float, str]]:
        """Of each trial of what trains in the cloud: rounds, epochs, batch, rate and optimiser."""
        rounds = min(10, self.cloud_epochs)
        epochs, batch = self.cloud_epochs // rounds, self.cloud_batch
        return [(rounds, epochs, batch, lr, self.cloud_optimiser) for lr in self.cloud_lrs]

    @property
    def steps(self) -> int:
        """Minibatches in all the local epochs of a typical device."""
        return self.local_epochs * max(1, -(-self.rows // self.batch))
