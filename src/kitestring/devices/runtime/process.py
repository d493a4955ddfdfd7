"""A device in a process of its own: it runs one package, and nothing else from outside.

    python -m kitestring.devices.runtime.process PACKAGE --trust KEY.pub

It answers frames on standard input (`devices.side`). They carry messages, rows, seeds and serial
numbers, and name no code.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from kitestring.devices.runtime.load import load
from kitestring.devices.side import DeviceSide, Opened, listen
from kitestring.errors import KitestringError
from kitestring.package import keys


def main(arguments: Sequence[str] | None = None) -> int:
    """0: the other end has closed. 2: one line on standard error says what is wrong."""
    parser = argparse.ArgumentParser(prog="kitestring.devices.runtime.process")
    parser.add_argument("package", type=Path)
    parser.add_argument("--trust", type=Path, action="append", required=True)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args(arguments)
    try:
        found = load(given.package, keys.trusted(given.trust), given.threads)
        opened = Opened(found.half, found.compute, found.package.manifest["collaboration"]["name"])
        listen(DeviceSide(lambda header: opened, lambda header: found.half))
    except KitestringError as error:  # of the package, or bytes that are no frame
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
