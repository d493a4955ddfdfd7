"""How far a training is, in a file: written whole or not at all, and told from a damaged one.

The file is a line that says what it is, a digest, how the checkpoint hangs together as JSON, and
its tensors as safetensors: reading it runs no code that it holds.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from kitestring.compress.distil.objective import Objective
from kitestring.errors import RunError, SettingError

_HEAD = b"kitestring distil 1\n"
_SIZE = 32  # of the digest, in bytes
DIGESTS = ("objective", "student", "teacher", "rows")
"""Of what a checkpoint was made with, the digests: that they differ is all there is to say."""
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


@dataclass
class Progress:
    """How far a training is, besides weights, memories and dice."""

    step: int = 0
    best: dict[str, Tensor] | None = None
    best_step: int = 0
    waited: int = 0  # checks since then
    ended: bool = False  # by patience
    curve: list[tuple[int, float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(frozen=True)
class Whole:
    """All that a step changes. `batches` may have a state, as what remembers the student's own text
    does."""

    module: nn.Module
    objective: Objective
    optimiser: torch.optim.Optimizer
    batches: Any
    progress: Progress

    @property
    def _cuda(self) -> list[torch.device]:
        return [p.device for p in self.module.parameters() if p.is_cuda][:1]

    def state(self) -> dict[str, Any]:
        return {
            "student": self.module.state_dict(),
            "objective": self.objective.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "batches": self.batches.state_dict() if hasattr(self.batches, "state_dict") else {},
            "progress": vars(self.progress),
            "dice": [torch.get_rng_state(), *map(torch.cuda.get_rng_state, self._cuda)],
        }

    def restore(self, found: Mapping[str, Any]) -> None:
        self.module.load_state_dict(found["student"])
        self.objective.load_state_dict(found["objective"])
        self.optimiser.load_state_dict(found["optimiser"])
        if found["batches"]:
            self.batches.load_state_dict(found["batches"])
        vars(self.progress).update(found["progress"])
        cpu, *cuda = (dice.cpu() for dice in found["dice"])
        torch.set_rng_state(cpu)
        for dice, device in zip(cuda, self._cuda, strict=True):
            torch.cuda.set_rng_state(dice, device)


def write(path: Path, made: Mapping[str, Any], whole: Whole) -> None:
    """`made` is what the training is told from others by. Raises `RunError` where there is no room
    or no right; what was kept before is then as it was."""
    body = _packed({"made": dict(made), **whole.state()})
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            for piece in (_HEAD, _digest([body]), body):
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as problem:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise RunError(
            f"cannot be written: {problem.strerror}", str(path),
            "Free some space or name another file; what was kept before is as it was",
        ) from None  # fmt: skip


def resume(path: Path, made: Mapping[str, Any], whole: Whole) -> None:
    """Bring `whole` to where it was when it was written last; nothing without a file.

    Raises `SettingError` for a damaged file, for one of something else and for a checkpoint of
    another training, and names what differs; `RunError` where it cannot be read."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return
    except OSError as problem:
        raise RunError(f"cannot be read: {problem.strerror}", str(path)) from None
    body = memoryview(raw)[len(_HEAD) + _SIZE :]
    if not raw.startswith(_HEAD):
        what = "is no checkpoint of a distillation"
        raise SettingError(what, str(path), "Name another file")
    if raw[len(_HEAD) :][:_SIZE] != _digest([body]):
        raise SettingError("is damaged", str(path), "Delete it to begin anew")
    found = _unpacked(body)
    differ = [name for name in made if made[name] != found["made"].get(name)]
    if differ:
        told = ", ".join(_difference(name, made, found["made"]) for name in differ)
        mend = "Delete it to begin anew, or name another file"
        raise SettingError(f"is of another training: {told}", str(path), mend)
    whole.restore(found)


def _packed(state: Mapping[str, Any]) -> bytes:
    tensors: dict[str, Tensor] = {}
    form = json.dumps(_form(state, tensors)).encode()
    return len(form).to_bytes(8, "little") + form + save(tensors)


def _unpacked(body: memoryview) -> Any:
    end = 8 + int.from_bytes(body[:8], "little")
    return _filled(json.loads(bytes(body[8:end])), load(bytes(body[end:])))


def _form(value: Any, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON can say it. Tensors go to `tensors`, each with memory of its own; a mapping
    is a list of pairs, since an optimiser numbers its parameters."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"pairs": [(key, _form(inner, tensors)) for key, inner in value.items()]}
    if isinstance(value, (list, tuple)):
        return {type(value).__name__: [_form(inner, tensors) for inner in value]}
    return value


def _filled(form: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(form, dict):
        return form
    [(kind, held)] = form.items()
    if kind == "tensor":
        return tensors[held]
    if kind == "pairs":
        return {key: _filled(inner, tensors) for key, inner in held}
    made = [_filled(inner, tensors) for inner in held]
    return tuple(made) if kind == "tuple" else made


def _difference(name: str, wanted: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    if name in DIGESTS:
        return f"its {name} {'differ' if name == 'rows' else 'differs'}"
    return f"{name} was {found.get(name)!r} and is {wanted[name]!r}"


def mark(tensors: Iterable[Tensor | None]) -> str:
    """A digest of shapes, dtypes and all the numbers."""
    pieces: list[Any] = []
    for a in tensors:
        if a is None:
            pieces.append(b"none")
        else:
            flat = a.detach().cpu().contiguous().reshape(-1)
            pieces += [f"{a.dtype} {list(a.shape)}".encode(), flat.view(torch.uint8).numpy().data]
    return _digest(pieces).hex()


def made_with(objective: nn.Module) -> str:
    """A digest of an objective's parts and of the plain values that they were made with."""
    lines = []
    for name, module in objective.named_modules():
        own = {k: getattr(v, "__qualname__", v) for k, v in vars(module).items() if k[0] != "_"}
        told = f"{name} {type(module).__qualname__} {own}"
        lines.append(_ADDRESS.sub("", told).encode())
    return _digest(lines).hex()


def _digest(pieces: Iterable[Any]) -> bytes:
    found = hashlib.blake2b(digest_size=_SIZE)
    for piece in pieces:
        found.update(piece)
    return found.digest()
