"""The one exception that means "the input is wrong": the command line prints it without a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

MOST_SHOWN = 40  # names in one message


class InputError(ValueError):
    """Bad input. The message names the offending value, where it came from, and the remedy."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A sentence naming the nearest known names, or the known ones (of many the first) when none is near."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3)
    if near:
        return f"Did you mean {' or '.join(repr(n) for n in near)}?"
    rest = f" and {len(known) - MOST_SHOWN} more" if len(known) > MOST_SHOWN else ""
    return f"Known: {', '.join(known[:MOST_SHOWN])}{rest}."
