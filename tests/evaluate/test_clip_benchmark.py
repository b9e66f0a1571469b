"""The same model on the same set by CLIP_benchmark's own functions and by ours: equal to 1e-6."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distilclip.models.clip import Clip, load_clip
from distilclip.sets.open import load_set
from distilclip.stages import corpus, train
from tests.conftest import encoded, picture, write_tar
from tests.sets import made_sets
from tests.stages import made_training

pytest.importorskip("clip_benchmark")
from tests.evaluate.clip_benchmark_peer import by_clip_benchmark, by_distilclip

CLASSES = ["circle", "square", "triangle", "star", "heart", "moon", "cross"]
TEMPLATES = ["a photo of a {c}.", "a drawing of the {c}.", "{c}"]
STUDENT = {
    "embed_dim": 32,
    "vision_cfg": {"timm_model_name": "cnn_w8", "timm_pool": "max", "timm_proj": "linear", "image_size": 32},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def clip(tiny_clip_folder: str) -> Clip:
    return load_clip(tiny_clip_folder)


def test_zero_shot_accuracies_are_equal(clip: Clip, tmp_path: Path) -> None:
    made_sets.write_webdataset(tmp_path / "shapes", CLASSES, TEMPLATES, count=6)
    dataset = load_set(f"tar:{tmp_path}/shapes")
    found = by_distilclip(clip, dataset)
    assert found == pytest.approx(by_clip_benchmark(clip, dataset, batch_size=8), abs=1e-6)
    assert set(found) == {"top1", "top5", "mean_per_class"}
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
    found = by_distilclip(clip, dataset)
    assert found == pytest.approx(by_clip_benchmark(clip, dataset, batch_size=5), abs=1e-6)
    assert len(set(found.values())) > 2


@pytest.mark.slow
def test_a_checkpoint_trained_on_the_corpus_scores_the_same_on_all_its_sets(
    tmp_path: Path, tiny_clip_json: str
) -> None:
    made = tmp_path / "corpus"
    corpus.main(corpus.Config(out=str(made), num_pairs=600, num_eval=100, image_size=32, shard_size=200))
    steps = {"batch_size": 64, "num_steps": 60, "warmup_steps": 5, "checkpoint_every": 60, "learning_rate": 4e-3}
    data = (f"{made}/train/*.tar",)
    config = made_training.config(tmp_path / "out", tiny_clip_json, data=data, student=json.dumps(STUDENT), **steps)
    train.main(config)
    clip = load_clip(str(tmp_path / "out"))
    scores = {}
    for spec in ("tar:shape", "tar:colour", "tar:shape_colour_unseen", "tar:sketch", "pairs:retrieval"):
        kind, _, name = spec.partition(":")
        dataset = load_set(f"{kind}:{made}/eval/{name}")
        scores[name] = by_distilclip(clip, dataset)
        assert scores[name] == pytest.approx(by_clip_benchmark(clip, dataset), abs=1e-6)
    assert scores["colour"]["top1"] > 0.3  # of a dozen colours: it has learned something to be wrong about
