"""`kitestring measure`: what one model takes on this machine."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from kitestring.errors import KitestringError, RunError, SettingError
from kitestring.extras import need

_BYTES = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def add(commands: Any) -> None:
    """Register the command with argparse's subparsers."""
    measure = commands.add_parser(
        "measure",
        help="measure a model on this machine: time, memory, operations, modelled energy",
        description="Measure a model on this machine: time, memory, operations, modelled energy.",
    )
    what = measure.add_argument_group("what")
    what.add_argument(
        "model", nargs="?", metavar="MODEL",
        help="a package (.kite), an .onnx, .pte or .gguf file, or a torch module: "
        "package.module:name, file.py:name",
    )  # fmt: skip
    what.add_argument("--baseline", metavar="MODEL", help="another, run in turn with it")
    what.add_argument(
        "--trust", type=Path, action="append", default=[], metavar="FILE",
        help="the public key that a package must be signed with",
    )  # fmt: skip
    what.add_argument(
        "--input", action="append", default=[], metavar="SHAPE",
        help="one row of a module's input: 1x28x28, or 20:int64:1000; again for each input",
    )  # fmt: skip
    what.add_argument(
        "--inputs", metavar="FILE", default="", help="real inputs, .npz, by name; of .pte in order"
    )
    what.add_argument(
        "--dim", action="append", default=[], metavar="NAME=N",
        help="the size of an axis that an ONNX graph leaves open",
    )  # fmt: skip
    what.add_argument("--rows", type=int, default=1, metavar="N", help="rows in one run (1)")
    what.add_argument("--runs", type=int, default=100, metavar="N", help="runs to time (100)")
    how = measure.add_argument_group("a smaller device")
    how.add_argument(
        "--threads", type=int, default=1, metavar="N", help="threads; one is held to one core (1)"
    )
    how.add_argument(
        "--cpu-quota", type=float, metavar="CORES",
        help="share of a core, as 0.5: an emulation by quota, not a slower core",
    )  # fmt: skip
    how.add_argument(
        "--memory", metavar="SIZE", help="limit on top of what the imports take, as 256MB"
    )
    out = measure.add_argument_group("what to keep")
    out.add_argument("--json", type=Path, metavar="FILE", help="everything, each run's time too")
    out.add_argument(
        "--save-profile", type=Path, metavar="FILE",
        help="a device profile of this machine, for compare --hardware",
    )  # fmt: skip
    out.add_argument(
        "--like", default="phone", metavar="CLASS",
        help="the size class that the profile's link and memory are taken over from (phone)",
    )  # fmt: skip
    out.add_argument(
        "--profiles", action="store_true", help="list the known device profiles with their sources"
    )


def run(given: argparse.Namespace, command: str) -> None:
    """Measure, print, and keep what is to be kept. Raises `KitestringError`."""
    from kitestring.measure import bench, saved
    from kitestring.measure.subject import Inputs, Subject, subjects

    pretty = find_spec("rich") is not None
    if given.profiles:
        need("the table", "rich")
        _print("profiles")
        return
    if not given.model:
        raise SettingError("no model named", mend="Name one, or give --profiles")
    saved.size_class(given.like)
    _writable(given.json)
    _writable(given.save_profile)
    if given.json and given.save_profile and given.json.resolve() == given.save_profile.resolve():
        raise SettingError("--json and --save-profile name one file", str(given.json))
    inputs = Inputs(given.rows, tuple(given.input), dict(map(_dim, given.dim)))
    memory = None if given.memory is None else size(given.memory)
    setting = bench.Setting(inputs, given.runs, given.threads, given.cpu_quota, memory)
    with _Progress(pretty) as progress, TemporaryDirectory() as folder:

        def found(name: str, part: str) -> list[Subject]:
            (Path(folder) / part).mkdir()
            trusted = tuple(given.trust)
            return subjects(name, given.inputs, given.rows, trusted, Path(folder) / part)

        models = found(given.model, "models")
        baselines = found(given.baseline, "baselines") if given.baseline else []
        report = bench.measure(models, baselines, setting, progress.said)
    whole = json.dumps(bench.plain(report), indent=1)
    if pretty:
        _print("results", report)
    else:
        print(whole)  # a device has no rich
    if given.json:
        try:
            given.json.write_text(whole, encoding="utf-8")
        except OSError as problem:
            raise RunError(f"cannot be written: {problem.strerror}", str(given.json)) from None
    if given.save_profile:
        made = saved.profile(report, given.like, given.save_profile.stem)
        saved.write(given.save_profile, made)
        print(f"\nProfile: {given.save_profile.resolve()}", file=sys.stderr)


def _print(what: str, *given: Any) -> None:
    from rich.console import Console

    from kitestring.measure import table

    Console().print(getattr(table, what)(*given))


def size(text: str) -> int:
    """ "256MB" in bytes; kB, MB and GB are powers of ten, KiB, MiB and GiB of two."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text)
    if not found or found[2].lower() not in _BYTES:
        raise SettingError(f"--memory {text!r} is no size", mend="Write 256MB or 64MiB")
    return int(float(found[1]) * _BYTES[found[2].lower()])


def _dim(text: str) -> tuple[str, int]:
    name, _, number = text.rpartition("=")
    if not name or not number.isdigit() or int(number) < 1:
        raise SettingError(f"--dim {text!r}", mend="Write NAME=N, as in length=20")
    return name, int(number)


def _writable(path: Path | None) -> None:
    """What cannot be kept is told before the work, not after."""
    if path is None:
        return
    folder = path.resolve().parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise SettingError("cannot be written", str(path), "Give a file in a folder of yours")


class _Progress:
    """A bar on a terminal, gone when it is done; nothing elsewhere, nor without rich."""

    def __init__(self, pretty: bool) -> None:
        self._bars: Any = None
        self._tasks: dict[str, Any] = {}
        if pretty and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import Progress

            self._bars = Progress(console=Console(stderr=True), transient=True)

    def __enter__(self) -> _Progress:
        if self._bars is not None:
            self._bars.start()
            self._bars.add_task("starting", total=None)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def said(self, name: str, done: int, total: int) -> None:
        if self._bars is None:
            return
        if name not in self._tasks:
            for task in self._bars.task_ids:
                self._bars.remove_task(task)
            self._tasks = {name: self._bars.add_task(name, total=total)}
        self._bars.update(self._tasks[name], completed=done)


def main(arguments: list[str] | None = None) -> int:
    """The command by itself: `python -m kitestring.measure.command measure MODEL`."""
    top = argparse.ArgumentParser(prog="kitestring")
    add(top.add_subparsers(dest="command", required=True, metavar="COMMAND"))
    given = top.parse_args(arguments)
    try:
        run(given, " ".join(["kitestring", *(sys.argv[1:] if arguments is None else arguments)]))
    except KitestringError as error:
        print(f"kitestring: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
