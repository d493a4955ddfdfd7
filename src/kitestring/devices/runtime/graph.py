"""What an exported graph says of itself: one JSON value among the metadata of its ONNX model.

Values of a graph are named after what they hold:

in    w:<weight>  x:<column>  share [rows]  by:<output>  draw:<place>
      lr mu momentum decay clip, float32; step, int64, from 1
      centre:<weight>  linear:<weight>  memory:<velocity.|first.|second.><weight>
out   out:<output>  loss  d:<weight>  dx:<column>
      next:<name>, what the input of that name (w:..., memory:...) holds in the next step
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np

from kitestring.core import Recipe, Rows
from kitestring.errors import PackageError

KEY, FORMAT = "kitestring", 1
NEXT = "next:"
Primitive = Literal["predict", "step", "backward"]
_GRAPH, _METADATA = 7, 14  # fields of ONNX's ModelProto
MEMORY = {"sgd": ("velocity.",), "adam": ("first.", "second.")}
"""What an optimiser remembers of each weight; zero at first."""


@dataclass(frozen=True)
class Leaf:
    """Dtype and shape of a weight, or of one row of a column or an output."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Form:
    """What of a recipe is built into a step: what it names, not the numbers that it sets."""

    optimiser: str
    momentum: bool
    decay: bool
    clip: bool
    trained: tuple[str, ...]
    centre: tuple[str, ...] = ()
    linear: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, recipe: Recipe, trained: Iterable[str], centre: Iterable[str], linear: Iterable[str]
    ) -> Form:
        """`centre` and `linear` in any order."""
        return cls(
            recipe.optimiser, bool(recipe.momentum), bool(recipe.decay), recipe.clip is not None,
            tuple(trained), tuple(sorted(centre)) if recipe.mu else (), tuple(sorted(linear)),
        )  # fmt: skip

    @property
    def memory(self) -> tuple[str, ...]:
        """Prefixes of what is remembered from step to step."""
        return MEMORY[self.optimiser] if self.optimiser == "adam" or self.momentum else ()

    @property
    def scalars(self) -> tuple[str, ...]:
        """The settings that the graph takes."""
        asked = {"mu": bool(self.centre), "momentum": self.momentum, "decay": self.decay,
                 "clip": self.clip, "step": self.optimiser == "adam"}  # fmt: skip
        return ("lr", *(name for name, there in asked.items() if there))

    def __str__(self) -> str:
        named = [n for n in ("momentum", "decay", "clip") if getattr(self, n)]
        named += [n for n in ("centre", "linear") if getattr(self, n)]
        return " ".join([self.optimiser, *named, f"of {len(self.trained)} weights"])


@dataclass(frozen=True)
class Draw:
    """Zeros and ones that the graph is given, ones with `chance`. A size (a, b) is a rows + b."""

    chance: float
    shape: tuple[tuple[int, int], ...]

    def of(self, rows: int) -> tuple[int, ...]:
        return tuple(a * rows + b for a, b in self.shape)


@dataclass(frozen=True)
class About:
    """`columns`, `cotangents`: those that the graph reads, one row of each. `weights`: all of the
    program's; it reads none of the `unused` ones. `trainable`: names in the module's order.
    `tied`: weights that are another one under a second name. `flops`: of one forward pass over one
    row. `rounds`: activations are rounded to 8 bits, and one between two steps may be taken to
    either, as other float errors have it."""

    program: str
    primitive: Primitive
    opset: int
    flops: float
    columns: Mapping[str, Leaf]
    weights: Mapping[str, Leaf]
    unused: tuple[str, ...] = ()
    trainable: tuple[str, ...] = ()
    tied: Mapping[str, str] = field(default_factory=dict)
    outputs: Mapping[str, Leaf] = field(default_factory=dict)
    cotangents: Mapping[str, Leaf] = field(default_factory=dict)
    form: Form | None = None
    draws: tuple[Draw, ...] = ()
    rounds: bool = False

    def reads(self, columns: Mapping[str, Rows]) -> bool:
        """Whether these columns are what it can read; it leaves out what it does not need."""
        return all(k in columns and columns[k].row == row for k, row in self._rows.items())

    @cached_property
    def _rows(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        return {k: (leaf.shape, np.dtype(leaf.dtype)) for k, leaf in self.columns.items()}

    @property
    def settings(self) -> Mapping[str, str]:
        """Of ONNX Runtime's session. Without the first, it dequantises weights in every run, even
        those that are built in, in the hope of joining that with rounded activations."""
        return {} if self.rounds else {"session.disable_quant_qdq": "1"}

    @property
    def call(self) -> str:
        """The primitive of `core.Devices` that runs it."""
        return "fit" if self.primitive == "step" else self.primitive

    @property
    def label(self) -> str:
        """For a person."""
        form = f" ({self.form})" if self.form else ""
        by = f" by {', '.join(self.cotangents)}" if self.cotangents else ""
        rows = ", ".join(f"{k} {leaf.dtype}{list(leaf.shape)}" for k, leaf in self.columns.items())
        return f"{self.primitive} of {self.program!r}{form}{by} on {rows}"

    def encode(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)}, sort_keys=True)

    @classmethod
    def decode(cls, text: str) -> About:
        """Raises `PackageError` for what another version wrote."""
        try:
            found = json.loads(text)
            if found.pop("format") != FORMAT:
                raise PackageError("of another format", "a graph's metadata", "Export it anew")
            for name in ("columns", "weights", "outputs", "cotangents"):
                found[name] = {k: _leaf(v) for k, v in found[name].items()}
            found["form"] = found["form"] and Form(**_tuples(found["form"]))
            draws = [Draw(d["chance"], tuple(map(tuple, d["shape"]))) for d in found["draws"]]
            return cls(**{**_tuples(found), "draws": tuple(draws)})
        except (KeyError, TypeError, ValueError, AttributeError) as problem:
            raise PackageError(f"cannot be read ({problem})", "a graph's metadata") from None


def _leaf(found: Mapping[str, Any]) -> Leaf:
    return Leaf(found["dtype"], tuple(found["shape"]))


def _tuples(found: Mapping[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in found.items()}


@dataclass(frozen=True)
class Graph:
    """A serialised ONNX model."""

    model: bytes

    @cached_property
    def about(self) -> About:
        """Raises `PackageError` where the model does not say what it is."""
        try:
            for number, value in _fields(self.model):
                if number == _METADATA:
                    entry = dict(_fields(value))
                    if entry[1] == KEY.encode():
                        return About.decode(bytes(entry[2]).decode())
        except (IndexError, KeyError, ValueError) as problem:
            what = f"not an ONNX model, or a damaged one ({problem})"
            raise PackageError(what, "a graph", "Export it anew") from None
        raise PackageError("an ONNX model without Kitestring's metadata", "a graph", "Export it")


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """(number, bytes) of a Protocol Buffers message's fields that have a length; others are left
    out. So no parser of ONNX is needed on a device."""
    view, at = memoryview(message), 0
    while at < len(view):
        tag, at = read_number(view, at)
        if tag & 7 == 2:
            size, at = read_number(view, at)
            if at + size > len(view):
                raise ValueError("it ends too early")
            if tag >> 3 != _GRAPH:
                yield tag >> 3, bytes(view[at : at + size])
            at += size
        elif tag & 7 == 0:
            _, at = read_number(view, at)
        elif tag & 7 in (1, 5):
            at += 8 if tag & 7 == 1 else 4
        else:
            raise ValueError("an unknown kind of field")


def read_number(view: memoryview, at: int) -> tuple[int, int]:
    """A variable-length integer, and where it ends."""
    value, shift = 0, 0
    while True:
        byte = view[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError("a number that does not end")
