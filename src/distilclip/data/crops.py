"""Draw the crop of a picture that training shows, and say what may be drawn. Imports neither torch nor numpy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from distilclip.errors import InputError


@runtime_checkable
class RandomNumbers(Protocol):
    """What a crop is drawn from, such as a `numpy.random.Generator`."""

    def random(self, size: int) -> Any:
        """Return `size` numbers of [0, 1)."""


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
    """smallest share of a picture's area that a crop may show"""
    flip: float = 0.0
    """share of crops to mirror (captions that tell left from right will then be wrong)"""

    def __post_init__(self) -> None:
        if not 0 < self.min_crop <= 1:
            raise InputError(f"min_crop is {self.min_crop}; it is a share of the area, over 0 and up to 1.")
        if not 0 <= self.flip <= 1:
            raise InputError(f"flip is {self.flip}; it is the share of mirrored views, from 0 to 1.")

    def draw(self, width: int, height: int, generator: RandomNumbers) -> Crop:
        """Draw a view of a picture of `width` x `height` pixels; it always takes five random numbers.

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
    """number of stored views to cycle through, each with its embedding (0: draw new crops)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.views < 0:
            raise InputError(f"views is {self.views}; it must be 0 or more.")
        if self.views and (self.min_crop, self.flip) != (Crops.min_crop, Crops.flip):
            raise InputError("The store's views have crops of their own: leave out --min-crop and --flip.")
