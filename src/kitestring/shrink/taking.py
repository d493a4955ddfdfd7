"""What a model takes of a device: measured here, in a fresh process, and scaled to the device."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from kitestring.core import Array
from kitestring.devices.profiles import Profile
from kitestring.measure import bench
from kitestring.measure.subject import Inputs, Subject
from kitestring.shrink.answer import Answer
from kitestring.shrink.budget import Figures

_RUNS = (20, 200)
_PATIENCE = 2.0  # seconds of runs


@dataclass(frozen=True)
class Taken:
    """On this machine, one row and one thread: bytes of the file, seconds, bytes of memory above
    what the imports take, operations.

    `ratio`: its time over that of the reference, the large model in float32, with which it was run
    in turn: what else the machine did meanwhile hit both."""

    size: int
    load: float
    p50: float
    p95: float
    memory: int
    flops: float | None
    ratio: float
    runtime: str


def take(made: Answer, x: Array, reference: Answer | None = None, around: float = 0.0) -> Taken:
    """`x`: rows, of which one is given. `around`: about how many seconds the reference takes.
    Nothing else should run on the machine meanwhile."""
    least, most = _RUNS
    runs = int(min(most, max(least, _PATIENCE / around))) if around else most
    with TemporaryDirectory() as folder:
        subjects = [
            _subject(Path(folder), name, a, x)
            for name, a in (("model", made), ("reference", reference)) if a is not None
        ]  # fmt: skip
        setting = bench.Setting(Inputs(), runs)
        pair = bench.measure(subjects[:1], subjects[1:], setting).pairs[0]
    found = pair.subject
    assert found.wall is not None  # it is under no limit
    return Taken(
        found.size or 0, found.load or 0.0, found.wall.p50, found.wall.p95, found.peak or 0,
        found.flops, pair.wall.median if pair.wall else 1.0, found.runtime,
    )  # fmt: skip


def _subject(folder: Path, name: str, made: Answer, x: Array) -> Subject:
    file, values = folder / f"{name}.onnx", folder / f"{name}.npz"
    file.write_bytes(made.file)
    np.savez(values, **{"x:x": x[:1]})
    return Subject(name, "onnx", str(file), made.size, str(values))


@dataclass(frozen=True)
class Scale:
    """From this machine to a device, by what the large model in float32 takes here."""

    reference: Taken
    device: Profile

    @property
    def rate(self) -> float | None:
        """Operations a second that the reference reaches here; None where none can be counted."""
        return self.reference.flops / self.reference.p50 if self.reference.flops else None

    @property
    def seconds(self) -> float:
        """That the reference takes on the device; where none can be counted, here."""
        flops = self.reference.flops
        return flops / self.device.flops if flops else self.reference.p50

    @property
    def times(self) -> float:
        """How many times as long the device takes."""
        return self.seconds / self.reference.p50

    def __call__(self, taken: Taken) -> Figures:
        p50 = taken.ratio * self.seconds
        return Figures(taken.size, p50, p50 * taken.p95 / taken.p50, float(taken.memory))
