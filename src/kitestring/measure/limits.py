"""Limits that stand in for a smaller device: control groups of Linux, version 1 or 2.

A share of the processor is taken away in slices of time: what runs, runs at full speed, and then
waits. That is an emulation by quota, not a slower core."""

from __future__ import annotations

import os
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal

Controller = Literal["cpu", "memory"]
PERIOD = 10_000  # microseconds: a share of the processor is given out anew that often
_LEAST = 1_000  # microseconds, of a quota: the kernel takes no less
_MOUNTS, _OWN = Path("/proc/self/mounts"), Path("/proc/self/cgroup")


class Unavailable(Exception):
    """There is no control group to be had; its text says why."""


@dataclass(frozen=True)
class Home:
    """Where a group of one controller can be made."""

    folder: Path
    version: Literal[1, 2]


def home(controller: Controller, mounts: Path = _MOUNTS, own: Path = _OWN) -> Home:
    """Below the group that this process is in, so that its limits go on to hold."""
    try:
        mounted = [line.split() for line in mounts.read_text().splitlines()]
        groups = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        raise Unavailable("there are no control groups here: they are a part of Linux") from None
    refused = ""
    for _, place, kind, options, *_ in mounted:
        if kind == "cgroup" and controller in options.split(","):
            path = next((p for _, names, p in groups if controller in names.split(",")), "/")
            folder = _inside(Path(place), path)
            if os.access(folder, os.W_OK):
                return Home(folder, 1)
            refused = str(folder)
    for _, place, kind, *_ in mounted:
        if kind != "cgroup2":
            continue
        path = next((p for number, names, p in groups if number == "0" and not names), "/")
        folder = _inside(Path(place), path)
        for above in [folder, *folder.parents]:
            if _hands_down(above, controller) and os.access(above, os.W_OK):
                return Home(above, 2)
            if above == Path(place):
                refused = refused or place
                break
    if refused:
        raise Unavailable(f"no control group for {controller} can be made below {refused}")
    raise Unavailable(f"no control group for {controller} is mounted")


def _inside(mount: Path, path: str) -> Path:
    """In a container the path may be one of the host's: then the mount itself."""
    folder = mount / path.lstrip("/")
    return folder if folder.is_dir() else mount


def _hands_down(folder: Path, controller: str) -> bool:
    try:
        return controller in (folder / "cgroup.subtree_control").read_text().split()
    except OSError:
        return False


class Group:
    """A control group of our own, removed at the end."""

    def __init__(self, where: Home, settings: dict[str, str]) -> None:
        self.version = where.version
        self.folder = where.folder / f"kitestring-{os.getpid()}-{secrets.token_hex(4)}"
        try:
            self.folder.mkdir()
            for name, value in settings.items():
                (self.folder / name).write_text(value)
        except OSError as problem:
            self.close()
            raise Unavailable(f"{problem.filename}: {problem.strerror}") from None

    def add(self, process: int) -> None:
        try:
            (self.folder / "cgroup.procs").write_text(str(process))
        except OSError as problem:
            raise Unavailable(f"{problem.filename}: {problem.strerror}") from None

    def close(self) -> None:
        # A process that has just ended may still be in it for a moment.
        for _ in range(100):
            try:
                self.folder.rmdir()
            except FileNotFoundError:
                return
            except OSError:
                time.sleep(0.02)
            else:
                return

    def __enter__(self) -> Group:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self.close()


def quota(share: float, where: Home | None = None) -> Group:
    """Processes that together get so much of one core: 0.5 is half of one, 2 is two."""
    where = where or home("cpu")
    period = max(PERIOD, round(_LEAST / share))
    most = round(share * period)
    if where.version == 1:
        # The quota second: it may not be below what the period's default allows.
        settings = {"cpu.cfs_period_us": str(period), "cpu.cfs_quota_us": str(most)}
    else:
        settings = {"cpu.max": f"{most} {period}"}
    return Group(where, settings)


def room(bytes: int, where: Home | None = None) -> Group:
    """A process that may take so much more memory, without swap, or is killed."""
    where = where or home("memory")
    if where.version == 2:
        return Group(where, {"memory.max": str(bytes), "memory.swap.max": "0"})
    settings = {"memory.limit_in_bytes": str(bytes)}
    if (where.folder / "memory.memsw.limit_in_bytes").exists():
        settings["memory.memsw.limit_in_bytes"] = str(bytes)
    return Group(where, settings)
