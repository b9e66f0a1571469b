"""What is wrong with sets and models is said before or instead of a number: what, where, and what to do.

More of the same lies with what it is about: class names and folders in test_sets, archives in test_known_sets, names in
test_prompts, images in test_encode and test_protocol, weights in models/test_clip.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.datasets as torchvision
from torch.nn import functional as F

from distilclip.errors import InputError
from distilclip.evaluate.cache import FeatureCache
from distilclip.evaluate.embedders import open_embedder
from distilclip.evaluate.encode import Encoding
from distilclip.evaluate.scores import agreement_scores
from distilclip.measures.agreement import agreement
from distilclip.models.clip import CONFIG_FILE, create_clip
from distilclip.sets.catalogue import CATALOGUE
from distilclip.sets.open import load_known_set, load_set
from distilclip.sets.score import Score
from distilclip.stage_calls import build_config
from distilclip.stages.evaluate import Config, main
from tests.conftest import TINY_CLIP, encoded, picture, write_tar
from tests.sets import made_sets
from tests.sets.test_sets import write_images, write_labelled_tar


def refused(spec: str, **options: Any) -> str:
    with pytest.raises(InputError) as error:
        load_set(spec, **options)
    return str(error.value)


# Wrong folders


def test_a_folder_without_tars_says_what_it_lacks(tmp_path: Path) -> None:
    write_images(tmp_path / "pets" / "cat", ["0.jpg"])
    assert refused(f"tar:{tmp_path}/pets") == f"{tmp_path}/pets holds no .tar file."
    assert "holds no .tar or .parquet or .csv or .tsv file" in refused(f"pairs:{tmp_path}/pets")


@pytest.mark.parametrize("kind", ["tar", "pairs"])
def test_a_pattern_that_nothing_matches_is_named(kind: str, tmp_path: Path) -> None:
    assert f"{tmp_path}/absent-*.tar" in refused(f"{kind}:{tmp_path}/absent-*.tar")


def test_a_data_root_that_is_not_there_is_no_root_with_every_set_missing(tmp_path: Path) -> None:
    root = f"{tmp_path}/dtaa"
    expected = (
        f"--data-root {root} is not a folder, or does not exist. It is the folder that the published sets lie in."
    )
    assert refused("pets", data_root=root) == expected
    with pytest.raises(InputError, match="is not a folder"):
        main(Config(list=True, data_root=root))


# Labels out of range


@pytest.mark.parametrize(
    ("label", "message"),
    [("2", "the label 2 is out of range: .* has 2 classes"), ("-1", "the label '-1' is no class in .*Known: circle")],
)
def test_a_label_in_json_is_judged_as_one_in_a_file(label: str, message: str, tmp_path: Path) -> None:
    members = []
    for number, own in enumerate(("0", "1", label)):
        meta = json.dumps({"label": int(own)}).encode()
        members += [(f"{number}.jpg", encoded(picture(number))), (f"{number}.json", meta)]
    write_tar(tmp_path / "test-0.tar", members)
    (tmp_path / "classnames.txt").write_text("circle\nsquare\n")
    with pytest.raises(InputError, match=f"test-0.tar: 2: {message}"):
        load_set(f"tar:{tmp_path}")


def test_a_class_number_of_an_archive_out_of_range_names_the_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_sets.write_cifar(tmp_path, torchvision.CIFAR10, ["airplane", "bird", "cat"], monkeypatch)
    read = torchvision.CIFAR10.__init__

    def with_a_slip(self: Any, *arguments: Any, **options: Any) -> None:
        read(self, *arguments, **options)
        self.targets[1] = 10

    monkeypatch.setattr(torchvision.CIFAR10, "__init__", with_a_slip)
    with pytest.raises(InputError, match=r"train, image 1: the class number 10 is out of range: the set has 3 classes"):
        load_known_set(CATALOGUE["cifar10"], data_root=str(tmp_path))


def test_class_number_zero_of_stl10_is_not_the_last_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_sets.write("stl10", tmp_path, monkeypatch)
    path = tmp_path / "stl10_binary" / "test_y.bin"
    labels = np.fromfile(path, np.uint8)
    labels[2] = 0
    labels.tofile(path)
    with pytest.raises(InputError, match=r"test_X.bin, image 2: the class number -1 is out of range"):
        load_known_set(CATALOGUE["stl10"], data_root=str(tmp_path))


# Empty classes


def test_a_class_without_a_sample_is_named_with_its_split(tmp_path: Path) -> None:
    write_labelled_tar(tmp_path / "test-0.tar", ["0", "1", "2"])
    write_labelled_tar(tmp_path / "train-0.tar", ["0", "2"])
    (tmp_path / "classnames.txt").write_text("circle\nsquare\nstar\n")
    message = refused(f"tar:{tmp_path}")
    assert f"{tmp_path} (train): 1 of 3 classes have no image: 'square'." in message
    assert f"Add images, or take the names out of {tmp_path}/classnames.txt." in message


# Images that cannot be read


def test_an_unreadable_image_stops_the_stage_without_a_result(tmp_path: Path, tiny_clip_folder: str) -> None:
    for label in ("cat", "dog"):
        write_images(tmp_path / "pets" / label, ["0.jpg", "1.jpg"])
    cut = tmp_path / "pets" / "dog" / "1.jpg"
    cut.write_bytes(cut.read_bytes()[:200])
    out = tmp_path / "out"
    options: dict[str, Any] = {"models": (tiny_clip_folder,), "sets": (f"folder:{tmp_path}/pets",), "num_workers": 0}
    options |= {"out": str(out), "device": "cpu", "tasks": ("zero-shot",)}
    with pytest.raises(InputError) as error:
        main(
            build_config(
                Config, {"out": str(out), "device": "cpu", "tasks": ("zero-shot",), **options}, stage="evaluate"
            )
        )
    assert f"{cut}: truncated image" in str(error.value)
    assert "--on-error skip" in str(error.value)
    assert not (out / "result.json").exists()
    assert not (out / "table.md").exists()


# Models whose widths do not fit


def opened(folder: Path, tmp_path: Path) -> None:
    device = torch.device("cpu")
    cache = FeatureCache(str(tmp_path / "cache"))
    open_embedder(str(folder), name="mine", weights=None, device=device, encoding=Encoding(), cache=cache)


def test_weights_of_another_width_than_their_config_are_named(tmp_path: Path) -> None:
    create_clip(json.dumps(TINY_CLIP), seed=0).save(str(tmp_path / "model"))
    config = json.loads((tmp_path / "model" / CONFIG_FILE).read_text())
    config["model_cfg"]["embed_dim"] = 24
    (tmp_path / "model" / CONFIG_FILE).write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"(?s)cannot build the model .*model.*size mismatch for text_projection"):
        opened(tmp_path / "model", tmp_path)


def test_towers_of_different_widths_have_no_similarity(tmp_path: Path) -> None:
    vision = {"timm_model_name": "cnn_w8", "timm_pool": "max", "timm_proj": "", "image_size": 32}
    create_clip(json.dumps({**TINY_CLIP, "vision_cfg": vision}), seed=0).save(str(tmp_path / "model"))
    with pytest.raises(InputError, match=r"image embeddings have \d+ dimensions, its text embeddings 16;.*timm_proj"):
        opened(tmp_path / "model", tmp_path)


def test_a_teacher_of_another_width_has_a_cosine_without_a_value_and_a_reason() -> None:
    random = torch.Generator().manual_seed(0)
    student, teacher = (F.normalize(torch.randn(10, dim, generator=random), dim=1) for dim in (4, 8))
    base = Score(set="mine", task="agreement", metric="cka", value=None)
    found = {score.metric: score for score in agreement_scores(agreement(student, teacher), base)}
    assert found["cosine"].value is None
    assert found["cosine"].reason == "the embeddings of student and teacher differ in width"
    assert found["cka"].value is not None
