"""A device profile of this machine, from what a model reached on it."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from kitestring.devices.profiles import FIGURES, LINK, PROFILES, Profile
from kitestring.errors import SettingError, unknown
from kitestring.measure.bench import QUOTA, Measured, Report


def size_class(name: str) -> Profile:
    """The class whose link and memory a profile of this machine takes over."""
    if name not in PROFILES:
        raise unknown("size class", name, PROFILES)
    return PROFILES[name]


def profile(report: Report, like: str, name: str) -> Profile:
    """Operations a second of the measured model that does most: those of the median run, and the
    range from the slowest twentieth to the fastest tenth."""
    size = size_class(like)
    counted = [p.subject for p in report.pairs if p.subject.flops and p.subject.wall]
    if not counted:
        failed = next((p.subject.failed for p in report.pairs if p.subject.failed), "")
        why = failed or "none of what was measured has operations that can be counted"
        raise SettingError(
            f"no profile can be saved: {why}", mend="Measure an ONNX graph or a torch module"
        )
    model = max(counted, key=lambda m: m.flops or 0.0)
    assert model.flops is not None
    assert model.wall is not None
    fast, slow = np.quantile(model.walls, (0.1, 0.95))
    rate = model.flops / model.wall.p50
    memory = report.setting.memory
    taken = f"{size.kind}: taken over from {size.name}"
    sources = {figure: taken for figure in (*LINK, "memory", "cloud_flops")}
    if memory is not None:
        sources["memory"] = "the limit under which it was measured"
    return replace(
        size, name=name, flops=rate, memory=memory or size.memory, kind="measured",
        about=report.machine, sources={"flops": _said(model, report), **sources},
        ranges={"flops": (model.flops / float(slow), model.flops / float(fast))},
    )  # fmt: skip


def _said(model: Measured, report: Report) -> str:
    assert model.flops is not None
    assert model.wall is not None
    setting = report.setting
    threads = "1 thread" if setting.threads == 1 else f"{setting.threads} threads"
    words = (
        f"measured on {report.date}: {model.name} {model.flops / 1e6:.4g} MFLOP / "
        f"{model.wall.p50 * 1e3:.4g} ms, median of {setting.runs} runs of {setting.inputs.rows} "
        f"rows each, {model.runtime}, {threads}"
    )
    return words if setting.quota is None else f"{words}; {setting.quota} of a core, {QUOTA}"


def write(path: Path, made: Profile) -> None:
    """As a file that `compare --hardware` takes: whole or not at all."""
    lines = [
        "# A device profile: kitestring compare --hardware FILE. docs/profiles.md says more.",
        f"name = {_text(made.name)}",
        f"about = {_text(made.about)}",
        f"kind = {_text(made.kind)}",
        "",
    ]
    for figure in FIGURES:
        low_high = made.ranges.get(figure)
        if low_high:
            lines.append(f"# from {low_high[0]:.6g} to {low_high[1]:.6g}")
        value = getattr(made, figure)
        lines.append(f"{figure} = {value if isinstance(value, int) else format(value, '.9g')}")
    lines += ["", "[sources]"]
    lines += [f"{figure} = {_text(words)}" for figure, words in made.sources.items()]
    part = path.with_name(path.name + ".part")
    try:
        part.write_text("\n".join(lines) + "\n", encoding="utf-8")
        os.replace(part, path)
    except OSError as problem:
        part.unlink(missing_ok=True)
        what = f"cannot be written: {problem.strerror}"
        raise SettingError(what, str(path), "Give another --save-profile") from None


def _text(words: str) -> str:
    """A string of TOML: one of JSON, but that it may not hold the character DEL."""
    return json.dumps(words, ensure_ascii=False).replace("\x7f", "\\u007f")
