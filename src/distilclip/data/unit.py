"""Whether stored embeddings are what they should be: finite, and of unit length."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Float16

from distilclip.errors import InputError

_TOLERANCE = 2e-3  # half precision keeps the length of a unit vector to about 5e-4


def check_embeddings(embeddings: Float16[np.ndarray, "n dim"], valid: Bool[np.ndarray, " n"], *, where: str) -> None:
    """Raise `InputError` naming the first valid row that is not finite or not of unit length."""
    wrong = valid & not_unit(embeddings)
    if wrong.any():
        raise InputError(
            f"{where}, row {int(np.argmax(wrong))}: not a finite unit vector. Embed the data again, into a new folder."
        )


def not_unit(embeddings: Float[np.ndarray, "n dim"]) -> Bool[np.ndarray, " n"]:
    """Which rows are not finite or not of unit length, within what half precision can hold."""
    lengths = np.linalg.norm(embeddings.astype(np.float32), axis=1)
    return ~(np.abs(lengths - 1) < _TOLERANCE)  # not >=, so that NaN is caught
