"""CoDA: the cloud sends a device pool samples that resemble its own; the device keeps what helps.

After Gu, Niu, Yan, Wu, Tang, Jia, Lyu, Chen: "On-device learning with cloud-coordinated data
augmentation for extreme model personalization in recommender systems", arXiv 2201.10382. The
device describes its rows by a few prototypes of their features; the cloud matches pool samples to
them; on the device a classifier of own against outside samples filters the gift, and of three
models (unchanged, trained on own rows, trained on own and kept rows) the one that does best on
held-out own rows stays. So no round makes it worse there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from kitestring.collaborate.about import About, Budget
from kitestring.collaborate.services import OnDevice
from kitestring.collaborate.steps import mean_loss, recipe
from kitestring.core import (
    Array,
    Ask,
    Chunk,
    Cloud,
    Crossing,
    Devices,
    Lane,
    Message,
    Recipe,
    Rows,
    Tree,
)


@dataclass(frozen=True)
class State:
    round: int  # -1: devices have not described themselves yet
    weights: Tree = field(default_factory=Tree)  # the shipped small model
    kept: float = 0.0  # share of the last gift that devices kept
    accepted: float = 0.0  # share of devices whose best model used it


@dataclass(frozen=True)
class CoDA:
    rounds: int = 10
    epochs: int = 1
    batch: int = 10
    lr: float = 0.1
    optimiser: str = "sgd"
    gift: int = 30  # pool samples a round
    prototypes: int = 4
    keep: float = -1.0  # log-likelihood ratio, own against outside, above which a sample is kept

    crosses: ClassVar[Crossing] = {
        "start": Lane(down={"parameters": ("*",)}, up={"features": ("prototypes",)}),
        "learn": Lane(down={"data": ("x", "y")}, up={"scalars": ("kept", "accepted")}),
    }
    state_type: ClassVar[type[State]] = State
    about: ClassVar[About] = About(
        "CoDA",
        "data",
        "Gu et al. 2022",
        "The cloud sends pool samples like the device's own; the device trains on what helps.",
        needs=("models", "pool", "split"),
    )

    @staticmethod
    def trials(budget: Budget) -> list[CoDA]:
        """Each round trains two models: each gets half the epochs, or half the rounds are left."""
        rounds = budget.rounds if budget.epochs > 1 else max(1, budget.rounds // 2)
        epochs = max(1, budget.epochs // 2)
        return [
            CoDA(rounds, epochs, budget.batch, lr, budget.optimiser, budget.gift)
            for lr in budget.lrs
        ]

    def install(self, devices: Devices) -> Tree:
        return devices.initial("small")

    def init(self, cloud: Cloud, seed: int) -> State:
        return State(-1, cloud.pretrained("small"))

    def ask(self, state: State, cloud: Cloud) -> Sequence[Ask] | None:
        if state.round == self.rounds:
            return None
        known = np.array(cloud.table.ids(), np.int64)
        new = np.setdiff1d(cloud.sample(None), known)
        start = Ask("start", new, all=Message(parameters=state.weights))
        if state.round < 0:
            return [start]
        assert cloud.data is not None
        pool = cloud.data
        h = cloud.predict("front", state.weights.pick("front."), {"x": pool["x"]})["h"]
        places = summary(h).values[0, : int(h.n[0])]

        def each(ids: Array) -> Message:
            chosen = match(cloud.table.get(ids)["prototypes"], places, self, state.round)
            n = np.full(len(ids), chosen.shape[1])
            return Message(data=Tree({k: Rows(pool[k].values[0][chosen], n) for k in ("x", "y")}))

        return [Ask("learn", known, each=each), start]

    def reply(self, verb: str, message: Message, devices: Devices) -> tuple[Message, Tree]:
        own = devices.data
        if verb == "start":
            w = message.parameters
            h = summary(devices.predict("front", w.pick("front."), {"x": own["x"]})["h"])
            found = cluster(h, self.prototypes, devices.uniform("prototypes", h.values.shape[1]))
            return Message(features=Tree(prototypes=found)), Tree(w)
        gift, start = dict(message.data), devices.private
        near = self._filter(own, gift, devices)
        gift = {k: r.keep(near) for k, r in gift.items()}
        place = np.cumsum(np.ones_like(own["x"].mask(), np.int64), axis=1)
        held = place % 4 == 0
        train = {k: r.keep(~held) for k, r in own.items()}
        # With too few rows to hold any back, all of them judge.
        some = (held & own["x"].mask()).any(1, keepdims=True)
        judge = {k: r.keep(held | ~some) for k, r in own.items()}
        alone = devices.fit("small", start, train, recipe(self), tag="alone").parameters
        both = {k: train[k].concat(gift[k]) for k in ("x", "y")}
        helped = devices.fit("small", start, both, recipe(self), tag="helped").parameters
        models = [start, alone, helped]
        losses = np.stack([mean_loss(w, judge, devices) for w in models])
        best = np.where(np.isfinite(losses), losses, np.inf).argmin(0)
        chosen = Tree({k: pick_model(best, [w[k] for w in models]) for k in start})
        kept = gift["x"].n / np.maximum(1, message.data["x"].n)
        report = Tree(kept=kept.astype(np.float32), accepted=(best == 2).astype(np.float32))
        return Message(scalars=report), chosen

    def _filter(self, own: Any, gift: Any, devices: Devices) -> Array:
        """[D, L] of the gift: looks like this device's own samples."""
        front = devices.private.pick("front.")
        a, b = (
            summary(devices.predict("front", front, {"x": rows["x"]})["h"]) for rows in (own, gift)
        )
        label = Rows(np.ones_like(a.mask(), np.float32), a.n)
        other = Rows(np.zeros_like(b.mask(), np.float32), b.n)
        rows = {"h": a.concat(b), "y": label.concat(other)}
        adam = Recipe(lr=0.01, epochs=5, batch=self.batch, optimiser="adam")
        critic = devices.fit("critic", devices.initial("critic"), rows, adam, tag="critic")
        logit = devices.predict("critic", critic.parameters, {"h": b})["out"].values
        prior = np.log(np.maximum(1, a.n) / np.maximum(1, b.n))
        near: Array = logit - prior[:, None] > self.keep
        return near

    def tell(self, state: State, chunks: Iterator[Chunk], cloud: Cloud) -> State:
        kept, accepted, count = 0.0, 0.0, 0
        for chunk in chunks:
            if chunk.message.features:
                cloud.table.put(chunk.ids, chunk.message.features)
            else:
                kept += float(chunk.message.scalars["kept"].sum())
                accepted += float(chunk.message.scalars["accepted"].sum())
                count += chunk.count
        told = max(1, count)
        return State(state.round + 1, state.weights, kept / told, accepted / told)

    def serve(self) -> OnDevice:
        return OnDevice(private=True)


def summary(h: Rows) -> Rows:
    """One vector for each row: features averaged over what is between rows and channels."""
    flat = h.values.reshape(*h.values.shape[:2], -1, h.values.shape[-1])
    return Rows(flat.mean(2).astype(np.float32), h.n)


def cluster(h: Rows, k: int, draw: Array) -> Array:
    """k-means prototypes [D, k, d] of each device's rows: a random start and five Lloyd steps."""
    x, real = h.values, h.mask()
    order = np.argsort(np.where(real, draw, 2), axis=1, stable=True)
    start = np.where(np.arange(k) < h.n[:, None], np.arange(k), 0)
    start = np.take_along_axis(order, start, axis=1)
    centres = np.take_along_axis(x, start[..., None], axis=1)
    clean = np.where(real[..., None], x, 0)
    for _ in range(5):
        far = ((clean[:, :, None] - centres[:, None]) ** 2).sum(-1)
        mine = (far.argmin(-1)[..., None] == np.arange(k)) & real[..., None]
        count = mine.sum(1)[..., None]
        moved = np.swapaxes(mine, 1, 2).astype(np.float32) @ clean / np.maximum(1, count)
        centres = np.where(count > 0, moved, centres).astype(np.float32)
    return centres


def match(prototypes: Array, places: Array, settings: CoDA, round: int) -> Array:
    """Pool rows [D, gift] nearest to the prototypes [D, k, d]; each round takes its own comb of
    ranks."""
    each = max(1, settings.gift // settings.prototypes)
    reach = min(len(places), each * settings.rounds)
    far = (
        (places**2).sum(-1)
        - 2 * prototypes @ places.T
        + (prototypes**2).sum(-1)[..., None]
    )  # fmt: skip
    nearest = np.argsort(far, axis=-1, stable=True)[..., :reach]
    ranks = np.minimum(round + settings.rounds * np.arange(each), reach - 1)
    return nearest[..., ranks].reshape(len(prototypes), -1)


def pick_model(best: Array, leaves: Sequence[Array]) -> Array:
    """Leaf `best`[d] for each device d."""
    wide = best.reshape((-1,) + (1,) * (leaves[0].ndim - 1))
    return np.where(wide == 0, leaves[0], np.where(wide == 1, leaves[1], leaves[2]))
