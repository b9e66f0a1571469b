"""Accuracies and recalls of a model on a set by CLIP_benchmark's own functions, under our names for them.

Its modules are called as they are, where numpy lets them: its `accuracy` turns an array of one element into a float,
which numpy 2.4 refuses, so top-1 and top-5 are taken from the logits that it computes.
"""

from __future__ import annotations

from typing import Any

import torch
from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval
from torch.utils.data import DataLoader, Dataset

from distilclip.data.samples import decode_image
from distilclip.data.shards import open_shard
from distilclip.evaluate.embedders import Embedder
from distilclip.evaluate.encode import Encoding
from distilclip.evaluate.protocol import Protocol
from distilclip.models.clip import Clip
from distilclip.sets.dataset import EvaluationSet, ImageRef, LabelledSet, PairSet

RECALL_AT = [1, 5, 10]


class Pictures(Dataset):
    """A set as CLIP_benchmark's data loaders give it: preprocessed images with their targets."""

    def __init__(self, clip: Clip, images: tuple[ImageRef, ...], targets: list[Any]) -> None:
        self.clip, self.images, self.targets = clip, images, targets
        self.shards = {uri: open_shard(uri) for uri in {image.uri for image in images}}

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, Any]:
        image = self.images[row]
        data = self.shards[image.uri].read(image.offset, image.size).image
        assert data is not None
        return self.clip.preprocess(decode_image(data)), self.targets[row]


def by_clip_benchmark(clip: Clip, dataset: EvaluationSet, *, batch_size: int = 64) -> dict[str, float]:
    """Top-1, top-5 (of more than five classes) and mean per class of a labelled set, recalls of a set of pairs."""
    if isinstance(dataset, LabelledSet):
        return _accuracies(clip, dataset, batch_size)
    assert isinstance(dataset, PairSet)
    return _recalls(clip, dataset, batch_size)


def by_distilclip(clip: Clip, dataset: EvaluationSet) -> dict[str, float]:
    """The same by this package's protocol."""
    scores = Protocol(tasks=("zero-shot", "retrieval")).measure(Embedder(clip, Encoding()), dataset)
    return {score.metric: score.value for score in scores if score.value is not None}


def _accuracies(clip: Clip, dataset: LabelledSet, batch_size: int) -> dict[str, float]:
    templates = [template.replace("{}", "{c}") for template in dataset.templates]
    names = list(dataset.classes.names)
    weight = zeroshot_classification.zero_shot_classifier(
        clip.model, clip.tokenizer, names, templates, "cpu", amp=False
    )
    loader = DataLoader(Pictures(clip, dataset.test.images, dataset.test.labels.tolist()), batch_size=batch_size)
    logits, target = zeroshot_classification.run_classification(clip.model, weight, loader, "cpu", amp=False)
    right = logits.topk(min(5, len(names)), dim=1).indices == target[:, None]
    recall = zeroshot_classification.balanced_accuracy_score(target, logits.argmax(dim=1))
    found = {"top1": right[:, 0].double().mean().item(), "mean_per_class": float(recall)}
    return {**found, "top5": right.any(dim=1).double().mean().item()} if len(names) > 5 else found


def _recalls(clip: Clip, dataset: PairSet, batch_size: int) -> dict[str, float]:
    captions: list[list[str]] = [[] for _ in dataset.images]
    for caption, image in zip(dataset.captions, dataset.image_of_text, strict=True):
        captions[image].append(caption)

    def collate(batch: list[Any]) -> tuple[torch.Tensor, list[list[str]]]:
        return torch.stack([image for image, _ in batch]), [own for _, own in batch]

    loader = DataLoader(Pictures(clip, dataset.images, captions), batch_size=batch_size, collate_fn=collate)
    found = zeroshot_retrieval.evaluate(clip.model, loader, clip.tokenizer, "cpu", amp=False, recall_k_list=RECALL_AT)
    ways = {"image_to_text": "text_retrieval", "text_to_image": "image_retrieval"}
    return {f"{ours}_r{k}": found[f"{theirs}_recall@{k}"] for ours, theirs in ways.items() for k in RECALL_AT}
