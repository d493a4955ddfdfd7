"""Matrix products in register tiles: out = start + scale a b, for small matrices that lie anyhow.

A tile holds rows x vectors of the result in registers while it runs along the shared dimension.
Vectors lie along the columns of b where those are next to each other; else along the shared
dimension, with a sum across lanes at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from llvmlite import binding

from kitestring.devices.fit.compiled.emit import FLAGS, WIDTH, Emitter, i64
from kitestring.devices.fit.compiled.kernels import Kernel, Pointers, kernel
from kitestring.devices.fit.compiled.views import View, blocks

_WIDE = "avx512f" in {k for k, v in dict(binding.get_host_cpu_features()).items() if v}
COLUMNS = 4 if _WIDE else 1  # vectors of a tile
REGISTERS = 24 if _WIDE else 6  # accumulators of a tile
DOT = (6, 4) if _WIDE else (3, 2)  # rows and columns of a tile of dot products
_PACK = 4 * WIDTH  # rows of a from which copying b pays
_CACHED = 2**18  # floats that stay in a core's cache
_NEAR = 2**13  # floats that stay in the first cache
_DEEP = 256  # of the shared dimension at a time, so that a panel of b stays in the cache


def lies(a: View, b: View) -> str:
    """How a [m, k] b [k, n] can be computed as they lie: "columns", "rows" (of a, the result
    transposed), "dot", or "" where b has to be copied first."""
    if b.shape[-1] == 1 or b.strides[-1] == 1:
        return "columns"
    few = a.shape[-2] < _PACK
    if few and a.strides[-1] == 1 and b.strides[-2] == 1 and a.shape[-1] >= 2 * WIDTH:
        return "dot"
    if a.strides[-2] == 1:
        return "rows"
    return ""


def product(
    out: View, a: View, b: View, start: View | None = None, scale: View | None = None
) -> Kernel:
    """out [..., m, n] = start + scale (a [..., m, k] b [..., k, n]); leading dimensions agree.

    `start` has the shape of out (strides of 0 broadcast a bias) or is out itself."""
    way = lies(a, b)
    if way == "rows":
        swap = [*range(len(out.shape) - 2), -1, -2]
        turned = None if start is None else start.permute(swap)
        return product(out.permute(swap), b.permute(swap), a.permute(swap), turned, scale)
    if b.shape[-1] == 1 and b.strides[-2] == 1 and a.strides[-1] == 1 and a.shape[-1] >= WIDTH:
        way = "dot"

    def emit(e: Emitter, at: Pointers) -> None:
        with ExitStack() as stack:
            index = [stack.enter_context(e.loop(s)) for s in out.shape[:-2]]
            if way == "dot":
                return _Tile(e, at, index, out, a, b, start, scale).dots()
            depth = a.shape[-1]
            large = a.shape[-2] >= _PACK or depth * b.shape[-1] > _CACHED
            parts = -(-depth // _DEEP) if large else 1
            for k in range(0, depth, -(-depth // parts)):
                size = min(-(-depth // parts), depth - k)
                left, right = a.slice(-1, k, size), b.slice(-2, k, size)
                _Tile(e, at, index, out, left, right, out if k else start, scale).columns()
        return None

    return kernel("product", emit, out, a, b, start, scale)


def runs(e: Emitter, n: int, most: int, body: Callable[[Any, int], None]) -> None:
    """Runs of equal length, about as few as `most` allows, and one of what is left: code of its
    own, so a few more runs are better where nothing is."""
    least = -(-n // most)
    even = (count for count in range(least, least + least // 3 + 1) if n % count == 0)
    _in_turn(e, n, -(-n // next(even, least)), body)


def stripes(e: Emitter, n: int, body: Callable[[Any, int], None]) -> None:
    """n columns, as many at a time as a tile has, then those that are left."""
    _in_turn(e, n, COLUMNS * WIDTH, body)


def _in_turn(e: Emitter, n: int, length: int, body: Callable[[Any, int], None]) -> None:
    whole = n - n % length
    if whole:
        with e.loop(whole, step=length) as i:
            body(i, length)
    if n % length:
        body(i64(whole), n % length)


def grow(e: Emitter, totals: Sequence[Any], scalar: Any, others: Sequence[tuple[Any, int]]) -> None:
    """Each total grows by the scalar times a vector of so many lanes."""
    for total, (vector, width) in zip(totals, others, strict=True):
        e.b.store(e.fma(e.splat(scalar, width), vector, e.b.load(total)), total)


def vectors(count: int) -> list[tuple[int, int]]:
    """(start, width) of the vectors that make up so many columns."""
    return [(k, min(WIDTH, count - k)) for k in range(0, count, WIDTH)]


class _Tile:
    def __init__(
        self, e: Emitter, at: Pointers, index: list[Any], out: View, a: View, b: View,
        start: View | None, scale: View | None,
    ) -> None:  # fmt: skip
        self.e, self.at, self.index = e, at, index
        self.out, self.a, self.b, self.start = out, a, b, start
        self.m, self.k, self.n = a.shape[-2], a.shape[-1], b.shape[-1]
        self.scale = e.read(at[scale.buffer], scale, [], 0, 1) if scale else None  # type: ignore[index]

    def spot(self, view: View, i: Any, j: Any) -> Any:
        return self.e.address(view, [*self.index, i, j])

    def read(self, view: View, spot: Any, r: int, c: int, lane: int, width: int) -> Any:
        """`width` elements along the last dimension (`lane` 1) or the one before, from r rows and
        c columns after a spot."""
        at = self.e.b.add(spot, i64(r * view.strides[-2] + c * view.strides[-1]))
        base = self.at[view.buffer]  # type: ignore[index]
        return self.e.along(base, view.dtype, at, view.strides[lane - 2], width)

    def finish(self, totals: Any, i: Any, j: Any) -> None:
        """Write what (row, column, width) -> sum holds, from row i and column j on."""
        e, out, start = self.e, self.out, self.start
        aim = self.spot(out, i, j)
        head = self.spot(start, i, j) if start else None
        for (r, c, width), total in totals.items():
            if self.scale is not None:
                total = e.b.fmul(total, e.splat(self.scale, width), flags=FLAGS)
            if start is not None:
                total = e.b.fadd(self.read(start, head, r, c, 1, width), total, flags=FLAGS)
            at = e.b.add(aim, i64(r * out.strides[-2] + c * out.strides[-1]))
            e.spread(total, self.at[out.buffer], "f32", at, out.strides[-1], width)  # type: ignore[index]

    def columns(self) -> None:
        """Down each stripe of columns; or row by row, so that a large result is written as it lies
        while a small b stays in the cache."""
        high = max(1, REGISTERS // min(COLUMNS, -(-self.n // WIDTH)))
        wide, small = self.m * self.n > _CACHED, self.k * self.n <= _CACHED // 2

        if wide and small:
            runs(self.e, self.m, high, self.row)
        else:

            def stripe(j: Any, count: int) -> None:
                fit = max(1, REGISTERS // len(vectors(count)))
                runs(self.e, self.m, fit, lambda i, rows: self.tile(i, rows, j, count))

            stripes(self.e, self.n, stripe)

    def row(self, i: Any, rows: int) -> None:
        stripes(self.e, self.n, partial(self.tile, i, rows))

    def tile(self, i: Any, rows: int, j: Any, columns: int) -> None:
        e, parts = self.e, vectors(columns)
        cells = [(r, p, width) for r in range(rows) for p, width in parts]
        totals = {cell: e.variable(e.kind("f32", cell[2])) for cell in cells}
        for (*_, width), total in totals.items():
            e.b.store(e.number(0.0, "f32", width), total)
        with e.loop(self.k) as k:
            left, right = self.spot(self.a, i, k), self.spot(self.b, k, j)
            b = [(self.read(self.b, right, 0, p, 1, w), w) for p, w in parts]
            for r in range(rows):
                a = self.read(self.a, left, r, 0, 0, 1)
                grow(e, [totals[r, p, w] for p, w in parts], a, b)
        self.finish({cell: e.b.load(total) for cell, total in totals.items()}, i, j)

    def dots(self) -> None:
        e, rest = self.e, self.k % WIDTH

        def tail(view: View, spot: Any, r: int, c: int, lane: int) -> Any:
            """The last vector, with zeros for what the loop has seen already."""
            whole = self.read(view, spot, r, c, lane, WIDTH)
            return e.b.select(e.lanes_from(WIDTH - rest), whole, e.number(0.0, "f32", WIDTH))

        def cell(i: Any, rows: int, j: Any, count: int) -> None:
            totals = {
                (r, c): e.variable(e.kind("f32", WIDTH)) for r in range(rows) for c in range(count)
            }
            for total in totals.values():
                e.b.store(e.number(0.0, "f32", WIDTH), total)

            def step(a: list[Any], b: list[Any]) -> None:
                for (r, c), total in totals.items():
                    e.b.store(e.fma(a[r], b[c], e.b.load(total)), total)

            def spots(k: Any) -> tuple[Any, Any]:
                return self.spot(self.a, i, k), self.spot(self.b, k, j)

            with e.loop(self.k - rest, step=WIDTH) as k:
                left, right = spots(k)
                step(
                    [self.read(self.a, left, r, 0, 1, WIDTH) for r in range(rows)],
                    [self.read(self.b, right, 0, c, 0, WIDTH) for c in range(count)],
                )
            if rest:
                left, right = spots(i64(self.k - WIDTH))
                step(
                    [tail(self.a, left, r, 0, 1) for r in range(rows)],
                    [tail(self.b, right, 0, c, 0) for c in range(count)],
                )
            sums = {}
            for r in range(rows):
                for c, width in blocks(count, 2 * WIDTH):
                    some = [e.b.load(totals[r, c + k]) for k in range(width)]
                    one = width == 1
                    total = e.across("sum", some[0], WIDTH) if one else e.sums(some, WIDTH)
                    sums[r, c, width] = total
            self.finish(sums, i, j)

        if self.m * self.k <= _NEAR:  # then only b has to come from further away, and once

            def down(j: Any, count: int) -> None:
                runs(e, self.m, high, lambda i, rows: cell(i, rows, j, count))

            high = -(-self.m // -(-self.m // DOT[0]))
            runs(e, self.n, REGISTERS // high, down)
        else:

            def along(i: Any, rows: int) -> None:
                most = max(1, REGISTERS // rows)
                runs(e, self.n, most, lambda j, count: cell(i, rows, j, count))

            runs(e, self.m, REGISTERS // 2, along)
