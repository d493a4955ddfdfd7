"""What several commands ask for in the same words: which task, and how to run over it."""

from __future__ import annotations

import argparse

from kitestring.errors import SettingError


def add_task(command: argparse.ArgumentParser) -> None:
    """The task's arguments, for `table` to read."""
    data = command.add_argument_group("the task")
    data.add_argument(
        "task", nargs="?", metavar="TASK",
        help="a built-in task (`kitestring tasks` lists them), package.module:name or file.py:name",
    )  # fmt: skip
    data.add_argument("--csv", metavar="FILE", help="a table instead, one row a line")
    data.add_argument("--user", metavar="COL", help="its column that says whose row it is")
    data.add_argument("--target", metavar="COL", help="its column to predict")
    data.add_argument("--users", type=int, metavar="N", help="only so many of the users")


def table(given: argparse.Namespace) -> str | None:
    """The table's file; None for a task. Raises `SettingError` where the two are mixed."""
    if given.csv is None:
        if given.user or given.target:
            raise SettingError("--user and --target belong to --csv", mend="Add --csv FILE")
        return None
    if given.task:
        raise SettingError(f"a task ({given.task}) and --csv exclude each other")
    if not given.user or not given.target:
        raise SettingError("--csv needs --user COL and --target COL")
    return str(given.csv)


def check_run(given: argparse.Namespace) -> None:
    """Raises `SettingError` for --workers below 1, and for --resume with --fresh."""
    if given.workers is not None and given.workers < 1:
        raise SettingError(f"--workers {given.workers} is too small", mend="Give 1 or more")
    if given.resume and given.fresh:
        raise SettingError("--resume and --fresh exclude each other")
