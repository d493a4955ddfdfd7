"""What to compare, what everybody may spend on it, and which needs a task does not meet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kitestring.collaborate.about import NEEDS, About, Budget
from kitestring.comparison import shrunk
from kitestring.comparison.jobs import Bench
from kitestring.comparison.methods import METHODS, Method, shown
from kitestring.devices.fit.compute import How, known, usable
from kitestring.devices.fit.programs import Precision
from kitestring.devices.profiles import fingerprint, profile
from kitestring.errors import SettingError
from kitestring.tasks.find import find, first_users
from kitestring.tasks.programs import confidence, entropy
from kitestring.tasks.tables import task_from_csv
from kitestring.tasks.task import Recorded, Task


@dataclass(frozen=True)
class Order:
    """What to compare: plain values, kept with the run so that a resumed one is the same.

    `profile_file` and `shrunk_file` are set here: the fingerprints of a profile that is a file and
    of a search's results, so that a run is not resumed with others."""

    task: str = "digits"
    csv: str | None = None
    user: str = ""
    target: str = ""
    users: int | None = None
    only: tuple[str, ...] = ()
    seeds: int = 3
    trials: int = 3
    profile: str = "phone"
    compute: How = "auto"
    device: str = "cpu"
    precision: Precision = "float32"
    lost: float = 0.0
    shrunk: str = ""  # the folder of a finished search, whose models get rows
    profile_file: str = ""
    shrunk_file: str = ""

    def __post_init__(self) -> None:
        for name, least in (("seeds", 1), ("trials", 1), ("users", 4)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise SettingError(f"--{name} {value} is too small", mend=f"Give {least} or more")
        if not 0 <= self.lost < 1:
            raise SettingError(f"--lost {self.lost} is not a share", mend="Give a number in [0, 1)")
        shown(self.only)
        profile(self.profile)
        object.__setattr__(self, "profile_file", fingerprint(self.profile))
        object.__setattr__(self, "shrunk_file", shrunk.fingerprint(self.shrunk))
        usable(self.device)
        known(self.precision)

    def load(self) -> Task | Recorded:
        if self.csv is not None:
            task = task_from_csv(Path(self.csv), self.user, self.target)
            return first_users(task, self.users) if self.users else task
        return find(self.task, self.users)

    def bench(self, task: Task | Recorded) -> Bench:
        hardware, how = profile(self.profile), self.compute
        return Bench(task, hardware, how, self.lost, self.device, self.precision, self.shrunk)

    @property
    def shown(self) -> list[Method]:
        """What has a row."""
        return shown(self.only, shrunk.methods(self.shrunk))

    @property
    def methods(self) -> Mapping[str, Method]:
        """All that there are, by name."""
        return {**METHODS, **shrunk.methods(self.shrunk)}

    @property
    def title(self) -> str:
        name = Path(self.csv).stem if self.csv else self.task
        return "".join(c if c.isalnum() else "-" for c in name).strip("-").lower()


def budget(bench: Bench, trials: int) -> Budget:
    """The task's plan, with the typical device's rows and as many learning rates as trials."""
    plan = bench.task.plan
    few = np.arange(min(200, bench.population.size))
    rows = int(np.median(bench.population.rows(few, "train")["y"].n)) if len(few) else 1
    return Budget(
        plan.local_epochs, min(plan.rounds, plan.local_epochs), plan.batch, plan.optimiser,
        _rates(plan.lr, trials), rows, plan.cloud_epochs, plan.cloud_batch, plan.cloud_optimiser,
        _rates(plan.cloud_lr, trials), plan.gift, plan.cloud_share,
    )  # fmt: skip


def _rates(given: tuple[float, ...], count: int) -> tuple[float, ...]:
    """`count` learning rates over the given range: those given, or evenly spaced in the
    logarithm."""
    if len(given) == count:
        return given
    if count == 1:
        return (given[len(given) // 2],)
    low, high = min(given), max(given)
    if low == high:
        low, high = low / 3, high * 3
    return tuple(float(f"{rate:.3g}") for rate in np.geomspace(low, high, count))


def missing(task: Task | Recorded, programs: set[str], about: About) -> str | None:
    """The need that a task does not meet, in words; None where it meets all."""
    has = {"pool", "confidence"}
    if isinstance(task, Task):
        has = {"models"}
        has |= {"pool"} if task.users.pool else set()
        has |= {"split"} if "front" in programs else set()
        has |= {"confidence"} if confidence(task) else set()
        has |= {"entropy"} if entropy(task) else set()
    for need in about.needs:
        if need not in has:
            return f"needs {NEEDS[need]}"
    return None
