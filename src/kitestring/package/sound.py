"""Whether a plan can be run at all: its forms are known, and every value is made before it is used.

Looked at once, as JSON, when a plan is decoded: what is wrong is told before any step has run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

_NUMBERS = ("inf", "-inf", "nan")


def check(inputs: Any, steps: Iterable[Any], outputs: Any) -> None:
    """Raises `ValueError` for the first thing that is wrong."""
    there = set(_made(inputs, "the input"))
    for at, (op, args, kwargs, out) in enumerate(steps):
        what = f"step {at} ({op})"
        if not isinstance(args, list) or not isinstance(kwargs, dict):
            raise ValueError(f"{what} is not given a list and a dictionary")
        _check_used([*args, *kwargs.values()], there, what)
        there.update(_made(out, what))
    _check_used(outputs, there, "the output")


def _check_used(given: Any, there: set[int], what: str) -> None:
    for number in _used(given, what):
        if number not in there:
            raise ValueError(f"{what} uses value {number}, which nothing before it makes")


def _used(given: Any, what: str) -> Iterator[int]:
    """The values that something given refers to."""
    if isinstance(given, list):
        for part in given:
            yield from _used(part, what)
    elif isinstance(given, dict):
        kind, of = _wrapped(given, what)
        if kind == "$":
            yield of
        elif kind == "dict":
            yield from _used(list(of.values()), what)
        elif kind in ("rows", "slice", "array"):
            yield from _used(of, what)


def _made(form: Any, what: str) -> Iterator[int]:
    """The values that are made where something of this form comes out."""
    kind, of = _wrapped(form, what) if isinstance(form, dict) else ("", form)
    if kind == "$":
        yield of
    elif kind in ("rows", "dict"):
        for part in of if kind == "rows" else of.values():
            yield from _made(part, what)
    else:
        raise ValueError(f"{what} has values in no form that is known")


def _wrapped(given: dict[str, Any], what: str) -> tuple[str, Any]:
    """The kind of a JSON object, and what is in it."""
    kinds = given.keys() - {"shape", "dtype"} if "array" in given else given.keys()
    kind = next(iter(kinds), "")
    if len(kinds) != 1 or kind not in _FORMS or not _FORMS[kind](given):
        raise ValueError(f"{what} has {', '.join(given) or 'nothing'} in a form that is not known")
    return kind, given[kind]


def _is_array(given: dict[str, Any]) -> bool:
    shape, dtype = given.get("shape"), given.get("dtype")
    sizes = isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)
    return sizes and isinstance(dtype, str) and isinstance(given["array"], list)


_FORMS: Mapping[str, Callable[[dict[str, Any]], bool]] = {
    "$": lambda g: type(g["$"]) is int,
    "rows": lambda g: isinstance(g["rows"], list) and len(g["rows"]) == 2,
    "array": _is_array,
    "slice": lambda g: isinstance(g["slice"], list) and len(g["slice"]) == 3,
    "dict": lambda g: isinstance(g["dict"], dict),
    "number": lambda g: g["number"] in _NUMBERS,
    "ellipsis": lambda g: True,
}
