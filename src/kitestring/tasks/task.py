"""A task: a small model, a large model, users' data, and how to tell a good answer from a bad
one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from kitestring.tasks.users import Users

if TYPE_CHECKING:
    from torch import Tensor, nn

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Metric:
    """`score(answer [n, ...], truth [n, ...])` of one user's rows; NaN where it is undefined.

    `answer` is the model's output for each row (logits, a value), `truth` the column "y"."""

    name: str
    score: Callable[[Array, Array], float]
    higher_is_better: bool = True
    unit: str = "%"  # "%" for shares in [0, 1]


@dataclass(frozen=True)
class Plan:
    """How much everybody may compute: the same budget for every collaboration."""

    local_epochs: int = 20  # passes over its own rows that a device makes in all
    rounds: int = 10  # exchanges over which a collaboration spreads them
    batch: int = 10
    optimiser: Literal["sgd", "adam"] = "sgd"
    lr: tuple[float, ...] = (0.03, 0.1, 0.3)  # one tuning trial each
    cloud_epochs: int = 30
    cloud_batch: int = 32
    cloud_optimiser: Literal["sgd", "adam"] = "adam"
    cloud_lr: tuple[float, ...] = (0.0003, 0.001, 0.003)  # as many trials as `lr`
    gift: int = 30  # pool rows that the cloud sends to a device in one data exchange
    cloud_share: float = 0.2  # of the requests, that a cascade may send up


LossName = Literal["cross_entropy", "binary", "squared"]


@dataclass(frozen=True)
class Task:
    """Models to train on users' rows.

    `small` and `large` make `nn.Module`s that map the column "x" [n, ...] to one output [n, ...]:
    logits [n, classes] or, for sequences, [n, length, classes]; a logit [n] for "binary"; a value
    [n] for "squared". Truths "y" below 0 are ignored by "cross_entropy" (padding).

    A small model with children `front` and `back` (or an `nn.Sequential`, cut before its last
    layer) can be split: the front runs on the device and its features may cross. `server` makes
    the large back that continues from those features in the cloud; a two-layer network by
    default.

    `asks="last"`: of a sequence, only the last position is asked when serving.

    `confidence` maps what is asked of the output to how sure it is, [n] in [0, 1]; a cascade needs
    it. By default the largest class probability, where the loss is "cross_entropy" or "binary"."""

    name: str
    users: Users
    small: Callable[[], nn.Module]
    large: Callable[[], nn.Module]
    metric: Metric
    loss: LossName | Callable[[Tensor, Tensor], Tensor] = "cross_entropy"  # -> one loss a row, [n]
    others: tuple[Metric, ...] = ()
    confidence: Callable[[Tensor], Tensor] | None = None
    server: Callable[[], nn.Module] | None = None
    asks: Literal["row", "last"] = "row"
    plan: Plan = field(default_factory=Plan)
    about: str = ""
    request: str = "one row"
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recorded:
    """Recorded answers instead of models: request collaborations run on them, nothing trains.

    Columns of the users' rows: "x" the sample's number (int64), "device" what the device's model
    answered (float32 [n] or [n, k]) and "confidence" how sure it was (float32 [n]); "y" the
    truth. `cloud` [samples, ...] is what the large model answered and `cost` [samples] its price
    in dollars, both by sample number."""

    name: str
    users: Users
    cloud: Array
    metric: Metric
    cost: Array | None = None
    others: tuple[Metric, ...] = ()
    plan: Plan = field(default_factory=Plan)
    about: str = ""
    request: str = "one request"
    notes: tuple[str, ...] = ()
