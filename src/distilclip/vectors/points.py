"""Take stored rows as points of a Euclidean space: read in place, compared in float64, never copied whole.

Example: under the cosine metric the rows (3, 4) and (0, 2) are the points (0.6, 0.8) and (0, 1), with the scales 0.2
and 0.5; their squared distance is 0.4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from distilclip.errors import InputError
from distilclip.vectors.kernels import gather, hash_rows, kernel_view, match_rows, norms_of, squared_distances
from distilclip.vectors.metric import Metric, check_metric
from distilclip.vectors.threads import in_threads

UNIT_TOLERANCE = 0.01
"""How far from 1 the length of a unit row may be: half precision alone makes it up to 0.001, bfloat16 0.004."""


@dataclass(frozen=True, kw_only=True)
class Points:
    """Row i stands for the point `scale[i] * values[i]`: scale is 1, or 1 / norm under the cosine metric."""

    values: np.ndarray  # [n, dim], float16, float32 or float64; may be a memory map
    scale: Float[np.ndarray, " n"]
    norm: Float[np.ndarray, " n"]  # of the points, after scaling

    @classmethod
    def of(
        cls, x: np.ndarray | Tensor | Sequence[Any], *, metric: Metric, valid: Bool[np.ndarray, " n"] | None = None
    ) -> Points:
        """Take the rows of `x` as points under `metric`; `InputError` names a valid row that cannot be one."""
        check_metric(metric)
        values = as_rows(x)
        norms = row_norms(values)
        ok = np.isfinite(norms) if metric != "cosine" else np.isfinite(norms) & (norms > 0)
        wrong = np.flatnonzero(~ok if valid is None else ~ok & valid)
        if len(wrong):
            what = "is not finite" if not np.isfinite(norms[wrong[0]]) else "is zero, so it has no cosine"
            raise InputError(f"Row {wrong[0]} {what} ({len(wrong)} such rows). Mark such rows invalid.")
        norms[~ok] = 1  # invalid rows are never compared; 1 keeps their scale finite
        if metric == "cosine":
            return cls(values=values, scale=1 / norms, norm=np.ones(len(values)))
        return cls(values=values, scale=np.ones(len(values)), norm=norms)

    def __len__(self) -> int:
        return len(self.values)

    @property
    def dim(self) -> int:
        """Width of a row."""
        return self.values.shape[1]

    def off_unit(self, valid: Bool[np.ndarray, " n"] | None = None) -> Int[np.ndarray, " m"]:
        """Return the points, among the valid ones, that do not have unit length; under the cosine metric all have."""
        off = np.abs(self.norm - 1) > UNIT_TOLERANCE
        return np.flatnonzero(off if valid is None else off & valid)

    def block(self, rows: Int[np.ndarray, " m"], *, device: torch.device | None = None) -> Float[Tensor, "m dim"]:
        """Return the points of some rows, in float32."""
        block = np.empty((len(rows), self.dim), np.float32)
        bits = kernel_view(self.values)
        in_threads(
            lambda start, stop: gather(bits, self.scale, rows[start:stop], block[start:stop]), len(rows), at_least=1024
        )
        return torch.from_numpy(block).to(device)

    def squared(self, left: Int[np.ndarray, " m"], right: Int[np.ndarray, " m"]) -> Float[np.ndarray, " m"]:
        """Return squared Euclidean distances of pairs by difference in float64: no cancellation, equal rows give 0."""
        result = np.empty(len(left))
        bits = kernel_view(self.values)
        in_threads(
            lambda start, stop: squared_distances(
                bits, self.scale, left[start:stop], right[start:stop], result[start:stop]
            ),
            len(left),
            at_least=4096,
        )
        return result


@dataclass(frozen=True)
class Distinct:
    """Rows with equal bytes collapsed: `first[position[i]]` is the smallest row whose bytes equal row i's."""

    first: Int[np.ndarray, " m"]
    position: Int[np.ndarray, " n"]  # -1 for rows left out


def distinct(values: np.ndarray, rows: Int[np.ndarray, " k"]) -> Distinct:
    """Collapse equal rows among `rows` (ascending), by hash and then by comparing the bytes."""
    # Rows of equal bytes have equal hashes; sorted, they are neighbours.
    bits = _words(values)
    hashes = np.empty(len(rows), np.uint64)
    in_threads(lambda start, stop: hash_rows(bits, rows[start:stop], hashes[start:stop]), len(rows), at_least=4096)
    order = np.argsort(hashes, kind="stable")
    smallest = np.empty(len(rows), np.int64)
    match_rows(bits, rows, hashes, order, smallest)
    # Number the distinct rows, and give each row the number of the one it equals.
    first, position_in_first = np.unique(smallest, return_inverse=True)
    position = np.full(len(values), -1, np.int64)
    position[rows] = position_in_first
    return Distinct(first=first, position=position)


def as_rows(x: np.ndarray | Tensor | Sequence[Any]) -> np.ndarray:
    """Return a two-dimensional floating array, shared with `x` wherever its type and device allow."""
    if isinstance(x, Tensor):
        x = x.detach().cpu()
        x = (x.float() if x.dtype == torch.bfloat16 else x).numpy()
    typed_in = not isinstance(x, np.ndarray)
    try:
        x = np.asanyarray(x)
    except ValueError as error:
        raise InputError(f"Expected rows of equal length, n x dim: {error}.") from error
    if typed_in and x.dtype.kind == "i":
        x = x.astype(np.float64)  # [[1, 0], [0, 1]] as one types it
    if x.ndim != 2 or 0 in x.shape[1:] or x.dtype not in (np.float16, np.float32, np.float64):
        raise InputError(f"Expected rows of float16, float32 or float64, n x dim, not {x.dtype} of shape {x.shape}.")
    return x if x.flags.c_contiguous else np.ascontiguousarray(x)


def row_norms(values: np.ndarray) -> Float[np.ndarray, " n"]:
    """Return Euclidean norms in float64."""
    # In one pass over the rows, each thread with a slice of its own.
    norms = np.empty(len(values))
    bits = kernel_view(values)
    in_threads(lambda start, stop: norms_of(bits[start:stop], norms[start:stop]), len(values), at_least=4096)
    return norms


def _words(values: np.ndarray) -> np.ndarray:
    """View rows as unsigned integers, as wide as divides a row."""
    row_bytes = values.shape[1] * values.dtype.itemsize
    width = next(w for w in (8, 4, 2) if row_bytes % w == 0)
    return values.view(np.ndarray).view(f"u{width}")
