"""The collaborations that a comparison runs, by name, and what each of them builds on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kitestring.collaborate.about import About, Budget
from kitestring.collaborate.baselines import pool_trained
from kitestring.collaborate.baselines.device_only import DeviceOnly
from kitestring.collaborate.baselines.distilled import Distilled, EightBits
from kitestring.collaborate.baselines.pooled import Pooled
from kitestring.collaborate.data.coda import CoDA
from kitestring.collaborate.features.fedgkt import FedGKT
from kitestring.collaborate.features.learn_back import LearnBack
from kitestring.collaborate.features.splitnn import SplitNN
from kitestring.collaborate.parameters.fedavg import FedAvg
from kitestring.collaborate.parameters.personal import Personal
from kitestring.collaborate.request.bottleneck import Bottleneck
from kitestring.collaborate.request.cascade import Cascade
from kitestring.collaborate.request.early_exit import EarlyExit
from kitestring.errors import unknown
from kitestring.exchange.ledger import leaf_names


@dataclass(frozen=True)
class Method:
    """`after`: the pool-trained programs it starts from; a hidden one is a means, not a row."""

    name: str
    about: About
    trials: Callable[[Budget], Sequence[Any]]
    after: tuple[str, ...] = ()
    hidden: bool = False


POOL_TRAINED = {"large": "cloud_only", "small": "shipped", "joint": "joint",
                "distilled": "distilled"}  # fmt: skip
"""Which method trains a program on the cloud's pool."""

METHODS: Mapping[str, Method] = {
    m.name: m
    for m in (
        Method("cloud_only", pool_trained.CLOUD_ONLY, lambda b: pool_trained.trials("large", b)),
        Method("device_only", DeviceOnly.about, DeviceOnly.trials),
        Method("pooled", Pooled.about, Pooled.trials, ("large",)),
        Method("shipped", pool_trained.SHIPPED, lambda b: pool_trained.trials("small", b)),
        Method("distilled", Distilled.about, Distilled.trials, ("large",)),
        Method("eight_bits", EightBits.about, EightBits.trials, ("distilled",)),
        Method("personal", Personal.about, Personal.trials, ("distilled",)),
        Method("fedavg", FedAvg.about, FedAvg.trials, ("small",)),
        Method("splitnn", SplitNN.about, SplitNN.trials, ("joint",)),
        Method("fedgkt", FedGKT.about, FedGKT.trials, ("joint",)),
        Method("learn_back", LearnBack.about, LearnBack.trials, ("joint",)),
        Method("coda", CoDA.about, CoDA.trials, ("small",)),
        Method("bottleneck", Bottleneck.about, Bottleneck.trials, ("joint",)),
        Method("cascade", Cascade.about, Cascade.trials, ("small", "large")),
        Method("early_exit", EarlyExit.about, EarlyExit.trials, ("joint",)),
        Method(
            "joint",
            About("Joint", "baseline", "-", "A front with two backs, trained on the pool.",
                  ("models", "pool", "split")),
            lambda b: pool_trained.trials("joint", b),
            hidden=True,
        ),
    )
}  # fmt: skip


def shown(
    names: Sequence[str] | None = None, more: Mapping[str, Method] | None = None
) -> list[Method]:
    """The methods of those names, or all that have a row; `more` have one whatever is named."""
    known = [m.name for m in METHODS.values() if not m.hidden]
    for name in names or ():
        if name not in known:
            raise unknown("collaboration", name, known)
    chosen = [METHODS[name] for name in known if not names or name in names]
    return [*chosen, *(more or {}).values()]


def table() -> str:
    """The collaborations as Markdown, what crosses read off their declarations."""
    lines = [
        "| collaboration | family | paper | learning: up | learning: down | a request sends |",
        "|---|---|---|---|---|---|",
    ]
    budget = Budget(1, 1, 1, "sgd", (0.1,), 1, 1, 1, "sgd", (0.1,), 1, 0.2)
    for method in shown():
        collaboration = method.trials(budget)[0]
        sent = [
            _words(leaf_names(collaboration.crosses, "up")),
            _words(leaf_names(collaboration.crosses, "down")),
            _words(leaf_names(collaboration.serve().crosses, "up")),
        ]
        about = method.about
        lines.append(f"| {about.title} | {about.family} | {about.paper} | {' | '.join(sent)} |")
    return "\n".join(lines)


def _words(names: Mapping[str, Sequence[str]]) -> str:
    said = [f"{kind} ({', '.join(leaves)})" for kind, leaves in names.items()]
    return "; ".join(said).replace("*", "\\*") or "nothing"
