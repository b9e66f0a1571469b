"""Compute on stored rows: compiled loops, numeric constants, and products with a bound on their error.

Numba has no half-precision type, so float16 rows are passed to the loops as their bits and widened by one instruction.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import no_type_check

import numpy as np
import torch
from jaxtyping import Float
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from torch import Tensor

# Sums may be reassociated to fill vector registers; NaN and infinity keep their meaning.
SUM = {"reassoc", "contract", "nsz"}
ROUNDING = 2.0**-24  # of one float32 operation, relative
PIECE = 128  # terms of a sum between two looks at whether it is too large already


def kernel_view(values: np.ndarray) -> np.ndarray:
    """View rows as kernels take them: float16 as uint16 bits, memory maps as plain read-only arrays."""
    values = values.view(np.ndarray)
    return values.view(np.uint16) if values.dtype == np.float16 else values


def squared_product(a: Float[Tensor, "n dim"], b: Float[Tensor, "m dim"]) -> Float[Tensor, "n m"]:
    """Return squared Euclidean distances as |a|^2 + |b|^2 - 2ab; see `product_error`."""
    # |b|^2 - 2ab as one product [n, m]; |a|^2 is added in place.
    squared = torch.addmm(b.square().sum(1)[None, :], a, b.T, alpha=-2)
    return squared.add_(a.square().sum(1)[:, None])


def product_error(dim: int, radius: float) -> float:
    """Return a bound on the error of `squared_product` for points no longer than `radius`.

    Each of three sums of `dim` float32 terms errs by at most dim 2^-24 radius^2, the product counting twice; the points
    themselves are rounded to float32, and the sums are added up. With 512 dimensions and unit vectors: 1.2e-4.
    """
    return 4 * (dim + 8) * ROUNDING * radius**2


@contextlib.contextmanager
def float32_sums() -> Iterator[None]:
    """Let CUDA sum products of half-precision factors in float32, partial sums too, inside a block."""
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


@intrinsic
@no_type_check
def stored(typing_context, value):
    """Widen a stored number to float64; uint16 holds the bits of a float16."""

    def convert(context, builder, signature, arguments):
        (number,) = arguments
        if isinstance(value, types.Integer):
            number = builder.bitcast(number, ir.HalfType())
        return number if value == types.float64 else builder.fpext(number, ir.DoubleType())

    return types.float64(value), convert


@intrinsic
@no_type_check
def widened(typing_context, value):
    """Widen a number of a tile to float32; int16 holds the bits of a bfloat16, the upper half of a float32."""

    def convert(context, builder, signature, arguments):
        (number,) = arguments
        if isinstance(value, types.Integer):
            bits = builder.zext(builder.bitcast(number, ir.IntType(16)), ir.IntType(32))
            number = builder.bitcast(builder.shl(bits, ir.Constant(ir.IntType(32), 16)), ir.FloatType())
        return number

    return types.float32(value), convert


@njit(nogil=True, cache=True)
@no_type_check
def gather(values, scale, rows, out):
    """Write the points of some rows in float32."""
    for e in range(len(rows)):
        # Multiplied in float64 and rounded once, so that a point does not depend on who gathers it.
        row, factor = values[rows[e]], scale[rows[e]]
        for k in range(len(row)):
            out[e, k] = factor * stored(row[k])


@njit(nogil=True, cache=True, fastmath=SUM)
@no_type_check
def norms_of(values, out):
    """Write the Euclidean norm of every row."""
    for i in range(len(values)):
        total = 0.0
        for k in range(values.shape[1]):
            total += stored(values[i, k]) * stored(values[i, k])
        out[i] = np.sqrt(total)


@njit(nogil=True, cache=True, fastmath=SUM)
@no_type_check
def squared_distance(values, scale, i, j, limit):
    """Return the squared distance of two points in float64, or infinity once a partial sum exceeds the limit."""
    # Slices, because a loop that starts elsewhere than at 0 checks for negative indices and fills no vector register.
    total = 0.0
    for first in range(0, values.shape[1], PIECE):
        # A piece of both rows; the difference is taken before squaring, so that nothing cancels.
        a, b = values[i, first : first + PIECE], values[j, first : first + PIECE]
        part = 0.0
        for k in range(len(a)):
            difference = scale[i] * stored(a[k]) - scale[j] * stored(b[k])
            part += difference * difference
        total += part
        # Far pairs are left after the first pieces.
        if total > limit:
            return np.inf
    return total


@njit(nogil=True, cache=True)
@no_type_check
def squared_distances(values, scale, left, right, out):
    """Write the squared distance of every pair of rows."""
    for e in range(len(left)):
        out[e] = squared_distance(values, scale, left[e], right[e], np.inf)


@njit(nogil=True, cache=True)
@no_type_check
def hash_rows(words, rows, out):
    """Write a hash of the bytes of some rows."""
    for e in range(len(rows)):
        # Multiply by an odd number and fold the upper half down: every bit of a row moves many bits of the hash.
        state = np.uint64(0x9E3779B97F4A7C15)
        for k in range(words.shape[1]):
            state = (state ^ np.uint64(words[rows[e], k])) * np.uint64(0xFF51AFD7ED558CCD)
            state ^= state >> np.uint64(32)
        out[e] = state


@njit(nogil=True, cache=True)
@no_type_check
def match_rows(words, rows, hashes, order, out):
    """Write for each row the smallest row with the same bytes; `order` sorts the hashes, and is stable."""
    # Rows of one hash are compared with every distinct row of that hash so far; there is nearly always only one.
    start = 0
    while start < len(order):
        # The rows from start to stop have one hash.
        stop = start + 1
        while stop < len(order) and hashes[order[stop]] == hashes[order[start]]:
            stop += 1
        for a in range(start, stop):
            i = rows[order[a]]
            out[order[a]] = i
            # Look among earlier rows that are the smallest of their bytes; a stable order puts the smallest first.
            for b in range(start, a):
                j = rows[order[b]]
                if out[order[b]] == j and (words[i] == words[j]).all():
                    out[order[a]] = j
                    break
        start = stop
