"""Measure a model in training on an evaluation set, in all its processes, by the protocol of `evaluate`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from distilclip.errors import InputError
from distilclip.evaluate.encode import Encoding, KeptPixels
from distilclip.evaluate.protocol import Protocol
from distilclip.evaluate.shared_embedder import SharedEmbedder
from distilclip.messages import warn
from distilclip.models.clip import Clip
from distilclip.sets.dataset import LabelledSet, MissingSet, PairSet
from distilclip.sets.open import load_set
from distilclip.sets.specs import Task, expand_groups

TASKS: tuple[Task, ...] = ("zero-shot", "retrieval")


@dataclass(frozen=True, kw_only=True)
class ValidationSet:
    """A set, and the processes that share its work: `gather` returns the values of all, in the order of `rank`."""

    dataset: LabelledSet | PairSet
    encoding: Encoding
    rank: int = 0
    world: int = 1
    gather: Callable[[Any], list[Any]] = field(default=lambda value: [value])
    kept: KeptPixels = field(default_factory=KeptPixels)

    def measure(self, clip: Clip) -> dict[str, float]:
        """Return what `evaluate` says of a model with the same precision and batch size, by metric.

        A set that cannot be measured is said, and gives nothing: a bad picture there does not end a training.
        """
        embedder = SharedEmbedder(
            clip, self.encoding, rank=self.rank, world=self.world, gather=self.gather, kept=self.kept
        )
        try:
            scores = Protocol(tasks=TASKS, on_error="skip").measure(embedder, self.dataset)
        except InputError as error:
            warn(f"validation: {self.dataset.name} could not be measured: {error}")
            return {}
        return {score.metric: score.value for score in scores if score.value is not None}


def count_pairs(dataset: LabelledSet | PairSet) -> int:
    """Return how many pairs of a picture and a text are as much work as a set."""
    if isinstance(dataset, PairSet):
        return (len(dataset.images) + len(dataset.captions)) // 2
    return (len(dataset.test.images) + len(dataset.classes.names) * len(dataset.templates)) // 2


def open_datasets(specs: Sequence[str], *, data_root: str | None, prompts: str | None) -> list[LabelledSet | PairSet]:
    """Read the sets to validate on.

    Raises `InputError` for a set that is not there, and for one that has neither class names nor captions.
    """
    found: list[LabelledSet | PairSet] = []
    for spec in expand_groups(specs):
        dataset = load_set(spec, data_root=data_root, prompts=prompts)
        if isinstance(dataset, MissingSet):
            raise InputError(f"The set {dataset.name} to validate on is missing: {dataset.reason}.")
        if isinstance(dataset, LabelledSet) and not dataset.classes.named:
            raise InputError(
                f"The classes of {dataset.name} are numbers only, so nothing can be validated on it: add "
                f"{dataset.classes.source}/classnames.txt."
            )
        found.append(dataset)
    return found
