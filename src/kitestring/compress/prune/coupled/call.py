"""One operation in a model's run: what it was given, and what there is to note of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

from torch import Tensor

from kitestring.compress.prune.coupled.atoms import Atoms, Block, Ids, Label
from kitestring.compress.prune.coupled.meet import level, meet

Mark: TypeAlias = Literal["heads", "normed", "embedded"]
Role: TypeAlias = Literal["into", "out"]


@dataclass(frozen=True)
class Notes:
    """`marks`: atoms of which something is known. `roles`: of axes of parameters along which
    products sum ("into") or put what they make ("out"), one of their atoms each. `whole`: of each
    convolution in groups, whether whole groups can go, or the same of each; `asked` says so before,
    for the run of a smaller model."""

    marks: dict[Mark, list[Ids]] = field(default_factory=lambda: {k: [] for k in get_args(Mark)})
    roles: dict[Role, list[int]] = field(default_factory=lambda: {k: [] for k in get_args(Role)})
    whole: list[bool] = field(default_factory=list)
    asked: tuple[bool, ...] = ()

    def mark(self, mark: Mark, ids: Ids) -> None:
        self.marks[mark].append(ids.reshape(-1))

    def role(self, role: Role, block: Block | None) -> None:
        if block is not None:
            self.roles[role].append(int(block.ids.flat[0]))

    def by_whole(self, usual: bool) -> bool:
        at = len(self.whole)
        self.whole.append(self.asked[at] if at < len(self.asked) else usual)
        return self.whole[-1]


@dataclass(frozen=True)
class Call:
    """`given` has the arguments by the names of PyTorch's schema, defaults too."""

    atoms: Atoms
    notes: Notes
    queries: bool
    name: str
    given: Mapping[str, Any]
    outs: tuple[Tensor, ...]
    labels: Callable[[Tensor], Label]

    def label(self, name: str) -> Label:
        return self.labels(self.given[name])

    def maybe(self, *names: str) -> list[Label]:
        """Of those arguments that are tensors."""
        found = [self.given.get(name) for name in names]
        return [self.labels(t) for t in found if isinstance(t, Tensor)]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.outs[0].shape)

    def axis(self, name: str, of: int) -> int:
        """A dimension of a tensor of `of` axes, counted from the front."""
        return int(self.given[name]) % max(of, 1)

    def axes(self, name: str, of: int) -> set[int]:
        """The same of a list of them; none stands for all."""
        found = self.given.get(name)
        found = [found] if isinstance(found, int) else found
        return {int(a) % max(of, 1) for a in found} if found else set(range(of))

    def together(self, labels: Sequence[Label]) -> Label:
        """Of what is computed position by position from tensors that are broadcast."""
        parts = [level(label, self.shape) for label in labels]
        return Label(self.shape, meet(self.atoms, self.shape, parts))


Rule: TypeAlias = Callable[[Call], Label | list[Label] | None]
"""Labels of what an operation gives: of all that has the shape, or one by one. None where it does
something that is not known."""
