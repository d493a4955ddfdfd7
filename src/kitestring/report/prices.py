"""What a row costs per device and day: bytes, dollars and joules, from a ledger and list prices.

Bytes and operations were measured; the dollars follow from them and from `prices.toml`, and the
joules are modelled from the device profile.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from kitestring.comparison.results import Row, SeedResult, Traffic
from kitestring.errors import SettingError, unknown

MONTH = 30  # days

FIGURES: dict[str, dict[str, str]] = {
    "cloud": {
        "gpu_hour": "dollars per GPU-hour",
        "gpu_flops": "effective operations per second of that GPU",
        "gb_in": "dollars per GB from devices into the cloud",
        "gb_out": "dollars per GB from the cloud to devices",
        "million_requests": "dollars per million requests",
    },
    "use": {
        "requests_per_day": "requests per device and day",
        "learn_every_days": "days until the learning is repeated",
    },
}
DIVISORS = ("gpu_flops", "learn_every_days")


@dataclass(frozen=True)
class Prices:
    """Dollars, and how much a device is used; the names are those of `prices.toml`."""

    gpu_hour: float
    gpu_flops: float  # operations per second
    gb_in: float  # per 1e9 bytes
    gb_out: float
    million_requests: float
    requests_per_day: float  # per device
    learn_every_days: float
    sources: Mapping[str, str] = field(default_factory=dict)  # figure -> where it comes from


@dataclass(frozen=True)
class Daily:
    """What one device costs on one day, the learning spread over `learn_every_days`."""

    up: Traffic
    down: Traffic  # what is sent down before the first request is the leaf "parameters (deploy)"
    compute: float  # dollars for the cloud's operations, or the recorded cost of the answers
    traffic: float  # dollars
    requests: float  # dollars
    joules: tuple[float, float]  # modelled (low, high), of the device
    cloud_calls: float  # requests that reach the cloud

    @property
    def bytes(self) -> float:
        return self.up.total + self.down.total

    @property
    def dollars(self) -> float:
        return self.compute + self.traffic + self.requests

    @property
    def fleet_month(self) -> float:
        """Dollars per month of 30 days for 1000 devices."""
        return self.dollars * MONTH * 1000


def load(path: Path | None = None) -> Prices:
    """The packaged prices, or those of the file at `path`, which must hold every figure."""
    packaged = (
        resources.files("kitestring.report").joinpath("prices.toml").read_text(encoding="utf-8")
    )
    default = _checked(tomllib.loads(packaged), "prices.toml")
    if path is None:
        return Prices(**default[0], sources=default[1])
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        mend = "Give the path of a prices file, or leave --prices out"
        raise SettingError(f"cannot read it: {error.strerror}", str(path), mend) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        mend = "Start from a copy of the packaged prices.toml"
        raise SettingError(f"not TOML: {error}", str(path), mend) from error
    figures, words = _checked(given, str(path))

    def source(name: str) -> str:
        # A figure that was changed under the packaged words is not what the words say.
        own = words.get(name)
        if own not in (None, default[1][name]):
            return str(own)
        return default[1][name] if figures[name] == default[0][name] else f"from {path.name}"

    return Prices(**figures, sources={name: source(name) for name in figures})


def daily(seed: SeedResult, prices: Prices, device_users: int) -> Daily:
    """What one seed of one row costs per device and day.

    The cloud's learning is shared by `device_users` devices. A recorded cost per request stands
    for the cloud's operations in serving. A round of the learning in which anything crossed is
    billed as one request per device, which is the most that it can be."""
    learning, serving = seed.learning, seed.serving
    often, asked = 1 / prices.learn_every_days, prices.requests_per_day
    deploy = {"parameters (deploy)": serving.deploy_bytes} if serving.deploy_bytes else {}
    deployed = Traffic({"parameters": serving.deploy_bytes} if deploy else {}, deploy)
    up = _sum([(learning.up, often), (serving.up, asked)])
    down = _sum([(learning.down, often), (deployed, often), (serving.down, asked)])
    second = prices.gpu_hour / 3600 / prices.gpu_flops  # dollars per operation
    learnt = learning.cloud_flops / max(1, device_users) * often * second
    if serving.recorded_cost is None:
        answered = serving.cloud_flops * second
    else:
        answered = serving.recorded_cost
    rounds = learning.rounds if learning.up.total + learning.down.total > 0 else 0
    calls = serving.cloud_calls * asked
    low, high = (
        learnt_j * often + served_j * asked
        for learnt_j, served_j in zip(learning.joules, serving.joules, strict=True)
    )
    return Daily(
        up=up,
        down=down,
        compute=learnt + answered * asked,
        traffic=(up.total * prices.gb_in + down.total * prices.gb_out) / 1e9,
        requests=(calls + rounds * often) * prices.million_requests / 1e6,
        joules=(low, high),
        cloud_calls=calls,
    )


def mean_daily(row: Row, prices: Prices, device_users: int) -> Daily:
    """The mean over the row's seeds of what each costs per device and day."""
    days = [daily(seed, prices, device_users) for seed in row.seeds]
    part = 1 / len(days)
    return Daily(
        up=_sum([(day.up, part) for day in days]),
        down=_sum([(day.down, part) for day in days]),
        compute=float(np.mean([day.compute for day in days])),
        traffic=float(np.mean([day.traffic for day in days])),
        requests=float(np.mean([day.requests for day in days])),
        joules=(
            float(np.mean([day.joules[0] for day in days])),
            float(np.mean([day.joules[1] for day in days])),
        ),
        cloud_calls=float(np.mean([day.cloud_calls for day in days])),
    )


def mean_traffic(parts: Sequence[Traffic]) -> Traffic:
    """The mean of several seeds' traffic, leaf by leaf."""
    return _sum([(traffic, 1 / len(parts)) for traffic in parts])


def _sum(parts: Sequence[tuple[Traffic, float]]) -> Traffic:
    kinds: dict[str, float] = {}
    leaves: dict[str, float] = {}
    for traffic, times in parts:
        for total, part in ((kinds, traffic.kinds), (leaves, traffic.leaves)):
            for name, size in part.items():
                total[name] = total.get(name, 0.0) + size * times
    return Traffic(kinds, leaves)


def _checked(given: Mapping[str, Any], where: str) -> tuple[dict[str, float], dict[str, str]]:
    """The figures and the words of a prices file, or the error that says what is wrong in it."""
    names = [name for section in FIGURES.values() for name in section]
    for section, content in given.items():
        if section not in (*FIGURES, "sources") or not isinstance(content, dict):
            raise _at(where, unknown("section", section, [*FIGURES, "sources"]))
        for name in content:
            if name not in FIGURES.get(section, names):
                raise _at(
                    where, unknown(f"figure in [{section}]", name, FIGURES.get(section, names))
                )
    figures: dict[str, float] = {}
    for section, known in FIGURES.items():
        for name, means in known.items():
            if name not in given.get(section, {}):
                mend = f"Add it under [{section}]: {means}"
                raise SettingError(f"{name!r} is missing", where, mend)
            value = given[section][name]
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise SettingError(f"{name} is {value!r}, not a number", where, f"It is: {means}")
            if not math.isfinite(value) or value < 0 or (value == 0 and name in DIVISORS):
                least = "more than 0" if name in DIVISORS else "0 or more"
                raise SettingError(f"{name} is {value}", where, f"{means} must be {least}")
            figures[name] = float(value)
    return figures, {name: str(words) for name, words in given.get("sources", {}).items()}


def _at(where: str, error: SettingError) -> SettingError:
    return SettingError(error.what, where, error.mend)
