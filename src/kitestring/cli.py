"""The command line: what each command takes, and where it is done."""

from __future__ import annotations

import argparse
import gc
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

from kitestring import __version__, asked
from kitestring.errors import KitestringError
from kitestring.export import command as exporting
from kitestring.extras import need
from kitestring.measure import command as measuring
from kitestring.pack import command as packing
from kitestring.partition import command as cutting
from kitestring.shrink import command as shrinking

if TYPE_CHECKING:
    from kitestring.comparison.results import Comparison


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="kitestring",
        description="Small models on devices and a large model in the cloud, together.",
    )
    top.add_argument("--version", action="version", version=f"kitestring {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    compare = commands.add_parser(
        "compare",
        help="try every way of collaborating on a task, and say which to choose",
        description="Try every way of collaborating on a task, and say which to choose.",
    )
    asked.add_task(compare)
    what = compare.add_argument_group("the comparison")
    what.add_argument("--only", metavar="NAMES", default="", help="only these, separated by commas")
    what.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds (default 3)")
    what.add_argument(
        "--trials", type=int, default=3, metavar="N", help="tuning trials for each (default 3)"
    )
    what.add_argument(
        "--hardware", default="phone", metavar="NAME",
        help="a size class (phone), a device of `kitestring measure --profiles`, or a profile file",
    )  # fmt: skip
    what.add_argument(
        "--compute", choices=("auto", "compiled", "vmap", "sequential"), default="auto",
        help="how: native code for the model, all devices at once, one by one, or what is faster",
    )  # fmt: skip
    what.add_argument(
        "--device", default="cpu", metavar="NAME",
        help="torch device to compute on, such as cuda or cuda:1 (cpu)",
    )  # fmt: skip
    what.add_argument(
        "--precision", choices=("float32", "bfloat16"), default="float32",
        help="of products in training; what is kept, sent and served is float32 (float32)",
    )  # fmt: skip
    what.add_argument(
        "--shrunk", metavar="DIR", default="",
        help="rows for the models that `shrink` found too: its folder",
    )  # fmt: skip
    what.add_argument(
        "--lost",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="share of replies that never arrive",
    )
    _judging(compare)
    run = compare.add_argument_group("the run")
    run.add_argument("--out", type=Path, metavar="DIR", help="where to keep it (runs/TASK)")
    run.add_argument("--resume", action="store_true", help="go on with a run that was interrupted")
    run.add_argument("--fresh", action="store_true", help="start over, whatever is there")
    run.add_argument("--workers", type=int, metavar="N", help="processes (one for each core)")

    report = commands.add_parser(
        "report",
        help="judge a finished comparison anew, with other limits or prices",
        description="Judge a finished comparison anew, with other limits or prices.",
    )
    report.add_argument("run", type=Path, metavar="DIR", help="the folder that `compare` wrote")
    _judging(report)
    commands.add_parser("tasks", help="list the built-in tasks")
    packing.add(commands)
    exporting.add(commands)
    measuring.add(commands)
    cutting.add(commands)
    shrinking.add(commands)
    return top


def _judging(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("the decision")
    group.add_argument(
        "--limit", metavar="LIMITS", default="",
        help='what must hold, as in "1MB/day, 50ms, no data up"',
    )  # fmt: skip
    group.add_argument("--prices", type=Path, metavar="FILE", help="a price table of your own")
    group.add_argument(
        "--explain", action="store_true", help="say how each program was computed, and why so"
    )
    group.add_argument("--profile", action="store_true", help="say where the time went")


def main(arguments: Sequence[str] | None = None) -> int:
    """0: done. 2: one line on standard error says what is wrong. 3: done, and nothing meets what
    was asked for (`shrink`). 130: interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    given = parser().parse_args(arguments)
    try:
        words = " ".join(_quoted(a) for a in arguments)
        return _COMMANDS[given.command](given, f"kitestring {words}") or 0
    except KitestringError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return _fail("interrupted; --resume goes on where it stopped", 130)
    except BrokenPipeError:
        return 0
    except Exception as error:
        if os.environ.get("KITESTRING_DEBUG"):
            traceback.print_exc()
        line = (str(error).strip().splitlines() or [""])[0]
        return _fail(
            f"unexpected {type(error).__name__}: {line}. "
            "This is a fault of Kitestring: KITESTRING_DEBUG=1 shows where, please report it"
        )


def run() -> int:
    """What a shell runs: `main`, then an end that does not search all of torch for cycles again."""
    status = main()
    gc.freeze()
    return status


def _fail(line: str, status: int = 2) -> int:
    print(f"kitestring: {line}", file=sys.stderr)
    return status


def _quoted(word: str) -> str:
    return f'"{word}"' if " " in word else word


def _compare(given: argparse.Namespace, command: str) -> None:
    need("comparing", "torch", "rich", "matplotlib", "sklearn")
    from kitestring.comparison import forks

    forks.begin()
    from kitestring.comparison.compare import compare
    from kitestring.comparison.order import Order
    from kitestring.report.decide import parse_limits
    from kitestring.report.prices import load as load_prices

    # What can be wrong with limits and prices is told now, not after the work.
    parse_limits(given.limit)
    load_prices(given.prices)
    order = Order(
        task=given.task or "digits",
        csv=asked.table(given),
        user=given.user or "",
        target=given.target or "",
        users=given.users,
        only=tuple(name.strip() for name in given.only.split(",") if name.strip()),
        seeds=given.seeds,
        trials=given.trials,
        profile=given.hardware,
        compute=given.compute,
        device=given.device,
        precision=given.precision,
        lost=given.lost,
        shrunk=given.shrunk,
    )
    asked.check_run(given)
    folder = given.out or Path("runs") / order.title
    from kitestring.comparison.progress import Progress

    # The workers take longer to start than the plots' library to load.
    Thread(target=import_module, args=("kitestring.report.page",), daemon=True).start()
    with Progress() as progress:
        comparison = compare(
            order, folder, resume=given.resume, fresh=given.fresh, workers=given.workers,
            heard=progress,
        )  # fmt: skip
    _judge(comparison, folder, given, command)


def _report(given: argparse.Namespace, command: str) -> None:
    need("a report", "torch", "rich", "matplotlib", "sklearn")
    from kitestring.comparison.compare import load

    _judge(load(given.run), given.run, given, command)


def _judge(comparison: Comparison, folder: Path, given: argparse.Namespace, command: str) -> None:
    from rich.console import Console

    from kitestring.report import page, terminal, times
    from kitestring.report.decide import decide, parse_limits
    from kitestring.report.prices import load as load_prices

    prices = load_prices(given.prices)
    verdict = decide(comparison, parse_limits(given.limit), prices)
    console = Console()
    console.print(terminal.table(comparison, verdict, prices))
    if given.explain:
        console.print(terminal.explained(comparison))
    if given.profile:
        console.print(times.profiled(comparison))
    path = folder / "report.html"
    page.write(comparison, verdict, prices, path, command=command)
    console.print(f"\nReport: {path.resolve()}", soft_wrap=True, highlight=False)


def _tasks(given: Any, command: str) -> None:
    from kitestring.tasks.find import BUILT_IN

    for name, (_, about) in BUILT_IN.items():
        print(f"{name:12} {about}")


_COMMANDS: dict[str, Callable[[argparse.Namespace, str], int | None]] = {
    "compare": _compare, "report": _report, "tasks": _tasks,
    "pack": packing.pack, "show": packing.show, "keys": packing.new_key,
    "export": exporting.run, "measure": measuring.run, "cut": cutting.run,
    "shrink": shrinking.run,
}  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(run())
