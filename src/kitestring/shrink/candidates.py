"""What is tried: widths of both models, alone or taught by the large one, in four precisions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Base = Literal["large", "small"]
Precision = Literal["float32", "int8", "weights8", "weights4"]

PRECISIONS: dict[Precision, str] = {
    "float32": "",
    "int8": "8 bits",
    "weights8": "8-bit weights",
    "weights4": "4-bit weights",
}
"""int8: weights and activations. weights8, weights4: weights alone, widened to compute."""
_PARTS = {0.5: "half", 0.25: "quarter", 0.125: "eighth"}


@dataclass(frozen=True)
class Shape:
    """One of the task's models, with `keep` of its channels and heads. `taught`: distilled from the
    large model, from the weights that were kept or, of a whole small model, from the start."""

    base: Base
    keep: float = 1.0
    taught: bool = False

    @property
    def title(self) -> str:
        part = [] if self.keep == 1 else [_PARTS[self.keep]]
        return ", ".join([self.base, *part, *["distilled"] * self.taught])

    @property
    def slug(self) -> str:
        return slug(self.title)

    @property
    def after(self) -> tuple[Shape, ...]:
        """What has to be trained before it."""
        if not self.taught:
            return ()
        if self.base == "large" or self.keep == 1:
            return (LARGE,)
        return (LARGE, Shape("small", taught=True))


LARGE, SMALL = Shape("large"), Shape("small")
SHAPES = (
    LARGE,
    SMALL,
    Shape("small", taught=True),
    Shape("small", 0.5, taught=True),
    *(Shape("large", keep, taught=True) for keep in _PARTS),
)


@dataclass(frozen=True)
class Candidate:
    shape: Shape
    precision: Precision = "float32"

    @property
    def title(self) -> str:
        return ", ".join(filter(None, [self.shape.title, PRECISIONS[self.precision]]))

    @property
    def slug(self) -> str:
        return slug(self.title)

    @property
    def plain(self) -> Candidate:
        """The same in float32."""
        return Candidate(self.shape)


def slug(title: str) -> str:
    return title.replace(",", "").replace(" ", "-")


CANDIDATES = {
    c.slug: c for c in (Candidate(shape, precision) for shape in SHAPES for precision in PRECISIONS)
}
"""All there are, by the names of their files."""
REFERENCES = (Candidate(LARGE), Candidate(SMALL))
"""What the others are held against: always trained, measured and shown."""
