"""Make perceptual copies: what happens to a picture file on its way through the web."""

from __future__ import annotations

import io

import numpy as np
from jaxtyping import UInt8
from PIL import Image

CHANGES = ("reencoded", "resized", "cropped", "recoloured")


def encode_jpeg(rng: np.random.Generator, image: Image.Image, *, low: int = 60, high: int = 95) -> bytes:
    """Return JPEG bytes at a quality drawn from [low, high]."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=int(rng.integers(low, high + 1)))
    return file.getvalue()


def perceptual_copy(rng: np.random.Generator, original: bytes) -> tuple[bytes, str]:
    """Return another JPEG file of the same picture, and the name of what was done to it.

    Every change ends in encoding the JPEG anew, and `reencoded` is no more than that (where the quality happens to be
    the original's, it gives the same bytes). Before it, `resized` scales by 0.7 to 1.5, `cropped` cuts up to a
    twentieth off each edge, `recoloured` shifts gain and offset of each channel.
    """
    image: Image.Image = Image.open(io.BytesIO(original))
    change = CHANGES[int(rng.integers(len(CHANGES)))]
    width, height = image.size
    if change == "resized":
        factor = np.exp(rng.uniform(np.log(0.7), np.log(1.5)))
        image = image.resize((round(width * factor), round(height * factor)), Image.Resampling.BICUBIC)
    elif change == "cropped":
        left, top, right, bottom = rng.uniform(0, 0.05, 4) * (width, height, width, height)
        image = image.crop((round(left), round(top), round(width - right), round(height - bottom)))
    elif change == "recoloured":
        image = Image.fromarray(_recolour(rng, np.asarray(image)))
    return encode_jpeg(rng, image, low=40, high=85), change


def _recolour(rng: np.random.Generator, pixels: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w 3"]:
    gain, offset = rng.uniform(0.94, 1.06, 3), rng.uniform(-8, 8, 3)
    return (np.clip(pixels * gain + offset + 0.5, 0, 255)).astype(np.uint8)
