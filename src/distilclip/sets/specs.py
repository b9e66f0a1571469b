"""Read the spec of an evaluation set: the name of a published set, or the kind and path of the user's own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, get_args

from distilclip.errors import InputError, did_you_mean
from distilclip.sets.catalogue import CATALOGUE, GROUPS

Task = Literal["zero-shot", "linear-probe", "retrieval", "agreement"]
ALL_TASKS: tuple[Task, ...] = ("zero-shot", "linear-probe", "retrieval", "agreement")

VALIDATED = "validate/"
"""How a column of metrics.jsonl begins that holds what a validation while training gave: validate/SET/METRIC."""
HELD_OUT = "held-out"
"""The set of the pairs kept aside from training, whose metrics are the loss and its terms."""

Kind = Literal["folder", "tar", "pairs"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""Of the user's own sets."""


def expand_groups(specs: Sequence[str]) -> tuple[str, ...]:
    """Replace `paper`, `robustness` and `retrieval` by the sets that they stand for; each set once."""
    return tuple(dict.fromkeys(name for spec in specs for name in GROUPS.get(spec, (spec,))))


def parse_spec(spec: str) -> tuple[str, str, str]:
    """Split a spec into name, kind and path; nothing is read. A published set is of kind `known`, its path its name.

    The name of one's own set is the path's last part that is no pattern.
    """
    if spec in CATALOGUE:
        return spec, "known", spec
    match = re.fullmatch(r"(?:([\w.+-]+)=)?([\w-]+):(?!//)(.+)", spec)
    if not match:
        raise InputError(
            f"The evaluation set {spec!r} does not say of what kind it is. Write folder:PATH, tar:PATH or pairs:PATH, "
            f"or the name of a published set (--list shows them). {did_you_mean(spec, [*CATALOGUE, *GROUPS])}"
        )
    name, kind, path = match.groups()
    if kind not in KINDS:
        raise InputError(f"The evaluation set {spec!r} is of no known kind. {did_you_mean(kind, KINDS)}")
    path = path.rstrip("/")
    return name or _name_of(path), kind, path


def is_set(spec: str) -> bool:
    """Return whether a text names an evaluation set, or a group of them, and not a folder or file by its path."""
    match = re.match(r"(?:[\w.+-]+=)?([\w-]+):(?!//)", spec)
    return spec in CATALOGUE or spec in GROUPS or (match is not None and match.group(1) in KINDS)


def _name_of(path: str) -> str:
    is_pattern = re.compile(r"[*?\[{]|\.(tar|parquet|csv|tsv)$")
    parts = [part for part in path.split("/") if part.strip(".") and not is_pattern.search(part)]
    return parts[-1] if parts else "set"


def check_unique(names: Sequence[str], *, flag: str) -> None:
    """Raise `InputError` where two models or sets of a flag have one name."""
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"{flag} has two entries called {twice[0]!r}: name them, as in NAME={twice[0]}.")
