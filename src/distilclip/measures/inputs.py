"""Turn a caller's arrays into tensors, and say what is wrong with them.

Example: `as_labels([0, 1, 9], name="pairs", num_rows=3, limit=2)` raises "pairs[2] is 9; it must be from 0 to 1".
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from distilclip.errors import InputError
from distilclip.measures.metrics import row_tiles

Rows = np.ndarray | Tensor | Sequence[Sequence[float]]
"""Features, a row each."""
Labels = np.ndarray | Tensor | Sequence[int]
"""Whole numbers from 0, one for each row."""


def as_features(x: Rows, *, name: str, dim: int | None = None) -> Float[Tensor, "n dim"]:
    """Return features as a tensor, shared with `x` where possible; `InputError` says what is wrong with them."""
    tensor = _as_tensor(x, name)
    if isinstance(x, Sequence) and not tensor.is_floating_point():
        tensor = tensor.float()  # [[1, 0], [0, 1]] as one types it
    if tensor.ndim != 2 or not tensor.is_floating_point():
        raise InputError(f"{name} has shape {_shape(tensor)} and {tensor.dtype}; give floats of shape [rows, dim].")
    if 0 in tensor.shape:
        raise InputError(f"{name} is empty: its shape is {_shape(tensor)}.")
    if dim is not None and tensor.shape[1] != dim:
        raise InputError(f"{name} has {tensor.shape[1]} columns where {dim} are needed; all come from one model.")
    # Tile by tile: the mask of all rows at once would be as large as half-precision features themselves.
    for rows in row_tiles(*tensor.shape):
        finite = torch.isfinite(tensor[rows]).all(dim=1)
        if not finite.all():
            row = rows.start + int((~finite).nonzero()[0])
            raise InputError(f"{name} holds NaN or infinity, first in row {row}. The model's outputs are broken.")
    return tensor


def as_labels(y: Labels, *, name: str, num_rows: int, limit: int | None = None) -> Int[Tensor, " n"]:
    """Return labels from 0 (below `limit`) as int64; `InputError` says what is wrong with them."""
    tensor = _as_tensor(y, name)
    if tensor.ndim != 1 or tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise InputError(f"{name} has shape {_shape(tensor)} and {tensor.dtype}; give whole numbers of shape [rows].")
    if len(tensor) != num_rows:
        raise InputError(f"{name} has {len(tensor)} entries for {num_rows} rows of features; give one for each row.")
    tensor = tensor.long()
    # Negative labels would count from the end, or break bincount far from here.
    outside = (tensor < 0) | (tensor >= limit) if limit is not None else tensor < 0
    if outside.any():
        first = int(outside.nonzero()[0])
        allowed = f"from 0 to {limit - 1}" if limit is not None else "0 or more"
        raise InputError(f"{name}[{first}] is {int(tensor[first])}; it must be {allowed}.")
    return tensor


def _as_tensor(x: Any, name: str) -> Tensor:
    if isinstance(x, Tensor):
        return x.detach()
    try:
        if isinstance(x, np.ndarray):
            with warnings.catch_warnings():  # measures never write into what they are given
                warnings.filterwarnings("ignore", "The given NumPy array is not writable")
                return torch.from_numpy(np.ascontiguousarray(x))
        return torch.tensor(x)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name} cannot be read as an array of numbers ({error}).") from error


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)
