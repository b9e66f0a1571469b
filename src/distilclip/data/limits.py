"""State which samples are used: the sizes they may have, and how many may be unusable. Imports no numpy."""

from __future__ import annotations

from typing import Literal

from distilclip.errors import InputError

MAX_PIXELS = 178_956_970 // 2
"""The pixel count above which Pillow, too, suspects a decompression bomb."""

MAX_ASPECT = 100
"""How many times as long as wide a picture may be: its shorter side is resized, and the longer one grows with it."""

MAX_CAPTION = 10_000
"""Characters of a caption that are read: tokenizers take quadratic time, and no context holds as many tokens."""

OnError = Literal["raise", "skip"]
Side = Literal["caption", "image"]
"""What a sample may lack where it is asked for; the other of the two it must have."""


def check_bad_ratio(share: float) -> None:
    """Raise `InputError` unless the share of samples that may be unusable lies between 0 and 1."""
    if not 0 <= share <= 1:
        raise InputError(f"max_bad_ratio is a share between 0 and 1, not {share}.")
