"""What a training view shows of a picture: a random crop, perhaps mirrored. Numbers only; `decode` makes the pixels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from distilclip.errors import InputError


@dataclass(frozen=True)
class Crop:
    """A box in shares of the upright picture's width and height, and whether what it shows is mirrored."""

    left: float
    top: float
    right: float
    bottom: float
    flip: bool = False


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How views are drawn."""

    min_crop: float = 0.9
    """smallest share of a picture's area that a crop shows"""
    flip: float = 0.0
    """share of the crops that are mirrored; captions that tell left from right will not fit"""

    def __post_init__(self) -> None:
        if not 0 < self.min_crop <= 1:
            raise InputError(f"min_crop is {self.min_crop}; it is a share of the area, over 0 and up to 1.")
        if not 0 <= self.flip <= 1:
            raise InputError(f"flip is {self.flip}; it is the share of mirrored views, from 0 to 1.")

    def draw(self, width: int, height: int, generator: np.random.Generator) -> Crop:
        """A view of a picture of `width` x `height` pixels; always the same five random numbers.

        The box has `min_crop` to 1 of the area and an aspect of 3/4 to 4/3, both narrowed to fit into the picture.
        """
        area, aspect, x, y, mirrored = generator.random(5)
        pixels = width * height * (self.min_crop + (1 - self.min_crop) * area)
        ratio = math.exp(math.log(4 / 3) * (2 * aspect - 1))
        w = min(1.0, math.sqrt(pixels * ratio) / width)
        h = min(1.0, math.sqrt(pixels / ratio) / height)
        left, top = x * (1 - w), y * (1 - h)
        return Crop(left, top, left + w, top + h, bool(mirrored < self.flip))


@dataclass(frozen=True, kw_only=True)
class Crops(Augmentation):
    """What training shows of a picture: crops of its own, or views that a store has embedded."""

    views: int = 0
    """show so many of the store's own views in turn, each with its embedding, instead of crops drawn here"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.views < 0:
            raise InputError(f"views is {self.views}; it must be 0 or more.")
        if self.views and (self.min_crop, self.flip) != (Crops.min_crop, Crops.flip):
            raise InputError("The store's views have crops of their own: leave out --min-crop and --flip.")
