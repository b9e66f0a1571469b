"""Turn what was measured into scores, each with its interval and baselines."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from distilclip.evaluate.zero_shot import ZeroShot
from distilclip.measures.agreement import Agreement
from distilclip.measures.metrics import mean_interval, mean_per_class, share_interval
from distilclip.measures.probe import Probe
from distilclip.measures.retrieval import Retrieval
from distilclip.sets.score import Score

RECALL_AT = (1, 5, 10)


MOST_CLASSES = 100
"""Classes that a score lists with their own shares: of more classes, half as many of either end."""
MOST_CONFUSIONS = 20


def zero_shot_scores(found: ZeroShot, base: Score, *, headline: str, names: Sequence[str] = ()) -> list[Score]:
    """Score top-1, top-5 (of more than five classes) and mean per class.

    With the `names` of the classes, top-1 also says how each class does, and which are taken for which.
    """
    scores = _accuracies(found.rank == 0, found.labels, base, headline=headline, top5=found.rank < 5)
    told = describe_classes(found, names) if names else {}
    return [score.with_details(**told) if score.metric == "top1" else score for score in scores]


def describe_classes(found: ZeroShot, names: Sequence[str]) -> dict[str, list[list[str | int]]]:
    """Return how a model does class by class.

    `classes` lists name, images and how many of these are right, from the lowest share to the highest; classes without
    an image are left out. `confusions` lists the true class, the one chosen instead, and for how many images.
    """
    num = len(names)
    images = torch.bincount(found.labels, minlength=num)
    right = torch.bincount(found.labels[found.rank == 0], minlength=num)
    present = images.nonzero()[:, 0].tolist()
    order = sorted(present, key=lambda at: (int(right[at]) / int(images[at]), at))
    if len(order) > MOST_CLASSES:
        order = [*order[: MOST_CLASSES // 2], *order[-MOST_CLASSES // 2 :]]
    wrong = found.rank > 0
    pairs, counts = torch.unique(found.labels[wrong] * num + found.predictions[wrong], return_counts=True)
    most = sorted(zip(counts.tolist(), pairs.tolist(), strict=True), key=lambda pair: (-pair[0], pair[1]))
    return {
        "classes": [[names[at], int(images[at]), int(right[at])] for at in order],
        "confusions": [[names[pair // num], names[pair % num], n] for n, pair in most[:MOST_CONFUSIONS]],
    }


def probe_scores(found: Sequence[Probe], labels: Int[Tensor, " n"], base: Score, *, headline: str) -> list[Score]:
    """Score top-1 and mean per class of a linear probe, with its penalty and the sweep; of folds, the means."""
    base = base.with_details(
        l2=found[0].l2 if len(found) == 1 else [probe.l2 for probe in found],
        sweep=[list(point) for point in found[0].sweep],
        converged=all(probe.converged for probe in found),
    )
    if len(found) == 1:
        return _accuracies(found[0].predictions.cpu() == labels, labels, base, headline=headline)
    return [
        _mean_score([getattr(probe, attribute) for probe in found], base, labels, metric=metric, headline=headline)
        for metric, attribute in (("top1", "accuracy"), ("mean_per_class", "mean_per_class"))
    ]


def retrieval_scores(found: Retrieval, pairs: Int[Tensor, " m"], base: Score) -> list[Score]:
    """Score recall at 1, 5 and 10, both ways."""
    num_images, num_captions = len(found.image_to_text), len(found.text_to_image)
    owned = torch.bincount(pairs)
    scores = []
    for direction, ranks, clusters, chance in (
        ("image_to_text", found.image_to_text, None, lambda k: _chance_of_any(owned, num_captions, k)),
        ("text_to_image", found.text_to_image, pairs.numpy(), lambda k: min(1.0, k / num_images)),
    ):
        for k in RECALL_AT:
            hits = ranks < k
            low, high = share_interval(hits.numpy(), clusters=clusters)
            # Rows that are compared one by one must be independent: images are, several captions of one are not.
            independent = direction == "image_to_text" or int(owned.max()) == 1
            kept = base.with_hits(hits.numpy()) if k == 1 and independent else base
            scores.append(
                dataclasses.replace(
                    kept,
                    metric=f"{direction}_r{k}",
                    value=hits.double().mean().item(),
                    headline=k == 1,
                    low=low,
                    high=high,
                    chance=chance(k),
                    num_test=len(hits),
                )
            )
    return scores


def agreement_scores(found: Agreement, base: Score) -> list[Score]:
    """Score CKA, where the widths match mean cosine and, for a labelled set, top-1 and top-5 agreement and KL."""
    values = {"cka": found.cka, "cosine": found.cosine}
    if base.num_classes is not None:
        top5 = {"top5_agreement": found.top5} if found.top5 is not None else {}
        values = {"top1_agreement": found.top1, **top5, "kl": found.kl, **values}
    reasons = {"cosine": "the embeddings of student and teacher differ in width"}
    return [
        dataclasses.replace(
            base,
            metric=metric,
            value=value,
            headline=metric in ("top1_agreement", "cka"),
            reason=""
            if value is not None
            else reasons.get(metric, "one of the two has no text classifier for the classes"),
        )
        for metric, value in values.items()
    ]


def _accuracies(
    correct: Bool[Tensor, " n"],
    labels: Int[Tensor, " n"],
    base: Score,
    *,
    headline: str,
    top5: Bool[Tensor, " n"] | None = None,
) -> list[Score]:
    assert base.num_classes is not None
    strata = labels.numpy()
    majority = torch.bincount(labels).max().item() / len(labels)
    found: list[tuple[str, Bool[Tensor, " n"], Int[np.ndarray, " n"] | None]] = [("top1", correct, None)]
    if top5 is not None and base.num_classes > 5:
        found.append(("top5", top5, None))
    found.append(("mean_per_class", correct, strata))
    scores = []
    for metric, hits, within in found:
        low, high = share_interval(hits.numpy(), strata=within)
        scores.append(
            dataclasses.replace(
                base.with_hits(hits.numpy()) if metric == "top1" else base,
                metric=metric,
                value=hits.double().mean().item() if within is None else mean_per_class(hits, labels),
                headline=metric == headline,
                low=low,
                high=high,
                chance=(5 if metric == "top5" else 1) / base.num_classes,
                majority=majority if metric == "top1" else None,
                num_test=len(labels),
            )
        )
    return scores


def _mean_score(values: list[float], base: Score, labels: Int[Tensor, " n"], *, metric: str, headline: str) -> Score:
    """Score the mean over folds."""
    assert base.num_classes is not None
    low, high = mean_interval(values)
    return dataclasses.replace(
        base.with_details(values=values),
        metric=metric,
        value=statistics.fmean(values),
        headline=metric == headline,
        low=max(0.0, low),
        high=min(1.0, high),
        chance=1 / base.num_classes,
        num_test=len(labels),
    )


def _chance_of_any(owned: Int[Tensor, " n"], num_captions: int, k: int) -> float:
    """Return the mean probability that k captions drawn at random hold one of an image's own."""
    counts, images = torch.unique(owned, return_counts=True)
    misses = [
        math.comb(num_captions - int(c), k) / math.comb(num_captions, k) if k <= num_captions else 0.0 for c in counts
    ]
    return 1 - sum(m * int(n) for m, n in zip(misses, images, strict=True)) / len(owned)
