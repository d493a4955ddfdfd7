"""Keeps the documents true: `python docs/check.py`, and `--write` to renew the generated parts.

Checked in every Markdown file: relative links and their anchors; paths of this repository that are
named in `code`; in console and sh blocks, the flags of `kitestring`, the targets of `make` and the
scripts of `python`; and what stands between `<!-- generated: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "kitestring"
GENERATED = re.compile(
    r"(?P<open><!-- generated: (?P<name>[\w-]+) -->\n)(?P<body>.*?)(?P<close><!-- end -->)", re.S
)
FENCE = re.compile(r"^[ ]*(```+|~~~+)[ ]*(\w*)[^\n]*\n(.*?)^[ ]*\1[ ]*$", re.S | re.M)
LINK = re.compile(r"!?\[(?:[^\]\[]|\[[^\]]*\])*\]\(<?([^)\s>]+)>?[^)]*\)")
REFERENCE = re.compile(r"^\[[^\]]+\]:\s+(\S+)", re.M)
TAG = re.compile(r"<(?:a|img)\b[^>]*?\b(?:href|src)=\"([^\"]+)\"", re.I)
CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
PATH = re.compile(r"\.?[\w.*-]+(?:/[\w.*-]+)*/?")


def documents() -> list[Path]:
    """The Markdown files of the repository, not those of hidden folders or environments."""
    return [
        path
        for path in sorted(ROOT.rglob("*.md"))
        if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
        and "site-packages" not in path.parts
    ]


def line_of(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


def blank(text: str, pattern: re.Pattern[str]) -> str:
    """The text with every match turned into spaces: positions stay what they were."""
    return pattern.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)


# Links


@functools.cache
def anchors(path: Path) -> frozenset[str]:
    """The anchors that GitHub makes of a file's headings, and those set by hand."""
    text = path.read_text(encoding="utf-8")
    found: dict[str, int] = {}
    names = set(re.findall(r"\b(?:id|name)=\"([^\"]+)\"", text))
    for match in re.finditer(r"^#{1,6}[ ]+(.+?)[ #]*$", blank(text, FENCE), re.M):
        title = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", match[1]).lower()
        slug = re.sub(r"[^\w\- ]", "", title).replace(" ", "-")
        count = found[slug] = found.get(slug, -1) + 1
        names.add(f"{slug}-{count}" if count else slug)
    return frozenset(names)


def links(path: Path, text: str) -> Iterator[tuple[int, str]]:
    prose = blank(blank(text, FENCE), CODE)
    for pattern in (LINK, REFERENCE, TAG):
        for match in pattern.finditer(prose):
            target, _, anchor = match[1].partition("#")
            if re.match(r"[a-z]+:", target):
                continue
            there = (path.parent / target).resolve() if target else path
            if not there.exists():
                yield match.start(), f"the link {match[1]} leads nowhere"
            elif anchor and there.suffix == ".md" and anchor not in anchors(there):
                yield match.start(), f"{there.relative_to(ROOT)} has no heading #{anchor}"


# Paths in `code`


def found_at(name: str) -> list[Path]:
    """Files that a document may mean by `name`: from the root, or from inside the package."""
    for base in (ROOT, PACKAGE):
        if "*" in name:
            if hits := list(base.glob(name.rstrip("/"))):
                return hits
        elif (base / name).exists():
            return [base / name]
    return []


def claims_to_be_ours(name: str) -> bool:
    """Whether its first folder is ours, or it is a Python file; `my_task.py` is the reader's."""
    first, slash, _ = name.partition("/")
    if slash:
        return any((base / first).is_dir() for base in (ROOT, PACKAGE))
    return name.endswith(".py") and not name.startswith(("my", "your"))


def paths(text: str) -> Iterator[tuple[int, str]]:
    prose = blank(text, FENCE)
    for match in CODE.finditer(prose):
        name, _, test = match[1].partition("::")
        name = re.sub(r":\d+(-\d+)?$", "", name)
        if not PATH.fullmatch(name) or not claims_to_be_ours(name):
            continue
        hits = found_at(name)
        if not hits and "/" not in name and not any(PACKAGE.rglob(name)):
            yield match.start(), f"there is no file {name}"
        elif not hits and "/" in name:
            yield match.start(), f"there is no {name}"
        elif test and not re.search(rf"def {re.escape(test)}\b", hits[0].read_text("utf-8")):
            yield match.start(), f"{name} has no {test}"


# Commands


@functools.cache
def help_of(*words: str) -> str | None:
    """What `kitestring WORDS --help` prints; None where there is no such command."""
    call = (
        "import sys; from kitestring.cli import main; sys.argv[0] = 'kitestring'; sys.exit(main())"
    )
    env = os.environ | {"COLUMNS": "88", "NO_COLOR": "1", "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run(
        [sys.executable, "-c", call, *words, "--help"],
        cwd=ROOT,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    return done.stdout if done.returncode == 0 else None


@functools.cache
def known_flags(*words: str) -> frozenset[str]:
    return frozenset(re.findall(r"(?<![\w-])--?[A-Za-z][\w-]*", help_of(*words) or ""))


@functools.cache
def make_targets() -> frozenset[str]:
    return frozenset(re.findall(r"^([\w-]+):(?!=)", (ROOT / "Makefile").read_text(), re.M))


def shell_lines(language: str, body: str) -> Iterator[tuple[int, str]]:
    """(offset, command) of a block; in a console block only what follows a `$`."""
    joined = re.sub(r"\\\n", "  ", body)  # as long as before, so that offsets stay right
    for match in re.finditer(r"^(.*)$", joined, re.M):
        line = match[1].strip()
        if language == "console":
            if not line.startswith("$ "):
                continue
            line = line[2:]
        if line and not line.startswith("#"):
            yield match.start(), line


def simple_commands(line: str) -> Iterator[list[str]]:
    """The commands of a shell line, without settings in front and without redirections."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split = True
    lexer.commenters = "#"
    words: list[str] = []
    for word in [*lexer, ";"]:
        if set(word) <= set("|&;"):
            yield words
            words = []
        elif words or not re.match(r"\w+=", word):
            words.append(word)


def wrong_in(words: list[str]) -> Iterator[str]:
    """What is wrong with one command of ours; other programs' commands are theirs to know."""
    if not words:
        return
    name, *rest = words
    if Path(name).name == "kitestring" and (PACKAGE / "cli.py").exists():
        at = 1 if rest and re.fullmatch(r"[a-z][\w-]*", rest[0]) else 0
        if help_of(*rest[:at]) is None:
            yield f"there is no `kitestring {' '.join(rest[:at])}`"
            return
        for word in rest[at:]:
            flag = word.partition("=")[0]
            if re.match(r"--?[A-Za-z]", flag) and flag not in known_flags(*rest[:at]):
                yield f"`{' '.join(['kitestring', *rest[:at]])}` has no flag {flag}"
    elif name == "make":
        for word in rest:
            if re.fullmatch(r"[a-z][\w-]*", word) and word not in make_targets():
                yield f"the Makefile has no target {word}"
    elif re.fullmatch(r"(?:.*/)?python3?(?:\.\d+)?", name):
        for word in rest[:1]:
            ours = word.endswith(".py") and claims_to_be_ours(word)
            if ours and not (ROOT / word).exists():
                yield f"there is no script {word}"


def commands(text: str) -> Iterator[tuple[int, str]]:
    for match in FENCE.finditer(text):
        if match[2] not in ("console", "sh", "bash", "shell"):
            continue
        for offset, line in shell_lines(match[2], match[3]):
            try:
                found = [wrong for words in simple_commands(line) for wrong in wrong_in(words)]
            except ValueError as error:
                found = [f"not a shell line: {error}"]
            for wrong in found:
                yield match.start(3) + offset, wrong


# Generated parts


def generate_help() -> str | None:
    if not (PACKAGE / "cli.py").exists():
        return None
    whole = help_of() or ""
    choices = re.search(r"\{([\w,]+)\}", whole)  # unless they are listed, each with what it does
    commands = re.findall(r"^    (\w+)\s", whole, re.M) or choices[1].split(",")
    each = [f"## {name}\n\n```text\n{(help_of(name) or '').strip()}\n```\n" for name in commands]
    return "\n" + "\n".join(each) + "\n"


def generate_collaborations() -> str | None:
    sys.path.insert(0, str(PACKAGE.parent))
    if importlib.util.find_spec("kitestring.comparison.methods") is None:
        return None
    from kitestring.comparison.methods import table

    return f"\n{table().strip()}\n\n"


def generate_example() -> str | None:
    path = ROOT / "tests" / "examples" / "my_task.py"
    return f"\n```python\n{path.read_text().strip()}\n```\n\n" if path.exists() else None


def generate_demo() -> str | None:
    path = ROOT / "benchmarks" / "results" / "digits.txt"
    return f"\n```text\n{path.read_text().rstrip()}\n```\n\n" if path.exists() else None


def generate_simulation() -> str | None:
    """The medians of benchmarks/results/simulation.md."""
    home = ROOT / "benchmarks"
    kept = home / "results" / "simulation.json"
    if not kept.exists():
        return None
    sys.path.insert(0, str(home / "simulation"))
    from workloads import WORKLOADS  # type: ignore[import-not-found]

    speeds: dict[tuple[str, str], dict[int, float]] = {}
    for r in json.loads(kept.read_text())["runs"]:
        if not r["failed"]:
            known = speeds.setdefault((r["workload"], r["contender"]), {})
            known[r["turn"]] = r["said"]["updates_per_s"]
    others = {"sequential": "plain torch", "pfl": "pfl-research", "flower": "Flower"}
    heads = ["workload", "client updates/s", *others.values()]
    lines = [heads, ["---"] * len(heads)]
    for name, w in WORKLOADS.items():
        mine = speeds[name, "kitestring"]
        cells = [f"{name}: {w.about}", three(statistics.median(mine.values()))]
        for other in others:
            theirs = speeds.get((name, other), {})
            ratios = [mine[turn] / theirs[turn] for turn in mine if turn in theirs]
            cells.append(f"{three(statistics.median(ratios))}×" if ratios else "-")
        lines.append(cells)
    return "\n" + "".join(f"| {' | '.join(cells)} |\n" for cells in lines) + "\n"


def generate_devices() -> str | None:
    """The medians of benchmarks/results/devices.md."""
    home = ROOT / "benchmarks"
    kept = home / "results" / "devices.json"
    if not kept.exists():
        return None
    sys.path[:0] = [str(PACKAGE.parent), str(home / "devices")]
    from cases import CASES  # type: ignore[import-not-found]

    from kitestring.units import duration, size

    found = json.loads(kept.read_text())
    runs = {(r["case"], r["name"]): r for r in found["cases"]}
    heads = ["model", "what", "Kitestring", "plain torch", "ONNX Runtime's example", "package"]
    lines = [heads, ["---"] * len(heads)]
    for case in CASES:
        leads = [runs[case.name, other]["lead"] for other in ("torch", "runtime")]
        lines.append([
            case.model, case.title, duration(runs[case.name, "kitestring"]["median"]),
            *(f"{lead[1]:.2f}×" if lead else "-" for lead in leads),
            size(found["sizes"][f"{case.model}-{case.train or 'predict'}"]["kitestring"]),
        ])  # fmt: skip
    return "\n" + "".join(f"| {' | '.join(cells)} |\n" for cells in lines) + "\n"


def three(value: float) -> str:
    """Three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


GENERATORS: dict[str, tuple[str, Callable[[], str | None]]] = {
    "example": ("README.md", generate_example),
    "demo": ("README.md", generate_demo),
    "help": ("docs/help.md", generate_help),
    "simulation": ("README.md", generate_simulation),
    "devices": ("README.md", generate_devices),
    "collaborations": ("README.md", generate_collaborations),
}


@functools.cache
def generated(name: str) -> str | None:
    """The part's text; None as long as the code that makes it is not there."""
    return GENERATORS[name][1]()


def renewed(text: str) -> str:
    def part(match: re.Match[str]) -> str:
        body = generated(match["name"]) if match["name"] in GENERATORS else None
        return match[0] if body is None else match["open"] + body + match["close"]

    return GENERATED.sub(part, text)


def generated_parts(path: Path, text: str) -> Iterator[tuple[int, str]]:
    bare = blank(blank(text, FENCE), CODE)
    parts = {match.start(): match for match in GENERATED.finditer(text)}
    for match in re.finditer(r"<!-- generated: ?(.*?) ?-->", bare):
        part = parts.get(match.start())
        if part is None or "<!-- generated:" in part["body"]:
            yield match.start(), f"the generated part {match[1]} has no end"
        elif part["name"] not in GENERATORS:
            yield match.start(), f"nobody generates {part['name']}"
        elif (body := generated(part["name"])) is None:
            print(f"{path.relative_to(ROOT)}: cannot generate {part['name']} yet; skipped")
        elif body != part["body"]:
            yield match.start(), f"{part['name']} is out of date: make docs"
    for name, (home, _) in GENERATORS.items():
        if path == ROOT / home and f"<!-- generated: {name} -->" not in bare:
            yield 0, f"the generated part {name} belongs here"


def main(arguments: list[str]) -> int:
    if arguments not in ([], ["--write"]):
        print("usage: python docs/check.py [--write]", file=sys.stderr)
        return 2
    wrong = 0
    for path in documents():
        text = path.read_text(encoding="utf-8")
        if arguments and (new := renewed(text)) != text:
            path.write_text(new, encoding="utf-8")
            print(f"{path.relative_to(ROOT)}: written")
            text = new
        findings = [
            *links(path, text),
            *paths(text),
            *commands(text),
            *generated_parts(path, text),
        ]
        for position, what in sorted(findings):
            print(f"{path.relative_to(ROOT)}:{line_of(text, position)}: {what}")
            wrong += 1
    print(f"docs: {wrong or 'nothing'} wrong in {len(documents())} files")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
