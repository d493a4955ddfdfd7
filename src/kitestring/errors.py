"""Everything Kitestring raises on purpose. Each error says what is wrong, where, and what to do.

KitestringError
├── SettingError      a name, flag or file of the person at the keyboard
├── TaskError         a task: its models, loss, metric
│   ├── DataError     a task's rows: missing, NaN, misshapen
│   └── ExportError   a model that a device's runtime cannot compute
├── ProtocolError     a message between device and cloud
│   ├── Undeclared    something crossed that the collaboration did not declare
│   ├── BadReply      a device's reply that cannot be used
│   └── BadBytes      bytes that are not a packed message
├── PackageError      a package: damaged, of a stranger's key, or for another runtime
├── NoReplies         nobody, or too few, answered, again and again
└── RunError          a run on disk: unfinished, foreign, damaged, or no room for it
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class KitestringError(Exception):
    """`what` is wrong, `where`, and the `mend`; `str()` is the one line a person reads."""

    def __init__(self, what: str, where: str = "", mend: str = "") -> None:
        self.what, self.where, self.mend = what, where, mend
        super().__init__(what, where, mend)

    def __str__(self) -> str:
        at = f"{self.where}: " if self.where else ""
        return f"{at}{self.what}" + (f". {self.mend}" if self.mend else "")


class SettingError(KitestringError): ...


class TaskError(KitestringError): ...


class DataError(TaskError): ...


class ExportError(TaskError): ...


class ProtocolError(KitestringError): ...


class Undeclared(ProtocolError): ...


class BadReply(ProtocolError): ...


class BadBytes(ProtocolError): ...


class PackageError(KitestringError): ...


class NoReplies(KitestringError): ...


class RunError(KitestringError): ...


def unknown(kind: str, name: str, known: Iterable[str]) -> SettingError:
    """The error for a name that nobody knows, with the nearest known one."""
    known = sorted(known)
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    return SettingError(f"unknown {kind} {name!r}", mend=f"{hint}Known: {', '.join(known)}")
