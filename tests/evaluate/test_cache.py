from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distilclip.data.bad_samples import ErrorPolicy
from distilclip.errors import InputError
from distilclip.evaluate.cache import FeatureCache, images_digest
from distilclip.evaluate.embedders import Embedder
from distilclip.evaluate.encode import Encoding, ImageFeatures, Output, encode_images
from distilclip.evaluate.zero_shot import text_classifier
from distilclip.models.clip import Clip, create_clip, load_clip
from distilclip.sets.dataset import ImageRef
from tests.conftest import TINY_CLIP, encoded, picture


@pytest.fixture
def refs(tmp_path: Path) -> list[ImageRef]:
    found = []
    for number in range(4):
        path = tmp_path / f"{number}.jpg"
        path.write_bytes(encoded(picture(number)))
        found.append(ImageRef(uri=str(path)))
    return found


@pytest.fixture
def clip(tiny_clip_folder: str) -> Clip:
    return load_clip(tiny_clip_folder)


def images(
    model: Embedder, refs: Sequence[ImageRef], *outputs: Output, policy: ErrorPolicy | None = None
) -> ImageFeatures:
    return model.image_features(refs, outputs or ("embedding",), policy=policy or ErrorPolicy(), name="x")


def test_what_is_read_equals_what_was_encoded(
    clip: Clip, refs: list[ImageRef], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Embedder(clip, Encoding(), FeatureCache(str(tmp_path / "cache")))
    first = images(model, refs, "embedding", "backbone")
    monkeypatch.setattr("distilclip.evaluate.embedders.encode_images", None)  # a second forward would fail
    monkeypatch.setattr("distilclip.evaluate.embedders.text_classifier", None)
    again = images(model, refs, "embedding", "backbone")
    assert torch.equal(first.rows, again.rows)
    for output in ("embedding", "backbone"):
        assert torch.equal(first.features[output], again.features[output])
    assert torch.equal(images(model, refs, "embedding").embedding, first.embedding)


def test_only_the_missing_output_is_computed(
    clip: Clip, refs: list[ImageRef], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Embedder(clip, Encoding(), FeatureCache(str(tmp_path / "cache")))
    images(model, refs, "embedding")
    asked = []

    def spy(*args: object, outputs: Sequence[Output], **kwargs: object) -> ImageFeatures:
        asked.append(list(outputs))
        return encode_images(*args, outputs=outputs, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr("distilclip.evaluate.embedders.encode_images", spy)
    both = images(model, refs, "embedding", "backbone")
    assert asked == [["backbone"]]
    assert set(both.features) == {"embedding", "backbone"}


def test_other_weights_precision_or_files_are_encoded_anew(
    clip: Clip, refs: list[ImageRef], tmp_path: Path, tiny_clip_json: str
) -> None:
    folder = tmp_path / "cache"
    cache = FeatureCache(str(folder))
    for model in (
        Embedder(clip, Encoding(), cache),
        Embedder(create_clip(tiny_clip_json, seed=1), Encoding(), cache),
        Embedder(clip, Encoding(dtype=torch.bfloat16), cache),
    ):
        images(model, refs)
    assert len(os.listdir(folder)) == 3
    model = Embedder(clip, Encoding(batch_size=2, num_workers=0), cache)
    images(model, refs)
    assert len(os.listdir(folder)) == 3  # the batch size is no part of the features
    Path(refs[2].uri).write_bytes(encoded(picture(99, (48, 48))))
    changed = images(model, refs)
    assert len(os.listdir(folder)) == 4
    assert torch.equal(changed.embedding, encode_images(clip, refs, encoding=Encoding(batch_size=2)).embedding)


def test_unreadable_images_are_judged_again_each_time(clip: Clip, refs: list[ImageRef], tmp_path: Path) -> None:
    Path(refs[1].uri).write_bytes(b"broken")
    model = Embedder(clip, Encoding(), FeatureCache(str(tmp_path / "cache")))
    first = images(model, refs, policy=ErrorPolicy("skip", 0.5))
    again = images(model, refs, policy=ErrorPolicy("skip", 0.5))
    assert first.unreadable == again.unreadable == ((1, "not an image"),)
    assert again.rows.tolist() == [0, 2, 3]
    with pytest.raises(InputError, match=r"1\.jpg: not an image"):
        images(model, refs)
    with pytest.raises(InputError, match="over the budget"):
        images(model, refs, policy=ErrorPolicy("skip", 0.1))


def test_classifiers_are_kept_by_names_and_templates(clip: Clip, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    model = Embedder(clip, Encoding(), FeatureCache(str(folder)))
    first = model.classifier(["cat", "dog"], ["a {}."])
    again = model.classifier(["cat", "dog"], ["a {}."])
    other = model.classifier(["cat"], ["dog", "a {}."])
    assert torch.equal(first.weight, again.weight)
    assert first.scale == again.scale
    assert len(other.weight) == 1
    assert len(os.listdir(folder)) == 2


def test_a_file_of_another_key_in_its_place_is_not_used(tmp_path: Path) -> None:
    cache = FeatureCache(str(tmp_path))
    cache.tensors(["a"], lambda: {"x": torch.zeros(1)}, key={"model": "m"})
    (name,) = os.listdir(tmp_path)
    content = (tmp_path / name).read_bytes().replace(b'"model":"m"', b'"model":"n"')
    (tmp_path / name).write_bytes(content)
    assert cache.tensors(["a"], lambda: {"x": torch.ones(1)}, key={"model": "m"})["x"] == 1


def test_images_in_memory_are_known_by_their_pixels() -> None:
    pixels = np.zeros((4, 4, 3), np.uint8)
    one, same, other = (ImageRef(uri="a", pixels=p) for p in (pixels, pixels.copy(), pixels + 1))
    assert images_digest([one]) == images_digest([same]) != images_digest([other])
    assert json.dumps(images_digest([one]))


def test_equal_weights_in_another_architecture_are_another_model(refs: list[ImageRef], tmp_path: Path) -> None:
    cache = FeatureCache(str(tmp_path / "cache"))
    clips = [create_clip(json.dumps({**TINY_CLIP, "quick_gelu": quick}), seed=1) for quick in (False, True)]
    plain, quick = (Embedder(clip, Encoding(), cache) for clip in clips)
    assert plain.digest == quick.digest
    assert plain.identity != quick.identity
    for model, clip in zip((plain, quick), clips, strict=True):
        assert torch.equal(images(model, refs).embedding, encode_images(clip, refs).embedding)
        found = model.classifier(["cat"], ["a {}."])
        assert torch.equal(found.weight, text_classifier(clip, ["cat"], ["a {}."]).weight)
    assert not torch.equal(images(plain, refs).embedding, images(quick, refs).embedding)


def test_a_file_is_looked_at_once_for_all_models(
    clip: Clip, refs: list[ImageRef], tmp_path: Path, tiny_clip_json: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_at: Counter[str] = Counter()
    stat = os.stat

    def counted(path: Any, **options: Any) -> os.stat_result:
        looked_at[str(path)] += 1
        return stat(path, **options)

    monkeypatch.setattr(os, "stat", counted)
    cache = FeatureCache(str(tmp_path / "cache"))
    split = tuple(refs)
    for own in (clip, create_clip(tiny_clip_json, seed=1)):
        images(Embedder(own, Encoding(), cache), split)
    assert {ref.uri: looked_at[ref.uri] for ref in refs} == {ref.uri: 1 for ref in refs}


def test_a_missing_file_is_no_state_of_one(tmp_path: Path) -> None:
    path = tmp_path / "0.jpg"
    absent = images_digest([ImageRef(uri=str(path))])
    path.write_bytes(b"")
    assert images_digest([ImageRef(uri=str(path))]) != absent


def test_a_reference_takes_no_dictionary() -> None:
    assert not hasattr(ImageRef(uri="a"), "__dict__")  # of ImageNet's training images there are 1.3 million
