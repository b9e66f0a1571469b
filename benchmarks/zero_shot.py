"""What evaluation costs beyond the forward pass: ImageNet-sized zero-shot, and COCO-sized retrieval both ways."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from _harness import Case, compare, is_quick
from torch.nn.functional import normalize

from distilclip.evaluate.scores import RECALL_AT, retrieval_scores, zero_shot_scores
from distilclip.evaluate.zero_shot import TextClassifier, classify
from distilclip.measures.retrieval import retrieval
from distilclip.sets.score import Score

DIM = 512


@dataclass(frozen=True)
class Labelled:
    image: torch.Tensor
    labels: torch.Tensor
    weight: torch.Tensor


@dataclass(frozen=True)
class Paired:
    image: torch.Tensor
    text: torch.Tensor
    image_of_text: torch.Tensor


def made_labelled(num_images: int, num_classes: int) -> Labelled:
    """Images around their class's text, so near that about two thirds are right."""
    random = torch.Generator().manual_seed(0)
    weight = normalize(torch.randn(num_classes, DIM, generator=random), dim=1)
    labels = torch.randint(num_classes, (num_images,), generator=random)
    noise = torch.randn(num_images, DIM, generator=random) / DIM**0.5
    return Labelled(normalize(weight[labels] + 6 * noise, dim=1), labels, weight)


def made_pairs(num_images: int, captions_each: int) -> Paired:
    random = torch.Generator().manual_seed(0)
    image = normalize(torch.randn(num_images, DIM, generator=random), dim=1)
    image_of_text = torch.arange(num_images).repeat_interleave(captions_each)
    noise = torch.randn(len(image_of_text), DIM, generator=random) / DIM**0.5
    return Paired(image, normalize(image[image_of_text] + 6 * noise, dim=1), image_of_text)


def zero_shot_ours(inputs: Labelled) -> dict[str, float]:
    """Ranks, and every score with its interval and baselines, as the stage writes them."""
    found = classify(inputs.image, inputs.labels, TextClassifier(weight=inputs.weight, scale=100.0))
    base = Score(set="x", task="zero-shot", metric="", value=None, num_classes=len(inputs.weight))
    return values(zero_shot_scores(found, base, headline="top1"))


def zero_shot_peer(inputs: Labelled) -> dict[str, float]:
    """As open_clip's script does: logits and their five largest, batch by batch; no intervals."""
    right = torch.zeros(5, dtype=torch.long)
    hit = torch.zeros(len(inputs.labels), dtype=torch.bool)
    for rows in torch.arange(len(inputs.labels)).split(256):
        logits = 100.0 * inputs.image[rows] @ inputs.weight.T
        correct = logits.topk(5, dim=1).indices == inputs.labels[rows, None]
        right += correct.cumsum(dim=1).sum(dim=0)
        hit[rows] = correct[:, 0]
    per_class = [hit[inputs.labels == k].double().mean() for k in range(len(inputs.weight))]
    total = len(inputs.labels)
    mean = torch.stack(per_class).nanmean().item()
    return {"top1": right[0].item() / total, "top5": right[4].item() / total, "mean_per_class": mean}


def retrieval_ours(inputs: Paired) -> dict[str, float]:
    found = retrieval(inputs.image, inputs.text, inputs.image_of_text)
    base = Score(set="x", task="retrieval", metric="", value=None)
    return values(retrieval_scores(found, inputs.image_of_text, base))


def retrieval_peer(inputs: Paired) -> dict[str, float]:
    """The whole matrix, and its ten largest along either side."""
    scores = inputs.text @ inputs.image.T
    text_hits = scores.topk(max(RECALL_AT), dim=1).indices == inputs.image_of_text[:, None]
    own = inputs.image_of_text[scores.T.topk(max(RECALL_AT), dim=1).indices]
    image_hits = own == torch.arange(len(inputs.image))[:, None]
    recalls = {"image_to_text": image_hits, "text_to_image": text_hits}
    return {
        f"{direction}_r{k}": hits[:, :k].any(dim=1).double().mean().item()
        for direction, hits in recalls.items()
        for k in RECALL_AT
    }


def values(scores: list[Score]) -> dict[str, float]:
    return {score.metric: score.value for score in scores if score.value is not None}


def equal(ours: dict[str, float], peer: dict[str, float]) -> bool:
    return ours.keys() == peer.keys() and all(abs(ours[name] - peer[name]) < 1e-6 for name in ours)


def zero_shot_case(num_images: int, num_classes: int) -> Case:
    return Case(
        name=f"zero-shot, {num_images:,} images x {num_classes:,} classes",
        setup=lambda: made_labelled(num_images, num_classes),
        ours=zero_shot_ours,
        peer=zero_shot_peer,
        equal=equal,
    )


def retrieval_case(num_images: int, captions_each: int) -> Case:
    return Case(
        name=f"retrieval, {num_images * captions_each:,} captions x {num_images:,} images",
        setup=lambda: made_pairs(num_images, captions_each),
        ours=retrieval_ours,
        peer=retrieval_peer,
        equal=equal,
    )


if __name__ == "__main__":
    if is_quick(__doc__ or ""):
        compare("zero_shot", [zero_shot_case(5_000, 200), retrieval_case(1_000, 5)])
    else:
        compare("zero_shot", [zero_shot_case(50_000, 1_000), retrieval_case(5_000, 5)])
