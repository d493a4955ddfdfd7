"""ONNX Runtime itself: sessions, and training steps without copies between them."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # before it is imported

import onnxruntime as ort

from kitestring import dice
from kitestring.core import Array
from kitestring.devices.runtime.graph import NEXT, Draw, Graph
from kitestring.devices.runtime.settled import settled
from kitestring.errors import DataError, PackageError, SettingError

CPU = ("CPUExecutionProvider",)
_LOUD = 4  # nothing but what ends the process: errors are raised


def checked(providers: Sequence[str]) -> tuple[str, ...]:
    """Those that were asked for, if this ONNX Runtime has them."""
    there = ort.get_available_providers()
    for name in providers:
        if name not in there:
            raise SettingError(
                f"this ONNX Runtime has no {name!r}", "device runtime",
                f"It has {', '.join(there)}; others come with other builds of onnxruntime",
            )  # fmt: skip
    return tuple(providers)


class Session:
    """A graph, ready to run; made ready when it is first used."""

    def __init__(self, graph: Graph, threads: int, providers: tuple[str, ...]) -> None:
        self.about = graph.about
        self._graph, self._threads, self._providers = graph, threads, providers
        self._lock = threading.Lock()
        self._made: Any = None

    @property
    def ort(self) -> Any:
        with self._lock:
            if self._made is None:
                options = ort.SessionOptions()
                options.intra_op_num_threads = self._threads
                options.inter_op_num_threads = 1
                options.log_severity_level = _LOUD
                for key, value in self.about.settings.items():
                    options.add_session_config_entry(key, value)
                try:
                    self._made = ort.InferenceSession(
                        self._graph.model, options, providers=list(self._providers)
                    )
                except Exception as problem:  # it raises classes of its own, of no common kind
                    lines = str(problem).strip().splitlines() or [type(problem).__name__]
                    what = f"ONNX Runtime {ort.__version__} cannot load it ({lines[0][:160]})"
                    raise PackageError(what, self.about.label, "Update onnxruntime") from None
                self.inputs = [i.name for i in self._made.get_inputs()]
                self.outputs = [o.name for o in self._made.get_outputs()]
            return self._made

    def settled(self, given: Mapping[str, Array]) -> Session:
        """The same with those of its inputs built in."""
        names = [i.name for i in self.ort.get_inputs()]
        model = settled(self._graph.model, {k: a for k, a in given.items() if k in names})
        return Session(Graph(model), self._threads, self._providers)

    def run(self, given: Mapping[str, Array]) -> dict[str, Array]:
        """Of what is given, what the graph reads."""
        session = self.ort
        read = {name: given[name] for name in self.inputs}
        try:
            found = session.run(None, read)
        except Exception as problem:
            raise self.failed(problem) from None
        return dict(zip(self.outputs, found, strict=True))

    def failed(self, problem: Exception) -> DataError:
        """The error for rows that a graph cannot compute, such as a token beyond its table."""
        lines = str(problem).strip().splitlines() or [type(problem).__name__]
        what = f"cannot be computed on these rows ({lines[0].rpartition('Message: ')[2][:160]})"
        mend = "Check that tokens and labels are among those that the model knows"
        return DataError(what, self.about.label, mend)


class Steps:
    """Minibatch steps of one device. What moves from step to step lies in two places: a step reads
    one and writes the other. Nothing else is copied but the rows of a batch."""

    def __init__(
        self, session: Session, fixed: Mapping[str, Array], columns: Mapping[str, Array], key: Array
    ) -> None:
        """`fixed`: weights, settings and terms by their inputs' names. `columns`: the device's own
        rows. `key` [1] draws what dropout keeps."""
        self._ort, self._key, self._columns = session.ort, key, columns
        self._failed = session.failed
        self._draws: tuple[Draw, ...] = session.about.draws
        moving = [name.removeprefix(NEXT) for name in session.outputs if name.startswith(NEXT)]
        wanted = {i.name: i for i in self._ort.get_inputs()}
        self._lies = [  # memory is zero at first
            {k: np.array(fixed[k]) if k in fixed else _zeros(wanted[k]) for k in moving}
            for _ in range(2)
        ]
        self._done, self._count = 0, np.zeros((), np.int64)
        self._loss = np.zeros((), np.float32)
        inputs = {k: a for k, a in {**fixed, "step": self._count}.items() if k in session.inputs}
        self._fixed = {k: _held(a) for k, a in inputs.items() if k not in moving}
        self._moving = [{k: _held(a) for k, a in lies.items()} for lies in self._lies]
        self._read = set(session.inputs)
        self._batches: dict[int, _Batch] = {}

    def run(self, index: Array, counts: Sequence[int]) -> float:
        """The loss, summed over steps. `index` [T, B]: rows of each, of which the first `counts`
        are real."""
        total = np.zeros((), np.float32)
        for t, count in enumerate(counts):
            batch = self._batches.get(count) or self._batch(count)
            rows = index[t, :count]
            for name, into in batch.columns.items():
                self._columns[name].take(rows, 0, into, "clip")
            for place, into in enumerate(batch.draws):
                draw = dice.uniform(dice.drawn(self._key, t, place), into.size)
                np.less(draw.reshape(into.shape), self._draws[place].chance, into, casting="unsafe")
            self._count[...] = t + 1
            try:
                self._ort.run_with_iobinding(batch.bindings[t % 2])
            except Exception as problem:
                raise self._failed(problem) from None
            total += self._loss
        self._done = len(counts)
        return float(total)

    def now(self, name: str) -> Array:
        """What moved, after the last step."""
        return self._lies[self._done % 2][name]

    def _batch(self, count: int) -> _Batch:
        """Places for that many rows, and the two ways to go on from there."""
        columns = {k: np.empty((count, *a.shape[1:]), a.dtype) for k, a in self._columns.items()}
        draws = [np.empty(d.of(count), np.float32) for d in self._draws]
        named = {**columns, **{f"draw:{i}": a for i, a in enumerate(draws)}}
        there = {k: _held(a) for k, a in named.items()}
        found = _Batch(columns, draws, [self._binding(there, way) for way in range(2)])
        self._batches[count] = found
        return found

    def _binding(self, there: Mapping[str, Any], way: int) -> Any:
        binding = self._ort.io_binding()
        for name, value in {**self._fixed, **self._moving[way], **there}.items():
            if name in self._read:
                binding.bind_ortvalue_input(name, value)
        for name, value in self._moving[1 - way].items():
            binding.bind_ortvalue_output(f"{NEXT}{name}", value)
        binding.bind_ortvalue_output("loss", _held(self._loss))
        return binding


class _Batch:
    def __init__(self, columns: dict[str, Array], draws: list[Array], bindings: list[Any]) -> None:
        self.columns, self.draws, self.bindings = columns, draws, bindings


def _zeros(wanted: Any) -> Array:
    kind = {"tensor(float)": np.float32, "tensor(double)": np.float64}[wanted.type]
    return np.zeros(wanted.shape, kind)


def _held(array: Array) -> Any:
    """As ONNX Runtime takes it: the same memory, which the caller keeps."""
    return ort.OrtValue.ortvalue_from_numpy(array)
