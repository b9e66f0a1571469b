"""Format numbers and values for the page."""

from __future__ import annotations

import re
from typing import Any

from markupsafe import Markup, escape

DASH = "\N{EN DASH}"  # where there is no number
MINUS = "\N{MINUS SIGN}"


def count(value: int | float | None) -> str:
    """Return 1234567 as `1,234,567`; a dash where there is none."""
    return DASH if value is None else f"{int(value):,}"


def number(value: int, noun: str) -> str:
    """Return `1 set`, `2 sets`."""
    return f"{count(value)} {noun}" + ("" if value == 1 else "s")


def magnitude(value: int | float | None) -> str:
    """Return 1234567 as `1.23 M`."""
    if value is None:
        return DASH
    for limit, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            scaled = value / (1e3 if unit == "k" else limit)
            return f"{scaled:.3g} {unit}"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def significant(value: int | float | None) -> str:
    """Return three significant digits, at most six decimals, never in exponent form: 0.00245, 0.07, 2000."""
    if value is None:
        return DASH
    text = f"{value:.3g}"
    return f"{value:.6f}".rstrip("0").rstrip(".") if "e-" in text else f"{value:.0f}" if "e+" in text else text


def percent(fraction: int | float | None) -> str:
    """Return 0.4373 as `43.7`; the unit is in the heading. A dash where there is none."""
    return DASH if fraction is None else f"{100 * fraction:.1f}"


def gain(fraction: int | float | None) -> str:
    """Return a difference of fractions in points, signed: `+3.2`, `-0.4`, `±0.0`."""
    if fraction is None:
        return ""
    points = round(100 * fraction, 1)
    if points == 0:
        return "±0.0"
    return f"+{points:.1f}" if points > 0 else f"{MINUS}{-points:.1f}"


def shorten(text: str, length: int = 300) -> str:
    """Cut a text to `length` characters with an ellipsis: a caption can be as long as a web page."""
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def breakable(name: str) -> Markup:
    """Let a browser break a long name after its underscores and slashes."""
    return Markup(re.sub(r"([_/])", r"\1<wbr>", str(escape(name))))


def plain(value: Any) -> str:
    """Return a JSON value in words: lists and objects with commas, a dash for null."""
    if value is None:
        return DASH
    if isinstance(value, list):
        return ", ".join(plain(item) for item in value)
    if isinstance(value, dict):
        return ", ".join(f"{name} {plain(item)}" for name, item in value.items())
    return str(value).lower() if isinstance(value, bool) else str(value)
