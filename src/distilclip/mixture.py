"""Read the weights of a mixture of data sets: `cc3m/*.tar=0.7`, and where the weights of rows are. Imports no numpy."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

from distilclip.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Weighting:
    """How often each row is drawn."""

    row_weights: str | None = None
    """weights by which rows are drawn; their ratios count, and rows of weight 0 are left out: a folder with
    weights/000000.parquet and so on, a .parquet by shard and row or by key, or a .npy with a value for every row"""
    row_weights_column: str = "weight"
    """column of the Parquet files with the weights"""


@dataclass(frozen=True)
class DataPart:
    """A part of a mixture: a pattern of files, and its share of the draws in the unit of the other parts' weights."""

    pattern: str
    weight: float


def read_parts(data: Sequence[str]) -> list[DataPart]:
    """Read `PATTERN=WEIGHT ...`; empty where no pattern has a weight.

    A path that itself ends in `=NUMBER`, as Hive names folders, is written with a slash or its own weight behind it.

    Raises:
        InputError: only some patterns have a weight, a weight is negative or not finite, or all are 0.
    """
    found = [_read_part(spec) for spec in data]
    parts = [part for part in found if part is not None]
    if not parts:
        return []
    if len(parts) < len(data):
        plain = data[found.index(None)]
        raise InputError(
            f"data: {plain!r} has no weight, and {parts[0].pattern}={parts[0].weight:g} has one. Give every part its "
            f"weight ({plain}=1), or none; a folder that is itself called so is written with a slash behind it."
        )
    if not any(part.weight for part in parts):
        raise InputError(f"data: the weights of all parts are 0 ({', '.join(data)}). Give one of them more.")
    return parts


def _read_part(spec: str) -> DataPart | None:
    pattern, _, text = spec.rpartition("=")
    try:
        weight = float(text)
    except ValueError:
        return None
    if not pattern:
        return None
    if os.path.exists(spec):
        raise InputError(
            f"data: {spec!r} exists, and its name ends as a part with a weight does. Write {spec}/ where the folder "
            f"is meant, {spec}=1 to give it a weight, or rename it."
        )
    if not 0 <= weight < math.inf:
        raise InputError(f"data: {spec!r} has the weight {text}; a weight is at least 0, and finite.")
    return DataPart(pattern, weight)
