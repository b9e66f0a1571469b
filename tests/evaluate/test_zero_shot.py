from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from distilclip.errors import InputError
from distilclip.evaluate.encode import Encoding
from distilclip.evaluate.zero_shot import TextClassifier, classify, text_classifier, zero_shot
from distilclip.models.clip import Clip, load_clip
from distilclip.sets.classes import templates_digest
from tests.sets.test_sets import labelled, write_images, write_labelled_tar

NAMES = ("cat", "dog", "red fox")
TEMPLATES = ("a photo of a {}.", "a {} in the snow.", "{}")


@pytest.fixture(scope="module")
def clip(tiny_clip_folder: str) -> Clip:
    return load_clip(tiny_clip_folder)


def classifier_of(weight: torch.Tensor) -> TextClassifier:
    return TextClassifier(weight=weight, scale=10.0)


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_classifier_equals_averaging_class_by_class(clip: Clip, batch_size: int) -> None:
    found = text_classifier(clip, NAMES, TEMPLATES, encoding=Encoding(batch_size=batch_size))
    for index, name in enumerate(NAMES):
        tokens = clip.tokenizer([template.replace("{}", name) for template in TEMPLATES])
        with torch.no_grad():
            naive = F.normalize(clip.encode_text(tokens).mean(0), dim=0)
        torch.testing.assert_close(found.weight[index], naive)
    assert found.scale == pytest.approx(float(clip.scale.detach()))


def test_a_repeated_template_changes_nothing(clip: Clip) -> None:
    once, twice = (text_classifier(clip, NAMES, TEMPLATES[:1] * times) for times in (1, 2))
    torch.testing.assert_close(once.weight, twice.weight)


def test_braces_in_class_names_are_letters(clip: Clip) -> None:
    assert text_classifier(clip, ["a {0} b"], ["photo of {}"]).weight.shape == (1, 16)


def test_templates_digest_is_of_their_text_and_order() -> None:
    assert templates_digest(["a {}", "b {}"]) != templates_digest(["b {}", "a {}"])
    assert templates_digest(["a {}"]) == hashlib.sha256(b"a {}\n").hexdigest()


def test_classify_by_hand() -> None:
    image = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    found = classify(image, torch.tensor([0, 0, 1]), classifier_of(torch.eye(2)))
    assert found.predictions.tolist() == [0, 1, 1]
    assert found.rank.tolist() == [0, 1, 0]
    assert found.top1 == pytest.approx(2 / 3)
    assert found.top5 == 1.0
    assert found.mean_per_class == pytest.approx((0.5 + 1) / 2)


def test_close_similarities_are_not_rounded_away() -> None:
    # An evaluator that casts cosines to integers, or to half precision, cannot tell these apart.
    weight = F.normalize(torch.tensor([[1.0, 1e-4], [1.0, 2e-4]]), dim=1)
    image = F.normalize(torch.tensor([[1.0, 1.0]]), dim=1)
    assert classify(image, torch.tensor([1]), classifier_of(weight)).top1 == 1.0


def test_permuting_classes_changes_no_score() -> None:
    generator = torch.Generator().manual_seed(0)
    image, weight = torch.randn(40, 8, generator=generator), torch.randn(6, 8, generator=generator)
    labels, order = torch.arange(40) % 6, torch.randperm(6, generator=generator)
    plain = classify(image, labels, classifier_of(weight))
    permuted = classify(image, order.argsort()[labels], classifier_of(weight[order]))
    assert torch.equal(plain.rank, permuted.rank)
    assert torch.equal(order[permuted.predictions], plain.predictions)


def test_zero_shot_of_a_folder_end_to_end(clip: Clip, tmp_path: Path) -> None:
    write_images(tmp_path / "set" / "cat", ["0.jpg", "1.jpg"])
    write_images(tmp_path / "set" / "dog", ["0.jpg"], seed=9)
    found = zero_shot(clip, f"folder:{tmp_path}/set", templates=["{}"])
    assert found.labels.tolist() == [0, 0, 1]
    assert found.top1 == pytest.approx((found.predictions == found.labels).double().mean().item())
    again = zero_shot(clip, labelled(f"folder:{tmp_path}/set"), templates=["{}"])
    assert torch.equal(found.predictions, again.predictions)


def test_sets_without_names_or_classes_are_refused(clip: Clip, tmp_path: Path) -> None:
    path = write_labelled_tar(tmp_path / "test-0.tar", ["0", "1"])
    with pytest.raises(InputError, match=r"numbers only: add .*classnames.txt"):
        zero_shot(clip, f"tar:{path}")
    pairs = write_labelled_tar(tmp_path / "pairs" / "0.tar", ["a", "b"], suffix="txt")
    with pytest.raises(InputError, match="has captions, not classes"):
        zero_shot(clip, f"pairs:{pairs}")


def test_template_without_a_place_for_the_name_is_refused(clip: Clip, tmp_path: Path) -> None:
    path = write_labelled_tar(tmp_path / "test-0.tar", ["cat", "dog"])
    with pytest.raises(InputError, match=r"has no \{\}"):
        zero_shot(clip, f"tar:{path}", templates=["a photo"])
