"""Pieces of HTML for the report: what these wrap in tags, they escape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from typing import Any

from kitestring import units


def document(title: str, parts: Sequence[str]) -> str:
    """A whole page in the report's style, without a script. `title`: plain text, escaped here;
    `parts`: HTML, of which the empty ones are left out."""
    css = resources.files("kitestring.report").joinpath("page.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{css}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body>\n</html>\n"
    )


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
