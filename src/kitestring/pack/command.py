"""`kitestring pack`, `show` and `keys`."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kitestring.errors import PackageError, SettingError
from kitestring.extras import need
from kitestring.units import size

_KEY = Path("kitestring.key")


def add(commands: Any) -> None:
    pack = commands.add_parser(
        "pack",
        help="make the signed package that a device runs",
        description="Make the signed package that a device runs: graphs of the model, and of its "
        "training, for ONNX Runtime; the device's half of a collaboration; weights.",
    )
    what = pack.add_argument_group("what to pack")
    what.add_argument("task", metavar="TASK", help="as in compare; or the folder of a finished run")
    what.add_argument("collaboration", metavar="COLLABORATION", help="such as fedavg or cascade")
    what.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of it"
    )
    pack.add_argument("--seed", type=int, default=0, metavar="N", help="of the first weights (0)")
    pack.add_argument("--key", type=Path, default=_KEY, metavar="FILE", help=f"signs it ({_KEY})")
    pack.add_argument("--out", type=Path, metavar="FILE", help="(TASK-COLLABORATION.kite)")

    show = commands.add_parser(
        "show",
        help="say what is in a package, and whether this machine can run it",
        description="Say what is in a package, and whether this machine can run it.",
    )
    show.add_argument("package", type=Path, metavar="PACKAGE")
    show.add_argument(
        "--trust", type=Path, action="append", default=[], metavar="FILE",
        help="a public key, or a folder of them; then signature and golden outputs are checked",
    )  # fmt: skip
    show.add_argument("--plans", action="store_true", help="the device's half, step by step")

    new = commands.add_parser(
        "keys", help="make a key that signs packages", description="Make a key that signs packages."
    )
    new.add_argument("file", type=Path, metavar="FILE", help="the private key; FILE.pub beside it")


def pack(given: argparse.Namespace, command: str) -> None:
    """Build, sign and write. What is wrong with the key or the file is told before the work."""
    need("packing", "torch", "onnx")
    from kitestring.pack.build import build
    from kitestring.pack.source import find
    from kitestring.package import archive, keys

    key = keys.load(given.key)
    title = Path(given.task).name.split(":")[-1]
    path = given.out or Path(f"{title}-{given.collaboration}.kite")
    _check_writable(path)
    source = find(given.task, given.collaboration, given.set, given.seed)
    made = build(source, lambda what: print(f"{what} ..."))
    archive.write(path, made.manifest, made.files, key)
    worst = max((c.error / c.tolerance for c in made.checked), default=0.0)
    print(f"{len(made.checked)} graphs agree with torch (at most {worst:.2g} of what is allowed)")
    print(f"{path}: {size(path.stat().st_size)}")


def _check_writable(path: Path) -> None:
    folder = path.resolve().parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise SettingError("cannot be written", str(path), "Give a file in a folder of yours")


def new_key(given: argparse.Namespace, command: str) -> None:
    from kitestring.package import keys

    public = keys.create(given.file)
    print(f"{given.file} signs packages: keep it to yourself")
    print(f"{given.file}.pub is for devices: {public}")


def show(given: argparse.Namespace, command: str) -> None:
    """With trusted keys, whether it is whole and runs here, and what it then is; without, what
    somebody's manifest says."""
    from kitestring.package import archive, keys

    if not given.trust:
        print("\n".join(_described(archive.unsigned(given.package), given.package)))
        print("\nNot verified: name a public key with --trust")
        return
    from kitestring.devices.runtime.load import load

    found = load(given.package, keys.trusted(given.trust))
    manifest = {**found.package.manifest, "signed by": found.package.key}
    print("\n".join(_described(manifest, given.package)))
    print("\nSigned by a trusted key, whole, and runs here:")
    for check in found.checked:
        print(f"  {check.label:32} off by {check.error:.1e} at most (allowed {check.tolerance:g})")
    if given.plans:
        for plan in found.half.plans.values():
            print("\n" + "\n".join(_steps(plan)))


def _described(manifest: Mapping[str, Any], path: Path) -> list[str]:
    """One printed line each, whatever texts are in it: nobody's manifest writes lines of its own or
    speaks to the terminal."""
    try:
        lines = _lines(manifest, path)
    except (
        *(LookupError, TypeError, AttributeError),
        *(ValueError, ArithmeticError, RecursionError),
    ) as problem:
        what = f"its manifest is not one that this version knows ({problem!r})"
        raise PackageError(what, path.name, "Update Kitestring, or pack it anew") from None
    return [_printable(line) for line in lines]


def _printable(line: str) -> str:
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)


def _lines(m: Mapping[str, Any], path: Path) -> list[str]:
    what, runtime = m["collaboration"], m["runtime"]
    settings = ", ".join(f"{k}={json.dumps(v)}" for k, v in what["settings"].items())
    lines = [
        f"{path.name}: {what['name']} on {m['task']}, {size(path.stat().st_size)}",
        f"  settings     {settings or 'none'}",
        f"  signed by    {m['signed by']}",
        f"  made with    Kitestring {m['kitestring']}, schema {m['schema']}",
        f"  runs in      {runtime['name']} {runtime['least']} or newer, operator set "
        f"{runtime['opset']}, {len(runtime['operators'])} operators",
        "  rows",
    ]
    for name, c in m["columns"].items():
        row = " x ".join(map(str, c["row"])) or "one number"
        lines.append(f"    {name:10} {c['dtype']}, {row}, {c['low']:g} to {c['high']:g}")
    lines.append("  may cross")
    for verb, lane in {**m["crosses"]["rounds"], **m["crosses"]["requests"]}.items():
        ways = [f"{way} {_lane(lane[way])}" for way in ("down", "up") if lane[way]]
        lines.append(f"    {verb:10} {'; '.join(ways) or 'nothing'}")
    lines.append("  files")
    lines += [f"    {size(f['bytes']):>9}  {name}" for name, f in m["files"].items()]
    return lines


def _lane(names: Mapping[str, list[str]]) -> str:
    return ", ".join(f"{kind} ({', '.join(leaves)})" for kind, leaves in names.items())


def _steps(plan: Any) -> list[str]:
    from kitestring.package.plan import numbers

    lines = [f"plan {plan.name}: {len(plan.steps)} steps"]
    for step in plan.steps:
        made, used = numbers(step.out), numbers([*step.args, dict(step.kwargs)])
        tokens = [f"${n}" for n in used[:6]] + ["..."] * (len(used) > 6)
        out = f"${made[0]}" if len(made) == 1 else f"${made[0]}-{made[-1]}" if made else "-"
        named = next((a for a in step.args if isinstance(a, str)), "")
        lines.append(f"  {out:>10} = {step.op} {named} {' '.join(tokens)}".rstrip())
    return lines
