"""From a task's modules to the programs that collaborations call by name.

small          columns x       -> h (features, where it can be split), out
small.answer                   -> answer, confidence: what a request gets
small.exit                     -> answer, entropy, h: what an early exit decides by
small.loss     x, y            -> loss, one a row
small.distill  x, y, teacher   -> trains on labels and on a teacher's outputs
front          x               -> h
distilled      x               -> the small model once more: under this name the cloud teaches it
server(.distill, .answer)  h   -> out: the cloud's large back on the device's features
server.taught  h, y, teacher   -> trains on a teacher's outputs alone, where y is not below 0
joint          x               -> out: front with both backs, trained together on the pool
bottleneck     x               -> out: front, encoder, rounding, decoder and the cloud's large back
encoder        x               -> code in [0, 1]: what the device computes of it
decoder.answer code            -> out: what the cloud does
large(.answer) x               -> out
critic         h               -> out: own samples against others, a logit
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kitestring.collaborate.request.bottleneck import BITS
from kitestring.compress.distil.objective import LOSSES, binary, real, squared
from kitestring.compress.distil.response import response
from kitestring.devices.fit.programs import Batch, Program
from kitestring.errors import TaskError
from kitestring.tasks.task import Array, Recorded, Task

_TEMPERATURE = 2.0


def confidence(task: Task) -> Callable[[Tensor], Tensor] | None:
    """How sure an answer is: the task's own, or the largest class probability; None without one."""

    def classes(out: Tensor) -> Tensor:
        most = out.softmax(-1).amax(-1)
        return most.flatten(1).mean(1) if most.ndim > 1 else most

    if task.confidence is not None:
        return task.confidence
    own = {"cross_entropy": classes, "binary": lambda out: out.abs().sigmoid()}
    return own.get(task.loss) if isinstance(task.loss, str) else None


def entropy(task: Task) -> Callable[[Tensor], Tensor] | None:
    """Of an answer's class probabilities, [n] in nats; None where an output holds none."""

    def classes(out: Tensor) -> Tensor:
        log = F.log_softmax(out, -1).clamp(min=-1e4)  # so that 0 log 0 is 0
        own = -(log.exp() * log).sum(-1)
        return own.flatten(1).mean(1) if own.ndim > 1 else own

    def one_logit(out: Tensor) -> Tensor:
        far = out.abs()
        return F.softplus(-far) + far * (-far).sigmoid()

    own = {"cross_entropy": classes, "binary": one_logit}
    return own.get(task.loss) if isinstance(task.loss, str) else None


def _divergence(loss: object) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """How far the outputs are from a teacher's: (out, teacher, y) -> [n]."""

    def classes(out: Tensor, teacher: Tensor, y: Tensor) -> Tensor:
        return response(out, teacher, _TEMPERATURE, real(y))

    def one_logit(out: Tensor, teacher: Tensor, y: Tensor) -> Tensor:
        return binary(out, teacher.sigmoid())

    def values(out: Tensor, teacher: Tensor, y: Tensor) -> Tensor:
        return squared(out, teacher)

    return {"cross_entropy": classes, "binary": one_logit}.get(str(loss), values)


class _Small(nn.Module):
    """A device model in two parts; without a front the whole is the back."""

    def __init__(self, front: nn.Module | None, back: nn.Module) -> None:
        super().__init__()
        if front is not None:
            self.front = front
        self.back = back

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        if not hasattr(self, "front"):
            return {"out": self.back(batch["x"])}
        h = self.front(batch["x"])
        return {"h": h, "out": self.back(h)}


class _Joint(nn.Module):
    def __init__(self, front: nn.Module, back: nn.Module, server: nn.Module) -> None:
        super().__init__()
        self.front, self.back, self.server = front, back, server

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        h = self.front(batch["x"])
        return {"out": self.server(h), "small": self.back(h)}


class _Encoded(nn.Module):
    """The device's half of a bottleneck."""

    def __init__(self, front: nn.Module, encoder: nn.Module) -> None:
        super().__init__()
        self.front, self.encoder = front, encoder

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return {"code": self.encoder(self.front(batch["x"])).sigmoid()}


class _Decoded(nn.Module):
    """The cloud's half."""

    def __init__(self, decoder: nn.Module, server: nn.Module) -> None:
        super().__init__()
        self.decoder, self.server = decoder, server

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return {"out": self.server(self.decoder(batch["code"]))}


class _Bottleneck(nn.Module):
    """Both, and between them as many levels as cross."""

    def __init__(self, near: _Encoded, far: _Decoded, levels: int) -> None:
        super().__init__()
        self.front, self.encoder = near.front, near.encoder
        self.decoder, self.server = far.decoder, far.server
        self.levels = levels

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        code = self.encoder(self.front(batch["x"])).sigmoid()
        whole = (code.detach() * self.levels + 0.5).floor() / self.levels
        code = code + (whole - code.detach())
        return {"out": self.server(self.decoder(code))}


class _Named(nn.Module):
    """One module under a name of its own, from one column to one output."""

    def __init__(self, name: str, module: nn.Module, column: str, output: str = "out") -> None:
        super().__init__()
        self.name, self.column, self.output = name, column, output
        self.add_module(name, module)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return {self.output: getattr(self, self.name)(batch[self.column])}


def split(module: nn.Module) -> tuple[nn.Module | None, nn.Module]:
    """Front and back of a small model: children of those names, or all but the last layer."""
    children = dict(module.named_children())
    if {"front", "back"} <= children.keys():
        return children["front"], children["back"]
    if isinstance(module, nn.Sequential) and len(module) > 1:
        return module[:-1], module[-1]
    return None, module


def programs(task: Task, seed: int, some_x: Array) -> dict[str, Program]:
    """`some_x`: a row or two, to learn the features' shape. Initial weights are drawn from
    `seed`."""
    sample = torch.from_numpy(np.array(some_x))
    loss = LOSSES[task.loss] if isinstance(task.loss, str) else task.loss
    far = _divergence(task.loss)
    sure = confidence(task)
    torch.manual_seed(seed)
    front, back = split(_made(task, "small"))
    large = _made(task, "large")

    def plain(outputs: Batch, batch: Batch) -> Tensor:
        return loss(outputs["out"], batch["y"])

    def taught(outputs: Batch, batch: Batch) -> Tensor:
        return plain(outputs, batch) + far(outputs["out"], batch["teacher"], batch["y"])

    def told(outputs: Batch, batch: Batch) -> Tensor:
        return far(outputs["out"], batch["teacher"], batch["y"])

    def asked(outputs: Batch) -> Tensor:
        return outputs["out"][:, -1] if task.asks == "last" else outputs["out"]

    def answered(outputs: Batch, batch: Batch) -> dict[str, Tensor]:
        out = asked(outputs)
        return {"answer": out} if sure is None else {"answer": out, "confidence": sure(out)}

    small, big = _Small(front, back), _Named("large", large, "x")
    made = {
        "small": Program("small", small, plain),
        "small.answer": Program("small.answer", small, after=answered),
        "small.loss": Program("small.loss", small, after=lambda o, b: {"loss": plain(o, b)}),
        "small.distill": Program("small.distill", small, taught),
        "distilled": Program("distilled", small, plain),
        "large": Program("large", big, plain),
        "large.answer": Program("large.answer", big, after=answered),
    }
    out = _output(task, "small", small, sample)
    if task.confidence is not None:
        shape = tuple(answered({"out": out}, {})["confidence"].shape)
        if shape != (len(sample),):
            raise TaskError(
                f"confidence gives {shape} for {len(sample)} rows",
                f"task {task.name}",
                "Return one number in [0, 1] for each row, [n]",
            )
    _output(task, "large", big, sample)
    if front is None:
        return made
    with torch.no_grad():
        h = front(sample)
    width, answers = int(h.shape[-1]), int(out.shape[-1]) if out.ndim > 1 else 1
    server = task.server() if task.server else _server(h, width, answers, out)
    critic = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 1), nn.Flatten(0))
    ended = _Named("server", server, "h")
    unsure = entropy(task)

    def exited(outputs: Batch, batch: Batch) -> dict[str, Tensor]:
        assert unsure is not None
        out = asked(outputs)
        return {"answer": out, "entropy": unsure(out), "h": outputs["h"]}

    if unsure is not None:
        made["small.exit"] = Program("small.exit", small, after=exited)

    near, far_half = _halves(h, front, server)

    def both(outputs: Batch, batch: Batch) -> Tensor:
        return plain(outputs, batch) + loss(outputs["small"], batch["y"])

    return made | {
        "front": Program("front", _Named("front", front, "x", "h")),
        "server": Program("server", ended, plain),
        "server.distill": Program("server.distill", ended, taught),
        "server.taught": Program("server.taught", ended, told),
        "server.answer": Program("server.answer", ended, after=answered),
        "joint": Program("joint", _Joint(front, back, server), both),
        "bottleneck": Program("bottleneck", _Bottleneck(near, far_half, 2**BITS - 1), plain),
        "encoder": Program("encoder", near),
        "decoder.answer": Program("decoder.answer", far_half, after=answered),
        "critic": Program(
            "critic", _Named("critic", critic, "h"), lambda o, b: binary(o["out"], b["y"])
        ),
    }


def _server(h: Tensor, width: int, answers: int, out: Tensor) -> nn.Module:
    """The default large back: three layers, eight times as wide as the features (128 to 512)."""
    wide = min(512, max(128, 8 * width))
    layers: list[nn.Module] = []
    if h.ndim > out.ndim and out.ndim <= 2:  # feature maps before one answer: flatten them
        layers.append(nn.Flatten())
        width = int(h[0].numel())
    layers += [nn.Linear(width, wide), nn.ReLU(), nn.Linear(wide, wide), nn.ReLU()]
    layers.append(nn.Linear(wide, answers))
    if out.ndim == 1:
        layers.append(nn.Flatten(0))
    return nn.Sequential(*layers)


def _halves(h: Tensor, front: nn.Module, server: nn.Module) -> tuple[_Encoded, _Decoded]:
    """An eighth of the features but not below eight, an even number: of the last axis, or of the
    channels of maps."""
    maps = h.ndim == 4
    wide = int(h.shape[1] if maps else h.shape[-1])
    few = max(2, min(wide, max(8, wide // 8)) // 2 * 2)
    layer: Callable[[int, int], nn.Module] = (
        partial(nn.Conv2d, kernel_size=1) if maps else nn.Linear
    )
    return _Encoded(front, layer(wide, few)), _Decoded(layer(few, wide), server)


def _made(task: Task, which: str) -> nn.Module:
    module = getattr(task, which)()
    if not isinstance(module, nn.Module):
        kind = type(module).__name__
        where = f"task {task.name}"
        raise TaskError(f"{which}() gave {kind}, not an nn.Module", where, "Return the model")
    return module


def _output(task: Task, which: str, module: nn.Module, sample: Tensor) -> Tensor:
    """Try a model on a row or two, so that shapes that do not match are told here and in one
    line."""
    try:
        with torch.no_grad():
            out = module.eval()({"x": sample})["out"]
    except (RuntimeError, ValueError, TypeError, IndexError) as problem:
        raise TaskError(
            f"the {which} model fails on x {tuple(sample.shape)} {sample.dtype}: "
            f"{str(problem).strip().splitlines()[0][:160]}",
            f"task {task.name}",
            "Make its input fit the column x",
        ) from None
    if not isinstance(out, Tensor) or out.shape[:1] != sample.shape[:1]:
        shape = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise TaskError(
            f"the {which} model gives {shape} for {len(sample)} rows",
            f"task {task.name}",
            "Return one output for each row, [n, ...]",
        )
    return out


class _Replay(nn.Module):
    """Recorded answers by sample number; nothing trains."""

    def __init__(self, cloud: Any) -> None:
        super().__init__()
        self.register_buffer("cloud", torch.as_tensor(cloud))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        cloud: Tensor = self.cloud  # type: ignore[assignment]
        return {"answer": cloud[batch["x"]]}


class _Recall(nn.Module):
    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return {"answer": batch["device"], "confidence": batch["confidence"]}


def recorded_programs(task: Recorded) -> dict[str, Program]:
    small, large = _Recall(), _Replay(task.cloud)
    return {
        name: Program(name, module)
        for name, module in (
            ("small", small), ("small.answer", small), ("large", large), ("large.answer", large),
        )
    }  # fmt: skip
