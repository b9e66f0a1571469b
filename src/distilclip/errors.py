"""Define the one exception for wrong input. The command line prints it in one line, without a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

MOST_SHOWN = 40  # names in one message


class InputError(ValueError):
    """Wrong input. The message names the wrong value, where it came from, and what to do."""


class OtherVersionError(InputError):
    """A file of a format version that this distilclip does not know: not damaged, but written by another version."""


def other_version(path: str, found: object, *, known: object) -> OtherVersionError:
    """Return the error for a file of format version `found`, where `known` is read."""
    return OtherVersionError(
        f"{path} has format version {found}; this distilclip reads version {known}. Read it with the version that "
        "wrote it, or run its stage again with this one, into a new folder."
    )


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a sentence with the known names that look similar, or else with the first of all known names."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3)
    if near:
        return f"Did you mean {' or '.join(repr(n) for n in near)}?"
    rest = f" and {len(known) - MOST_SHOWN} more" if len(known) > MOST_SHOWN else ""
    return f"Known: {', '.join(known[:MOST_SHOWN])}{rest}."
