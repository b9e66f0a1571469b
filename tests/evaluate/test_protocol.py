from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from distilclip.errors import InputError
from distilclip.evaluate.embedders import Embedder
from distilclip.evaluate.encode import Encoding, Output, encode_images, encode_texts
from distilclip.evaluate.protocol import Protocol, View
from distilclip.measures.probe import linear_probe
from distilclip.models.clip import Clip, load_clip
from distilclip.sets.dataset import EvaluationSet, LabelledSet, MissingSet, PairSet
from distilclip.sets.open import load_set
from distilclip.sets.score import Score
from tests.conftest import encoded, picture, write_tar
from tests.sets.test_sets import labelled, paired, write_images, write_labelled_tar


@pytest.fixture(scope="module")
def clip(tiny_clip_folder: str) -> Clip:
    return load_clip(tiny_clip_folder)


@pytest.fixture
def colours(tmp_path: Path) -> str:
    """A set that any backbone can probe: plain dark and plain light pictures, 8 to train on and 4 to test of each."""
    for split, count in (("train", 8), ("test", 4)):
        members = []
        for number in range(2 * count):
            shade = (number % 2) * 160 + 3 * number
            image = encoded(picture(number).point(lambda _, shade=shade: shade))
            members += [(f"{number:02}.jpg", image), (f"{number:02}.cls", b"dark" if number % 2 == 0 else b"light")]
        write_tar(tmp_path / "colours" / f"{split}-0.tar", members)
    return f"tar:{tmp_path}/colours"


def measure(clip: Clip, dataset: EvaluationSet, *, teacher: View | None = None, **options: Any) -> list[Score]:
    """Scores by a protocol with these options."""
    return Protocol(**options).measure(embedder(clip), dataset, teacher=teacher)


def view(clip: Clip, dataset: LabelledSet | PairSet) -> View:
    return Protocol().view(embedder(clip), dataset)


def embedder(clip: Clip) -> Embedder:
    return Embedder(clip, Encoding())


def by_metric(scores: list[Score]) -> dict[tuple[str, str], Score]:
    return {(score.task, score.metric): score for score in scores}


def test_a_labelled_set_has_all_its_tasks(clip: Clip, colours: str) -> None:
    dataset = labelled(colours)
    found = by_metric(measure(clip, dataset, teacher=view(clip, dataset)))
    assert found["linear-probe", "top1"].value == 1.0
    assert found["linear-probe", "top1"].details["features"] == "backbone"
    assert found["linear-probe", "top1"].details["l2"] in [
        l2 for l2, _ in found["linear-probe", "top1"].details["sweep"]
    ]
    assert found["zero-shot", "top1"].chance == 0.5
    assert found["zero-shot", "top1"].majority == 0.5
    assert found["zero-shot", "top1"].num_test == 8
    assert found["agreement", "top1_agreement"].value == 1.0
    assert found["agreement", "cosine"].value == pytest.approx(1)
    assert ("zero-shot", "top5") not in found  # of two classes it would always be 1
    assert [key for key, score in found.items() if score.headline] == [
        ("zero-shot", "top1"),
        ("linear-probe", "top1"),
        ("agreement", "top1_agreement"),
        ("agreement", "cka"),
    ]


@pytest.mark.parametrize(("features", "output"), [("backbone", "backbone"), ("projected", "embedding")])
def test_probe_equals_one_fitted_on_features_taken_by_hand(
    clip: Clip, colours: str, features: Literal["backbone", "projected"], output: Output
) -> None:
    dataset = labelled(colours)
    assert dataset.train is not None
    train, test = (
        encode_images(clip, s.images, outputs=(output,)).features[output] for s in (dataset.train, dataset.test)
    )
    by_hand = linear_probe(train, torch.from_numpy(dataset.train.labels), test, torch.from_numpy(dataset.test.labels))
    found = by_metric(measure(clip, dataset, tasks=("linear-probe",), probe_features=features))
    assert found["linear-probe", "top1"].details["l2"] == by_hand.l2
    assert found["linear-probe", "top1"].value == by_hand.accuracy


def test_a_given_penalty_is_used_without_a_sweep(clip: Clip, colours: str) -> None:
    found = by_metric(measure(clip, labelled(colours), tasks=("linear-probe",), probe_l2=0.5))
    assert found["linear-probe", "top1"].details["l2"] == 0.5
    assert found["linear-probe", "top1"].details["sweep"] == []


def test_a_probe_that_cannot_be_is_a_row_with_a_reason(clip: Clip, tmp_path: Path) -> None:
    write_labelled_tar(tmp_path / "a" / "test-0.tar", ["cat", "dog"])
    (probe,) = measure(clip, labelled(f"tar:{tmp_path}/a"), tasks=("linear-probe",))
    assert probe.value is None
    assert probe.reason == "the set has no training images"
    write_labelled_tar(tmp_path / "a" / "train-0.tar", ["cat", "dog"])
    (probe,) = measure(clip, labelled(f"tar:{tmp_path}/a"), tasks=("linear-probe",))
    assert probe.value is None
    assert "give --probe-l2" in probe.reason


def test_unnamed_classes_have_no_zero_shot_but_a_reason(clip: Clip, tmp_path: Path) -> None:
    dataset = labelled(f"tar:{write_labelled_tar(tmp_path / 'test-0.tar', ['0', '1', '1'])}")
    found = by_metric(measure(clip, dataset, tasks=("zero-shot", "agreement"), teacher=view(clip, dataset)))
    assert found["zero-shot", "top1"].value is None
    assert "classnames.txt" in found["zero-shot", "top1"].reason
    assert found["agreement", "top1_agreement"].value is None
    assert found["agreement", "cka"].value == pytest.approx(1)


def test_retrieval_of_a_pair_set_equals_ranks_by_hand(clip: Clip, tmp_path: Path) -> None:
    members = []
    for number in range(6):
        captions = [f"picture number {number}", f"image {number} of six"][: 1 + number % 2]
        members += [(f"{number}.jpg", encoded(picture(number)))]
        members += [(f"{number}.json", json.dumps({"captions": captions}).encode())]
    dataset = paired(f"pairs:{write_tar(tmp_path / 'a.tar', members)}")
    found = by_metric(measure(clip, dataset))
    scores = encode_images(clip, dataset.images).embedding @ encode_texts(clip, dataset.captions).T
    hits = [dataset.image_of_text[scores[i].argmax()] == i for i in range(6)]
    assert found["retrieval", "image_to_text_r1"].value == pytest.approx(sum(hits) / 6)
    assert found["retrieval", "image_to_text_r1"].num_test == 6
    assert found["retrieval", "text_to_image_r1"].num_test == 9
    assert found["retrieval", "text_to_image_r5"].chance == pytest.approx(5 / 6)
    # Half the images own one of nine captions, half own two.
    assert found["retrieval", "image_to_text_r1"].chance == pytest.approx((1 / 9 + 2 / 9) / 2)
    assert found["retrieval", "image_to_text_r10"].chance == 1.0


def test_unreadable_images_leave_with_their_captions_and_are_counted(clip: Clip, tmp_path: Path) -> None:
    members = []
    for number in range(4):
        image = b"broken" if number == 1 else encoded(picture(number))
        members += [(f"{number}.jpg", image), (f"{number}.txt", f"picture {number}".encode())]
    dataset = paired(f"pairs:{write_tar(tmp_path / 'a.tar', members)}")
    with pytest.raises(InputError, match=r"a\.tar: 1: not an image"):
        measure(clip, dataset)
    found = by_metric(measure(clip, dataset, on_error="skip", max_bad_ratio=0.3))
    for metric in ("image_to_text_r1", "text_to_image_r1"):
        assert found["retrieval", metric].num_test == 3
        assert found["retrieval", metric].num_unreadable == 1
    readable = paired(f"pairs:{write_tar(tmp_path / 'b.tar', members[:2] + members[4:])}")
    alone = by_metric(measure(clip, readable))
    assert {key: score.value for key, score in found.items()} == {key: score.value for key, score in alone.items()}


def test_only_the_asked_tasks_are_measured(clip: Clip, colours: str) -> None:
    assert {score.task for score in measure(clip, load_set(colours), tasks=("zero-shot",))} == {"zero-shot"}


def test_templates_replace_the_sets_own_and_are_recorded(clip: Clip, tmp_path: Path) -> None:
    write_images(tmp_path / "cat", ["0.jpg"])
    write_images(tmp_path / "dog", ["0.jpg"])
    dataset = labelled(f"folder:{tmp_path}")
    own, same, other = (
        measure(clip, dataset, tasks=("zero-shot",), templates=templates)[0].details
        for templates in (None, dataset.templates, ("{}",))
    )
    assert own["templates_digest"] == same["templates_digest"] != other["templates_digest"]
    assert [details["own_templates"] for details in (own, same, other)] == [False, False, True]


def test_class_names_are_recorded_by_their_digest(clip: Clip, tmp_path: Path) -> None:
    write_images(tmp_path / "cat", ["0.jpg"])
    write_images(tmp_path / "dog", ["0.jpg"])
    digests = []
    for names in ("cat\ndog\n", "cat\ttabby\ndog\n"):
        (tmp_path / "classnames.txt").write_text(names)
        (score, *_) = measure(clip, labelled(f"folder:{tmp_path}"), tasks=("zero-shot",))
        digests.append(score.details["classes_digest"])
    assert digests[0] != digests[1]


def test_several_folds_are_averaged(clip: Clip, colours: str) -> None:
    dataset = labelled(colours)
    folds = (np.arange(0, 8), np.arange(4, 12), np.arange(8, 16))
    found = by_metric(measure(clip, dataclasses.replace(dataset, folds=folds), tasks=("linear-probe",)))
    score = found["linear-probe", "top1"]
    assert len(score.details["values"]) == len(score.details["l2"]) == 3
    assert score.value == pytest.approx(np.mean(score.details["values"]))
    assert score.low is not None
    assert score.high is not None
    assert score.low <= score.value <= score.high


def test_one_caption_an_image_is_a_protocol_of_its_own(clip: Clip, tmp_path: Path) -> None:
    members = []
    for number in range(4):
        members += [(f"{number}.jpg", encoded(picture(number)))]
        members += [(f"{number}.json", json.dumps({"captions": [f"first {number}", f"second {number}"]}).encode())]
    dataset = paired(f"pairs:{write_tar(tmp_path / 'a.tar', members)}")
    found = by_metric(measure(clip, dataset, captions="first", caption_prefix="a photo of "))
    assert found["retrieval", "text_to_image_r1"].num_test == 4
    assert found["retrieval", "text_to_image_r1"].details == {
        "captions": "first",
        "caption_prefix": "a photo of ",
        "num_captions": 4,
    }
    image = encode_images(clip, dataset.images).embedding
    text = encode_texts(clip, [f"a photo of first {number}" for number in range(4)])
    hits = (text @ image.T).argmax(dim=1) == torch.arange(4)
    assert found["retrieval", "text_to_image_r1"].value == pytest.approx(hits.double().mean().item())


def test_a_set_that_is_missing_keeps_its_rows(clip: Clip) -> None:
    missing = MissingSet(name="pets", reason="not found under data", kind="labelled", has_train=True)
    found = measure(clip, missing)
    assert [(s.task, s.value, s.reason, s.headline) for s in found] == [
        ("zero-shot", None, "not found under data", True),
        ("linear-probe", None, "not found under data", True),
    ]
    assert [s.task for s in measure(clip, dataclasses.replace(missing, has_train=False))] == ["zero-shot"]
    assert [s.task for s in measure(clip, dataclasses.replace(missing, kind="pairs", has_train=False))] == ["retrieval"]
