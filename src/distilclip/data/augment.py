"""The training view of a picture: a random resized crop, drawn from the sample's own generator."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

Transform = Callable[[Image.Image, np.random.Generator], Tensor]


def random_resized_crop(size: int, *, min_scale: float) -> Transform:
    """A crop of `min_scale` to 1 of the area and 3/4 to 4/3 in aspect, resized to `size` pixels square, bicubic.

    Returns uint8 [3, size, size]: the model subtracts its mean on its own device. Crop and resize are one pass.
    """

    def transform(image: Image.Image, generator: np.random.Generator) -> Tensor:
        box = crop_box(image.width, image.height, min_scale=min_scale, generator=generator)
        resized = image.resize((size, size), Image.Resampling.BICUBIC, box=box, reducing_gap=2.0)
        return torch.from_numpy(np.asarray(resized).transpose(2, 0, 1).copy())

    return transform


def crop_box(
    width: int, height: int, *, min_scale: float, generator: np.random.Generator
) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of the crop, in pixels; inside the picture whatever its aspect."""
    area = width * height * generator.uniform(min_scale, 1.0)
    aspect = math.exp(generator.uniform(math.log(3 / 4), math.log(4 / 3)))
    w = min(width, math.sqrt(area * aspect))
    h = min(height, math.sqrt(area / aspect))
    left = generator.uniform(0, width - w)
    top = generator.uniform(0, height - h)
    return left, top, left + w, top + h
