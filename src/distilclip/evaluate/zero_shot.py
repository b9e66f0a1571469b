"""Classify images by the text embeddings of class names, without training (zero-shot)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from distilclip.data.bad_samples import ErrorPolicy
from distilclip.errors import InputError
from distilclip.evaluate.encode import Encoding, encode_images, encode_texts
from distilclip.measures.metrics import mean_per_class, row_tiles, target_rank
from distilclip.models.clip import Clip
from distilclip.sets.classes import check_templates
from distilclip.sets.dataset import EvaluationSet, LabelledSet


@dataclass(frozen=True, kw_only=True)
class TextClassifier:
    """Hold one unit vector per class, and the model's scale, which turns cosines into logits."""

    weight: Float[Tensor, "k dim"]
    scale: float

    def logits(self, image: Float[Tensor, "n dim"]) -> Float[Tensor, "n k"]:
        """Return scaled cosine similarities, in float32."""
        return self.scale * (image @ self.weight.T)


@dataclass(frozen=True, kw_only=True)
class ZeroShot:
    """Hold the predicted class of each image, and the rank of its true class (0 is first)."""

    predictions: Int[Tensor, " n"]
    rank: Int[Tensor, " n"]
    labels: Int[Tensor, " n"]
    num_unreadable: int = 0

    @property
    def top1(self) -> float:
        """Return the share of images whose class comes first."""
        return (self.rank == 0).double().mean().item()

    @property
    def top5(self) -> float:
        """Return the share of images whose class is among the first five."""
        return (self.rank < 5).double().mean().item()

    @property
    def mean_per_class(self) -> float:
        """Return top-1 within each class, averaged over the classes."""
        return mean_per_class(self.rank == 0, self.labels)


def text_classifier(
    clip: Clip, names: Sequence[str], templates: Sequence[str], *, encoding: Encoding | None = None
) -> TextClassifier:
    """Encode every class's prompts, normalise, average, and normalise again (Radford et al. 2021, section 3.1.4)."""
    encoding = encoding or Encoding()
    rows = []
    step = classes_at_once(templates, encoding)
    for start in range(0, len(names), step):
        some = names[start : start + step]
        prompts = [template.replace("{}", name) for name in some for template in templates]
        embeddings = encode_texts(clip, prompts, encoding=encoding)
        rows.append(F.normalize(embeddings.view(len(some), len(templates), -1).mean(dim=1), dim=-1))
    return TextClassifier(weight=torch.cat(rows), scale=float(clip.scale.detach()))


def classes_at_once(templates: Sequence[str], encoding: Encoding) -> int:
    """Return for how many classes the prompts are encoded in one batch."""
    return max(1, encoding.batch_size // len(templates))


def classify(
    image: Float[Tensor, "n dim"], labels: Int[Tensor, " n"], classifier: TextClassifier, *, num_unreadable: int = 0
) -> ZeroShot:
    """Rank all classes for each image, tile by tile. Equal scores rank by class number."""
    predictions, ranks = [], []
    for rows in row_tiles(len(image), len(classifier.weight)):
        logits, predicted = classifier.logits(image[rows]), labels[rows].clone()
        rank = target_rank(logits, predicted)
        wrong = rank.nonzero()[:, 0]
        predicted[wrong] = logits[wrong].argmax(dim=1)
        predictions.append(predicted)
        ranks.append(rank)
    return ZeroShot(
        predictions=torch.cat(predictions), rank=torch.cat(ranks), labels=labels, num_unreadable=num_unreadable
    )


def zero_shot(
    model: Clip,
    dataset: LabelledSet | str,
    *,
    templates: Sequence[str] | None = None,
    encoding: Encoding | None = None,
    policy: ErrorPolicy | None = None,
) -> ZeroShot:
    """Classify a set's test images by its class names.

    `dataset` is a set or its spec (`folder:PATH`, `tar:PATH`); `templates` replace the set's own. Raises `InputError`
    for a set without class names, and for images as `policy` says.
    """
    chosen = _open_set(dataset) if isinstance(dataset, str) else dataset
    if not isinstance(chosen, LabelledSet):
        raise InputError(f"The set {chosen.name!r} has captions, not classes; `retrieval` is the measure for it.")
    if not chosen.classes.named:
        raise InputError(
            f"The classes of {chosen.name!r} are numbers only: add {chosen.classes.source}/classnames.txt."
        )
    templates = tuple(templates) if templates is not None else chosen.templates
    check_templates(templates, source="templates")
    found = encode_images(model, chosen.test.images, encoding=encoding, policy=policy, description=chosen.name)
    return classify(
        found.embedding,
        torch.from_numpy(chosen.test.labels)[found.rows],
        text_classifier(model, chosen.classes.names, templates, encoding=encoding),
        num_unreadable=found.num_unreadable,
    )


def _open_set(spec: str) -> EvaluationSet:
    # Imported here: the readers of published sets are many, and who brings a set needs none of them.
    from distilclip.sets.open import load_set

    return load_set(spec)
