"""Strided views over buffers, and expressions over them: what kernels read and write."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import TypeAlias

SIZES = {"f32": 4, "i64": 8, "i32": 4, "u8": 1, "bool": 1}


class Refused(Exception):
    """What this compiler has no code for; the text says what."""


@dataclass(eq=False)
class Buffer:
    """`size` elements in a device's memory, at byte `at` once that is laid out.

    `fixed` ones live throughout; the others may share memory when their uses do not overlap."""

    name: str
    dtype: str
    size: int
    fixed: bool = False
    at: int = -1


@dataclass(frozen=True)
class View:
    """Element [i, j, ...] is `buffer`[offset + i * strides[0] + j * strides[1] + ...].

    Without a buffer it is that number itself: an arange, broadcast and cut like any view."""

    buffer: Buffer | None
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0

    @property
    def dtype(self) -> str:
        return self.buffer.dtype if self.buffer else "i64"

    def permute(self, order: Sequence[int]) -> View:
        order = [d % len(self.shape) for d in order]
        shape = tuple(self.shape[d] for d in order)
        return replace(self, shape=shape, strides=tuple(self.strides[d] for d in order))

    def expand(self, shape: Sequence[int]) -> View:
        extra = len(shape) - len(self.shape)
        old, strides = (1,) * extra + self.shape, (0,) * extra + self.strides
        wide = tuple(o if s == -1 else s for s, o in zip(shape, old, strict=True))
        kept = tuple(0 if o == 1 else t for o, t in zip(old, strides, strict=True))
        return replace(self, shape=wide, strides=kept)

    def slice(self, dim: int, start: int, length: int, step: int = 1) -> View:
        dim %= len(self.shape)
        shape, strides = list(self.shape), list(self.strides)
        offset = self.offset + start * strides[dim]
        shape[dim], strides[dim] = length, strides[dim] * step
        return replace(self, shape=tuple(shape), strides=tuple(strides), offset=offset)

    def select(self, dim: int, index: int) -> View:
        cut = self.slice(dim, index, 1)
        rest = [d for d in range(len(self.shape)) if d != dim % len(self.shape)]
        return cut.permute([*rest, dim]).reshape([self.shape[d] for d in rest]) or cut

    def reshape(self, shape: Sequence[int]) -> View | None:
        """The same elements under another shape; None where no strides give that."""
        old = [(n, s) for n, s in zip(self.shape, self.strides, strict=True) if n != 1]
        strides: list[int] = []
        left = list(old)
        for size in reversed(shape):
            if size == 1:
                strides.append(0)
                continue
            if not left:
                return None
            n, s = left.pop()
            while n % size:  # merge with the dimension before, if they lie end to end
                if not left or left[-1][1] != s * n:
                    return None
                n, s = n * left.pop()[0], s
            strides.append(s)
            if n > size:
                left.append((n // size, s * size))
        if left:
            return None
        return replace(self, shape=tuple(shape), strides=tuple(reversed(strides)))


@dataclass(frozen=True, eq=False)
class Expr:
    """An operation on views, expressions and numbers, element by element; all have one shape."""

    op: str
    args: tuple[Value | float | int | bool, ...]
    dtype: str
    shape: tuple[int, ...]

    def over(self, change: Callable[[View], Value | None]) -> Expr | None:
        """The same expression over changed views; None where one cannot be changed."""
        args = []
        shape = self.shape
        for a in self.args:
            if isinstance(a, View):
                a = change(a)  # type: ignore[assignment]
            elif isinstance(a, Expr):
                a = a.over(change)  # type: ignore[assignment]
            if a is None:
                return None
            args.append(a)
            if isinstance(a, View | Expr):
                shape = a.shape
        if not any(isinstance(a, View | Expr) for a in args):  # a constant takes any shape
            made = change(View(None, self.shape, (0,) * len(self.shape)))
            shape = made.shape if made else self.shape
        return Expr(self.op, tuple(args), self.dtype, shape)

    def leaves(self) -> Iterator[View]:
        for a in self.args:
            if isinstance(a, View):
                yield a
            elif isinstance(a, Expr):
                yield from a.leaves()

    def ops(self) -> Iterator[str]:
        yield self.op
        for a in self.args:
            if isinstance(a, Expr):
                yield from a.ops()


Value: TypeAlias = View | Expr


def plain(buffer: Buffer, shape: Sequence[int]) -> View:
    """All of a buffer, the last dimension lying end to end."""
    strides = [1]
    for n in reversed(shape[1:]):
        strides.insert(0, strides[0] * n)
    return View(buffer, tuple(shape), tuple(strides) if shape else ())


@dataclass
class Nest:
    """A loop nest over views of one shape, with as few and as long loops as they allow.

    Dimensions go from the outermost to the innermost; `views` are rearranged in step."""

    shape: list[int] = field(default_factory=list)
    views: list[View] = field(default_factory=list)


def nest(views: Sequence[View], last: int | None = None) -> Nest:
    """The first view decides the order, its shortest stride innermost; or dimension `last` is."""
    first = views[0]
    dims = [d for d in range(len(first.shape)) if first.shape[d] != 1]
    dims.sort(key=lambda d: (d == last, -abs(first.strides[d]) if first.strides[d] else 0))
    kept: list[list[int]] = [[d] for d in dims]
    merged: list[list[int]] = []
    for group in kept:
        if merged and all(
            v.strides[merged[-1][-1]] == v.strides[group[0]] * v.shape[group[0]] for v in views
        ):
            merged[-1] += group
        else:
            merged.append(group)
    shape = [prod(first.shape[d] for d in g) for g in merged]
    moved = [
        View(v.buffer, tuple(shape), tuple(v.strides[g[-1]] for g in merged), v.offset)
        for v in views
    ]
    return Nest(shape, moved)


def constant(value: float | int | bool, dtype: str, shape: Sequence[int] = ()) -> Expr:
    return Expr("const", (value,), dtype, tuple(shape))


def tried(value: Value, change: Callable[[View], Value | None]) -> Value | None:
    """The value over changed views; None where a view cannot be changed so."""
    return change(value) if isinstance(value, View) else value.over(change)


def changed(value: Value, change: Callable[[View], View]) -> Value:
    found = tried(value, change)
    assert found is not None
    return found


def substituted(value: Value, old: View, new: Value, change: Callable[[View], View]) -> Value:
    """The value over changed views, with `new` in place of `old`."""
    found = tried(value, lambda view: new if view == old else change(view))
    assert found is not None
    return found


def leaves(value: Value) -> list[View]:
    return [value] if isinstance(value, View) else list(value.leaves())


def blocks(n: int, width: int) -> list[tuple[int, int]]:
    """(start, width) of what is left of n after whole blocks, in powers of two."""
    out, at = [], n - n % width
    while at < n:
        width //= 2
        if n - at >= width:
            out.append((at, width))
            at += width
    return out
