"""`kitestring cut`: where to cut a model between a device and the cloud."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from kitestring.extras import need

EXAMPLE = "kitestring cut digits:large --device phone --cloud pc --link 10Mbit,50ms"


def add(commands: Any) -> None:
    """Registers the command with argparse's subparsers."""
    cut = commands.add_parser(
        "cut",
        help="find where to cut a model between a device and the cloud",
        description="Time each layer of a model here, scale that to a device and a cloud, and find "
        "the cut with the least latency, and with the least energy of the device.",
    )
    cut.add_argument(
        "model", metavar="MODEL",
        help="a torch module as package.module:name or file.py:name, or a built-in task's, as in "
        "digits:large",
    )  # fmt: skip
    cut.add_argument(
        "--device", default="phone", metavar="PROFILE",
        help="a size class (phone), a device of `kitestring measure --profiles`, or a profile file",
    )  # fmt: skip
    cut.add_argument(
        "--cloud", metavar="PROFILE",
        help="what computes in the cloud (what the device's profile assumes)",
    )  # fmt: skip
    cut.add_argument(
        "--link", metavar="LINK",
        help="bits a second both ways, and the round trip: 10Mbit,50ms (the device's profile)",
    )  # fmt: skip
    cut.add_argument(
        "--input", metavar="SHAPE",
        help="shape of one row, as 3x224x224, or 20:int64:1000 for whole numbers below 1000",
    )  # fmt: skip
    cut.add_argument("--out", type=Path, metavar="DIR", help="where to keep it (runs/cut-MODEL)")


def run(given: argparse.Namespace, command: str) -> None:
    """Prints the cuts, and writes cuts.json, cuts.svg and cuts.png. Raises `KitestringError`."""
    need("cutting", "torch", "rich", "matplotlib")
    from rich.console import Console

    from kitestring.devices.profiles import profile
    from kitestring.errors import RunError
    from kitestring.partition import picture, show
    from kitestring.partition.model import linked, load
    from kitestring.partition.study import study

    # What can be wrong with names is told now, not after the work.
    device = linked(profile(given.device), given.link)
    cloud = profile(given.cloud) if given.cloud else None
    module, rows = load(given.model, given.input)
    speed = (
        (cloud.flops, f"{cloud.name}, {cloud.kind}") if cloud else (device.cloud_flops, "assumed")
    )
    verdict = show.Verdict(study(module, rows), device, *speed)
    console = Console()
    console.print(show.table(verdict))
    folder = given.out or Path("runs") / f"cut-{_plain(given.model)}"
    found = {"command": command, **show.plain(verdict, given.model)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "cuts.json").write_text(json.dumps(found, indent=1) + "\n")
        picture.draw(verdict, f"{given.model} on {device.name}", folder)
    except OSError as problem:
        raise RunError(f"cannot be written: {problem.strerror}", str(folder)) from None
    where = folder.resolve()
    console.print(f"\nKept: {where}/cuts.json, .svg, .png", soft_wrap=True, highlight=False)


def _plain(model: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in model).strip("-").lower()
