"""What a search found, as rows of a comparison: which of it, under which names, and faults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kitestring.comparison import shrunk
from kitestring.comparison.methods import shown
from kitestring.comparison.order import Order
from kitestring.errors import KitestringError, RunError
from kitestring.tasks import digits


def search(
    folder: Path, sizes: dict[str, int], choice: str | None, task: str = "digits", seeds: int = 1
) -> str:
    """A finished search's results, as far as a comparison reads them."""
    candidates: dict[str, Any] = {
        name: {"title": name.replace("-", ", "), "here": {"size": size, "p50": 1e-5 * size}}
        for name, size in sizes.items()
    }
    found = {"task": task, "front": list(sizes), "choice": choice, "seeds": seeds}
    (folder / shrunk.FRONT).write_text(json.dumps({**found, "candidates": candidates}))
    return str(folder)


def test_few_of_a_long_front_the_smallest_the_largest_and_the_choice(tmp_path: Path) -> None:
    """Ten models of 1 to 10 bytes: with room for five and the choice among them, four others."""
    sizes = {f"m{10 - i}": 10 - i for i in range(10)}
    found = [v.name for v in shrunk.variants(search(tmp_path, sizes, "m3"))]
    assert found == ["m1", "m3", "m4", "m7", "m10"]
    without = [v.name for v in shrunk.variants(search(tmp_path, sizes, None))]
    assert without == ["m1", "m3", "m5", "m8", "m10"]


def test_a_short_front_is_shown_whole(tmp_path: Path) -> None:
    found = shrunk.variants(search(tmp_path, {"a": 5, "b": 2}, "a"))
    assert [v.name for v in found] == ["b", "a"]
    (alone,) = shrunk.variants(search(tmp_path, {"a": 5}, "a"))
    assert (alone.name, alone.size, alone.seconds) == ("a", 5, pytest.approx(5e-5))


def test_names_fit_a_column() -> None:
    def short(title: str) -> str:
        return shrunk.Variant("", title, 1, 1.0).short

    assert short("large, quarter, distilled, 4-bit weights") == "Large ¼ w4"
    assert short("small, distilled, 8 bits") == "Small int8"
    assert short("small") == "Small"


def test_rows_come_after_the_others_whatever_is_named(tmp_path: Path) -> None:
    folder = search(tmp_path, {"small-half": 3}, None)
    order = Order(only=("shipped",), shrunk=folder)
    assert [m.name for m in order.shown] == ["shipped", "shrunk_small_half"]
    assert order.methods["shrunk_small_half"].about.title == "Small ½"
    assert [m.name for m in shown(("shipped",))] == ["shipped"]


def test_another_search_is_another_order(tmp_path: Path) -> None:
    """So that a comparison is not resumed with other models."""
    first = Order(shrunk=search(tmp_path, {"a": 1}, "a"))
    again = Order(shrunk=search(tmp_path, {"a": 1}, "a"))
    other = Order(shrunk=search(tmp_path, {"a": 2}, "a"))
    assert first == again != other


def test_the_note_says_what_was_measured(tmp_path: Path) -> None:
    (note,) = shrunk.note(search(tmp_path, {"large": 2000}, "large", seeds=2))
    assert "Large (large) 2.0 kB, 20.0 ms" in note
    assert "2 seeds" in note
    assert shrunk.note("") == []


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"front": ["a"]}', '{"front": 1, "candidates": {}}',
             '{"front": ["a"], "candidates": {"a": {"why_not": "too large"}}, "choice": null}'],
)  # fmt: skip
def test_a_damaged_search_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / shrunk.FRONT).write_text(text)
    with pytest.raises(RunError, match=r"front\.json: cannot be read"):
        shrunk.variants(str(tmp_path))


def test_no_search_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no finished search is here\. Run `kitestring shrink`"):
        Order(shrunk=str(tmp_path))


def test_a_search_that_learnt_from_a_user_who_is_compared_on_is_refused(tmp_path: Path) -> None:
    """Another number of made-up writers is dealt anew: the second of 16 is in the pool."""
    folder = search(tmp_path, {"small": 3}, None)
    of = {"task": "digits", "csv": None, "user": "", "target": "", "users": 16}
    (tmp_path / "settings.json").write_text(json.dumps(of))
    x = np.zeros((1, 1, 16, 16), np.uint8)
    with pytest.raises(RunError, match=r"learnt from writer 2, .* the same --users"):
        shrunk.programs(digits.task(), folder, 0, x)
    with pytest.raises(RunError, match="kept no 'small'"):  # with as many it goes on
        shrunk.programs(digits.task(16), folder, 0, x)


def test_a_search_on_another_task_is_refused(tmp_path: Path) -> None:
    folder = search(tmp_path, {"a": 1}, "a", task="qmnist")
    with pytest.raises(KitestringError, match="a search on qmnist, not on digits"):
        shrunk.of_task(folder, "digits")
    shrunk.of_task(folder, "qmnist")
    shrunk.of_task("", "digits")
