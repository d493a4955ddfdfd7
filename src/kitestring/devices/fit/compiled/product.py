"""Matrix products in register tiles: out = start + scale a b, for small matrices that lie anyhow.

A tile holds rows x vectors of the result in registers while it runs along the shared dimension.
Vectors lie along the columns of b where those are next to each other; else along the shared
dimension, with a sum across lanes at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
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
            parts = -(-depth // _DEEP) if a.shape[-2] >= _PACK else 1
            for k in range(0, depth, -(-depth // parts)):
                size = min(-(-depth // parts), depth - k)
                left, right = a.slice(-1, k, size), b.slice(-2, k, size)
                _Tile(e, at, index, out, left, right, out if k else start, scale).columns()
        return None

    return kernel("product", emit, out, a, b, start, scale)


def runs(e: Emitter, n: int, most: int, body: Callable[[Any, int], None]) -> None:
    """Runs of equal length, as few as `most` allows, and one of what is left."""
    length = -(-n // -(-n // most))
    whole = n - n % length
    if whole:
        with e.loop(whole, step=length) as i:
            body(i, length)
    if n % length:
        body(i64(whole), n % length)


class _Tile:
    def __init__(
        self, e: Emitter, at: Pointers, index: list[Any], out: View, a: View, b: View,
        start: View | None, scale: View | None,
    ) -> None:  # fmt: skip
        self.e, self.at, self.index = e, at, index
        self.out, self.a, self.b, self.start = out, a, b, start
        self.m, self.k, self.n = a.shape[-2], a.shape[-1], b.shape[-1]
        self.scale = e.read(at[scale.buffer], scale, [], 0, 1) if scale else None  # type: ignore[index]

    def read(self, view: View, i: Any, j: Any, lane: int, width: int) -> Any:
        index = [*self.index, i, j]
        return self.e.read(self.at[view.buffer], view, index, len(index) - 2 + lane, width)  # type: ignore[index]

    def finish(self, total: Any, i: Any, j: Any, width: int) -> None:
        e = self.e
        if self.scale is not None:
            total = e.b.fmul(total, e.splat(self.scale, width), flags=FLAGS)
        if self.start is not None:
            total = e.b.fadd(self.read(self.start, i, j, 1, width), total, flags=FLAGS)
        index = [*self.index, i, j]
        e.write(total, self.at[self.out.buffer], self.out, index, len(index) - 1, width)  # type: ignore[index]

    def columns(self) -> None:
        e = self.e

        def block(j: Any, wide: int) -> None:
            parts = [(k, WIDTH) for k in range(0, wide - wide % WIDTH, WIDTH)]
            parts += blocks(wide, WIDTH)

            def rows(i: Any, count: int) -> None:
                here = [e.b.add(i, i64(r)) for r in range(count)]
                there = [e.b.add(j, i64(p)) for p, _ in parts]
                totals = {
                    (r, p): e.variable(e.kind("f32", width), None)
                    for r in range(count)
                    for p, (_, width) in enumerate(parts)
                }
                for (_, p), total in totals.items():
                    e.b.store(e.number(0.0, "f32", parts[p][1]), total)
                with e.loop(self.k) as k:
                    b = [
                        self.read(self.b, k, j, 1, w)
                        for j, (_, w) in zip(there, parts, strict=True)
                    ]
                    for r in range(count):
                        a = self.read(self.a, here[r], k, 0, 1)
                        for p, (_, w) in enumerate(parts):
                            total = totals[r, p]
                            e.b.store(e.fma(e.splat(a, w), b[p], e.b.load(total)), total)
                for (r, p), total in totals.items():
                    self.finish(e.b.load(total), here[r], there[p], parts[p][1])

            runs(self.e, self.m, max(1, REGISTERS // len(parts)), rows)

        most = COLUMNS * WIDTH
        whole = self.n - self.n % most
        if whole:
            with e.loop(whole, step=most) as j:
                block(j, most)
        if self.n % most:
            block(i64(whole), self.n % most)

    def dots(self) -> None:
        e, rest = self.e, self.k % WIDTH

        def tail(view: View, i: Any, j: Any) -> Any:
            place = e.address(view, [*self.index, i, j])
            return e.some(self.at[view.buffer], place, rest)  # type: ignore[index]

        def cell(i: Any, rows: int) -> None:
            def across(j: Any, count: int) -> None:
                here = [e.b.add(i, i64(r)) for r in range(rows)]
                there = [e.b.add(j, i64(c)) for c in range(count)]
                pairs = [(r, c) for r in range(rows) for c in range(count)]
                totals = {p: e.variable(e.kind("f32", WIDTH)) for p in pairs}
                for total in totals.values():
                    e.b.store(e.number(0.0, "f32", WIDTH), total)

                def step(a: list[Any], b: list[Any]) -> None:
                    for r, c in pairs:
                        total = totals[r, c]
                        e.b.store(e.fma(a[r], b[c], e.b.load(total)), total)

                if self.k >= WIDTH:
                    with e.loop(self.k - rest, step=WIDTH) as k:
                        step(
                            [self.read(self.a, r, k, 1, WIDTH) for r in here],
                            [self.read(self.b, k, c, 0, WIDTH) for c in there],
                        )
                if rest:
                    k = i64(self.k - rest)
                    step([tail(self.a, r, k) for r in here], [tail(self.b, k, c) for c in there])
                for r, c in pairs:
                    total = e.across("sum", e.b.load(totals[r, c]), WIDTH)
                    self.finish(total, here[r], there[c], 1)

            runs(self.e, self.n, max(1, REGISTERS // rows), across)

        runs(self.e, self.m, REGISTERS // 2, cell)
