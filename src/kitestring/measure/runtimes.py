"""How each kind of model is loaded and run, in the process that is measured.

Each runner imports its runtime when it is made, so that what the import takes is known apart, and
then can `load`, `run` once and `count` what one run computes."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from kitestring.core import Array
from kitestring.devices.runtime.graph import Graph
from kitestring.errors import PackageError, SettingError
from kitestring.measure import inputs as drawing
from kitestring.measure.constants import folded
from kitestring.measure.operations import Counted, count
from kitestring.measure.subject import Inputs, Subject


class Runner(Protocol):
    label: str  # the runtime and its version

    def load(self) -> None: ...
    def run(self) -> None: ...
    def count(self) -> Counted: ...


def runner(subject: Subject, given: Inputs, threads: int) -> Runner:
    kinds: dict[str, Callable[[Subject, Inputs, int], Runner]] = {
        "onnx": Onnx, "torch": Torch, "executorch": ExecuTorch, "gguf": Gguf,
    }  # fmt: skip
    return kinds[subject.runtime](subject, given, threads)


def missing(package: str, what: str) -> SettingError:
    return SettingError(
        f"measuring {what} needs {package}, which is not installed",
        mend=f"Run: pip install {package}",
    )


def starved(problem: Exception) -> bool:
    """Whether it is for want of memory, which each runtime says in its own words."""
    said = str(problem).lower()
    return isinstance(problem, MemoryError) or any(words in said for words in _STARVED)


_STARVED = ("bad_alloc", "bad allocation", "allocate memory", "failed to allocate", "out of memory",
            "unable to allocate")  # fmt: skip


class Onnx:
    """An ONNX graph in ONNX Runtime, on the CPU."""

    def __init__(self, subject: Subject, given: Inputs, threads: int) -> None:
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
        try:
            import onnxruntime
        except ImportError:
            raise missing("onnxruntime", "an ONNX model") from None
        self._runtime, self._subject, self._given = onnxruntime, subject, given
        self._threads = threads
        self._settings = _settings(subject.source)
        self.label = f"ONNX Runtime {onnxruntime.__version__}"

    def _session(self, options: Any, model: str | bytes = "") -> Any:
        options.intra_op_num_threads, options.inter_op_num_threads = self._threads, 1
        options.log_severity_level = 3
        # Threads that wait must sleep: the other process is on the same cores.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        for key, value in self._settings.items():
            options.add_session_config_entry(key, value)
        source = self._subject.source
        try:
            return self._runtime.InferenceSession(
                model or source, options, providers=["CPUExecutionProvider"]
            )
        except Exception as problem:
            if starved(problem):
                raise
            said = str(problem).strip().splitlines()[0][:160]
            raise SettingError(f"ONNX Runtime cannot load it: {said}", source, _CHECK) from None

    def load(self) -> None:
        self._session_ = self._session(self._runtime.SessionOptions())
        self._feeds = self._feed(self._session_)

    def _feed(self, session: Any) -> dict[str, Array]:
        wanted = [(i.name, i.type, list(i.shape)) for i in session.get_inputs()]
        if self._subject.values:
            return drawing.matching(self._subject.values, [name for name, _, _ in wanted])
        kept = session.get_modelmeta().custom_metadata_map
        return drawing.drawn(wanted, ranges(kept), self._given)

    def run(self) -> None:
        self._session_.run(None, self._feeds)

    def count(self) -> Counted:
        """One run in a session that fuses and packs nothing and keeps a profile of itself. What is
        constant is not counted."""
        options = self._runtime.SessionOptions()
        options.graph_optimization_level = self._runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.enable_profiling = True
        with tempfile.TemporaryDirectory() as folder:
            options.profile_file_prefix = str(Path(folder) / "nodes")
            model = folded(self._subject.source, self._runtime, bool(self._settings))
            session = self._session(options, model)
            session.run(None, self._feed(session))
            events = json.loads(Path(session.end_profiling()).read_text())
        return count(events)


_CHECK = "Check the file; onnx.checker says more"


def _settings(path: str) -> Mapping[str, str]:
    """Those with which a device runs the graph, where it is one of ours."""
    try:
        return Graph(Path(path).read_bytes()).about.settings
    except (OSError, PackageError):
        return {}


def ranges(metadata: dict[str, str]) -> dict[str, Any]:
    """The ranges of the inputs, where the graph's metadata holds a JSON value that names them:
    {"inputs": {name: {"low": number, "high": number}}}."""
    for text in metadata.values():
        try:
            found = json.loads(text)
        except ValueError:
            continue
        if isinstance(found, dict) and isinstance(found.get("inputs"), dict):
            return {k: v for k, v in found["inputs"].items() if isinstance(v, dict)}
    return {}


class Torch:
    """A torch module, as it predicts, run eagerly."""

    def __init__(self, subject: Subject, given: Inputs, threads: int) -> None:
        try:
            import torch
        except ImportError:
            raise missing("torch", "a module") from None
        from kitestring.measure import modules

        torch.set_num_threads(threads)
        self._torch, self._modules, self._subject, self._given = torch, modules, subject, given
        self._source = modules.source(subject.source)
        self.label = f"torch {torch.__version__}"

    def load(self) -> None:
        self._module = self._modules.made(self._source, self._subject.name)
        if self._subject.values:
            found = drawing.read(self._subject.values)
            arrays = self._modules.ordered(self._module, found, self._subject.values)
        else:
            shapes = [drawing.row(text) for text in self._given.shapes]
            wanted = shapes or self._modules.rows(self._module, self._subject.name)
            arrays = [
                drawing.draw((self._given.rows, *r.shape), r.dtype, None, _bound(r)) for r in wanted
            ]
        self._feeds = [self._torch.from_numpy(a) for a in arrays]
        self._tried = False

    def run(self) -> None:
        try:
            with self._torch.inference_mode():
                self._module(*self._feeds)
        except Exception as problem:
            if starved(problem):
                raise
            said = (str(problem).strip().splitlines() or [""])[0][:160]
            shapes = ", ".join(str(tuple(t.shape)) for t in self._feeds)
            raise SettingError(
                f"it fails on inputs of {shapes}: {type(problem).__name__}: {said}",
                self._subject.source, "Give the shape of one row of each input with --input",
            ) from None  # fmt: skip

    def count(self) -> Counted:
        self.load()
        self.run()
        found: Counted = self._modules.count(self._module, self._feeds)
        return found


def _bound(r: drawing.Row) -> float | None:
    return None if r.dtype == "float32" else float(r.below)


_SCALARS = {0: "uint8", 1: "int8", 3: "int32", 4: "int64", 5: "float16", 6: "float32", 11: "bool"}


class ExecuTorch:
    """The method `forward` of an ExecuTorch program; its shapes are fixed. Nothing is counted."""

    def __init__(self, subject: Subject, given: Inputs, threads: int) -> None:
        os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # of what it brings along
        try:
            from executorch.extension.pybindings import portable_lib
            from executorch.runtime import Runtime
        except ImportError:
            raise missing("executorch", "a .pte file") from None
        import torch

        portable_lib._unsafe_reset_threadpool(threads)
        self._runtime, self._torch, self._subject = Runtime.get(), torch, subject
        self.label = f"ExecuTorch {version('executorch')}"

    def load(self) -> None:
        source = self._subject.source
        try:
            self._program = self._runtime.load_program(source)
            self._method: Any = self._program.load_method("forward")
        except RuntimeError as problem:
            said = str(problem).strip().splitlines()[0][:160]
            raise SettingError(f"ExecuTorch cannot load it: {said}", source, _WHOLE) from None
        about = self._method.metadata
        metas = [about.input_tensor_meta(place) for place in range(about.num_inputs())]
        if self._subject.values:
            arrays = list(drawing.read(self._subject.values).values())  # it knows no names
        else:
            arrays = [
                drawing.draw(tuple(m.sizes()), _SCALARS.get(m.dtype(), "float32"), None, None)
                for m in metas
            ]
        self._feeds = [self._torch.from_numpy(a) for a in arrays]

    def run(self) -> None:
        self._method.execute(self._feeds)

    def count(self) -> Counted:
        return Counted(None, None)


_WHOLE = "Export it again; it must have a method `forward`"


class Gguf:
    """A language model in llama.cpp: one run reads a prompt of as many tokens as there are rows,
    from an empty memory. Nothing is counted."""

    def __init__(self, subject: Subject, given: Inputs, threads: int) -> None:
        try:
            import llama_cpp
        except ImportError:
            raise missing("llama-cpp-python", "a .gguf file") from None
        self._runtime, self._subject, self._given = llama_cpp, subject, given
        self._threads = threads
        self.label = f"llama-cpp-python {llama_cpp.__version__}"

    def load(self) -> None:
        source, n = self._subject.source, self._given.rows
        try:
            self._model = self._runtime.Llama(
                source, n_ctx=max(64, n), n_batch=max(64, n), n_threads=self._threads,
                n_threads_batch=self._threads, verbose=False,
            )  # fmt: skip
        except (ValueError, RuntimeError) as problem:
            said = str(problem).strip().splitlines()[0][:160]
            raise SettingError(f"llama.cpp cannot load it: {said}", source, _EXPORT) from None
        words = self._model.n_vocab()
        self._tokens = np.random.default_rng(0).integers(0, words, n).tolist()

    def run(self) -> None:
        self._model.reset()
        self._model.eval(self._tokens)

    def count(self) -> Counted:
        return Counted(None, None)


_EXPORT = "Check that the file is whole"
