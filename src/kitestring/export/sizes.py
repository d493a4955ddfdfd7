"""Numbers that grow with the rows of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True)
class Size:
    """`each` for every row, and `more` beside."""

    each: int
    more: int = 0

    def of(self, rows: int) -> int:
        return self.each * rows + self.more

    def __str__(self) -> str:
        each = "rows" if self.each == 1 else f"{self.each} rows"
        return f"{each} {self.more:+d}" if self.more else each


Dim: TypeAlias = int | Size
Shape: TypeAlias = tuple[Dim, ...]
ROWS = Size(1)


def through(first: float, second: float, rows: tuple[int, int]) -> Size | None:
    """What is `first` with the one number of rows and `second` with the other; None if nothing
    whole is."""
    each, rest = divmod(second - first, rows[1] - rows[0])
    if rest or each != int(each) or first != int(first):
        return None
    return Size(int(each), int(first - each * rows[0]))


def times(dims: Sequence[Dim]) -> Dim | None:
    """Their product, where it is a size."""
    total, per = 1, None
    for dim in dims:
        if not isinstance(dim, Size):
            total *= dim
        elif per is not None:
            return None
        else:
            per = dim
    return total if per is None else Size(per.each * total, per.more * total)


def broadcast(*shapes: Shape) -> Shape:
    """As arrays of these shapes broadcast against one another."""
    out: list[Dim] = [1] * max(map(len, shapes), default=0)
    for shape in shapes:
        for at, dim in enumerate(reversed(shape), 1):
            if dim != 1:
                assert out[-at] in (1, dim), (shapes, "do not broadcast")
                out[-at] = dim
    return tuple(out)
