from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from distilclip.evaluate import wording
from distilclip.evaluate.embedders import Embedder
from distilclip.evaluate.encode import Encoding, encode_images
from distilclip.evaluate.wording import describe_spread, measure_spread, measure_unlikeness, unlikeness
from distilclip.evaluate.wording_notes import list_wording_warnings, note_wording
from distilclip.evaluate.zero_shot import zero_shot
from distilclip.models.clip import load_clip
from distilclip.sets.score import Score
from tests.sets.test_sets import labelled, write_images


@pytest.fixture(scope="module")
def model(tiny_clip_folder: str) -> Embedder:
    return Embedder(load_clip(tiny_clip_folder), Encoding())


def unit(seed: int, count: int) -> torch.Tensor:
    return F.normalize(torch.randn(count, 5, generator=torch.Generator().manual_seed(seed)).double(), dim=1)


# How unlike captions prompts are


@pytest.mark.parametrize("num_captions", [2, 3, 40])
def test_unlikeness_equals_counting_pairs(num_captions: int) -> None:
    prompts, captions = unit(0, 30), unit(1, num_captions)
    prompts[:2] = captions[:2]
    pairs = []
    for prompt in prompts:
        near = max(float(prompt @ caption) for caption in captions)
        for row, caption in enumerate(captions):
            own = max(float(caption @ other) for i, other in enumerate(captions) if i != row)
            pairs.append(1.0 if near < own else 0.5 if near == own else 0.0)
    assert unlikeness(prompts, captions) == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)


def test_unlikeness_by_hand() -> None:
    angles = torch.deg2rad(torch.tensor([0.0, 10.0, 30.0]))  # nearest others: 10, 10 and 20 degrees away
    captions = torch.stack([angles.cos(), angles.sin()], dim=1)
    for degrees, expected in ((5.0, 0.0), (45.0, 2 / 3), (90.0, 1.0)):
        angle = torch.deg2rad(torch.tensor([degrees]))
        assert unlikeness(torch.stack([angle.cos(), angle.sin()], dim=1), captions) == pytest.approx(expected)


def test_prompts_that_are_drawn_as_captions_are_have_a_half() -> None:
    assert unlikeness(unit(2, 1000), unit(3, 1000)) == pytest.approx(0.5, abs=0.05)


def test_a_single_caption_says_nothing() -> None:
    assert unlikeness(unit(0, 3), unit(1, 1)) == 0.5


def test_order_and_repetition_of_captions_change_nothing(model: Embedder) -> None:
    captions = [f"picture of {i}" for i in range(20)]
    values = {
        measure_unlikeness(model, ["cat", "dog"], templates=["a {}"], captions=given)
        for given in (captions, captions * 3)
    }
    assert len(values) == 1


def test_many_prompts_and_captions_are_sampled_evenly(monkeypatch: pytest.MonkeyPatch, model: Embedder) -> None:
    monkeypatch.setattr(wording, "NUM_COMPARED", 4)
    captions = [f"picture of {i}" for i in range(16)]
    found = measure_unlikeness(model, list("abcdefgh"), templates=["a {}"], captions=captions)
    fewer = measure_unlikeness(model, list("aceg"), templates=["a {}"], captions=captions[::4])
    assert found == fewer


# The spread over templates


def test_the_spread_equals_zero_shot_with_each_template_alone(model: Embedder, tmp_path: Path) -> None:
    for seed, name in enumerate(("cat", "dog", "red fox")):
        write_images(tmp_path / "set" / name, [f"{i}.jpg" for i in range(4)], seed=9 * seed)
    dataset = labelled(f"folder:{tmp_path}/set")
    images = encode_images(model.clip, dataset.test.images)
    labels = torch.from_numpy(dataset.test.labels)[images.rows]
    names = dataset.classes.names
    found = measure_spread(model, names, images.embedding, labels, templates=["the {} there", "{}"])
    assert list(found) == ["the {} there", "{}", "a photo of a {}."]
    for template, top1 in found.items():
        assert zero_shot(model.clip, dataset, templates=[template]).top1 == top1


def test_a_spread_names_its_ends() -> None:
    record = describe_spread({"a {}": 0.5, "{}": 0.25, "the {}": 0.75})
    assert record.pop("top1") == {"a {}": 0.5, "{}": 0.25, "the {}": 0.75}
    assert record == {"min": 0.25, "min_template": "{}", "max": 0.75, "max_template": "the {}"}


# What is said of it


def score(model: str, value: float, *, top1: dict[str, float], unlike: float | None = None) -> Score:
    details = {"template_spread": describe_spread(top1)}
    if unlike is not None:
        details["prompts_unlike_captions"] = unlike  # type: ignore[assignment]
    return Score(model=model, set="shapes", task="zero-shot", metric="top1", value=value, details=details)


def test_notes_name_the_spread_of_every_model() -> None:
    scores = [
        score("a", 0.267, top1={"{}": 0.415, "a {}": 0.267}, unlike=0.97),
        score("b", 0.3, top1={"{}": 0.44, "a {}": 0.3}, unlike=0.5),
    ]
    assert note_wording(scores) == [
        "shapes: top-1 with each of 2 templates alone: a 26.7 ('a {}') to 41.5 ('{}'), b 30.0 ('a {}') to 44.0 ('{}').",
        "shapes: prompts unlike the training captions (0.5 as those are, 1 most): a 0.97, b 0.50.",
    ]
    assert note_wording([Score(set="pets", task="zero-shot", metric="top1", value=0.5)]) == []


def test_far_prompts_are_warned_of_with_the_remedy_that_there_is() -> None:
    scores = [
        score("a", 0.2, top1={"{}": 0.2}, unlike=0.97),
        score("b", 0.2, top1={"{}": 0.2}, unlike=0.89),
    ]
    (warning,) = list_wording_warnings(scores, templates_files={"shapes": "out/templates/shapes.txt"})
    assert "97% of the time for a. Give --templates learned, or edit out/templates/shapes.txt" in warning
    (warning,) = list_wording_warnings(scores, templates_files={})
    assert warning.endswith("one a line, and give --templates FILE.")


def test_an_order_of_models_that_depends_on_the_template_is_warned_of() -> None:
    same = [score("a", 0.30, top1={"{}": 0.5, "a {}": 0.3}), score("b", 0.29, top1={"{}": 0.49, "a {}": 0.29})]
    assert list_wording_warnings(same, templates_files={}) == []  # a is first with every template
    (warning,) = list_wording_warnings([same[0], score("b", 0.29, top1={"{}": 0.54, "a {}": 0.29})], templates_files={})
    assert "with '{}' alone, b is 4.0 above a." in warning
    assert "by up to 25.0, while the models lie 1.0 apart" in warning
    far_apart = [score("a", 0.9, top1={"{}": 0.5}), score("b", 0.1, top1={"{}": 0.6})]
    assert list_wording_warnings(far_apart, templates_files={}) == []
    assert list_wording_warnings(same[:1], templates_files={}) == []
