"""How models are measured: one protocol, applied to any model on any set, each set encoded once for all tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from distilclip.data.bad_samples import ErrorPolicy, OnError
from distilclip.evaluate.agreement import agreement
from distilclip.evaluate.embedders import Embedder
from distilclip.evaluate.encode import ImageFeatures, Output
from distilclip.evaluate.knn_probe import NUM_NEIGHBOURS, TEMPERATURE, knn_predictions
from distilclip.evaluate.scores import (
    Score,
    Task,
    agreement_scores,
    few_shot_scores,
    knn_scores,
    probe_scores,
    retrieval_scores,
    zero_shot_scores,
)
from distilclip.evaluate.zero_shot import TextClassifier, classify
from distilclip.measures.few_shot import few_shot
from distilclip.measures.probe import Probe, linear_probe
from distilclip.measures.retrieval import retrieval
from distilclip.sets.classes import classes_digest, templates_digest
from distilclip.sets.dataset import EvaluationSet, ImageRef, LabelledSet, MissingSet, PairSet

ALL_TASKS: tuple[Task, ...] = ("zero-shot", "linear-probe", "retrieval", "agreement")
"""What is measured by default; the k-NN and few-shot probes are to be asked for."""

PROBES: frozenset[Task] = frozenset({"linear-probe", "knn-probe", "few-shot"})


@dataclass(frozen=True, kw_only=True)
class View:
    """A set's test images as one model sees them, and its text classifier where the classes have names.

    Where a model has no features of them, `reason` says why, and there are none.
    """

    images: ImageFeatures | None
    classifier: TextClassifier | None = None
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """All scores of a model on a set; for a labelled set also the true and the zero-shot classes, row by row."""

    scores: list[Score]
    labels: Int[Tensor, " n"] | None = None
    predictions: Int[Tensor, " n"] | None = None


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Everything that decides a score beside the model and the set.

    `templates` replace the sets' own; `probe_l2` None sweeps the penalty; `seed` draws the probe's held-out rows and
    the few shots. Retrieval uses all captions, or with `captions="first"` (the protocol of CLIP-KD's code) the first of
    each image, behind `caption_prefix`. The error policy holds for every split by itself.
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

    def templates_of(self, dataset: LabelledSet) -> tuple[str, ...]:
        """The prompt templates that are used for a set."""
        return self.templates if self.templates is not None else dataset.templates

    def describe(self, dataset: EvaluationSet) -> dict[str, Any]:
        """What a result says of a set: its sizes and classes, and the templates that are used for it."""
        if isinstance(dataset, MissingSet):
            return {"missing": dataset.reason}
        if isinstance(dataset, PairSet):
            return {"num_images": len(dataset.images), "num_captions": len(dataset.captions), **dataset.record}
        templates = self.templates_of(dataset)
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
        lacks = model.lacks(test, outputs)
        if lacks:
            return View(images=None, reason=lacks)
        images = self._encode(model, test, outputs, name=f"{dataset.name}-test")
        if not isinstance(dataset, LabelledSet) or not dataset.classes.named:
            return View(images=images)
        names, classes = dataset.classes.prompted
        classifier = model.classifier(names, self.templates_of(dataset))
        return View(images=images, classifier=classifier.of_classes(classes) if classifier else None)

    def measure(self, model: Embedder, dataset: EvaluationSet, *, teacher: View | None = None) -> Measurement:
        """All scores of a model on a set, of the tasks that apply to it; `teacher` is its view of the same set.

        What cannot be measured is a score without a value that says why. Raises `InputError` for images that the error
        policy does not pass over, and for a model whose features are not finite.
        """
        if isinstance(dataset, MissingSet):
            return Measurement(scores=self._missing(dataset))
        if isinstance(dataset, PairSet):
            return self._measure_pairs(model, dataset, teacher)
        return self._measure_labelled(model, dataset, teacher)

    def _missing(self, dataset: MissingSet) -> list[Score]:
        tasks: list[Task] = ["retrieval"] if dataset.kind == "pairs" else ["zero-shot"]
        tasks += [task for task in self.tasks if task in PROBES and dataset.has_train]
        return [
            Score(set=dataset.name, task=task, metric=_metric_of(task), value=None).missing(dataset.reason)
            for task in tasks
            if task in self.tasks
        ]

    def _measure_labelled(self, model: Embedder, dataset: LabelledSet, teacher: View | None) -> Measurement:
        probes = [task for task in self.tasks if task in PROBES]
        outputs: list[Output] = ["embedding"]
        asks_backbone = probes and dataset.train is not None and self.probe_features == "backbone"
        if asks_backbone and not model.lacks(dataset.test.images, ("backbone",)):
            outputs.append("backbone")  # a model without such features is measured on the other tasks all the same
        view = self.view(model, dataset, outputs=outputs)
        if view.images is None:
            return Measurement(scores=self._refused(dataset, view.reason))
        labels = torch.from_numpy(dataset.test.labels)[view.images.rows]
        scores: list[Score] = []
        predictions = None
        if "zero-shot" in self.tasks:
            base = self._base(dataset, view.images, "zero-shot")
            if view.classifier is None:
                scores.append(base.missing(_no_classifier(dataset)))
            else:
                templates = self.templates_of(dataset)
                found = classify(view.images.embedding, labels, view.classifier)
                predictions = found.predictions
                base = base.with_details(
                    templates_digest=templates_digest(templates),
                    num_templates=len(templates),
                    own_templates=templates != dataset.templates,
                    classes_digest=classes_digest(dataset.classes),
                )
                scores += zero_shot_scores(found, base, headline=dataset.metric)
        if probes:
            scores += self._probes(model, dataset, view.images, labels, probes)
        if "agreement" in self.tasks and teacher is not None:
            scores += self._agreement(dataset, view, teacher)
        return Measurement(scores=scores, labels=labels, predictions=predictions)

    def _measure_pairs(self, model: Embedder, dataset: PairSet, teacher: View | None) -> Measurement:
        view = self.view(model, dataset)
        if view.images is None:
            return Measurement(scores=self._refused(dataset, view.reason))
        scores: list[Score] = []
        if "retrieval" in self.tasks:
            scores += self._retrieval(model, dataset, view.images)
        if "agreement" in self.tasks and teacher is not None:
            scores += self._agreement(dataset, view, teacher)
        return Measurement(scores=scores)

    def _retrieval(self, model: Embedder, dataset: PairSet, images: ImageFeatures) -> list[Score]:
        # Captions of unreadable images go with them; the others' images are renumbered.
        place = np.full(len(dataset.images), -1)
        place[images.rows.numpy()] = np.arange(len(images.rows))
        owners = dataset.image_of_text
        chosen = np.flatnonzero(place[owners] >= 0)
        if self.captions == "first":
            chosen = chosen[np.unique(owners[chosen], return_index=True)[1]]
        base = self._base(dataset, images, "retrieval").with_details(
            captions=self.captions, caption_prefix=self.caption_prefix, num_captions=len(chosen)
        )
        text = model.captions(dataset, chosen.tolist(), prefix=self.caption_prefix)
        if text is None:
            return [base.missing("a store holds one caption of each image, without a prefix")]
        pairs = torch.from_numpy(place[owners[chosen]])
        return retrieval_scores(retrieval(images.embedding, text, pairs), pairs, base)

    def _probes(
        self,
        model: Embedder,
        dataset: LabelledSet,
        images: ImageFeatures,
        labels: Int[Tensor, " n"],
        tasks: Sequence[Task],
    ) -> list[Score]:
        output: Output = "backbone" if self.probe_features == "backbone" else "embedding"
        kind = model.backbone_kind if self.probe_features == "backbone" else None
        features = kind or self.probe_features
        bases = {t: self._base(dataset, images, t).with_details(features=features) for t in tasks}
        if dataset.train is None:
            return [base.missing("the set has no training images") for base in bases.values()]
        lacks = model.lacks(dataset.train.images, (output,))
        if lacks:
            return [base.missing(lacks) for base in bases.values()]
        parts: dict[str, tuple[Float[Tensor, "n width"], Int[Tensor, " n"]]] = {}
        readable = torch.arange(0)
        for name, split in (("train", dataset.train), ("validation", dataset.validation)):
            if split is not None:
                found = self._encode(model, split.images, (output,), name=f"{dataset.name}-{name}")
                own = torch.from_numpy(split.labels)[found.rows]
                parts[name] = found.features[output].to(model.device), own.to(model.device)
                readable = found.rows if name == "train" else readable
        inputs = ProbeInputs(
            train=parts["train"],
            validation=parts.get("validation"),
            test=(images.features[output].to(model.device), labels.to(model.device)),
            folds=[_places(readable, fold).to(model.device) for fold in dataset.folds],
        )
        return measure_probes(inputs, bases, metric=dataset.metric, l2=self.probe_l2, seed=self.seed)

    def _agreement(self, dataset: LabelledSet | PairSet, view: View, teacher: View) -> list[Score]:
        assert view.images is not None
        base = self._base(dataset, view.images, "agreement")
        if teacher.images is None:
            return [base.missing(teacher.reason)]
        # A store lacks images that a model can read: those without a caption.
        mine = torch.isin(view.images.rows, teacher.images.rows)
        its = torch.isin(teacher.images.rows, view.images.rows)
        classifiers = None
        if view.classifier is not None and teacher.classifier is not None:
            classifiers = view.classifier, teacher.classifier
        found = agreement(view.images.embedding[mine], teacher.images.embedding[its], classifiers=classifiers)
        return agreement_scores(found, self._base(dataset, view.images, "agreement", num_test=int(mine.sum())))

    def _refused(self, dataset: LabelledSet | PairSet, reason: str) -> list[Score]:
        """A score without a value for every task that applies to the set."""
        applicable = {"retrieval"} if isinstance(dataset, PairSet) else {"zero-shot", *PROBES}
        num_classes = None if isinstance(dataset, PairSet) else len(dataset.classes)
        return [
            Score(set=dataset.name, task=task, metric=_metric_of(task), value=None, num_classes=num_classes).missing(
                reason
            )
            for task in self.tasks
            if task in applicable
        ]

    def _encode(
        self, model: Embedder, images: Sequence[ImageRef], outputs: Sequence[Output], *, name: str
    ) -> ImageFeatures:
        return model.images(images, outputs, policy=ErrorPolicy(self.on_error, self.max_bad_ratio), name=name)

    def _base(
        self, dataset: LabelledSet | PairSet, images: ImageFeatures, task: Task, *, num_test: int | None = None
    ) -> Score:
        return Score(
            set=dataset.name,
            task=task,
            metric=_metric_of(task),
            value=None,
            num_test=len(images.rows) if num_test is None else num_test,
            num_unreadable=images.num_unreadable,
            num_classes=len(dataset.classes) if isinstance(dataset, LabelledSet) else None,
            details=dict(dataset.record),
        )


def _metric_of(task: Task) -> str:
    return {"retrieval": "image_to_text_r1", "few-shot": "16_shot", "agreement": "cka"}.get(task, "top1")


def _no_classifier(dataset: LabelledSet) -> str:
    if not dataset.classes.named:
        return "the classes have numbers but no names: add classnames.txt"
    return "a store has no text encoder for the classes' prompts"


def _places(readable: Int[Tensor, " n"], fold: Int[np.ndarray, " f"]) -> Int[Tensor, " f"]:
    """Where the rows of a fold stand among the readable ones."""
    return torch.isin(readable, torch.from_numpy(fold)).nonzero()[:, 0]


Examples = tuple[Float[Tensor, "_ dim"], Int[Tensor, " _"]]
"""Features with their labels, on the device where probes are computed."""

_ONE_EACH = "one training image a class leaves none to choose the penalty on: give --probe-l2"


@dataclass(frozen=True, kw_only=True)
class ProbeInputs:
    """A set's splits as features. `folds` are rows of `train`, of which each makes a training set of its own."""

    train: Examples
    test: Examples
    validation: Examples | None = None
    folds: Sequence[Int[Tensor, " _"]] = field(default_factory=tuple)

    @property
    def pool(self) -> Examples:
        """Everything that is not tested."""
        if self.validation is None:
            return self.train
        return torch.cat([self.train[0], self.validation[0]]), torch.cat([self.train[1], self.validation[1]])


def measure_probes(
    inputs: ProbeInputs, bases: Mapping[Task, Score], *, metric: str, l2: float | None, seed: int
) -> list[Score]:
    """The scores of every probe in `bases`, each made from its base; what cannot be fitted says why."""
    scores: list[Score] = []
    labels = inputs.test[1].cpu()
    alone = inputs.validation is None and l2 is None and int(torch.bincount(inputs.train[1]).max()) < 2
    if "linear-probe" in bases:
        base = bases["linear-probe"]
        if alone:
            scores.append(base.missing(_ONE_EACH))
        else:
            found = linear_probes(inputs, l2=l2, seed=seed)
            scores += probe_scores(found, labels, base, headline=metric)
    if "knn-probe" in bases:
        base = bases["knn-probe"].with_details(num_neighbours=NUM_NEIGHBOURS, temperature=TEMPERATURE)
        predictions = knn_predictions(*inputs.pool, inputs.test[0])
        scores += knn_scores(predictions, labels, base, headline=metric)
    if "few-shot" in bases:
        base = bases["few-shot"]
        if alone:
            scores.append(base.missing(_ONE_EACH))
        else:
            shots = few_shot(*inputs.pool, *inputs.test, l2=l2, seed=seed)
            scores += few_shot_scores(shots, labels, base, metric=metric)
    return scores


def linear_probes(inputs: ProbeInputs, *, l2: float | None, seed: int) -> list[Probe]:
    """The linear probe, or one of each fold."""
    train, labels = inputs.train
    folds: Sequence[Int[Tensor, " f"] | slice] = inputs.folds or [slice(None)]
    return [
        linear_probe(train[fold], labels[fold], *inputs.test, l2=l2, validation=inputs.validation, seed=seed)
        for fold in folds
    ]
