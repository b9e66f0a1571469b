from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import pytest
import torch

from distilclip.errors import InputError
from distilclip.evaluate.encode import Output, encode_images, encode_texts
from distilclip.evaluate.protocol import Protocol
from distilclip.evaluate.scores import Score
from distilclip.evaluate.sets import load_set
from distilclip.evaluate.table import build_tables, write_csv
from distilclip.models.clip import Clip, load_clip
from distilclip.ops.probe import linear_probe
from tests.conftest import encoded, picture, write_tar
from tests.evaluate.test_sets import labelled, paired, write_images, write_labelled_tar


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


def by_metric(scores: list[Score]) -> dict[tuple[str, str], Score]:
    return {(score.task, score.metric): score for score in scores}


def test_a_labelled_set_has_all_its_tasks(clip: Clip, colours: str) -> None:
    dataset = labelled(colours)
    protocol = Protocol()
    found = by_metric(protocol.measure(clip, dataset, teacher=protocol.view(clip, dataset)))
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
    found = by_metric(Protocol(tasks=("linear-probe",), probe_features=features).measure(clip, dataset))
    assert found["linear-probe", "top1"].details["l2"] == by_hand.l2
    assert found["linear-probe", "top1"].value == by_hand.accuracy


def test_a_given_penalty_is_used_without_a_sweep(clip: Clip, colours: str) -> None:
    found = by_metric(Protocol(tasks=("linear-probe",), probe_l2=0.5).measure(clip, labelled(colours)))
    assert found["linear-probe", "top1"].details["l2"] == 0.5
    assert found["linear-probe", "top1"].details["sweep"] == []


def test_a_probe_that_cannot_be_is_a_row_with_a_reason(clip: Clip, tmp_path: Path) -> None:
    write_labelled_tar(tmp_path / "a" / "test-0.tar", ["cat", "dog"])
    (probe,) = Protocol(tasks=("linear-probe",)).measure(clip, labelled(f"tar:{tmp_path}/a"))
    assert probe.value is None
    assert probe.reason == "the set has no training images"
    write_labelled_tar(tmp_path / "a" / "train-0.tar", ["cat", "dog"])
    (probe,) = Protocol(tasks=("linear-probe",)).measure(clip, labelled(f"tar:{tmp_path}/a"))
    assert probe.value is None
    assert "give --probe-l2" in probe.reason


def test_unnamed_classes_have_no_zero_shot_but_a_reason(clip: Clip, tmp_path: Path) -> None:
    dataset = labelled(f"tar:{write_labelled_tar(tmp_path / 'test-0.tar', ['0', '1', '1'])}")
    protocol = Protocol(tasks=("zero-shot", "agreement"))
    found = by_metric(protocol.measure(clip, dataset, teacher=protocol.view(clip, dataset)))
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
    found = by_metric(Protocol().measure(clip, dataset))
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
        Protocol().measure(clip, dataset)
    found = by_metric(Protocol(on_error="skip", max_bad_ratio=0.3).measure(clip, dataset))
    for metric in ("image_to_text_r1", "text_to_image_r1"):
        assert found["retrieval", metric].num_test == 3
        assert found["retrieval", metric].num_unreadable == 1
    readable = paired(f"pairs:{write_tar(tmp_path / 'b.tar', members[:2] + members[4:])}")
    alone = by_metric(Protocol().measure(clip, readable))
    assert {key: score.value for key, score in found.items()} == {key: score.value for key, score in alone.items()}


def test_only_the_asked_tasks_are_measured(clip: Clip, colours: str) -> None:
    assert {score.task for score in Protocol(tasks=("zero-shot",)).measure(clip, load_set(colours))} == {"zero-shot"}


def test_templates_replace_the_sets_own_and_are_recorded(clip: Clip, tmp_path: Path) -> None:
    write_images(tmp_path / "cat", ["0.jpg"])
    write_images(tmp_path / "dog", ["0.jpg"])
    dataset = labelled(f"folder:{tmp_path}")
    own, other = (
        Protocol(tasks=("zero-shot",), templates=templates).measure(clip, dataset)[0].details["templates_digest"]
        for templates in (None, ("{}",))
    )
    assert own != other


# Tables


def rows_of(*scores: Score, model: str = "tiny") -> list[dict[str, object]]:
    return [score.row(model=model, digest="d") for score in scores]


def test_table_shows_headlines_in_percent_and_says_what_is_missing() -> None:
    top1 = Score(set="pets", task="zero-shot", metric="top1", value=0.4567, headline=True, num_unreadable=2)
    top5 = Score(set="pets", task="zero-shot", metric="top5", value=0.9)
    absent = Score(set="food|2", task="linear-probe", metric="top1", value=None).missing(
        "the set has no training images"
    )
    zero_shot, probe = build_tables([*rows_of(top1, top5, absent), *rows_of(absent, model="other")])
    assert zero_shot.columns == ["model", "pets"]
    assert zero_shot.rows == [["tiny", "45.7"]]
    assert zero_shot.notes == ["pets: 2 images could not be read and are left out."]
    assert probe.rows == [["tiny", "-"], ["other", "-"]]
    assert probe.markdown() == (
        "## Linear probe\n\n| model | food\\|2 |\n| --- | ---: |\n| tiny | - |\n| other | - |\n\n"
        "food|2: the set has no training images.\n"
    )


def test_csv_holds_every_score_as_a_fraction() -> None:
    score = Score(set="pets", task="zero-shot", metric="top1", value=0.25, low=0.2, high=0.3, num_test=8)
    lines = write_csv(rows_of(score)).splitlines()
    assert lines[0].startswith("model,set,task,metric,value,low,high")
    assert lines[1].startswith("tiny,pets,zero-shot,top1,0.25,0.2,0.3,")
