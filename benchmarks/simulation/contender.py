"""What the contenders share: their arguments, the clock of their rounds, the line they end with.

    python benchmarks/simulation/CONTENDER.py WORKLOAD [--seconds 6] [--rounds 3] [--check N]

With --check the contender stops after N rounds, and its weights are held against those of a plain
loop: `torch.optim.SGD`, one device after the other, one process. Sums in another order differ by
some 1e-7; where that makes a ReLU or a maximum fall the other way, by some 1e-5: the plain loop in
float32 is as far from itself in float64.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import models
import torch
from torch import Tensor, nn
from workloads import WORKLOADS, Workload, cohort, rows

PATIENCE = 10  # times the seconds that were asked for: then fewer rounds will do


@dataclass
class Clock:
    """The first round may compile or start processes: it is noted, but does not count."""

    seconds: float
    rounds: int
    check: int
    laps: list[float] = field(default_factory=list)

    def start(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> bool:
        """A round has ended; whether there shall be another."""
        now = time.perf_counter()
        self.laps.append(now - self._last)
        self._last = now
        if self.check:
            return len(self.laps) < self.check
        counted, spent = self.laps[1:], sum(self.laps[1:])
        few = not counted or (len(counted) < self.rounds and spent < PATIENCE * self.seconds)
        return few or spent < self.seconds


def arguments(description: str | None) -> tuple[Workload, Clock]:
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("--seconds", type=float, default=6, help="of rounds, about (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="at least (%(default)s)")
    parser.add_argument("--check", type=int, default=0, metavar="N", help="compare after N rounds")
    given = parser.parse_args()
    torch.set_num_threads(1)
    return WORKLOADS[given.workload], Clock(given.seconds, given.rounds, given.check)


def descend(
    module: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], x: Any, y: Any, w: Workload
) -> None:
    """One local epoch of SGD, in place and all parameters at once: as fast as plain torch does."""
    weights = list(module.parameters())
    x, y = torch.from_numpy(x), torch.from_numpy(y)
    for at in range(0, len(x), w.batch):
        batch = slice(at, at + w.batch)
        slopes = torch.autograd.grad(loss(module(x[batch]), y[batch]), weights)
        with torch.no_grad():
            torch._foreach_add_(weights, slopes, alpha=-w.lr)


def plain(w: Workload, cohorts: Iterable[Any]) -> dict[str, Tensor]:
    """The weights after a round with each of the cohorts, computed in the plainest way."""
    module, loss = models.make(w.name), models.loss(w.name)
    weights = {k: v.clone() for k, v in module.state_dict().items()}
    for devices in cohorts:
        total, count = {k: torch.zeros_like(v, dtype=torch.double) for k, v in weights.items()}, 0
        for device in devices:
            module.load_state_dict(weights)
            step = torch.optim.SGD(module.parameters(), w.lr)
            x, y = (torch.from_numpy(column) for column in rows(w, int(device)))
            for at in range(0, len(x), w.batch):
                step.zero_grad()
                loss(module(x[at : at + w.batch]), y[at : at + w.batch]).backward()
                step.step()
            count += len(x)
            for k, v in module.state_dict().items():
                total[k] += len(x) * v
        weights = {k: (v / count).float() for k, v in total.items()}
    return weights


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Of those that are installed."""
    found = {}
    for name in packages:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def finish(
    w: Workload,
    clock: Clock,
    weights: Callable[[], Mapping[str, Tensor]],
    packages: Iterable[str] = (),
    cohorts: Iterable[Any] | None = None,
    how: str = "",
) -> None:
    """Print the result as one line of JSON; `cohorts` are those that it trained, if not ours, and
    `how` is what it says of how it computed."""
    counted = clock.laps[1:] or clock.laps
    said: dict[str, Any] = {
        "updates_per_s": w.cohort / statistics.median(counted),
        "first_s": clock.laps[0],
        "rounds_s": [round(lap, 6) for lap in clock.laps],
        "how": how,
        "packages": versions(["torch", "numpy", *packages]),
    }
    if clock.check:
        turns = [cohort(w, turn) for turn in range(clock.check)]
        wanted, start = plain(w, turns if cohorts is None else cohorts), plain(w, [])
        found = weights()
        said["difference"] = max(float((found[k] - v).abs().max()) for k, v in wanted.items())
        said["moved"] = max(float((start[k] - v).abs().max()) for k, v in wanted.items())
    print(json.dumps(said), flush=True)
