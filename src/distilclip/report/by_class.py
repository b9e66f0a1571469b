"""Compare the models class by class, where `evaluate` wrote down how each class does."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from distilclip.sets.score import Score

MOST_SHOWN = 8  # confusions of a model


@dataclass(frozen=True, kw_only=True)
class ClassRow:
    """One class: its test images, and the share of them that each model gets right, None where it is not listed."""

    name: str
    num_images: int
    shares: tuple[float | None, ...]


@dataclass(frozen=True, kw_only=True)
class ByClass:
    """The classes of one set, hardest first, and what each model takes for what: true class, chosen class, images."""

    set: str
    models: tuple[str, ...]
    rows: tuple[ClassRow, ...]
    confusions: tuple[tuple[str, list[list[Any]]], ...]


def compare_by_class(scores: Sequence[Score]) -> list[ByClass]:
    """Return a comparison for each set whose zero-shot scores list their classes."""
    told: dict[str, dict[str, Score]] = {}
    for score in scores:
        if score.task == "zero-shot" and score.details.get("classes"):
            told.setdefault(score.set, {})[score.model] = score
    return [_compare(name, of_models) for name, of_models in told.items()]


def _compare(name: str, of_models: dict[str, Score]) -> ByClass:
    shares = {model: {row[0]: row[2] / row[1] for row in s.details["classes"]} for model, s in of_models.items()}
    images = {row[0]: row[1] for score in of_models.values() for row in score.details["classes"]}
    rows = [
        ClassRow(name=label, num_images=num, shares=tuple(shares[model].get(label) for model in of_models))
        for label, num in images.items()
    ]
    rows.sort(key=lambda row: (statistics.fmean(s for s in row.shares if s is not None), row.name))
    confusions = tuple((model, score.details["confusions"][:MOST_SHOWN]) for model, score in of_models.items())
    return ByClass(set=name, models=tuple(of_models), rows=tuple(rows), confusions=confusions)
