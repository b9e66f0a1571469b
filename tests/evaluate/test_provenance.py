"""What an evaluation is made from: which changes are noticed, and which are none."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from distilclip.errors import InputError
from distilclip.evaluate.provenance import file_digests, model_digests, set_digest
from distilclip.models.clip import create_clip
from tests.sets import made_sets
from tests.sets.test_sets import write_images


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    for label in ("cat", "dog"):
        write_images(tmp_path / "pets" / label, ["0.jpg", "1.jpg"])
    (tmp_path / "pets" / "classnames.txt").write_text("cat\ndog\n")
    return tmp_path / "pets"


def of_set(spec: str, data_root: str | None = None) -> str:
    return set_digest(spec, data_root=data_root)


def test_a_set_is_known_by_names_and_sizes_and_its_texts_by_content(pets: Path, tmp_path: Path) -> None:
    found = [of_set(f"folder:{pets}")]
    (pets / "classnames.txt").write_text("cat\nfox\n")  # as many bytes
    found.append(of_set(f"folder:{pets}"))
    (pets / "dog" / "1.jpg").rename(pets / "dog" / "2.jpg")
    found.append(of_set(f"folder:{pets}"))
    (pets / "dog" / "2.jpg").write_bytes(b"cut")
    found.append(of_set(f"folder:{pets}"))
    assert len(set(found)) == 4
    shutil.copytree(pets, tmp_path / "copy")
    assert of_set(f"folder:{tmp_path}/copy") == found[-1]  # neither the place nor the time of a file counts


def test_a_pattern_counts_its_files_and_the_texts_beside_them(tmp_path: Path) -> None:
    for name in ("test-0.tar", "test-1.tar", "other.tar"):
        (tmp_path / name).write_bytes(b"x")
    first = of_set(f"tar:{tmp_path}/test-*.tar")
    (tmp_path / "other.tar").write_bytes(b"xx")
    assert of_set(f"tar:{tmp_path}/test-*.tar") == first
    (tmp_path / "templates.txt").write_text("{}")
    assert of_set(f"tar:{tmp_path}/test-*.tar") != first


def test_a_published_set_counts_only_itself_and_whether_it_is_there(tmp_path: Path) -> None:
    absent = of_set("pets", str(tmp_path))
    made_sets.write_webdataset(tmp_path / "wds_pets", ["cat", "dog"], ["a {c}."], count=2)
    there = of_set("pets", str(tmp_path))
    made_sets.write_webdataset(tmp_path / "wds_dtd", ["cat", "dog"], ["a {c}."], count=2)
    assert absent != there == of_set("pets", str(tmp_path))


def test_an_archive_unpacked_into_the_data_root_is_not_all_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_sets.write("food101", tmp_path, monkeypatch)
    first = of_set("food101", str(tmp_path))
    (tmp_path / "another").mkdir()
    (tmp_path / "another" / "0.jpg").write_bytes(b"x")
    assert of_set("food101", str(tmp_path)) == first
    next((tmp_path / "food-101").rglob("*.jpg")).write_bytes(b"x")
    assert of_set("food101", str(tmp_path)) != first


def test_a_set_of_ones_own_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"No file matches .*absent"):
        of_set(f"tar:{tmp_path}/absent")
    with pytest.raises(InputError, match="absent is not a folder"):
        of_set(f"folder:{tmp_path}/absent")


def test_a_model_is_known_by_config_and_weights(tmp_path: Path, tiny_clip_json: str) -> None:
    folder = tmp_path / "model"
    found = []
    for seed in (1, 2):
        create_clip(tiny_clip_json, seed=seed).save(str(folder))
        found.append(model_digests(str(folder)))
    (folder / "optimizer.safetensors").write_bytes(b"x")  # of a checkpoint, which is the same model
    assert model_digests(str(folder)) == found[1] != found[0]
    assert list(found[0]) == ["model"]
    (folder / "config.json").write_text("{}")  # transformers' own, as folders of the hub have it
    assert model_digests(str(folder)) == found[1]
    assert model_digests("ViT-B-32") == model_digests("hf-hub:org/name") == {}
    assert list(model_digests("ViT-B-32", str(folder / "open_clip_model.safetensors"))) == ["weights"]


def test_files_count_by_content_and_what_is_no_file_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert file_digests({"templates": str(tmp_path / "a"), "weights of b": "laion2b_s34b_b79k", "prompts": None}) == {
        "templates": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    }
