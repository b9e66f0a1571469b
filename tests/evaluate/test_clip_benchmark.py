"""The same model on the same set by CLIP_benchmark's own functions and by ours: equal to 1e-6.

Its modules are called as they are, where numpy lets them: its `accuracy` turns an array of one element into a float,
which numpy 2.4 refuses, so top-1 and top-5 are taken from the logits that it computes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from distilclip.data.samples import decode_image
from distilclip.evaluate.dataset import EvaluationSet, ImageRef, LabelledSet, PairSet
from distilclip.evaluate.embedders import ModelEmbedder
from distilclip.evaluate.encode import Encoding
from distilclip.evaluate.protocol import Protocol
from distilclip.evaluate.sets import load_set
from distilclip.models.clip import Clip, load_clip
from tests.conftest import encoded, picture, write_tar
from tests.evaluate import made_sets

classification = pytest.importorskip("clip_benchmark.metrics.zeroshot_classification")
retrieval = pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval")

CLASSES = ["circle", "square", "triangle", "star", "heart", "moon", "cross"]
TEMPLATES = ["a photo of a {c}.", "a drawing of the {c}.", "{c}"]


class Pictures(Dataset):
    """A set as CLIP_benchmark's data loaders give it: preprocessed images with their targets."""

    def __init__(self, clip: Clip, images: tuple[ImageRef, ...], targets: list[Any], classes: list[str]) -> None:
        self.clip, self.images, self.targets, self.classes = clip, images, targets, classes

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, Any]:
        from distilclip.data.shards import open_shard

        image = self.images[row]
        data = open_shard(image.uri).read(image.offset, image.size).image
        assert data is not None
        return self.clip.preprocess(decode_image(data)), self.targets[row]


@pytest.fixture(scope="module")
def clip(tiny_clip_folder: str) -> Clip:
    return load_clip(tiny_clip_folder)


def ours(clip: Clip, dataset: EvaluationSet) -> dict[str, float]:
    scores = Protocol(tasks=("zero-shot", "retrieval")).measure(ModelEmbedder(clip, Encoding()), dataset).scores
    return {score.metric: score.value for score in scores if score.value is not None}


def test_zero_shot_accuracies_are_equal(clip: Clip, tmp_path: Path) -> None:
    made_sets.write_webdataset(tmp_path / "shapes", CLASSES, TEMPLATES, count=6)
    dataset = load_set(f"tar:{tmp_path}/shapes")
    assert isinstance(dataset, LabelledSet)
    pictures = Pictures(clip, dataset.test.images, dataset.test.labels.tolist(), CLASSES)
    loader = DataLoader(pictures, batch_size=8)
    weight = classification.zero_shot_classifier(clip.model, clip.tokenizer, CLASSES, TEMPLATES, "cpu", amp=False)
    logits, target = classification.run_classification(clip.model, weight, loader, "cpu", amp=False)
    top5 = logits.topk(5, dim=1).indices
    found = ours(clip, dataset)
    assert found["top1"] == pytest.approx((top5[:, 0] == target).double().mean().item(), abs=1e-6)
    assert found["top5"] == pytest.approx((top5 == target[:, None]).any(dim=1).double().mean().item(), abs=1e-6)
    recall = classification.balanced_accuracy_score(target, logits.argmax(dim=1))
    assert found["mean_per_class"] == pytest.approx(recall, abs=1e-6)
    assert 0 < found["top1"] < 1  # an answer that both could get wrong


def test_recalls_are_equal_whatever_the_number_of_captions(clip: Clip, tmp_path: Path) -> None:
    captions = [
        [f"picture {number} is {word}" for word in ("red", "blue", "old")[: 1 + number % 3]] for number in range(24)
    ]
    members = []
    for number, own in enumerate(captions):
        members += [(f"{number:02}.jpg", encoded(picture(number)))]
        members += [(f"{number:02}.json", json.dumps({"captions": own}).encode())]
    dataset = load_set(f"pairs:{write_tar(tmp_path / 'a.tar', members)}")
    assert isinstance(dataset, PairSet)
    pictures = Pictures(clip, dataset.images, captions, [])

    def collate(batch: list[Any]) -> tuple[torch.Tensor, list[list[str]]]:
        return torch.stack([image for image, _ in batch]), [own for _, own in batch]

    loader = DataLoader(pictures, batch_size=5, collate_fn=collate)
    theirs = retrieval.evaluate(clip.model, loader, clip.tokenizer, "cpu", amp=False, recall_k_list=[1, 5, 10])
    found = ours(clip, dataset)
    for k in (1, 5, 10):
        assert found[f"text_to_image_r{k}"] == pytest.approx(theirs[f"image_retrieval_recall@{k}"], abs=1e-6)
        assert found[f"image_to_text_r{k}"] == pytest.approx(theirs[f"text_retrieval_recall@{k}"], abs=1e-6)
    assert len(np.unique(list(found.values()))) > 2
