"""Encode sets for evaluation in several processes at once: each takes its share of the batches, all get everything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from distilclip.data.bad_samples import ErrorPolicy
from distilclip.errors import InputError
from distilclip.evaluate.embedders import Embedder
from distilclip.evaluate.encode import ImageFeatures, KeptPixels, Output, encode_images, encode_texts
from distilclip.evaluate.zero_shot import TextClassifier, classes_at_once, text_classifier
from distilclip.sets.dataset import ImageRef

T = TypeVar("T")


@dataclass(frozen=True)
class SharedEmbedder(Embedder):
    """Hold a model that every process has, such as a student in training, and compute its features together.

    `gather` returns the values of all processes in the order of `rank`. The batches are those of one process, so the
    features are, too. Nothing is cached and no digest is made: the weights change all the time.
    """

    rank: int = 0
    world: int = 1
    gather: Callable[[Any], list[Any]] = lambda value: [value]
    kept: KeptPixels = field(default_factory=KeptPixels)
    """the prepared pictures of the one set that this embedder is for"""

    @property
    def digest(self) -> str:
        """Return nothing: weights in training have no name of their own."""
        return ""

    def image_features(
        self, images: Sequence[ImageRef], outputs: Sequence[Output], *, policy: ErrorPolicy, name: str
    ) -> ImageFeatures:
        """Return the features of the images that can be read, the same on every process; `policy` judges the others."""
        places = self._places(len(images), size=self.encoding.batch_size)
        own = [images[place] for place in places[self.rank]]

        def encode() -> ImageFeatures | None:
            if not own:
                return None
            lenient = ErrorPolicy("skip", 1.0)
            return encode_images(
                self.clip,
                own,
                outputs=outputs,
                encoding=self.encoding,
                policy=lenient,
                description=name,
                kept=self.kept,
            )

        found = self._gather_all(encode)
        rows: list[int] = []
        unreadable: list[tuple[int, str]] = []
        for part, of_part in zip(found, places, strict=True):
            if part is not None:
                rows += [of_part[row] for row in part.rows.tolist()]
                unreadable += [(of_part[row], error) for row, error in part.unreadable]
        policy.seen(len(images))
        for row, error in sorted(unreadable):
            policy.bad(error, where=images[row].where)
        policy.check(final=True)
        order = torch.tensor(rows).argsort()
        features: dict[Output, Tensor] = {
            output: torch.cat([part.features[output] for part in found if part is not None])[order]
            for output in outputs
        }
        return ImageFeatures(rows=torch.tensor(rows)[order], features=features, unreadable=tuple(sorted(unreadable)))

    def classifier(self, names: Sequence[str], templates: Sequence[str]) -> TextClassifier:
        """Return the text classifier of some classes, each process encoding the prompts of some of them."""

        def encode(own: Sequence[str]) -> Tensor:
            return text_classifier(self.clip, own, templates, encoding=self.encoding).weight

        weight = self._together(names, encode, size=classes_at_once(templates, self.encoding))
        return TextClassifier(weight=weight, scale=float(self.clip.scale.detach()))

    def text_features(self, texts: Sequence[str]) -> Float[Tensor, "m dim"]:
        """Return the unit embeddings of some texts, each process encoding some of them."""

        def encode(own: Sequence[str]) -> Tensor:
            return encode_texts(self.clip, own, encoding=self.encoding)

        return self._together(texts, encode, size=self.encoding.batch_size)

    def _places(self, count: int, *, size: int) -> list[list[int]]:
        """The places of each process: batches of `size` in turn, as one process would make them."""
        return [
            [
                place
                for start in range(rank * size, count, self.world * size)
                for place in range(start, min(start + size, count))
            ]
            for rank in range(self.world)
        ]

    def _together(self, words: Sequence[str], encode: Callable[[Sequence[str]], Tensor], *, size: int) -> Tensor:
        """One row for each of some words, encoded in turns."""
        places = self._places(len(words), size=size)
        own = [words[place] for place in places[self.rank]]
        found = self._gather_all(lambda: encode(own) if own else None)
        order = torch.tensor([place for of_rank in places for place in of_rank]).argsort()
        return torch.cat([part for part in found if part is not None])[order]

    def _gather_all(self, compute: Callable[[], T]) -> list[T]:
        """What every process computes. An `InputError` of one is raised on all, so that none waits for it."""
        outcome: tuple[T | None, InputError | None]
        try:
            outcome = compute(), None
        except InputError as error:
            outcome = None, error
        outcomes = self.gather(outcome)
        failures = [error for _, error in outcomes if error is not None]
        if failures:
            raise failures[0]
        return [value for value, _ in outcomes]
