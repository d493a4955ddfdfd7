"""The geometry of a convolution: which input each weight reads at each output position."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """One convolution in two dimensions; pairs are (height, width)."""

    batch: int
    groups: int
    ins: int  # channels of a group
    outs: int
    size: tuple[int, int]  # of the input
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @property
    def out(self) -> tuple[int, int]:
        return tuple(  # type: ignore[return-value]
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, p, d, k, s in zip(
                self.size, self.padding, self.dilation, self.kernel, self.stride, strict=True
            )
        )

    @property
    def reach(self) -> tuple[int, int]:
        """How many phase positions the last weight lies after the first."""
        pairs = zip(self.dilation, self.kernel, self.stride, strict=True)
        return tuple(d * (k - 1) // s for d, k, s in pairs)  # type: ignore[return-value]

    def span(self, d: int, phase: tuple[int, int]) -> tuple[int, int, int]:
        """Inputs of a phase along dimension d: the first one's position, its number, how many.

        Input i lies at padded position i + padding = stride * position + phase."""
        first = max(0, -(-(self.padding[d] - phase[d]) // self.stride[d]))
        start = first * self.stride[d] + phase[d] - self.padding[d]
        count = -(-(self.size[d] - start) // self.stride[d])
        return first, start, max(0, min(count, self.out[d] + self.reach[d] - first))

    @property
    def before(self) -> tuple[int, int]:
        """Zeros that the output's gradient needs above and to the left."""
        return tuple(  # type: ignore[return-value]
            max(0, self.reach[d] - min(self.span(d, phase)[0] for phase in self.phases))
            for d in (0, 1)
        )

    @property
    def after(self) -> tuple[int, int]:
        return tuple(  # type: ignore[return-value]
            max(0, max(sum(self.span(d, phase)[::2]) for phase in self.phases) - self.out[d])
            for d in (0, 1)
        )

    @property
    def pitch(self) -> int:
        """From row to row, of the input, the output and its gradient alike. The zeros after a row
        are those before the next."""
        wide = (
            self.size[1] + self.padding[1] if self.stride[1] == 1 else self.out[1] + self.reach[1]
        )
        return max(wide, self.out[1] + max(self.before[1], self.after[1]))

    @property
    def padded(self) -> tuple[int, int]:
        """Rows and columns of one phase of the padded input, as far as it is read."""
        return self.out[0] + self.reach[0], self.out[1] + self.reach[1]

    @property
    def positions(self) -> int:
        """From the first output to the last, in the pitch."""
        return (self.out[0] - 1) * self.pitch + self.out[1]

    def place(self, y: int, x: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """The phase that weight (y, x) reads, and how far on (rows, columns)."""
        at = y * self.dilation[0], x * self.dilation[1]
        s = self.stride
        return (at[0] % s[0], at[1] % s[1]), (at[0] // s[0], at[1] // s[1])

    @property
    def phases(self) -> list[tuple[int, int]]:
        """Those that some weight reads."""
        spots = [(y, x) for y in range(self.kernel[0]) for x in range(self.kernel[1])]
        return sorted({self.place(y, x)[0] for y, x in spots})
