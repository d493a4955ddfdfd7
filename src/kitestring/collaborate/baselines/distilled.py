"""Distilled: the large model teaches the small one on the cloud's pool, then the small one is sent
down.

Hinton, Vinyals, Dean: "Distilling the knowledge in a neural network", arXiv 1503.02531, section 2:
the small model learns from labels and from the large model's softened answers. `EightBits` sends
and keeps it in 8 bits: whole numbers and one scale for each output row of a weight (Jacob et al.,
"Quantization and training of neural networks", CVPR 2018, section 2.1, symmetric). The device
computes in float32 either way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from kitestring.collaborate.about import About, Budget
from kitestring.collaborate.baselines.pool_trained import Beforehand, State
from kitestring.collaborate.services import OnDevice
from kitestring.core import Cloud, Devices, Recipe, Rows, Tree
from kitestring.errors import SettingError

_SCALE = "scale."


@dataclass(frozen=True)
class Distilled(Beforehand):
    rounds: int = 10
    epochs: int = 3
    batch: int = 32
    lr: float = 1e-3
    optimiser: str = "adam"

    about: ClassVar[About] = About(
        "Distilled",
        "baseline",
        "Hinton et al. 2015",
        "The large model teaches a small one on the cloud's pool, which is then sent down once.",
        needs=("models", "pool"),
    )

    @staticmethod
    def trials(budget: Budget) -> list[Distilled]:
        return [Distilled(*how) for how in budget.in_cloud]

    def init(self, cloud: Cloud, seed: int) -> State:
        return State(0, cloud.initial("small"), cloud.pretrained("large"))

    def trained(self, state: State, cloud: Cloud, pool: Mapping[str, Rows], how: Recipe) -> State:
        # Anew in every round: of long sequences over many classes they would fill the state.
        taught = cloud.predict("large", state.large, {"x": pool["x"]})["out"]
        fit = cloud.fit("small.distill", state.weights, {**pool, "teacher": taught}, how)
        return replace(state, weights=fit.parameters)

    def serve(self) -> OnDevice:
        return OnDevice()


@dataclass(frozen=True)
class EightBits(Beforehand):
    """What `Distilled` made, sent down in 8 bits."""

    bits: int = 8  # 2 to 8, of which each takes a byte all the same
    reach: float = 1.0  # of a row's largest weight, beyond which weights are cut off

    about: ClassVar[About] = About(
        "Distilled int8",
        "baseline",
        "Jacob et al. 2018",
        "The distilled small model, sent down and kept on the device in 8 bits a weight.",
        needs=("models", "pool"),
    )

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise SettingError(f"bits {self.bits}", "EightBits", "Give 2 to 8")
        if not 0 < self.reach <= 1:
            raise SettingError(f"reach {self.reach}", "EightBits", "Give a share in (0, 1]")

    @staticmethod
    def trials(budget: Budget) -> list[EightBits]:
        return [EightBits(reach=1 - 0.5 * i / len(budget.lrs)) for i in range(len(budget.lrs))]

    def init(self, cloud: Cloud, seed: int) -> State:
        return State(0, rounded(cloud.pretrained("distilled"), self.bits, self.reach))

    def serve(self) -> Restored:
        return Restored()


def rounded(weights: Tree, bits: int = 8, reach: float = 1.0) -> Tree:
    """Matrices and kernels as int8 [out, ...] and float32 scales [out] beside them; what has one
    axis stays as it is."""
    most = 2 ** (bits - 1) - 1
    found: dict[str, Any] = {}
    for name, leaf in weights.items():
        if leaf.ndim < 2:
            found[name] = leaf
            continue
        far = reach * np.abs(leaf).max(axis=tuple(range(1, leaf.ndim)))
        scale = (np.where(far > 0, far, 1) / most).astype(np.float32)
        wide = scale.reshape(-1, *[1] * (leaf.ndim - 1))
        found[name] = np.clip(np.rint(leaf / wide), -most, most).astype(np.int8)
        found[_SCALE + name] = scale
    return Tree(found)


def restored(found: Tree) -> Tree:
    """The float32 weights of `rounded` ones that have a device axis."""
    scales = found.below(_SCALE)
    return Tree(
        {
            k: a.astype(np.float32) * scales[k].reshape(*scales[k].shape, *[1] * (a.ndim - 2))
            if k in scales
            else a
            for k, a in found.items()
            if not k.startswith(_SCALE)
        }
    )


@dataclass(frozen=True)
class Restored(OnDevice):
    """The device answers everything with weights that were sent in 8 bits."""

    def weights(self, devices: Devices, deployed: Tree) -> Tree:
        return restored(deployed)
