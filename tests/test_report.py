"""The report stands alone, escapes what it is given and is written whole; the table fits."""

from __future__ import annotations

import errno
import io
import os
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from kitestring import units
from kitestring.comparison.results import Comparison
from kitestring.errors import RunError
from kitestring.report import page, plots, prices, terminal
from kitestring.report.decide import decide
from kitestring.report.limits import parse_limits
from synthetic import ROWS, comparison

PRICES = prices.load()
VOID = {"meta", "br", "use", "path"}


class Outline(HTMLParser):
    """Checks that tags nest, and gathers ids and addresses."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.handle_startendtag(tag, attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.addresses += [
            value or "" for name, value in attrs if name in ("href", "xlink:href", "src")
        ]

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def outline(html: str) -> Outline:
    out = Outline()
    out.feed(html)
    out.close()
    assert out.open == []
    return out


def made(c: Comparison, limits: str = "1MB/day, 100ms") -> str:
    return page.page(c, decide(c, parse_limits(limits), PRICES), PRICES, "kitestring compare")


@pytest.mark.parametrize(
    "c",
    [
        comparison(users=12),
        comparison(users=12, higher_is_better=False, seeds=1),
        comparison(users=12, missing=tuple(ROWS)),
        comparison(users=12, only=("device_only",)),
        comparison(users=1, seeds=1, only=("device_only", "fedavg")),
        comparison(only=()),
    ],
    ids=["all", "lower", "all missing", "one row", "one user", "no rows"],
)
def test_the_page_stands_alone(c: Comparison) -> None:
    html = made(c)
    page = outline(html)
    assert len(page.ids) == len(set(page.ids))
    assert all(address.startswith("#") for address in page.addresses)
    assert {address[1:] for address in page.addresses} <= set(page.ids)
    assert {name[1:] for name in re.findall(r"url\((.*?)\)", html)} <= set(page.ids)
    assert not re.search(r"<script|<link|@import|<img", html)
    assert "nan" not in re.findall(r"\w+", page.text)


def test_the_page_is_the_same_every_time() -> None:
    assert made(comparison(users=6)) == made(comparison(users=6))


def test_every_figure_has_its_place() -> None:
    c = comparison(missing=("coda",))
    text = outline(made(c)).text
    for said in (
        "CoDA did not run: the synthetic task brings no column for CoDA.",
        "All users are made up.",
        "features.gradient",
        "a made-up machine, 2 cores",
        "kitestring compare",
        "list price, check yours",
        "at most 400 local steps per device",
        "limit of 100ms",
        "synthetic phone",
    ):
        assert said in text


def test_modelled_figures_are_marked() -> None:
    html = made(comparison(users=6))
    joules = re.findall(r"<td([^>]*)>[^<]* J</td>", html)
    latencies = re.findall(r"<td([^>]*)>[\d.]+ ms</td>", html)
    dollars = re.findall(r"<td([^>]*)>\$[^<]*</td>", html)
    assert joules
    assert latencies
    assert dollars
    assert set(joules + latencies + dollars) == {' class="modelled"'}


def test_what_users_supply_is_escaped() -> None:
    evil = "<b onload='x'>&\"$\\frac{机"
    c = comparison(users=6, only=("device_only", "fedavg"))
    row = replace(c.rows[1], title=evil, says=evil, source=evil, settings={evil: evil})
    c = replace(
        c, rows=[c.rows[0], row], task=evil, about=evil, metric=evil, notes=[evil], budget=evil,
        machine=evil, unit=evil, request=evil, profile={evil: evil},
    )  # fmt: skip
    html = made(c, "")
    assert "<b onload" not in html
    assert outline(html).text.count(evil) > 10


def test_many_leaves_are_folded() -> None:
    c = comparison(users=6, only=("fedavg",))
    seed = c.rows[0].seeds[0]
    leaves = {f"parameters.layer{i}": 10.0 for i in range(30)}
    up = replace(seed.learning.up, kinds={"parameters": 300.0}, leaves=leaves)
    seed = replace(seed, learning=replace(seed.learning, up=up))
    html = made(replace(c, rows=[replace(c.rows[0], seeds=[seed])]))
    assert "22 more, 220 B" in html


def test_written_whole(tmp_path: Path) -> None:
    c = comparison(users=6)
    path = tmp_path / "r.html"
    page.write(c, decide(c, parse_limits(""), PRICES), PRICES, path)
    assert path.read_text(encoding="utf-8").endswith("</html>\n")
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.svg"
    path.write_text("old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(RunError, match="No space left on device") as error:
        page.write_plot(comparison(users=6), PRICES, path)
    assert str(path) in str(error.value)
    assert error.value.mend
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("where", ["missing/r.svg", "file/r.svg", "folder"])
def test_a_path_that_cannot_be_written(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(RunError):
        page.write_plot(comparison(users=6), PRICES, tmp_path / where)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def test_the_plot_alone_has_its_own_colours(tmp_path: Path) -> None:
    page.write_plot(comparison(users=6), PRICES, tmp_path / "p.svg")
    text = (tmp_path / "p.svg").read_text(encoding="utf-8")
    ElementTree.fromstring(text)
    assert "var(" not in text
    assert plots.PALETTE[0] in text
    assert "FedGKT" in text  # text, not outlines


def test_pareto_by_hand() -> None:
    points = [(5.0, 0.7), (1.0, 0.5), (3.0, 0.6), (3.0, 0.65), (9.0, 0.7), (2.0, 0.4)]
    assert plots.pareto(points) == [1, 3, 0]


@given(st.lists(st.tuples(st.floats(0, 1e9), st.floats(-1, 1)), max_size=20))
def test_nothing_beats_the_front(points: list[tuple[float, float]]) -> None:
    front = plots.pareto(points)
    for i in front:
        assert not any(x <= points[i][0] and y > points[i][1] for x, y in points)
    for j, (x, y) in enumerate(points):
        assert j in front or any(points[i][0] <= x and points[i][1] >= y for i in front)


@pytest.mark.parametrize("width", [80, 100])
@pytest.mark.parametrize("higher", [True, False])
def test_the_table_fits(width: int, higher: bool) -> None:
    c = comparison(missing=("coda",), higher_is_better=higher)
    console = Console(record=True, width=width, file=io.StringIO())
    verdict = decide(c, parse_limits("1MB/day, no data up"), PRICES)
    console.print(terminal.table(c, verdict, PRICES))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    assert f"* {ROWS[str(verdict.choice)][0]}" in text
    assert "x Pooled" in text
    assert "features 24.0 MB" in text
    assert "CoDA did not run" in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (units.size(0), "0 B"),
        (units.size(999), "999 B"),
        (units.size(999.6), "1.0 kB"),
        (units.size(1_234_567), "1.2 MB"),
        (units.size(304_000), "304 kB"),
        (units.duration(0.0313), "31.3 ms"),
        (units.duration(600), "10 min"),
        (units.duration(9000), "2.50 h"),
        (units.energies((0.0012, 0.0036)), "1.2–3.6 mJ"),
        (units.money(0), "$0"),
        (units.money(0.0000024), "$0.0000024"),
        (units.money(4.1), "$4.10"),
        (units.money(12_345), "$12,345"),
        (units.operations(1.1e12), "1.1 T"),
        (units.share(1.0), "100%"),
        (units.share(0.9996), ">99.9%"),
        (units.share(0.034), "3.4%"),
        (units.share(None), "-"),
        (units.score(0.7912, "%"), "79.1%"),
        (units.score(5.2263, ""), "5.226"),
        (units.score(21.5, "°C"), "21.50 °C"),
        (units.number(3.0), "3"),
        (units.number(0.3 / 0.1), "3"),
        (units.number(3.204), "3.20"),
        (units.number(1e-9), "1e-09"),
        (units.gap(0.0213, "%"), "2.1 points"),
    ],
)
def test_units(text: str, expected: str) -> None:
    assert text == expected
