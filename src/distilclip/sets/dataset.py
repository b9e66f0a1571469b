"""Define an evaluation set, wherever it comes from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from jaxtyping import Int, UInt8

from distilclip.sets.catalogue import Metric
from distilclip.sets.classes import Classes


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageRef:
    """Hold where an image lies: a file of its own, a sample of a shard (with `key`), or an array (with `pixels`).

    `error` says why it is already known to be unusable. `border` pixels are cut off each side before preprocessing.
    """

    uri: str
    key: str = ""
    offset: int = 0
    size: int = 0
    error: str = ""
    border: int = 0
    pixels: UInt8[np.ndarray, "h w 3"] | None = field(default=None, compare=False, repr=False)

    @property
    def where(self) -> str:
        """Return file and member, for messages."""
        return f"{self.uri}: {self.key}" if self.key else self.uri


@dataclass(frozen=True, kw_only=True)
class Split:
    """Hold images and their class numbers; -1 where an unusable sample has none."""

    images: tuple[ImageRef, ...]
    labels: Int[np.ndarray, " n"]


@dataclass(frozen=True, kw_only=True)
class LabelledSet:
    """Hold images with one class each. Without `train` there is no probe; `metric` is the set's own.

    `folds` are rows of `train`, where the set is defined by several small training sets (STL-10's ten): a probe is
    fitted on each, and its accuracies are averaged. `record` is saved with every score: where the names and prompts
    come from, the layout that was read, the digest of a drawn split.
    """

    name: str
    classes: Classes
    templates: tuple[str, ...]
    test: Split
    train: Split | None = None
    validation: Split | None = None
    metric: Metric = "top1"
    folds: tuple[Int[np.ndarray, " _"], ...] = ()
    record: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class PairSet:
    """Hold images with captions of their own, for retrieval: caption j describes image `image_of_text[j]`."""

    name: str
    images: tuple[ImageRef, ...]
    captions: tuple[str, ...]
    image_of_text: Int[np.ndarray, " m"]
    record: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class MissingSet:
    """Stand for a known set that is not on this disk, so that it keeps its place in the table; `reason` says why."""

    name: str
    reason: str
    kind: Literal["labelled", "pairs"]
    has_train: bool = False


EvaluationSet = LabelledSet | PairSet | MissingSet
