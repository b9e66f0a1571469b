"""Bring vectors of any length and precision to the form of a store: rows of unit length in half precision."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float16

from distilclip.data.store import not_unit

BLOCK_ROWS = 65_536


@dataclass(frozen=True)
class UnitRows:
    """Rows as a store holds them. A row that is not `usable` held NaN, infinity or zeros alone, and is zeros.

    `num_normalised` counts the rows that had another length.
    """

    rows: Float16[np.ndarray, "n dim"]
    usable: Bool[np.ndarray, " n"]
    num_normalised: int


def to_unit_rows(vectors: Float[np.ndarray, "n dim"]) -> UnitRows:
    """Return vectors as rows of unit length, rounded to half precision.

    A row whose half-precision form has unit length already, as far as half precision can tell, keeps its bits. Others
    are divided by their length in double precision. Vectors that need no change at all are returned as they are, and
    so are never copied out of a memory map.
    """
    usable = np.ones(len(vectors), bool)
    num_normalised = 0
    changed: np.ndarray | None = None
    for start in range(0, len(vectors), BLOCK_ROWS):
        here = slice(start, start + BLOCK_ROWS)
        with np.errstate(over="ignore"):  # what overflows is not of unit length
            half = vectors[here].astype(np.float16, copy=False)
        wrong = np.flatnonzero(not_unit(half))
        if len(wrong):
            half = np.array(half)
            exact = vectors[here][wrong].astype(np.float64)
            with np.errstate(over="ignore"):
                lengths = np.linalg.norm(exact, axis=1)
            good = np.isfinite(lengths) & (lengths > 0)
            half[wrong[good]] = (exact[good] / lengths[good, None]).astype(np.float16)
            half[wrong[~good]] = 0
            usable[start + wrong[~good]] = False
            num_normalised += int(good.sum())
        if changed is None and (len(wrong) or vectors.dtype != np.float16):
            changed = np.empty(vectors.shape, np.float16)
            changed[:start] = vectors[:start]
        if changed is not None:
            changed[here] = half
    return UnitRows(vectors if changed is None else changed, usable, num_normalised)
