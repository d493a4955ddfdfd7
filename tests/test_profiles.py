"""Device profiles: assumed classes stay what they were, published figures follow from what they
quote, and a file of one's own is read or refused."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kitestring.comparison.compare import compare, load
from kitestring.comparison.order import Order
from kitestring.devices.profiles import (
    FIGURES,
    LINK,
    PROFILES,
    Profile,
    fingerprint,
    latencies,
    profile,
    published,
    read,
    references,
)
from kitestring.errors import RunError, SettingError
from kitestring.measure import saved, table
from kitestring.measure.bench import Measured, Pair, Report, Setting, Spread
from told import told

HERE = Path(__file__).parent
TINY = f"{HERE / 'tiny.py'}:task"


def test_the_size_classes_stay_what_they_were() -> None:
    """Results in this repository rest on these figures; the joules are those of Huang et al. 2012,
    table 4, in nanojoules a bit."""
    assert {
        name: (p.flops, p.memory, p.up, p.down, p.round_trip, p.kind)
        for name, p in PROFILES.items()
    } == {
        "phone": (5e9, 256 * 2**20, 1.25e6, 5e6, 0.05, "assumed"),
        "pc": (20e9, 2 * 2**30, 5e6, 12.5e6, 0.03, "assumed"),
        "gateway": (1e9, 64 * 2**20, 1.25e6, 2.5e6, 0.04, "assumed"),
        "microcontroller": (50e6, 512 * 2**10, 0.125e6, 0.125e6, 0.1, "assumed"),
    }
    assert PROFILES["phone"].joules_up == pytest.approx(438.39e-9 * 8)
    assert PROFILES["phone"].joules_down == pytest.approx(51.97e-9 * 8)
    assert PROFILES["pc"].joules_up == pytest.approx(283.17e-9 * 8)
    assert PROFILES["pc"].joules_down == pytest.approx(137.01e-9 * 8)
    assert all(p.cloud_flops == 1e12 for p in PROFILES.values())


# Published devices


def test_figures_follow_from_what_is_quoted() -> None:
    """By hand: MobileNet v1 is 1.1375 GFLOP, in 14.0 ms on a Pixel 4 (TensorFlow Lite). ResNet-8 is
    25.0 M operations, once in 70.426 s / 100 and in 11.098 s / 50 on the microcontroller (MLPerf
    Tiny v0.5 and v1.1). Where sources differ, the geometric mean is used."""
    assert profile("pixel-4").flops == pytest.approx(1.1375e9 / 14.0e-3, rel=1e-4)
    small = profile("stm32l4r5")
    low, high = 25.003e6 / 0.70426, 25.003e6 / 0.22196
    assert small.ranges["flops"] == pytest.approx((low, high), rel=1e-4)
    assert small.flops == pytest.approx(math.sqrt(low * high), rel=1e-4)
    assert small.memory == 640_000
    assert profile("oneplus-7t").up == pytest.approx(math.sqrt(6 * 11.22) * 1e6 / 8)
    assert profile("raspberry-pi-5").round_trip == pytest.approx(math.sqrt(0.010 * 0.021))


def test_operations_of_the_networks_are_those_of_their_definitions() -> None:
    """Counted by torch from networks built here from the papers' tables: MobileNet v1 (Howard et
    al. 2017, table 1; they say 569 M multiply-adds), MobileNet v2 (Sandler et al. 2018, table 2;
    300 M), ResNet-8 (MLPerf Tiny's reference for CIFAR-10)."""
    import torch
    from torch import nn
    from torch.utils.flop_counter import FlopCounterMode

    def conv(i: int, o: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Module:
        return nn.Conv2d(i, o, kernel, stride, kernel // 2, groups=groups, bias=False)

    def head(width: int, classes: int) -> list[nn.Module]:
        return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes)]

    one: list[nn.Module] = [conv(3, 32, 3, 2)]
    width = 32
    for out, stride in [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2),
                        *[(512, 1)] * 5, (1024, 2), (1024, 1)]:  # fmt: skip
        one += [conv(width, width, 3, stride, width), conv(width, out, 1)]
        width = out
    two: list[nn.Module] = [conv(3, 32, 3, 2)]
    width = 32
    for wider, out, repeats, stride in [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2),
                                        (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]:  # fmt: skip
        for place in range(repeats):
            inner = width * wider
            two += [conv(width, inner, 1)] if wider > 1 else []
            two += [conv(inner, inner, 3, stride if place == 0 else 1, inner)]
            two += [conv(inner, out, 1)]
            width = out
    two += [conv(320, 1280, 1)]

    class Block(nn.Module):
        def __init__(self, i: int, o: int) -> None:
            super().__init__()
            self.first, self.second = conv(i, o, 3, 1 if i == o else 2), conv(o, o, 3)
            self.short = nn.Identity() if i == o else conv(i, o, 1, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x)) + self.short(x)  # type: ignore[no-any-return]

    eight = [conv(3, 16, 3), Block(16, 16), Block(16, 32), Block(32, 64)]
    networks = {
        "MobileNet v1 1.0 224": (one + head(1024, 1000), 224, 569e6),
        "MobileNet v2 1.0 224": (two + head(1280, 1000), 224, 300e6),
        "ResNet-8 int8": (eight + head(64, 10), 32, 12.5e6),
    }
    quoted = {run.network: run.flops for name in published() for run in latencies(name)}
    assert quoted.keys() == networks.keys()
    for name, (layers, side, paper) in networks.items():
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            nn.Sequential(*layers)(torch.zeros(1, 3, side, side))
        assert counter.get_total_flops() == quoted[name], name
        assert quoted[name] == pytest.approx(2 * paper, rel=0.005), name


def test_every_published_figure_names_its_source() -> None:
    used: set[str] = set()
    for p in published().values():
        assert p.kind == "published"
        assert p.about
        for figure in ("flops", "memory", *LINK):
            words = p.sources[figure]
            keys = set(re.findall(r"\[([\w]+)\]", words))
            assert keys or words.startswith("assumed: "), (p.name, figure)
            assert keys <= references().keys()
            used |= keys
        for figure, (low, high) in p.ranges.items():
            assert low < getattr(p, figure) < high, (p.name, figure)
    assert used == references().keys(), "nothing is cited that nobody uses"


def test_devices_of_every_kind_are_there() -> None:
    kinds = [p.about.split(",")[0].split(":")[0].split()[0].lower() for p in published().values()]
    for kind, least in {"phone": 3, "board": 2, "microcontroller": 1}.items():
        assert kinds.count(kind) >= least, kind
    assert kinds.count("laptop") + kinds.count("pc") >= 2


def test_the_document_holds_the_table() -> None:
    """docs/profiles.md is as `kitestring measure --profiles` says."""
    text = (HERE.parent / "docs" / "profiles.md").read_text(encoding="utf-8")
    assert table.markdown() in text
    for key, words in references().items():
        assert f"* [{key}] {words}" in text, key


def test_the_list_names_every_profile_and_source(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    Console(width=200).print(table.profiles())
    said = capsys.readouterr().out
    for p in (*PROFILES.values(), *published().values()):
        assert p.name in said
    for key in references():
        assert f"[{key}]" in said
    assert "assumed" in said
    assert "1.14 GFLOP / 14 ms = 81.2 GFLOP/s" in said


# Files of one's own

WHOLE = {
    "name": "mine", "flops": 2e9, "memory": 1_000_000, "up": 1e6, "down": 2e6, "round_trip": 0.1,
    "joules_up": 1e-6, "joules_down": 0.0,
}  # fmt: skip


def toml(values: dict[str, Any]) -> str:
    return "\n".join(f"{k} = {json.dumps(v)}" for k, v in values.items()) + "\n"


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(toml(WHOLE | {"up": [1e6, 4e6]}) + '[sources]\nflops = "a stopwatch"\n')
    found = profile(str(path))
    assert (found.name, found.flops, found.memory, found.kind) == ("mine", 2e9, 10**6, "assumed")
    assert found.up == pytest.approx(2e6)  # the geometric mean
    assert found.ranges == {"up": (1e6, 4e6)}
    assert found.sources == {"flops": "a stopwatch"}
    assert found.cloud_flops == 1e12


def test_what_a_file_leaves_out_is_as_in_the_class_it_is_like(tmp_path: Path) -> None:
    path = tmp_path / "board.toml"
    path.write_text('like = "gateway"\nflops = 3e9\nmemory = 5000\n')
    found = read(path)
    assert found == replace(
        PROFILES["gateway"], name="board", flops=3e9, memory=5000, kind="assumed",
        sources={f: "assumed: taken over from gateway" for f in (*LINK, "cloud_flops")},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "says", "mend"),
    [
        ({"flops": None}, "flops is missing", "--save-profile"),
        ({"memory": None}, "memory is missing", "--save-profile"),
        ({"flops": "fast"}, "flops is 'fast'", "Give a number"),
        ({"flops": True}, "flops is True", "Give a number"),
        ({"flops": 0}, "flops is 0", "above 0"),
        ({"up": -1}, "up is -1", "above 0"),
        ({"round_trip": -0.1}, "round_trip is -0.1", "0 or more"),
        ({"up": [2, 1]}, "up is [2, 1]", "[low, high]"),
        ({"up": [1, 2, 3]}, "up is [1, 2, 3]", "[low, high]"),
        ({"up": []}, "up is []", "[low, high]"),
        ({"speed": 3}, "unknown key 'speed'", "Known: "),
        ({"flop": 3}, "unknown key 'flop'", "Did you mean 'flops'"),
        ({"like": "fone"}, "unknown size class 'fone'", "Did you mean 'phone'"),
        ({"like": ["phone"]}, "unknown size class", "Known"),
        ({"like": 3}, "unknown size class '3'", "Known"),
        ({"kind": "guessed"}, "kind is 'guessed'", "assumed, published, measured, modelled"),
        ({"name": 3}, "name and about are texts", "--save-profile"),
        ({"sources": "me"}, "sources is not a table", "--save-profile"),
    ],
)
def test_a_bad_file_is_one_line(
    tmp_path: Path, change: dict[str, Any], says: str, mend: str
) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(toml({k: v for k, v in {**WHOLE, **change}.items() if v is not None}))
    with told(SettingError, says, where="bad.toml", mend=mend):
        profile(str(path))


def test_what_is_no_file_or_no_toml(tmp_path: Path) -> None:
    with told(SettingError, "No such file", where="none.toml"):
        profile(str(tmp_path / "none.toml"))
    with told(SettingError, "Is a directory", where=str(tmp_path)):
        profile(f"{tmp_path}/")
    (tmp_path / "bad.toml").write_bytes(b"flops = \xff")
    with told(SettingError, "not TOML"):
        profile(str(tmp_path / "bad.toml"))
    (tmp_path / "bad.toml").write_text("flops = = 3")
    with told(SettingError, "not TOML"):
        profile(str(tmp_path / "bad.toml"))
    with told(SettingError, "unknown device profile 'pixel4'", mend="Did you mean 'pixel-4'"):
        profile("pixel4")


_figure = st.floats(1e-9, 1e15, allow_nan=False)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.fixed_dictionaries({f: _figure for f in FIGURES if f != "memory"}), st.integers(1, 2**50),
    st.text(max_size=20), st.dictionaries(st.sampled_from(FIGURES), st.text(max_size=20)),
)  # fmt: skip
def test_what_is_written_is_read_again(
    tmp_path: Path, figures: dict[str, float], memory: int, about: str, sources: dict[str, str]
) -> None:
    """Nine digits of each figure; any text in the words."""
    made = Profile("it", memory=memory, about=about, kind="measured", sources=sources, **figures)
    saved.write(tmp_path / "it.toml", made)
    found = read(tmp_path / "it.toml")
    assert (found.name, found.about, found.kind) == ("it", about, "measured")
    assert found.sources == sources
    for figure in FIGURES:
        assert getattr(found, figure) == pytest.approx(getattr(made, figure), rel=1e-8), figure


def report(**how: Any) -> Report:
    """Ten runs of 4 M operations: 1 to 10 ms, so the median is 5.5 ms."""
    walls = tuple(x / 1000 for x in range(1, 11))
    spread = Spread(0.0055, 0.00955, 0.0055)
    found = Measured("net", "ONNX Runtime 1.0", 1, "", 0.1, spread, spread, 1, 4e6, 1e3, None, (),
                     walls, walls)  # fmt: skip
    return Report((Pair(found),), Setting(**how), (), "A machine", "2026-11-22")


def test_a_saved_profile_says_what_was_measured_and_what_was_not(tmp_path: Path) -> None:
    """4 MFLOP / 5.5 ms; the range by NumPy's rule: the tenth percentile 1.9 ms, the 95th 9.55."""
    made = saved.profile(report(runs=10), "gateway", "mine")
    assert made.flops == pytest.approx(4e6 / 0.0055)
    assert made.ranges["flops"] == pytest.approx((4e6 / 0.00955, 4e6 / 0.0019))
    assert made.kind == "measured"
    for part in ("2026-11-22", "net", "5.5 ms", "10 runs", "ONNX Runtime 1.0", "1 thread"):
        assert part in made.sources["flops"]
    for figure in LINK:
        assert getattr(made, figure) == getattr(PROFILES["gateway"], figure)
        assert made.sources[figure] == "assumed: taken over from gateway"
    saved.write(tmp_path / "m.toml", made)
    found = read(tmp_path / "m.toml")
    assert found.flops == pytest.approx(made.flops)
    assert found == replace(made, ranges={}, flops=found.flops)


def test_a_profile_taken_under_limits_says_so() -> None:
    made = saved.profile(report(quota=0.5, memory=10**7), "phone", "mine")
    assert "0.5 of a core, CPU-quota emulation: not a slower core" in made.sources["flops"]
    assert made.memory == 10**7
    assert made.sources["memory"] == "the limit under which it was measured"


def test_a_profile_that_cannot_be_written(tmp_path: Path) -> None:
    made = saved.profile(report(), "phone", "mine")
    with told(SettingError, "cannot be written", where="gone"):
        saved.write(tmp_path / "gone" / "m.toml", made)
    (tmp_path / "folder.toml").mkdir()
    with told(SettingError, "cannot be written"):
        saved.write(tmp_path / "folder.toml", made)
    assert not list(tmp_path.glob("*.part"))


# A comparison that uses one


def kitestring(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kitestring.cli", *map(str, words)],
        capture_output=True, text=True, env={**os.environ, "COLUMNS": "100"}, timeout=240,
    )  # fmt: skip


def test_compare_uses_the_file_and_says_where_it_is_from(tmp_path: Path) -> None:
    """Device only answers in (its operations) / (the file's operations a second), no more."""
    path, folder = tmp_path / "mine.toml", tmp_path / "run"
    made = saved.profile(report(runs=10), "gateway", "mine")
    saved.write(path, made)
    words = ["compare", TINY, "--only", "device_only", "--seeds", 1, "--trials", 1]
    words += ["--workers", 1, "--hardware", path, "--out", folder, "--compute", "sequential"]
    found = kitestring(*map(str, words))
    assert found.returncode == 0, found.stderr
    comparison = load(folder)
    assert comparison.profile["name"] == "mine"
    assert comparison.profile["kind"] == "measured"
    serving = comparison.rows[0].seeds[0].serving
    assert serving.flops > 0
    assert serving.latency_p50 == pytest.approx(serving.flops / (4e6 / 0.0055))
    page = (folder / "report.html").read_text()
    assert "measured on 2026-11-22: net" in page
    assert "taken over from gateway" in page

    how: dict[str, Any] = {"task": TINY, "only": ("device_only",), "seeds": 1, "trials": 1}
    order = Order(profile=str(path), compute="sequential", **how)
    path.write_text(path.read_text().replace("up = 1250000", "up = 99"))
    changed = Order(profile=str(path), compute="sequential", **how)
    assert json.loads((folder / "settings.json").read_text())["profile_file"] == order.profile_file
    with told(RunError, "differs in profile_file", where=str(folder)):
        compare(changed, folder, resume=True)


def test_an_order_knows_its_profile_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(toml(WHOLE))
    one = Order(profile=str(path))
    path.write_text(toml(WHOLE | {"up": 3e6}))
    assert Order(profile=str(path)) != one
    assert Order().profile_file == fingerprint("phone") == fingerprint("pixel-4") == ""
    path.unlink()
    with told(SettingError, "No such file", where="mine.toml"):
        Order(profile=str(path))
