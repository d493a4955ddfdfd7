"""What files take in ONNX Runtime: one row on one thread of one core, a picture or a text.

Each is in a fresh process and takes turns with the float file, run for run.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jobs import KEPT

from kitestring.measure.bench import Pair, Setting, measure
from kitestring.measure.subject import Subject

RUNS = 200


def timed(files: Mapping[str, str], x: np.ndarray[Any, Any]) -> dict[str, Pair]:
    """By name; the first is what the others are held against."""
    values = KEPT / "row.npz"
    found: dict[str, Pair] = {}
    first = _subject(next(iter(files)), next(iter(files.values())), values)
    for name, path in files.items():
        subject = _subject(name, path, values)
        np.savez(values, **{_input(path): x})
        against = [] if subject.source == first.source else [first]
        found[name] = measure([subject], against, Setting(runs=RUNS)).pairs[0]
    return found


def _subject(name: str, path: str, values: Path) -> Subject:
    return Subject(name, "onnx", path, Path(path).stat().st_size, str(values))


def _input(path: str) -> str:
    from onnxruntime import InferenceSession

    return str(InferenceSession(path, providers=["CPUExecutionProvider"]).get_inputs()[0].name)
