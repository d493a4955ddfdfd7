"""Which model to cut, and rows for it: a built-in task's, or anybody's torch module."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from kitestring.devices.profiles import Profile
from kitestring.errors import SettingError, TaskError
from kitestring.measure import modules
from kitestring.measure.inputs import row
from kitestring.partition.graph import COUNTS
from kitestring.tasks.find import BUILT_IN, find
from kitestring.tasks.task import Task

_WHICH = ("small", "large")


def load(name: str, shape: str | None) -> tuple[nn.Module, Tensor]:
    """The model, and some rows for it [n, ...].

    `name`: "digits:large" of a built-in task, which brings rows; else package.module:name or
    file.py:name, a module or a function that makes one; then `shape` is that of one row, as in
    "3x224x224" or, whole numbers below 1000, "20:int64:1000". Weights are the initial ones: how
    long a layer takes does not depend on them."""
    task, _, which = name.partition(":")
    if task in BUILT_IN:
        if shape:
            raise SettingError(f"--input {shape}: {task} brings its own rows", mend="Leave it out")
        return _of_task(task, which)
    if ":" not in name:
        known = ", ".join(f"{task}:large" for task in BUILT_IN)
        mend = f"Name package.module:name, file.py:name, or of a built-in task as in {known}"
        raise SettingError(f"no model named in {name!r}", mend=mend)
    module = modules.made(modules.source(name), name)
    if shape is None:
        return module, _drawn(modules.rows(module, name)[0].shape, "float32", 2)
    found = row(shape)
    return module, _drawn(found.shape, found.dtype, found.below)


def _of_task(name: str, which: str) -> tuple[nn.Module, Tensor]:
    if which not in _WHICH:
        mend = f"Name {name}:small or {name}:large"
        raise SettingError(f"no model {which!r} of the task {name}", mend=mend)
    task = find(name)
    if not isinstance(task, Task):
        raise TaskError("its answers are recorded, it has no models", f"task {name}")
    torch.manual_seed(0)
    x = task.users.load(task.users.devices[0])["train"]["x"][: COUNTS[-1]]
    return getattr(task, which)().eval(), torch.from_numpy(np.array(x))


def _drawn(shape: tuple[int, ...], dtype: str, below: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    size = (COUNTS[-1], *shape)
    if dtype == "float32":
        return torch.randn(size, generator=generator)
    return torch.randint(0, below, size, generator=generator)


_RATES = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
_LINK = re.compile(r"([\d.]+)\s*([kmg]bit)(?:/s)?(?:\s*,\s*([\d.]+)\s*(ms|s))?", re.IGNORECASE)


def linked(profile: Profile, link: str | None) -> Profile:
    """The profile, on another link: "10Mbit" up and down alike, or "10Mbit,50ms" with the round
    trip."""
    if link is None:
        return profile
    found = _LINK.fullmatch(link.strip())
    mend = "Write bits a second, up and down alike, and the round trip: 10Mbit,50ms"
    if not found:
        raise SettingError(f"--link {link!r} is no link", mend=mend)
    try:
        rate = float(found[1]) * _RATES[found[2].lower()] / 8
        trip = float(found[3]) * (1e-3 if found[4].lower() == "ms" else 1) if found[3] else None
    except ValueError:
        raise SettingError(f"--link {link!r} is no link", mend=mend) from None
    if rate <= 0:
        raise SettingError(f"--link {link!r} carries nothing", mend=mend)
    trip = profile.round_trip if trip is None else trip
    return replace(profile, up=rate, down=rate, round_trip=trip)
