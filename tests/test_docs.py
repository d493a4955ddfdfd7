"""The docs check finds what it is there to find, in a repository of a few files."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[1] / "docs" / "check.py"
CLI = """
import argparse

def main():
    parser = argparse.ArgumentParser("kitestring")
    compare = parser.add_subparsers(required=True).add_parser("compare")
    compare.add_argument("task")
    compare.add_argument("--seeds", type=int)
    parser.parse_args()
"""


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_check", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)  # a fresh one, so that nothing is remembered between tests
    package = tmp_path / "src" / "kitestring"
    (package / "engines").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "cli.py").write_text(CLI)
    (package / "engines" / "local.py").write_text("def run(): ...\n")
    (tmp_path / "Makefile").write_text("test: venv\n\ttrue\n")
    (tmp_path / "other.md").write_text("# A title, with `code`\n\n```sh\n# no heading\n```\n")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "PACKAGE", package)
    return module


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[a](other.md) ![b](https://example.org/x.png) [c](#here)\n# Here", None),
        ("[a](gone.md)", "the link gone.md leads nowhere"),
        ("[a](other.md#a-title-with-code)", None),
        ("[a](other.md#no-heading)", "other.md has no heading #no-heading"),
        ("[a]: gone.md", "the link gone.md leads nowhere"),
        ('<img src="gone.svg">', "the link gone.svg leads nowhere"),
        ("`[a](gone.md)`", None),
        ("`engines/local.py` `src/kitestring/engines/` `local.py` `engines/*.py`", None),
        ("`engines/remote.py`", "there is no engines/remote.py"),
        ("`remote.py`", "there is no file remote.py"),
        ("`my_task.py` `a/b` `numpy>=2.0`", None),
        ("`engines/local.py::run`", None),
        ("`engines/local.py::walk`", "engines/local.py has no walk"),
        ("```sh\nkitestring compare digits --seeds 3 | tee log\n```", None),
        ("```console\n$ kitestring compare digits --seed=3\n--other\n```", "has no flag --seed"),
        (
            "1. Do\n\n   ```sh\n   A=1 kitestring compare \\\n     --speed 3\n   ```",
            "no flag --speed",
        ),
        ("```python\nkitestring(--speed)\n```", None),
        ("```sh\nls && kitestring compete\n```", "there is no `kitestring compete`"),
        ("```sh\nmake test PYTHON=python3.12\n```", None),
        ("```sh\nmake tests\n```", "the Makefile has no target tests"),
        ("```sh\npython engines/remote.py\n```", "there is no script engines/remote.py"),
        ("<!-- generated: nonsense -->\n<!-- end -->", "nobody generates nonsense"),
        ("<!-- generated: help -->\nold", "the generated part help has no end"),
        ("<!-- generated: help -->\nold\n<!-- end -->", "help is out of date"),
    ],
)
def test_what_is_wrong_is_found(
    check: ModuleType, capsys: pytest.CaptureFixture[str], text: str, complaint: str | None
) -> None:
    (check.ROOT / "page.md").write_text(text + "\n")
    assert check.main([]) == (complaint is not None)
    found = [line for line in capsys.readouterr().out.splitlines() if line.startswith("page.md:")]
    assert len(found) == (complaint is not None), found
    assert (complaint or "") in "".join(found)


def test_write_renews_the_generated_parts(check: ModuleType) -> None:
    page = check.ROOT / "page.md"
    page.write_text("before\n<!-- generated: help -->\nold\n<!-- end -->\nafter\n")
    assert check.main(["--write"]) == 0
    assert check.main([]) == 0
    assert "--seeds SEEDS" in page.read_text()
    assert page.read_text().startswith("before\n")
    assert page.read_text().endswith("after\n")
    assert "old" not in page.read_text()
