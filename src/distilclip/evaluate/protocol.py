"""How models are measured: one protocol, applied to any model on any set, each set encoded once for all tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from distilclip.data.policy import ErrorPolicy, OnError
from distilclip.evaluate.agreement import agreement
from distilclip.evaluate.classes import templates_digest
from distilclip.evaluate.dataset import ImageRef, LabelledSet, PairSet, Split
from distilclip.evaluate.encode import Encoding, ImageFeatures, Output, encode_images, encode_texts
from distilclip.evaluate.retrieval import retrieval
from distilclip.evaluate.scores import (
    Score,
    Task,
    agreement_scores,
    probe_scores,
    retrieval_scores,
    zero_shot_scores,
)
from distilclip.evaluate.zero_shot import TextClassifier, classify, text_classifier
from distilclip.models.clip import Clip
from distilclip.ops.probe import linear_probe

ALL_TASKS: tuple[Task, ...] = ("zero-shot", "linear-probe", "retrieval", "agreement")


@dataclass(frozen=True, kw_only=True)
class View:
    """A set's test images as one model sees them, and its text classifier where the classes have names."""

    images: ImageFeatures
    classifier: TextClassifier | None = None


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Everything that decides a score beside the model and the set.

    `templates` replace the sets' own; `probe_l2` None sweeps the penalty; `seed` draws the probe's held-out rows and
    the bootstrap; the error policy holds for every split by itself.
    """

    tasks: Sequence[Task] = ALL_TASKS
    templates: tuple[str, ...] | None = None
    probe_features: Literal["backbone", "projected"] = "backbone"
    probe_l2: float | None = None
    seed: int = 0
    on_error: OnError = "raise"
    max_bad_ratio: float = 0.01
    encoding: Encoding = field(default_factory=Encoding)

    def templates_of(self, dataset: LabelledSet) -> tuple[str, ...]:
        """The prompt templates that are used for a set."""
        return self.templates if self.templates is not None else dataset.templates

    def view(self, clip: Clip, dataset: LabelledSet | PairSet, *, outputs: Sequence[Output] = ("embedding",)) -> View:
        """Encode a set's test images, and the prompts of its classes."""
        test = dataset.test.images if isinstance(dataset, LabelledSet) else dataset.images
        images = self._encode(clip, test, outputs, description=f"{clip.name}: {dataset.name}")
        if not isinstance(dataset, LabelledSet) or not dataset.classes.named:
            return View(images=images)
        templates = self.templates_of(dataset)
        return View(
            images=images, classifier=text_classifier(clip, dataset.classes.names, templates, encoding=self.encoding)
        )

    def measure(self, clip: Clip, dataset: LabelledSet | PairSet, *, teacher: View | None = None) -> list[Score]:
        """All scores of a model on a set, of the tasks that apply to it; `teacher` is its view of the same set.

        Raises `InputError` for images that the error policy does not pass over, and for a model whose features are not
        finite.
        """
        if isinstance(dataset, PairSet):
            return self._measure_pairs(clip, dataset, teacher)
        return self._measure_labelled(clip, dataset, teacher)

    def _measure_labelled(self, clip: Clip, dataset: LabelledSet, teacher: View | None) -> list[Score]:
        probed = "linear-probe" in self.tasks and dataset.train is not None
        output = self._probe_output
        view = self.view(
            clip, dataset, outputs=("embedding", output) if probed and output != "embedding" else ("embedding",)
        )
        labels = _labels(dataset.test, view.images)
        scores: list[Score] = []
        if "zero-shot" in self.tasks:
            scores += self._zero_shot(dataset, view, labels)
        if "linear-probe" in self.tasks:
            scores += self._linear_probe(clip, dataset, view, labels)
        if "agreement" in self.tasks and teacher is not None:
            scores += self._agreement(dataset, view, teacher)
        return scores

    def _measure_pairs(self, clip: Clip, dataset: PairSet, teacher: View | None) -> list[Score]:
        view = self.view(clip, dataset)
        scores: list[Score] = []
        if "retrieval" in self.tasks:
            # Captions of unreadable images go with them; the others' images are renumbered.
            place = np.full(len(dataset.images), -1)
            place[view.images.rows.numpy()] = np.arange(len(view.images.rows))
            kept = np.flatnonzero(place[dataset.image_of_text] >= 0)
            pairs = torch.from_numpy(place[dataset.image_of_text[kept]])
            text = encode_texts(clip, [dataset.captions[i] for i in kept], encoding=self.encoding)
            base = self._base(dataset, view, "retrieval")
            scores += retrieval_scores(retrieval(view.images.embedding, text, pairs), pairs, base, seed=self.seed)
        if "agreement" in self.tasks and teacher is not None:
            scores += self._agreement(dataset, view, teacher)
        return scores

    def _zero_shot(self, dataset: LabelledSet, view: View, labels: Int[Tensor, " n"]) -> list[Score]:
        base = self._base(dataset, view, "zero-shot")
        if view.classifier is None:
            return [base.missing("the classes have numbers but no names: add classnames.txt")]
        templates = self.templates_of(dataset)
        base = base.with_details(templates_digest=templates_digest(templates), num_templates=len(templates))
        found = classify(view.images.embedding, labels, view.classifier)
        return zero_shot_scores(found, base, headline=dataset.metric, seed=self.seed)

    def _linear_probe(self, clip: Clip, dataset: LabelledSet, view: View, labels: Int[Tensor, " n"]) -> list[Score]:
        base = self._base(dataset, view, "linear-probe").with_details(features=self.probe_features)
        if dataset.train is None:
            return [base.missing("the set has no training images")]
        train = self._probe_split(clip, dataset.train, f"{clip.name}: {dataset.name}, train")
        validation = None
        if dataset.validation is not None:
            validation = self._probe_split(clip, dataset.validation, f"{clip.name}: {dataset.name}, validation")
        elif self.probe_l2 is None and torch.bincount(train[1]).max() < 2:
            return [base.missing("one training image a class leaves none to choose the penalty on: give --probe-l2")]
        device = clip.device if clip.device.type == "cuda" else torch.device("cpu")
        found = linear_probe(
            train[0].to(device),
            train[1].to(device),
            view.images.features[self._probe_output].to(device),
            labels.to(device),
            l2=self.probe_l2,
            validation=None if validation is None else (validation[0].to(device), validation[1].to(device)),
            seed=self.seed,
        )
        return probe_scores(found, labels, base, headline=dataset.metric, seed=self.seed)

    def _agreement(self, dataset: LabelledSet | PairSet, view: View, teacher: View) -> list[Score]:
        assert torch.equal(view.images.rows, teacher.images.rows)  # what can be read does not depend on the model
        found = agreement(
            view.images.embedding, teacher.images.embedding, classifiers=_both(view.classifier, teacher.classifier)
        )
        return agreement_scores(found, self._base(dataset, view, "agreement"))

    @property
    def _probe_output(self) -> Output:
        return "backbone" if self.probe_features == "backbone" else "embedding"

    def _probe_split(
        self, clip: Clip, split: Split, description: str
    ) -> tuple[Float[Tensor, "n width"], Int[Tensor, " n"]]:
        found = self._encode(clip, split.images, (self._probe_output,), description=description)
        return found.features[self._probe_output], _labels(split, found)

    def _encode(
        self, clip: Clip, images: Sequence[ImageRef], outputs: Sequence[Output], *, description: str
    ) -> ImageFeatures:
        policy = ErrorPolicy(self.on_error, self.max_bad_ratio)
        return encode_images(
            clip, images, outputs=outputs, encoding=self.encoding, policy=policy, description=description
        )

    def _base(self, dataset: LabelledSet | PairSet, view: View, task: Task) -> Score:
        return Score(
            set=dataset.name,
            task=task,
            metric="image_to_text_r1" if task == "retrieval" else "top1",
            value=None,
            num_test=len(view.images.rows),
            num_unreadable=view.images.num_unreadable,
            num_classes=len(dataset.classes) if isinstance(dataset, LabelledSet) else None,
        )


def _labels(split: Split, found: ImageFeatures) -> Int[Tensor, " n"]:
    return torch.from_numpy(split.labels)[found.rows]


def _both(
    student: TextClassifier | None, teacher: TextClassifier | None
) -> tuple[TextClassifier, TextClassifier] | None:
    return None if student is None or teacher is None else (student, teacher)
