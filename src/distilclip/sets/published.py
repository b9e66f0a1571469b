"""Read the rows of numbers that papers print, to show beside one's own. Imports neither torch nor numpy."""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, Literal

Published = Literal[
    "clip-cid",
    "clip-cid-vit-b-32",
    "clip-cid-vit-b-16",
    "clip-kd",
    "clip-kd-terms",
    "clip-kd-vit-b-16",
    "clip-kd-rn101",
    "clip-kd-laion",
]
"""A group of rows in published.toml, or a paper: all groups whose names begin with it."""


@dataclass(frozen=True, kw_only=True)
class PublishedRow:
    """Hold a paper's numbers for one model, as it prints them, in percent.

    They are text, so that nothing can take them for scores measured here.
    """

    name: str
    """what it is called in a table; ends in (published)"""
    percent: dict[tuple[str, str], str] = field(default_factory=dict)
    """by task and set"""
    means: dict[tuple[str, frozenset[str]], str] = field(default_factory=dict)
    """the paper's own means, by task and the sets that they are over"""
    sources: dict[tuple[str, str], str] = field(default_factory=dict)
    """the paper and its table, by task and set"""

    def text(self, task: str, set_name: str, members: Collection[str] = ()) -> str:
        """Return the number for a set, or for the mean over just these `members`; empty where the paper has none."""
        return self.means.get((task, frozenset(members)), "") if members else self.percent.get((task, set_name), "")

    def has(self, task: str, sets: Collection[str]) -> bool:
        """Return whether the paper has a number for any of these sets."""
        return any((task, name) in self.percent for name in sets)


def published_rows(groups: Sequence[str]) -> list[PublishedRow]:
    """Return the rows of some groups in the order of the file; a row that stands in several is given once.

    Where two tables print one number with other digits, the first stands.
    """
    found: dict[str, PublishedRow] = {}
    for group, tables in _read().items():
        if any(group == asked or group.startswith(f"{asked}-") for asked in groups):
            for title, table in tables.items():
                _add_table(found, title, table)
    return list(found.values())


def published_notes(rows: Sequence[PublishedRow], task: str, sets: Collection[str]) -> list[str]:
    """Say of the rows that are shown for these sets where they come from."""
    sources = {row.sources[key]: None for row in rows for key in row.sources if key[0] == task and key[1] in sets}
    return [
        f"(published): copied from {source}; not measured here, and in no mean, interval or comparison."
        for source in sources
    ]


def _add_table(found: dict[str, PublishedRow], title: str, table: Mapping[str, Any]) -> None:
    task, sets = table["task"], table["sets"].split()
    for model, line in table["percent"].items():
        numbers, _, mean = line.partition("|")
        row = found.setdefault(model, PublishedRow(name=f"{model} (published)"))
        for name, number in zip(sets, numbers.split(), strict=True):
            row.percent.setdefault((task, name), number)
            row.sources.setdefault((task, name), f"{table['source']}, {title}")
        if mean:
            row.means.setdefault((task, frozenset(sets)), mean.strip())


@functools.cache
def _read() -> dict[str, dict[str, dict[str, Any]]]:
    return tomllib.loads(resources.files("distilclip.sets").joinpath("published.toml").read_text(encoding="utf-8"))
