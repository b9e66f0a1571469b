"""Measure a model on a set by one protocol. Each set is encoded once for all tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from distilclip.data.bad_samples import ErrorPolicy
from distilclip.data.limits import OnError
from distilclip.errors import InputError
from distilclip.evaluate.embedders import Embedder
from distilclip.evaluate.encode import ImageFeatures, Output
from distilclip.evaluate.scores import agreement_scores, probe_scores, retrieval_scores, zero_shot_scores
from distilclip.evaluate.zero_shot import TextClassifier, classify
from distilclip.measures.agreement import agreement
from distilclip.measures.probe import linear_probe
from distilclip.measures.retrieval import retrieval
from distilclip.sets.classes import classes_digest, templates_digest
from distilclip.sets.dataset import EvaluationSet, ImageRef, LabelledSet, MissingSet, PairSet, Split
from distilclip.sets.score import Score
from distilclip.sets.specs import ALL_TASKS, Task

HEADLINE: dict[Task, str] = {"retrieval": "image_to_text_r1", "agreement": "cka"}
"""The metric of a score that is missing, where it is not top-1."""


@dataclass(frozen=True, kw_only=True)
class View:
    """Hold a set's test images as one model sees them, and its text classifier where the classes have names."""

    images: ImageFeatures
    classifier: TextClassifier | None = None


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Hold everything that decides a score beside the model and the set.

    `templates` replace the sets' own; `probe_l2` None sweeps the penalty; `seed` draws the probe's held-out rows.
    Retrieval uses all captions, or with `captions="first"` (the protocol of CLIP-KD's code) the first of each image,
    behind `caption_prefix`. The error policy holds for every split by itself.
    """

    tasks: Sequence[Task] = ALL_TASKS
    templates: tuple[str, ...] | None = None
    probe_features: Literal["backbone", "projected"] = "backbone"
    probe_l2: float | None = None
    captions: Literal["all", "first"] = "all"
    caption_prefix: str = ""
    seed: int = 0
    on_error: OnError = "raise"
    max_bad_ratio: float = 0.01

    def describe(self, dataset: EvaluationSet) -> dict[str, Any]:
        """Return what a result says of a set: its sizes and classes, and the templates that are used for it."""
        if isinstance(dataset, MissingSet):
            return {"missing": dataset.reason}
        if isinstance(dataset, PairSet):
            return {"num_images": len(dataset.images), "num_captions": len(dataset.captions), **dataset.record}
        templates = self._templates_of(dataset)
        splits = {"test": dataset.test, "train": dataset.train, "validation": dataset.validation}
        return {
            **{f"num_{name}": len(split.images) for name, split in splits.items() if split is not None},
            "num_classes": len(dataset.classes),
            "metric": dataset.metric,
            "templates": list(templates),
            "templates_digest": templates_digest(templates),
            "classes_digest": classes_digest(dataset.classes),
            **dataset.record,
        }

    def view(
        self, model: Embedder, dataset: LabelledSet | PairSet, *, outputs: Sequence[Output] = ("embedding",)
    ) -> View:
        """Encode a set's test images, and the prompts of its classes."""
        test = dataset.test.images if isinstance(dataset, LabelledSet) else dataset.images
        images = self._encode(model, test, outputs, name=f"{dataset.name}-test")
        if not isinstance(dataset, LabelledSet) or not dataset.classes.named:
            return View(images=images)
        return View(images=images, classifier=model.classifier(dataset.classes.names, self._templates_of(dataset)))

    def measure(self, model: Embedder, dataset: EvaluationSet, *, teacher: View | None = None) -> list[Score]:
        """Return all scores of a model on a set, of the tasks that apply to it; `teacher` is its view of the same set.

        What cannot be measured is a score without a value that says why. Raises `InputError` for images that the error
        policy does not pass over, and for a model whose features are not finite.
        """
        if isinstance(dataset, MissingSet):
            return self._score_missing_set(model, dataset)
        probed = isinstance(dataset, LabelledSet) and dataset.train is not None and "linear-probe" in self.tasks
        outputs: list[Output] = ["embedding"]
        if probed and self.probe_features == "backbone":
            outputs.append("backbone")
        view = self.view(model, dataset, outputs=outputs)
        scores: list[Score] = []
        if isinstance(dataset, PairSet) and "retrieval" in self.tasks:
            scores += self._retrieval(model, dataset, view.images)
        if isinstance(dataset, LabelledSet) and "zero-shot" in self.tasks:
            scores += self._zero_shot(model, dataset, view)
        if isinstance(dataset, LabelledSet) and "linear-probe" in self.tasks:
            scores += self._linear_probe(model, dataset, view.images)
        if "agreement" in self.tasks and teacher is not None:
            scores += self._agreement(model, dataset, view, teacher)
        return scores

    def _score_missing_set(self, model: Embedder, dataset: MissingSet) -> list[Score]:
        tasks: list[Task] = ["retrieval"] if dataset.kind == "pairs" else ["zero-shot"]
        if dataset.has_train:
            tasks.append("linear-probe")
        named: dict[str, Any] = {"model": model.name, "model_digest": model.digest, "set": dataset.name}
        return [
            Score(**named, task=task, metric=HEADLINE.get(task, "top1"), value=None).without_value(dataset.reason)
            for task in tasks
            if task in self.tasks
        ]

    def _zero_shot(self, model: Embedder, dataset: LabelledSet, view: View) -> list[Score]:
        base = self._base(model, dataset, view.images, "zero-shot")
        if view.classifier is None:
            return [base.without_value("the classes have numbers but no names: add classnames.txt")]
        templates = self._templates_of(dataset)
        base = base.with_details(
            templates_digest=templates_digest(templates),
            num_templates=len(templates),
            own_templates=templates != dataset.templates,
            classes_digest=classes_digest(dataset.classes),
        )
        labels = _labels_of(dataset.test, view.images)
        found = classify(view.images.embedding, labels, view.classifier)
        return zero_shot_scores(found, base, headline=dataset.metric, names=dataset.classes.names)

    def _retrieval(self, model: Embedder, dataset: PairSet, images: ImageFeatures) -> list[Score]:
        # Captions of unreadable images go with them; the others' images are renumbered.
        place = np.full(len(dataset.images), -1)
        place[images.rows.numpy()] = np.arange(len(images.rows))
        owners = dataset.image_of_text
        chosen = np.flatnonzero(place[owners] >= 0)
        if self.captions == "first":
            chosen = chosen[np.unique(owners[chosen], return_index=True)[1]]
        base = self._base(model, dataset, images, "retrieval").with_details(
            captions=self.captions, caption_prefix=self.caption_prefix, num_captions=len(chosen)
        )
        text = model.text_features([self.caption_prefix + dataset.captions[i] for i in chosen])
        pairs = torch.from_numpy(place[owners[chosen]])
        return retrieval_scores(retrieval(images.embedding, text, pairs), pairs, base)

    def _linear_probe(self, model: Embedder, dataset: LabelledSet, images: ImageFeatures) -> list[Score]:
        """Return the scores of a probe or, of a set with folds, of one probe for each."""
        output: Output = "backbone" if self.probe_features == "backbone" else "embedding"
        kind = model.clip.backbone_kind if self.probe_features == "backbone" else self.probe_features
        base = self._base(model, dataset, images, "linear-probe").with_details(features=kind)
        if dataset.train is None:
            return [base.without_value("the set has no training images")]
        train, train_labels, readable = self._examples(model, dataset.train, output, name=f"{dataset.name}-train")
        validation = None
        if dataset.validation is not None:
            name = f"{dataset.name}-validation"
            validation = self._examples(model, dataset.validation, output, name=name)[:2]
        if validation is None and self.probe_l2 is None and int(torch.bincount(train_labels).max()) < 2:
            return [
                base.without_value("one training image a class leaves none to choose the penalty on: give --probe-l2")
            ]
        labels = _labels_of(dataset.test, images)
        test, test_labels = images.features[output].to(model.device), labels.to(model.device)
        folds = [_places_of(readable, fold).to(model.device) for fold in dataset.folds]
        chosen: Sequence[Int[Tensor, " f"] | slice] = folds or [slice(None)]
        probes = [
            linear_probe(
                train[rows],
                train_labels[rows],
                test,
                test_labels,
                l2=self.probe_l2,
                validation=validation,
                seed=self.seed,
            )
            for rows in chosen
        ]
        return probe_scores(probes, labels, base, headline=dataset.metric)

    def _agreement(self, model: Embedder, dataset: LabelledSet | PairSet, view: View, teacher: View) -> list[Score]:
        if not torch.equal(view.images.rows, teacher.images.rows):
            raise InputError(f"Images of the set {dataset.name} changed during the run. Start it again.")
        classifiers, num_classes = None, 0
        if view.classifier is not None and teacher.classifier is not None:
            classifiers = view.classifier.logits, teacher.classifier.logits
            num_classes = len(view.classifier.weight)
        found = agreement(
            view.images.embedding, teacher.images.embedding, classifiers=classifiers, num_classes=num_classes
        )
        return agreement_scores(found, self._base(model, dataset, view.images, "agreement"))

    def _templates_of(self, dataset: LabelledSet) -> tuple[str, ...]:
        return self.templates if self.templates is not None else dataset.templates

    def _encode(
        self, model: Embedder, images: Sequence[ImageRef], outputs: Sequence[Output], *, name: str
    ) -> ImageFeatures:
        policy = ErrorPolicy(self.on_error, self.max_bad_ratio)
        return model.image_features(images, outputs, policy=policy, name=name)

    def _examples(
        self, model: Embedder, split: Split, output: Output, *, name: str
    ) -> tuple[Float[Tensor, "n width"], Int[Tensor, " n"], Int[Tensor, " n"]]:
        """Return features and labels of a split where probes are computed, and the rows that could be read."""
        found = self._encode(model, split.images, (output,), name=name)
        return found.features[output].to(model.device), _labels_of(split, found).to(model.device), found.rows

    def _base(self, model: Embedder, dataset: LabelledSet | PairSet, images: ImageFeatures, task: Task) -> Score:
        """Return what all scores of a task have in common."""
        return Score(
            model=model.name,
            model_digest=model.digest,
            set=dataset.name,
            task=task,
            metric=HEADLINE.get(task, "top1"),
            value=None,
            num_test=len(images.rows),
            num_unreadable=images.num_unreadable,
            num_classes=len(dataset.classes) if isinstance(dataset, LabelledSet) else None,
            details=dict(dataset.record),
        )


def _labels_of(split: Split, images: ImageFeatures) -> Int[Tensor, " n"]:
    """Return the labels of the images that could be read."""
    return torch.from_numpy(split.labels)[images.rows]


def _places_of(readable: Int[Tensor, " n"], fold: Int[np.ndarray, " f"]) -> Int[Tensor, " f"]:
    """Return where the rows of a fold stand among the readable ones."""
    return torch.isin(readable, torch.from_numpy(fold)).nonzero()[:, 0]
