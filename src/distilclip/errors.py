"""Define the one exception for wrong input. The command line prints it in one line, without a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

MOST_SHOWN = 40  # names in one message


class InputError(ValueError):
    """Wrong input. The message names the wrong value, where it came from, and what to do."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a sentence with the known names that look similar, or else with the first of all known names."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3)
    if near:
        return f"Did you mean {' or '.join(repr(n) for n in near)}?"
    rest = f" and {len(known) - MOST_SHOWN} more" if len(known) > MOST_SHOWN else ""
    return f"Known: {', '.join(known[:MOST_SHOWN])}{rest}."
