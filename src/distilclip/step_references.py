"""Read `@` references of a recipe: `@train/teacher` is the folder of that step, and `@` alone the folder of the run."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from distilclip.errors import InputError, did_you_mean

REFERENCE = re.compile(r"(?:^|(?<=[=:]))@([\w./-]*)")


def find_references(values: Iterable[Any], path: str, paths: Sequence[str], source: str) -> set[str]:
    """Return the steps that a step's values name; `@` alone, the folder of the run, names all others.

    Raises `InputError` for a reference to no step.
    """
    found: set[str] = set()
    for value in values:
        if isinstance(value, list):
            found |= find_references(value, path, paths, source)
        for reference in REFERENCE.findall(value) if isinstance(value, str) else []:
            step = step_of(reference, paths)
            if reference and step is None:
                raise InputError(f"{source}, [{path}]: @{reference} is no step. {did_you_mean(reference, paths)}")
            found |= {step} if step else set(paths) - {path}
    return found


def step_of(reference: str, paths: Iterable[str]) -> str | None:
    """Return the step whose folder, or a file in it, is named by a reference."""
    return next((path for path in paths if reference == path or reference.startswith(f"{path}/")), None)


def resolve(value: Any, folders: Mapping[str, str]) -> Any:
    """Replace the references in a value: a step's name by its folder, `@` alone by the folder of the run."""
    if isinstance(value, list):
        return [resolve(item, folders) for item in value]
    if not isinstance(value, str):
        return value

    def place(match: re.Match[str]) -> str:
        step = step_of(match.group(1), folders) or ""
        return folders[step] + match.group(1)[len(step) :]

    return REFERENCE.sub(place, value)
