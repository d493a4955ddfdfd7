"""One step of an optimiser as nodes of a graph: what `core.Recipe` says, in torch.optim's order."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from kitestring.devices.runtime.graph import Form
from kitestring.export.builder import Builder, Value

_BETAS, _EPS = (0.9, 0.999), 1e-8  # torch.optim.Adam's


def descend(
    b: Builder, form: Form, weights: Mapping[str, Value], slopes: Mapping[str, Value]
) -> dict[str, Value]:
    """What weights and the optimiser's memory are after the step, by the names of inputs."""
    shifted = {name: _shifted(b, form, name, weights[name], s) for name, s in slopes.items()}
    if form.clip:
        shifted = _clipped(b, shifted)
    found: dict[str, Value] = {}
    for name, slope in shifted.items():
        w = weights[name]
        if form.decay:
            slope = b.each("Add", slope, b.each("Mul", w, _setting(b, "decay", w)))
        step = _adam if form.optimiser == "adam" else _sgd
        found |= step(b, form, name, w, slope)
    return found


def _setting(b: Builder, name: str, like: Value) -> Value:
    return b.cast(b.input(name, np.float32, ()), like.dtype)


def _shifted(b: Builder, form: Form, name: str, w: Value, slope: Value) -> Value:
    """+ mu (w - centre) + linear."""
    if name in form.centre:
        far = b.each("Sub", w, b.input(f"centre:{name}", w.dtype, w.shape))
        slope = b.each("Add", slope, b.each("Mul", far, _setting(b, "mu", w)))
    if name in form.linear:
        slope = b.each("Add", slope, b.input(f"linear:{name}", w.dtype, w.shape))
    return slope


def _clipped(b: Builder, slopes: Mapping[str, Value]) -> dict[str, Value]:
    """torch.nn.utils.clip_grad_norm_: by clip / (norm + 1e-6) where that is below 1."""
    total = None
    for slope in slopes.values():
        square = b.reduce("ReduceSumSquare", slope, range(slope.rank), False)
        square = b.cast(square, np.float32)
        total = square if total is None else b.each("Add", total, square)
    assert total is not None
    norm = b.each("Add", b.each("Sqrt", total), b.number(1e-6, np.float32))
    share = b.each("Min", b.each("Div", b.input("clip", np.float32, ()), norm),
                   b.number(1, np.float32))  # fmt: skip
    return {k: b.each("Mul", s, b.cast(share, s.dtype)) for k, s in slopes.items()}


def _memory(b: Builder, kind: str, name: str, w: Value) -> Value:
    return b.input(f"memory:{kind}{name}", w.dtype, w.shape)


def _sgd(b: Builder, form: Form, name: str, w: Value, slope: Value) -> dict[str, Value]:
    found = {}
    if form.momentum:
        before = b.each("Mul", _memory(b, "velocity.", name, w), _setting(b, "momentum", w))
        slope = found[f"memory:velocity.{name}"] = b.each("Add", before, slope)
    found[f"w:{name}"] = b.each("Sub", w, b.each("Mul", slope, _setting(b, "lr", w)))
    return found


def _adam(b: Builder, form: Form, name: str, w: Value, slope: Value) -> dict[str, Value]:
    """Kingma and Ba 2015, algorithm 1, as torch computes it: corrections in double precision."""
    first, second = (_memory(b, kind, name, w) for kind in form.memory)
    beta, gamma = _BETAS
    far = b.each("Mul", b.each("Sub", slope, first), b.number(1 - beta, w.dtype))
    first = b.each("Add", first, far)
    square = b.each("Mul", b.each("Mul", slope, slope), b.number(1 - gamma, w.dtype))
    second = b.each("Add", b.each("Mul", second, b.number(gamma, w.dtype)), square)
    wide = np.float64
    pace = b.each("Div", b.cast(b.input("lr", np.float32, ()), wide), _correction(b, beta))
    root = b.each("Sqrt", _correction(b, gamma))
    below = b.each("Div", b.each("Sqrt", second), b.cast(root, w.dtype))
    below = b.each("Add", below, b.number(_EPS, w.dtype))
    change = b.each("Mul", b.each("Div", first, below), b.cast(pace, w.dtype))
    return {
        f"w:{name}": b.each("Sub", w, change),
        f"memory:first.{name}": first, f"memory:second.{name}": second,
    }  # fmt: skip


def _correction(b: Builder, beta: float) -> Value:
    """1 - beta^t with t the number of the step, from 1."""
    t = b.cast(b.input("step", np.int64, ()), np.float64)
    return b.each("Sub", b.number(1, np.float64), b.each("Pow", b.number(beta, np.float64), t))
