"""Stored rows as points of a Euclidean space: read in place, compared in float64, never copied whole.

Numba has no half-precision type, so float16 rows are passed to kernels as their bits and widened by one instruction.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, no_type_check

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from torch import Tensor

from distilclip.errors import InputError
from distilclip.vectors.metric import check_metric

# Sums may be reassociated to fill vector registers; NaN and infinity keep their meaning.
SUM = {"reassoc", "contract", "nsz"}
ROUNDING = 2.0**-24  # of one float32 operation, relative
PIECE = 128  # terms of a sum between two looks at whether it is too large already


@dataclass(frozen=True, kw_only=True)
class Points:
    """Row i stands for the point `scale[i] * values[i]`: scale is 1, or 1 / norm under the cosine metric."""

    values: np.ndarray  # [n, dim], float16, float32 or float64; may be a memory map
    scale: Float[np.ndarray, " n"]
    norm: Float[np.ndarray, " n"]  # of the points, after scaling

    @classmethod
    def of(cls, x: np.ndarray | Tensor, *, metric: str, valid: Bool[np.ndarray, " n"] | None = None) -> Points:
        """Rows of `x` as points under `metric`; `InputError` names a valid row that has no place in that space."""
        check_metric(metric)
        values = as_rows(x)
        norms = row_norms(values)
        ok = np.isfinite(norms) if metric != "cosine" else np.isfinite(norms) & (norms > 0)
        wrong = np.flatnonzero(~ok if valid is None else ~ok & valid)
        if len(wrong):
            what = "is not finite" if not np.isfinite(norms[wrong[0]]) else "is zero, so it has no cosine"
            raise InputError(f"Row {wrong[0]} {what} ({len(wrong)} such rows). Mark such rows invalid.")
        norms[~ok] = 1
        if metric == "cosine":
            return cls(values=values, scale=1 / norms, norm=np.ones(len(values)))
        return cls(values=values, scale=np.ones(len(values)), norm=norms)

    def __len__(self) -> int:
        return len(self.values)

    @property
    def dim(self) -> int:
        """Width of a row."""
        return self.values.shape[1]

    def block(self, rows: Int[np.ndarray, " m"], *, device: torch.device | None = None) -> Float[Tensor, "m dim"]:
        """The points of some rows, in float32."""
        block = np.empty((len(rows), self.dim), np.float32)
        bits = kernel_view(self.values)
        in_threads(
            lambda start, stop: _gather(bits, self.scale, rows[start:stop], block[start:stop]), len(rows), at_least=1024
        )
        return torch.from_numpy(block).to(device)

    def squared(self, left: Int[np.ndarray, " m"], right: Int[np.ndarray, " m"]) -> Float[np.ndarray, " m"]:
        """Squared Euclidean distances of pairs by direct difference in float64: no cancellation, equal rows give 0."""
        result = np.empty(len(left))
        bits = kernel_view(self.values)
        in_threads(
            lambda start, stop: _squared(bits, self.scale, left[start:stop], right[start:stop], result[start:stop]),
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
    bits = _words(values)
    hashes = np.empty(len(rows), np.uint64)
    in_threads(lambda start, stop: _hash(bits, rows[start:stop], hashes[start:stop]), len(rows), at_least=4096)
    order = np.argsort(hashes, kind="stable")
    smallest = np.empty(len(rows), np.int64)
    _match(bits, rows, hashes, order, smallest)
    first, position_in_first = np.unique(smallest, return_inverse=True)
    position = np.full(len(values), -1, np.int64)
    position[rows] = position_in_first
    return Distinct(first=first, position=position)


def as_rows(x: np.ndarray | Tensor) -> np.ndarray:
    """A two-dimensional floating array, shared with `x` wherever its type and device allow."""
    if isinstance(x, Tensor):
        x = x.detach().cpu()
        x = (x.float() if x.dtype == torch.bfloat16 else x).numpy()
    if x.ndim != 2 or x.dtype not in (np.float16, np.float32, np.float64):
        raise InputError(f"Expected rows of float16, float32 or float64, n x dim, not {x.dtype} of shape {x.shape}.")
    return x if x.flags.c_contiguous else np.ascontiguousarray(x)


def row_norms(values: np.ndarray) -> Float[np.ndarray, " n"]:
    """Euclidean norms in float64."""
    norms = np.empty(len(values))
    bits = kernel_view(values)
    in_threads(lambda start, stop: _norms(bits[start:stop], norms[start:stop]), len(values), at_least=4096)
    return norms


def squared_product(a: Float[Tensor, "n dim"], b: Float[Tensor, "m dim"]) -> Float[Tensor, "n m"]:
    """Squared Euclidean distances as |a|^2 + |b|^2 - 2ab; see `product_error`."""
    squared = torch.addmm(b.square().sum(1)[None, :], a, b.T, alpha=-2)
    return squared.add_(a.square().sum(1)[:, None])


def product_error(dim: int, radius: float) -> float:
    """A bound on the error of `squared_product` for points no longer than `radius`.

    Each of three sums of `dim` float32 terms errs by at most dim 2^-24 radius^2, the product counting twice; the points
    themselves are rounded to float32, and the sums are added up.
    """
    return 4 * (dim + 8) * ROUNDING * radius**2


@contextlib.contextmanager
def float32_sums() -> Iterator[None]:
    """A block in which CUDA sums products of half-precision factors in float32, partial sums too."""
    settings = torch.backends.cuda.matmul
    names = ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")
    before = {name: getattr(settings, name) for name in names}
    try:
        for name in names:
            setattr(settings, name, False)
        yield
    finally:
        for name, allowed in before.items():
            setattr(settings, name, allowed)


def in_threads(function: Callable[[int, int], Any], count: int, *, at_least: int = 1) -> None:
    """Call `function(start, stop)` over equal slices of `range(count)`, one per core; for work without the GIL."""
    num_slices = max(1, min(torch.get_num_threads(), count // at_least))
    if num_slices == 1:
        function(0, count)
        return
    bounds = np.linspace(0, count, num_slices + 1).astype(int).tolist()
    with workers(num_slices) as map_threads:
        map_threads(function, bounds[:-1], bounds[1:])


@contextlib.contextmanager
def workers(count: int) -> Iterator[Callable[..., None]]:
    """A `map` over threads, inside which torch computes on one thread each, so that both never compete for a core."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(count) as pool:
            yield lambda function, *arguments: list(pool.map(function, *arguments)).clear()
    finally:
        torch.set_num_threads(num_threads)


def kernel_view(values: np.ndarray) -> np.ndarray:
    """Rows as kernels take them: float16 as uint16 bits, read-only memory maps as plain read-only arrays."""
    values = values.view(np.ndarray)
    return values.view(np.uint16) if values.dtype == np.float16 else values


def _words(values: np.ndarray) -> np.ndarray:
    """Rows as unsigned integers, as wide as divides a row."""
    row_bytes = values.shape[1] * values.dtype.itemsize
    width = next(w for w in (8, 4, 2) if row_bytes % w == 0)
    return values.view(np.ndarray).view(f"u{width}")


@intrinsic
@no_type_check
def stored(typing_context, value):
    """A stored number as float64; uint16 holds the bits of a float16."""

    def convert(context, builder, signature, arguments):
        (number,) = arguments
        if isinstance(value, types.Integer):
            number = builder.bitcast(number, ir.HalfType())
        return number if value == types.float64 else builder.fpext(number, ir.DoubleType())

    return types.float64(value), convert


@intrinsic
@no_type_check
def widened(typing_context, value):
    """A number of a tile as float32; int16 holds the bits of a bfloat16, the upper half of a float32."""

    def convert(context, builder, signature, arguments):
        (number,) = arguments
        if isinstance(value, types.Integer):
            bits = builder.zext(builder.bitcast(number, ir.IntType(16)), ir.IntType(32))
            number = builder.bitcast(builder.shl(bits, ir.Constant(ir.IntType(32), 16)), ir.FloatType())
        return number

    return types.float32(value), convert


@njit(nogil=True, cache=True)
@no_type_check
def _gather(values, scale, rows, out):
    for e in range(len(rows)):
        row, factor = values[rows[e]], scale[rows[e]]
        for k in range(len(row)):
            out[e, k] = factor * stored(row[k])


@njit(nogil=True, cache=True, fastmath=SUM)
@no_type_check
def _norms(values, out):
    for i in range(len(values)):
        total = 0.0
        for k in range(values.shape[1]):
            total += stored(values[i, k]) * stored(values[i, k])
        out[i] = np.sqrt(total)


@njit(nogil=True, cache=True, fastmath=SUM)
@no_type_check
def squared_distance(values, scale, i, j, limit):
    """Squared distance of two points in float64; infinite once a partial sum exceeds the limit."""
    # Slices, because a loop that starts elsewhere than at 0 checks for negative indices and fills no vector register.
    total = 0.0
    for first in range(0, values.shape[1], PIECE):
        a, b = values[i, first : first + PIECE], values[j, first : first + PIECE]
        part = 0.0
        for k in range(len(a)):
            difference = scale[i] * stored(a[k]) - scale[j] * stored(b[k])
            part += difference * difference
        total += part
        if total > limit:
            return np.inf
    return total


@njit(nogil=True, cache=True)
@no_type_check
def _squared(values, scale, left, right, out):
    for e in range(len(left)):
        out[e] = squared_distance(values, scale, left[e], right[e], np.inf)


@njit(nogil=True, cache=True)
@no_type_check
def _hash(words, rows, out):
    for e in range(len(rows)):
        state = np.uint64(0x9E3779B97F4A7C15)
        for k in range(words.shape[1]):
            state = (state ^ np.uint64(words[rows[e], k])) * np.uint64(0xFF51AFD7ED558CCD)
            state ^= state >> np.uint64(32)
        out[e] = state


@njit(nogil=True, cache=True)
@no_type_check
def _match(words, rows, hashes, order, out):
    # Rows of one hash are compared with every distinct row of that hash so far; there is nearly always only one.
    start = 0
    while start < len(order):
        stop = start + 1
        while stop < len(order) and hashes[order[stop]] == hashes[order[start]]:
            stop += 1
        for a in range(start, stop):
            i = rows[order[a]]
            out[order[a]] = i
            for b in range(start, a):
                j = rows[order[b]]
                if out[order[b]] == j and (words[i] == words[j]).all():
                    out[order[a]] = j
                    break
        start = stop
