"""Lines of code by folder: `python benchmarks/lines.py` -> benchmarks/results/lines.md

Blank lines, comments and docstrings do not count.
"""

from __future__ import annotations

import ast
import io
import tokenize
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]


def code_lines(path: Path) -> int:
    source = path.read_text()
    quiet: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            value = body[0].value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                quiet |= set(range(value.lineno, (value.end_lineno or value.lineno) + 1))
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    used: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in layout | {tokenize.ENDMARKER}:
            used |= set(range(token.start[0], token.end[0] + 1))
    return len(used - quiet)


def main() -> None:
    lines: Counter[str] = Counter()
    files: Counter[str] = Counter()
    for top in ("src/kitestring", "tests", "benchmarks", "docs"):
        for path in sorted((ROOT / top).rglob("*.py")):
            folder = str(path.parent.relative_to(ROOT))
            lines[folder] += code_lines(path)
            files[folder] += 1
    rows = [f"| {folder} | {files[folder]} | {n} |" for folder, n in sorted(lines.items())]
    package = sum(n for folder, n in lines.items() if folder.startswith("src"))
    text = "\n".join(
        [
            "# Lines of code",
            "",
            "`python benchmarks/lines.py`; without blank lines, comments and docstrings.",
            "",
            "| folder | files | lines |",
            "|---|---|---|",
            *rows,
            f"| **the package** | | **{package}** |",
        ]
    )
    (ROOT / "benchmarks" / "results" / "lines.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
