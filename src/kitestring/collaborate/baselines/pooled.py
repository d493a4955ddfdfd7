"""Pooled: every device uploads its raw rows once, and the cloud trains on all there is.

What privacy costs is read off here: the quality without any. The cloud holds all rows in
memory, as it would have to. The small model is trained on all of them from the start and sent
down to answer. The large one goes on from what the pool made of it, with as many steps again on
rows drawn from all, and is reported as "after".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from kitestring.collaborate.about import About, Budget
from kitestring.collaborate.baselines.pool_trained import State, slower
from kitestring.collaborate.services import InCloud, OnDevice
from kitestring.core import Ask, Chunk, Cloud, Crossing, Devices, Lane, Message, Rows, Tree


@dataclass(frozen=True)
class Pooled:
    rounds: int = 10
    epochs: int = 3
    batch: int = 32
    lr: float = 1e-3
    optimiser: str = "adam"

    crosses: ClassVar[Crossing] = {"upload": Lane(up={"data": ("x", "y")})}
    state_type: ClassVar[type[State]] = State
    about: ClassVar[About] = About(
        "Pooled",
        "baseline",
        "-",
        "Every device uploads its raw rows; the cloud trains on all and sends a small model down.",
        needs=("models",),
        large="large",
    )

    @staticmethod
    def trials(budget: Budget) -> list[Pooled]:
        return [Pooled(*how) for how in budget.in_cloud]

    def install(self, devices: Devices) -> Tree:
        return Tree()

    def init(self, cloud: Cloud, seed: int) -> State:
        return State(-1, cloud.initial("small"), cloud.pretrained("large"))

    def ask(self, state: State, cloud: Cloud) -> Sequence[Ask] | None:
        if state.round == self.rounds:
            return None
        everyone = cloud.sample(None)
        return [Ask("upload", everyone)] if state.round < 0 else [Ask("think", everyone[:0])]

    def reply(self, verb: str, message: Message, devices: Devices) -> tuple[Message, Tree]:
        return Message(data=Tree(devices.data)), Tree()

    def tell(self, state: State, chunks: Iterator[Chunk], cloud: Cloud) -> State:
        for chunk in chunks:
            assert chunk.ids is not None
            cloud.table.put(chunk.ids, chunk.message.data)
        if state.round < 0:
            return replace(state, round=0)
        rows, how = everything(cloud), slower(self, state.round)
        small = cloud.fit("small", state.weights, rows, how).parameters
        some = sample(rows, cloud)
        large = cloud.fit("large", state.large, some, how, tag="large").parameters
        return State(state.round + 1, small, large)

    def serve(self) -> OnDevice:
        return OnDevice()

    def large(self) -> InCloud:
        return InCloud()


def everything(cloud: Cloud) -> dict[str, Rows]:
    """The pool and all that was uploaded, side by side."""
    parts = [cloud.table.get([i]) for i in cloud.table.ids()]
    if cloud.data is not None:
        parts.insert(0, Tree(cloud.data))
    out = {}
    for name in ("x", "y"):
        values = np.concatenate([p[name].values[0, : int(p[name].n[0])] for p in parts])
        out[name] = Rows(values[None], np.array([len(values)]))
    return out


def sample(rows: dict[str, Rows], cloud: Cloud) -> dict[str, Rows]:
    """As many rows as the pool has, drawn from all of them: the large model's share of a round."""
    total = int(rows["x"].n[0])
    count = total if cloud.data is None else min(total, int(cloud.data["x"].n[0]))
    chosen = np.argsort(cloud.uniform("large", total), stable=True)[None, :count]
    return {name: r.take(chosen, np.array([count])) for name, r in rows.items()}
