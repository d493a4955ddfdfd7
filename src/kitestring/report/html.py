"""Pieces of HTML for the report: what these wrap in tags, they escape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from kitestring import units


def cell(text: str, kind: str = "") -> str:
    """A table cell; a dash for an unknown figure is neither measured nor modelled."""
    style = f' class="{kind}"' if kind and text != units.UNKNOWN else ""
    return f"<td{style}>{escape(text)}</td>"


def bullets(lines: Sequence[str]) -> str:
    if not lines:
        return ""
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"


def facts(values: Mapping[str, str]) -> str:
    """Names and values as a description list."""
    pairs = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in values.items())
    return f'<dl class="facts">{pairs}</dl>\n'


def settings(values: Mapping[str, Any]) -> str:
    """Plain text, not yet escaped: "lr 0.05, epochs 2"."""
    return ", ".join(f"{name} {plain(value)}" for name, value in values.items()) or "none"


def plain(value: Any) -> str:
    """A setting's value as plain text, not yet escaped."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return settings(value)
    if isinstance(value, list | tuple):
        return ", ".join(map(plain, value))
    return str(value)
