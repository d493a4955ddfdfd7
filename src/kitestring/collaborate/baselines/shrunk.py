"""Shrunk: a model that was made smaller beforehand is sent down once, and answers on the device.

What made it so (distilling, pruning, quantising: `kitestring shrink`) is done before any device is
asked, and nothing is trained here.
"""

from __future__ import annotations

from dataclasses import dataclass

from kitestring.collaborate.baselines.pool_trained import Beforehand, State
from kitestring.collaborate.services import OnDevice
from kitestring.core import Cloud


@dataclass(frozen=True)
class Shrunk(Beforehand):
    model: str = "small"  # the program whose weights, as they were delivered, are sent

    def init(self, cloud: Cloud, seed: int) -> State:
        return State(0, cloud.initial(self.model))

    def serve(self) -> OnDevice:
        return OnDevice(model=self.model)
