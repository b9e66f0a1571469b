"""What an evaluation set is, wherever it comes from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Int

from distilclip.evaluate.classes import Classes


@dataclass(frozen=True, kw_only=True)
class ImageRef:
    """Where an image lies: a file of its own, or (with a key) a sample of a shard.

    `error` says why it is already known to be unusable.
    """

    uri: str
    key: str = ""
    offset: int = 0
    size: int = 0
    error: str = ""

    @property
    def where(self) -> str:
        """File and member, for messages."""
        return f"{self.uri}: {self.key}" if self.key else self.uri


@dataclass(frozen=True, kw_only=True)
class Split:
    """Images and their classes; -1 where an unusable sample has none."""

    images: tuple[ImageRef, ...]
    labels: Int[np.ndarray, " n"]


@dataclass(frozen=True, kw_only=True)
class LabelledSet:
    """Images with one class each. Without `train` there is no linear probe; `metric` is the set's own."""

    name: str
    classes: Classes
    templates: tuple[str, ...]
    test: Split
    train: Split | None = None
    validation: Split | None = None
    metric: Literal["top1", "mean_per_class"] = "top1"


@dataclass(frozen=True, kw_only=True)
class PairSet:
    """Images with captions of their own, for retrieval: caption j describes image `image_of_text[j]`."""

    name: str
    images: tuple[ImageRef, ...]
    captions: tuple[str, ...]
    image_of_text: Int[np.ndarray, " m"]
