"""What a comparison measured, as plain values: written once as JSON, read by the report and by
`decide`.

Every figure here was measured on held-out test rows or read off the ledger, except those named
`modelled_*` and `seconds`, which come from the device profile and the network model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class Traffic:
    """Bytes by compartment ("data", "features", "parameters", "scalars") and by leaf, one way."""

    kinds: dict[str, float] = field(default_factory=dict)
    leaves: dict[str, float] = field(default_factory=dict)  # "features.h" -> bytes

    @property
    def total(self) -> float:
        return sum(self.kinds.values())


@dataclass(frozen=True)
class Learning:
    """The cost of learning once, per device (means over devices) or for the cloud as a whole."""

    up: Traffic
    down: Traffic
    seconds: float  # simulated: what one device spends computing and sending
    clock: float  # simulated: from the first ask to the last reply, all devices in parallel
    flops: float  # of one device
    joules: tuple[float, float]  # modelled (low, high), of one device
    cloud_flops: float  # of the whole learning, all devices together
    rounds: int
    lost: int  # replies that never came
    refused: int  # replies that came and were not usable (NaN, wrong shape)


@dataclass(frozen=True)
class Serving:
    """The cost of answering, per request (means over all test requests)."""

    up: Traffic
    down: Traffic
    deploy_bytes: float  # parameters sent down once, before the first request, per device
    requests: int
    cloud_calls: float  # share of requests that reached the cloud, 0..1
    cloud_flops: float  # per request
    flops: float  # of the device, per request
    latency_p50: float  # seconds, simulated
    latency_p95: float
    joules: tuple[float, float]  # modelled (low, high), of the device, per request
    recorded_cost: float | None = None  # dollars per request, for tasks that bring recorded costs


@dataclass(frozen=True)
class SeedResult:
    """One collaboration, one seed."""

    seed: int
    users: list[str]  # device users, in order
    scores: list[float]  # the metric per device user, on test rows
    others: dict[str, list[float]]  # further metrics, per device user
    learning: Learning
    serving: Serving
    curve: list[tuple[int, float, float]]  # (% of the rounds done, mean, p10), on validation rows
    large_before: float | None  # the large model, mean over device users
    large_after: float | None
    computed: str  # "compiled", or "PROGRAM vmap: why" and the like
    wall_s: float


@dataclass(frozen=True)
class Row:
    """One collaboration: why it is missing, or what each seed gave."""

    name: str  # "fedavg"
    title: str  # "FedAvg"
    family: str  # "baseline", "parameters", "features", "data", "request"
    source: str  # the paper in a few words
    says: str  # one plain sentence: who trains what, what crosses
    missing: str | None = None  # the need that this task does not meet
    settings: dict[str, Any] = field(default_factory=dict)  # the chosen ones
    trials: list[dict[str, Any]] = field(default_factory=list)  # {"settings": {...}, "score": x}
    seeds: list[SeedResult] = field(default_factory=list)


@dataclass(frozen=True)
class Spent:
    """Seconds that one job took since it was last started, by the parts of `clock.Clock`."""

    title: str  # of the collaboration; not every one has a row
    trial: bool  # or else a seed
    parts: dict[str, float]


@dataclass(frozen=True)
class Times:
    """What a comparison's jobs took, each on one thread."""

    jobs: list[Spent]
    workers: int  # that shared the jobs
    wall_s: float | None  # from the start to the last job's end; None if the run was resumed


@dataclass(frozen=True)
class Comparison:
    """Everything that a comparison of one task found."""

    task: str
    about: str  # one or two sentences: the data, the models, the question
    metric: str  # "accuracy"
    higher_is_better: bool
    unit: str  # "" or "%" (scores are then shares 0..1) or the target's unit
    pool_users: int
    device_users: int
    rows_per_device: tuple[float, float, float]  # train: min, median, max
    request: str  # what one request is: "one image", "one next character"
    small_parameters: int
    large_parameters: int
    budget: str  # the budget of local steps, in words
    trials: int
    profile: dict[str, Any]  # the device profile used
    version: str
    machine: str
    rows: list[Row]
    notes: list[str] = field(default_factory=list)  # what a reader must know (made-up users, ...)
    times: Times | None = None  # None: of a run that did not keep them


def to_json(comparison: Comparison) -> dict[str, Any]:
    return asdict(comparison)


def _with_traffic(value: Mapping[str, Any]) -> dict[str, Any]:
    ways = {"up": Traffic(**value["up"]), "down": Traffic(**value["down"])}
    return {**value, **ways, "joules": tuple(value["joules"])}


def learning_from(value: Mapping[str, Any]) -> Learning:
    return Learning(**_with_traffic(value))


def serving_from(value: Mapping[str, Any]) -> Serving:
    return Serving(**_with_traffic(value))


def from_json(value: Mapping[str, Any]) -> Comparison:
    """The inverse of `to_json`; unknown fields, and missing ones that have no default, raise
    TypeError or KeyError."""

    def seed(v: Mapping[str, Any]) -> SeedResult:
        own = {f.name: v[f.name] for f in fields(SeedResult)}
        own["learning"] = learning_from(v["learning"])
        own["serving"] = serving_from(v["serving"])
        own["curve"] = [tuple(point) for point in v["curve"]]
        return SeedResult(**own)

    rows = [Row(**{**row, "seeds": [seed(s) for s in row["seeds"]]}) for row in value["rows"]]
    spread, times = tuple(value["rows_per_device"]), value.get("times")
    if times is not None:
        times = Times(**{**times, "jobs": [Spent(**job) for job in times["jobs"]]})
    return Comparison(**{**value, "rows": rows, "rows_per_device": spread, "times": times})
