"""Figures as people read them: 1.2 MB, 31 ms, $4.10. One place, so that all pages agree."""

from __future__ import annotations

import math

BYTES = {"B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "PB": 1e15}
SECONDS = {"ns": 1e-9, "µs": 1e-6, "ms": 1e-3, "s": 1.0}
JOULES = {"nJ": 1e-9, "µJ": 1e-6, "mJ": 1e-3, "J": 1.0, "kJ": 1e3, "MJ": 1e6, "GJ": 1e9}
FLOPS = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}
UNKNOWN = "-"


def number(x: float, digits: int = 3) -> str:
    """`digits` significant digits, without an exponent between 0.0001 and a million."""
    if math.isnan(x):
        return UNKNOWN
    if x == 0:
        return "0"
    if math.isinf(x) or not 1e-4 <= abs(x) < 1e6:
        return f"{x:.{digits}g}"
    if abs(x) < 1e4 and math.isclose(x, round(x), rel_tol=1e-9):
        return f"{x:,.0f}"
    x = float(f"{x:.{digits}g}")
    places = max(0, digits - 1 - math.floor(math.log10(abs(x))))
    text = f"{x:,.{places}f}"
    return text.rstrip("0").rstrip(".") if places and abs(x) < 1 else text


def _scaled(x: float, units: dict[str, float], zero: str) -> str:
    if math.isnan(x):
        return UNKNOWN
    if x == 0:
        return f"0 {zero}".strip()
    # 999.6 B is 1.00 kB, not 1000 B: choose the unit after rounding.
    x = float(f"{x:.3g}")
    unit = next((u for u in reversed(units) if abs(x) >= units[u]), next(iter(units)))
    value = x / units[unit]
    places = 0 if unit == "B" or abs(value) >= 99.95 else 1
    return f"{value:,.{places}f} {unit}".strip()


def size(x: float) -> str:
    """Bytes; means may be fractions of a byte."""
    return f"{number(x, 2)} B" if 0 < abs(x) < 1 else _scaled(x, BYTES, "B")


def duration(x: float) -> str:
    """Seconds, and minutes and hours from two minutes on."""
    if x >= 7200:
        return f"{number(x / 3600)} h"
    return f"{number(x / 60)} min" if x >= 120 else _scaled(x, SECONDS, "s")


def energy(x: float) -> str:
    """Joules."""
    return _scaled(x, JOULES, "J")


def energies(low_high: tuple[float, float]) -> str:
    """A (low, high) estimate in joules, in the unit of the high end."""
    low, high = low_high
    text = energy(high)
    if math.isnan(low) or math.isnan(high) or high <= 0:
        return text
    unit = text.split()[-1]
    return f"{number(low / JOULES[unit], 2)}–{number(high / JOULES[unit], 2)} {unit}"


def operations(x: float) -> str:
    """Floating-point operations: 1.2 T."""
    return _scaled(x, FLOPS, "") if x >= 1 or x == 0 else number(x, 2)


def money(x: float) -> str:
    """Dollars: cents where they matter, two digits below a cent."""
    if math.isnan(x):
        return UNKNOWN
    if x == 0:
        return "$0"
    if x < 0.1:
        # Without an exponent: tiny bills are read by people too.
        places = min(12, 1 - math.floor(math.log10(x)))
        return f"${x:.{places}f}"
    return f"${x:,.2f}" if x < 1000 else f"${x:,.0f}"


def share(x: float | None) -> str:
    """A share 0..1 as per cent."""
    if x is None or math.isnan(x):
        return UNKNOWN
    # 99.96% of the users is not all of them.
    if 0.9995 <= x < 1:
        return ">99.9%"
    if 0 < x < 0.0005:
        return "<0.1%"
    places = 0 if x in (0.0, 1.0) or 0.1 <= x < 0.995 else 1
    return f"{100 * x:.{places}f}%"


def score(x: float, unit: str) -> str:
    """A metric's value; unit "%" means that `x` is a share 0..1."""
    if math.isnan(x):
        return UNKNOWN
    return f"{100 * x:.1f}%" if unit == "%" else f"{number(x, 4)} {unit}".strip()


def gap(x: float, unit: str) -> str:
    """A difference of two scores; of shares, in percentage points."""
    if math.isnan(x) or math.isinf(x):
        return UNKNOWN
    if unit == "%":
        return f"{number(100 * x, 2)} points"
    return f"{number(x, 2)} {unit}".strip()
