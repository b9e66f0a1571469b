"""Hold the captions and pictures on which an exported model is compared with its source."""

from __future__ import annotations

import numpy as np
from PIL import Image

CAPTIONS = (
    "a photo of a cat",
    "Two  DOGS,\n\trunning!",
    "it's 2024's best café — “naïve” résumé’s",  # noqa: RUF001
    "日本語 русский العربية ελληνικά",
    "snake_case e-mail@example.org #1 50% off :-) 🙂",
    "x" * 300 + " end",
    " ".join(["long"] * 200),
    "",
)
"""They try a tokenizer: spaces, scripts, signs, truncation."""

SIZES = ((97, 64), (64, 97), (640, 480), (31, 33))
"""They try a preprocessing: upright, lying, larger, smaller than the input."""


def pictures(*sizes: tuple[int, int]) -> list[Image.Image]:
    """Return noise of every size, and of `sizes` (width, height): in noise, each pixel that is off shows."""
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in (*SIZES, *sizes)]
