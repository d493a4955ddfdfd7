"""Bytes on disk of packages and all they need: `installed.py NAME ...`, one JSON line."""

from __future__ import annotations

import json
import re
import sys
from importlib import metadata

from packaging.requirements import Requirement


def needed(name: str, found: dict[str, metadata.Distribution]) -> None:
    """That package and, in turn, what it requires here."""
    name = re.sub(r"[-_.]+", "-", name).lower()
    if name in found:
        return
    found[name] = metadata.distribution(name)
    for line in found[name].requires or []:
        wanted = Requirement(line)
        if wanted.marker is None or wanted.marker.evaluate({"extra": ""}):
            needed(wanted.name, found)


def size(package: metadata.Distribution) -> int:
    files = [package.locate_file(f) for f in package.files or [] if f.suffix != ".pyc"]
    return sum(f.stat().st_size for f in files if f.is_file())


def main() -> None:
    answer = {}
    for names in sys.argv[1:]:
        found: dict[str, metadata.Distribution] = {}
        for name in names.split("+"):
            needed(name, found)
        each = {name: size(package) for name, package in found.items()}
        versions = {name: package.version for name, package in found.items()}
        answer[names] = {"bytes": sum(each.values()), "each": each, "versions": versions}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
