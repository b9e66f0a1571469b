"""Read how models are named on the command line: NAME=MODEL, and NAME=FILE for their weights. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence

from distilclip.errors import InputError, did_you_mean


def split_model(spec: str) -> tuple[str, str]:
    """Split `[NAME=]MODEL` into name and model; without a name, it is the last part of the model's path or id.

    Raises `InputError` for a name that has other characters than letters, digits and `. + - _`.
    """
    match = re.fullmatch(r"([\w.+-]+)=(.+)", spec)
    if match:
        return match[1], match[2]
    name, equals, _ = spec.partition("=")
    if equals and not re.search(r"[/:]", name):
        raise InputError(f"{spec!r}: {name!r} cannot name a model. A name has letters, digits and any of . + - _")
    return re.split(r"[/:]", spec.rstrip("/"))[-1], spec


def weights_by_name(weights: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """Return weights files by model; a bare file is the only model's. `InputError` for a name that no model has."""
    found = {}
    for value in weights:
        match = re.fullmatch(r"([\w.+-]+)=(.+)", value)
        if match is None and len(names) > 1:
            raise InputError(f"--weights {value!r} does not say whose weights it holds: write NAME={value}.")
        name, path = (match[1], match[2]) if match else (names[0], value)
        if name not in names:
            raise InputError(f"--weights {value!r}: no model is called {name!r}. {did_you_mean(name, names)}")
        found[name] = path
    return found
