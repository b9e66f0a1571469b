"""State which samples are used: how large a picture may be, and how many samples may be unusable. Imports no numpy."""

from __future__ import annotations

from typing import Literal

from distilclip.errors import InputError

MAX_PIXELS = 178_956_970 // 2
"""The pixel count above which Pillow, too, suspects a decompression bomb."""

OnError = Literal["raise", "skip"]


def check_bad_ratio(share: float) -> None:
    """Raise `InputError` unless the share of samples that may be unusable lies between 0 and 1."""
    if not 0 <= share <= 1:
        raise InputError(f"max_bad_ratio is a share between 0 and 1, not {share}.")
