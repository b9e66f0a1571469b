from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from distilclip.data.reader import Reader
from distilclip.data.store import Store
from distilclip.errors import InputError
from distilclip.evaluate.encode import encode_texts
from distilclip.models.clip import load_clip
from distilclip.sets.dataset import LabelledSet, PairSet
from distilclip.sets.open import load_set
from distilclip.sets.specs import parse_spec
from distilclip.stages import embed
from tests.conftest import encoded, picture, write_tar


def labelled(spec: str) -> LabelledSet:
    found = load_set(spec)
    assert isinstance(found, LabelledSet)
    return found


def paired(spec: str) -> PairSet:
    found = load_set(spec)
    assert isinstance(found, PairSet)
    return found


def write_images(folder: Path, names: list[str], seed: int = 0) -> None:
    folder.mkdir(parents=True)
    for number, name in enumerate(names):
        (folder / name).write_bytes(encoded(picture(seed + number)))


def write_labelled_tar(path: Path, labels: list[str], *, suffix: str = "cls") -> str:
    members = []
    for number, label in enumerate(labels):
        members += [(f"{number:03}.jpg", encoded(picture(number))), (f"{number:03}.{suffix}", label.encode())]
    return write_tar(path, members)


def write_own_sets(folder: Path, classes: list[str], *, num_train: int, num_test: int) -> tuple[str, str]:
    """A labelled set with so many training and test images of each class, and six pairs: how they are named."""
    labels = [str(number) for number in range(len(classes))]
    write_labelled_tar(folder / "shape" / "train-0.tar", labels * num_train)
    write_labelled_tar(folder / "shape" / "test-0.tar", labels * num_test)
    (folder / "shape" / "classnames.txt").write_text("".join(f"{name}\n" for name in classes))
    members = []
    for number in range(6):
        members += [(f"{number}.jpg", encoded(picture(number))), (f"{number}.txt", f"picture {number}".encode())]
    write_tar(folder / "pairs" / "test-0.tar", members)
    return f"tar:{folder}/shape", f"pairs:{folder}/pairs"


# Specs


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("folder:data/pets/", ("pets", "folder", "data/pets")),
        ("tar:data/shape", ("shape", "tar", "data/shape")),
        ("pairs:data/coco/test-{00000..00003}.tar", ("coco", "pairs", "data/coco/test-{00000..00003}.tar")),
        ("tar:s3://bucket/pets/*.tar", ("pets", "tar", "s3://bucket/pets/*.tar")),
        ("mine=folder:x/y", ("mine", "folder", "x/y")),
        ("tar:test-0.tar", ("set", "tar", "test-0.tar")),
    ],
)
def test_spec_gives_name_kind_and_path(spec: str, expected: tuple[str, str, str]) -> None:
    assert parse_spec(spec) == expected


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("data/pets", "does not say of what kind"),
        ("s3://bucket/pets", "does not say of what kind"),
        ("folders:data/pets", "Did you mean 'folder'"),
    ],
)
def test_spec_without_a_known_kind_is_refused(spec: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_spec(spec)


# Folders


def test_folder_without_splits_is_tested_whole(tmp_path: Path) -> None:
    write_images(tmp_path / "pets" / "red_fox", ["b.jpg", "a.PNG", "notes.txt"])
    write_images(tmp_path / "pets" / "cat", ["nested.jpeg"])
    found = labelled(f"folder:{tmp_path}/pets")
    assert found.name == "pets"
    assert found.classes.names == ("cat", "red fox")
    assert found.templates == ("a photo of a {}.",)
    assert [os.path.basename(image.uri) for image in found.test.images] == ["nested.jpeg", "a.PNG", "b.jpg"]
    assert found.test.labels.tolist() == [0, 1, 1]
    assert found.train is None


def test_folder_with_splits_names_and_templates(tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        for label in ("n01", "n02"):
            write_images(tmp_path / split / label, ["0.jpg"])
    (tmp_path / "classnames.txt").write_text("n02\ttabby cat\nn01\tfox terrier\n")
    (tmp_path / "templates.txt").write_text("a photo of a {}.\n\na sketch of a {}.\n")
    found = labelled(f"folder:{tmp_path}")
    assert found.classes.names == ("tabby cat", "fox terrier")
    assert found.test.labels.tolist() == [1, 0]
    assert found.templates == ("a photo of a {}.", "a sketch of a {}.")
    assert found.train is not None
    assert found.validation is not None


def test_validation_is_tested_where_there_is_no_test_folder(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for label in ("cat", "dog"):
            write_images(tmp_path / split / label, ["0.jpg"])
    found = labelled(f"folder:{tmp_path}")
    assert all("/val/" in image.uri for image in found.test.images)
    assert found.validation is None


def test_class_names_match_folders_apart_from_case_and_underscores(tmp_path: Path) -> None:
    write_images(tmp_path / "Red_Fox", ["0.jpg"])
    write_images(tmp_path / "cat", ["0.jpg"])
    (tmp_path / "classnames.txt").write_text("red fox\nCat\n")
    assert labelled(f"folder:{tmp_path}").test.labels.tolist() == [0, 1]


def test_folders_named_by_number_are_classes_by_number_not_by_alphabet(tmp_path: Path) -> None:
    for label in range(11):
        write_images(tmp_path / str(label), ["0.jpg"])
    (tmp_path / "classnames.txt").write_text("".join(f"class {chr(97 + i)}\n" for i in range(11)))
    found = labelled(f"folder:{tmp_path}")
    by_folder = {
        image.uri.split("/")[-2]: label for image, label in zip(found.test.images, found.test.labels, strict=True)
    }
    assert by_folder == {str(i): i for i in range(11)}


def test_links_to_class_folders_are_followed(tmp_path: Path) -> None:
    write_images(tmp_path / "elsewhere", ["0.jpg"])
    write_images(tmp_path / "set" / "cat", ["0.jpg"])
    (tmp_path / "set" / "dog").symlink_to(tmp_path / "elsewhere")
    assert labelled(f"folder:{tmp_path}/set").test.labels.tolist() == [0, 1]


def test_a_folder_that_no_class_name_matches_gets_a_suggestion(tmp_path: Path) -> None:
    write_images(tmp_path / "persain_cat", ["0.jpg"])
    write_images(tmp_path / "dog", ["0.jpg"])
    (tmp_path / "classnames.txt").write_text("persian cat\ndog\n")
    with pytest.raises(InputError, match=r"'persain_cat' is no class .* Did you mean 'persian cat'"):
        load_set(f"folder:{tmp_path}")


def test_a_class_without_images_is_named(tmp_path: Path) -> None:
    write_images(tmp_path / "cat", ["0.jpg"])
    write_images(tmp_path / "dog", ["0.jpg"])
    (tmp_path / "classnames.txt").write_text("cat\ndog\nhorse\n")
    with pytest.raises(InputError, match=r"1 of 3 classes have no image: 'horse'"):
        load_set(f"folder:{tmp_path}")
    (tmp_path / "cow").mkdir()
    with pytest.raises(InputError, match=r"class folder .*/cow holds no image"):
        load_set(f"folder:{tmp_path}")


def write_splits(root: Path, *names: str) -> None:
    for name in names:
        for label in ("cat", "dog"):
            write_images(root / name / label, ["0.jpg"])


def test_a_folder_that_is_no_split_is_not_made_a_class_with_the_splits(tmp_path: Path) -> None:
    write_splits(tmp_path, "train", "test")
    write_images(tmp_path / "unlabeled", ["0.jpg"])
    with pytest.raises(InputError, match=r"has the folder unlabeled beside (test|train), in which .* Move"):
        load_set(f"folder:{tmp_path}")


def test_a_class_may_have_the_name_of_a_split(tmp_path: Path) -> None:
    for label in ("car", "train", "bus"):
        write_images(tmp_path / label, ["0.jpg"])
    assert labelled(f"folder:{tmp_path}").classes.names == ("bus", "car", "train")


def test_trainval_is_for_training_and_dev_is_validation(tmp_path: Path) -> None:
    write_splits(tmp_path / "a", "trainval", "test")
    found = labelled(f"folder:{tmp_path}/a")
    assert found.train is not None
    assert [image.uri.split("/")[-3] for image in found.train.images] == ["trainval"] * 2
    write_splits(tmp_path / "b", "train", "dev", "test")
    found = labelled(f"folder:{tmp_path}/b")
    assert found.validation is not None
    assert [image.uri.split("/")[-3] for image in found.validation.images] == ["dev"] * 2


@pytest.mark.parametrize("twins", [("train", "trainval"), ("trainval", "val"), ("dev", "val")])
def test_images_that_would_count_twice_are_refused(tmp_path: Path, twins: tuple[str, str]) -> None:
    write_splits(tmp_path / "folders", *twins, "test")
    for name in (*twins, "test"):
        write_labelled_tar(tmp_path / "tars" / f"{name}-0.tar", ["cat", "dog"])
    for spec in (f"folder:{tmp_path}/folders", f"tar:{tmp_path}/tars"):
        with pytest.raises(InputError, match=f"{twins[0]}.*{twins[1]}.* of which two hold images of the same split"):
            load_set(spec)


def test_images_beside_class_folders_are_to_be_sorted(tmp_path: Path) -> None:
    """ImageNet as it is downloaded: train/WNID/*.JPEG, val/*.JPEG, and its devkit."""
    write_images(tmp_path / "train" / "n01440764", ["0.JPEG"])
    write_images(tmp_path / "train" / "n01443537", ["0.JPEG"])
    write_images(tmp_path / "val", ["ILSVRC2012_val_00000001.JPEG"])
    (tmp_path / "ILSVRC2012_devkit_t12").mkdir()
    with pytest.raises(InputError, match=r"images in val lie in no class folder.*valprep\.sh"):
        load_set(f"folder:{tmp_path}")


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ([], "is not a folder, or does not exist"),
        (["set/0.jpg"], "has no subfolders"),
        (["set/train/cat/0.jpg", "set/train/dog/0.jpg"], "has training images only"),
        (["set/cat/0.jpg"], "single class"),
    ],
)
def test_wrong_folders_are_told_apart(tmp_path: Path, made: list[str], message: str) -> None:
    for name in made:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(picture(0)))
    with pytest.raises(InputError, match=message):
        load_set(f"folder:{tmp_path}/set")


# Tars


def test_tar_folder_with_numbers_and_names(tmp_path: Path) -> None:
    write_labelled_tar(tmp_path / "shape" / "test-00000.tar", ["1", "0", "1"])
    write_labelled_tar(tmp_path / "shape" / "train-00000.tar", ["0", "1"])
    (tmp_path / "shape" / "classnames.txt").write_text("circle\nsquare\n")
    found = labelled(f"tar:{tmp_path}/shape")
    assert found.test.labels.tolist() == [1, 0, 1]
    assert found.test.images[1].key == "001"
    assert found.classes.names == ("circle", "square")
    assert found.train is not None
    assert found.train.labels.tolist() == [0, 1]


def test_shards_of_trainval_and_dev_are_not_tested(tmp_path: Path) -> None:
    for name, labels in (("trainval-0", ["cat", "dog", "dog"]), ("test-0", ["dog", "cat"])):
        write_labelled_tar(tmp_path / "a" / f"{name}.tar", labels)
    found = labelled(f"tar:{tmp_path}/a/*.tar")
    assert found.test.labels.tolist() == [1, 0]
    assert found.train is not None
    assert found.train.labels.tolist() == [0, 1, 1]
    for name, labels in (("train-0", ["cat", "dog"]), ("dev-0", ["dog", "cat", "cat"]), ("test-0", ["dog", "cat"])):
        write_labelled_tar(tmp_path / "b" / f"{name}.tar", labels)
    found = labelled(f"tar:{tmp_path}/b")
    assert found.validation is not None
    assert found.validation.labels.tolist() == [1, 0, 0]


def test_a_shard_that_names_no_split_beside_those_that_do_is_refused(tmp_path: Path) -> None:
    for name in ("test-0", "train-0", "extra-0"):
        write_labelled_tar(tmp_path / "set" / f"{name}.tar", ["cat", "dog"])
    for path in (f"{tmp_path}/set", f"{tmp_path}/set/*.tar"):
        with pytest.raises(InputError, match=r"extra-0\.tar names no split, and .*/test-0\.tar beside it does"):
            load_set(f"tar:{path}")
    assert labelled(f"tar:{tmp_path}/set/{{test,train}}-0.tar").train is not None


@pytest.mark.parametrize("kind", ["tar", "pairs"])
def test_pictures_are_not_read_when_a_set_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    size = 1 << 20
    members = []
    for number, label in enumerate(("cat", "dog")):
        members += [(f"{number}.jpg", bytes(size)), (f"{number}.cls", label.encode()), (f"{number}.txt", b"a pet")]
    write_tar(tmp_path / "test-0.tar", members)
    read = Reader.read
    lengths: list[int] = []

    def counted(self: Reader, offset: int, length: int) -> bytes:
        lengths.append(length)
        return read(self, offset, length)

    monkeypatch.setattr(Reader, "read", counted)
    load_set(f"{kind}:{tmp_path}/test-0.tar")
    assert 0 < sum(lengths) < size / 10


def test_tar_labels_may_be_names(tmp_path: Path) -> None:
    write_labelled_tar(tmp_path / "test-0.tar", ["T-Shirt", "Hat", "T-Shirt"])
    found = labelled(f"tar:{tmp_path}")
    assert found.classes.names == ("Hat", "T-Shirt")
    assert found.test.labels.tolist() == [1, 0, 1]
    assert found.classes.named


def test_tar_labels_may_lie_in_json(tmp_path: Path) -> None:
    members = []
    for number, meta in enumerate([{"label": 1}, {"cls": "square"}, {"label": "circle"}]):
        members += [(f"{number}.jpg", encoded(picture(number))), (f"{number}.json", json.dumps(meta).encode())]
    write_tar(tmp_path / "a.tar", members)
    (tmp_path / "classnames.txt").write_text("circle\nsquare\n")
    assert labelled(f"tar:{tmp_path}/*.tar").test.labels.tolist() == [1, 1, 0]


def test_numbers_without_names_leave_the_classes_unnamed(tmp_path: Path) -> None:
    write_labelled_tar(tmp_path / "test-0.tar", ["10", "2", "10"])
    found = labelled(f"tar:{tmp_path}")
    assert not found.classes.named
    assert found.classes.labels == ("2", "10")


def test_label_out_of_range_names_the_sample(tmp_path: Path) -> None:
    write_labelled_tar(tmp_path / "test-0.tar", ["0", "1", "2"])
    (tmp_path / "classnames.txt").write_text("circle\nsquare\n")
    with pytest.raises(InputError, match=r"test-0.tar: 002: the label 2 is out of range: .* has 2 classes"):
        load_set(f"tar:{tmp_path}")


def test_sample_without_label_is_named(tmp_path: Path) -> None:
    write_labelled_tar(tmp_path / "test-0.tar", ["a caption", "another"], suffix="txt")
    with pytest.raises(InputError, match=r"test-0.tar: 000 has no label.*pairs:PATH"):
        load_set(f"tar:{tmp_path}")


def test_names_that_occur_twice_need_labels_of_their_own(tmp_path: Path) -> None:
    write_labelled_tar(tmp_path / "test-0.tar", ["crane", "dog"])
    (tmp_path / "classnames.txt").write_text("crane\ncrane\ndog\n")
    with pytest.raises(InputError, match=r"2 classes .* are called 'crane'"):
        load_set(f"tar:{tmp_path}")
    write_labelled_tar(tmp_path / "test-0.tar", ["0", "1", "2"])
    assert labelled(f"tar:{tmp_path}").test.labels.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("templates.txt", "a photo of it\n", r"'a photo of it' has no \{\}"),
        ("templates.txt", "\n", "holds no prompt template"),
        ("classnames.txt", "\n", "is empty"),
    ],
)
def test_text_files_that_make_no_sense_are_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    write_labelled_tar(tmp_path / "test-0.tar", ["a", "b"])
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        load_set(f"tar:{tmp_path}")


# Pairs


def test_all_captions_of_an_image_belong_to_it(tmp_path: Path) -> None:
    members = [
        ("0.jpg", encoded(picture(0))),
        ("0.json", json.dumps({"captions": ["a cat", " ", "a tabby"], "caption": "a pet"}).encode()),
        ("1.jpg", encoded(picture(1))),
        ("1.txt", b"a dog"),
        ("1.json", json.dumps({"captions": ["a hound", "a dog"], "caption": "unread"}).encode()),
    ]
    write_tar(tmp_path / "pets" / "test-0.tar", members)
    write_tar(tmp_path / "pets" / "train-0.tar", members)
    found = paired(f"pairs:{tmp_path}/pets")
    assert found.captions == ("a pet", "a cat", "a tabby", "a dog", "a hound")
    assert found.image_of_text.tolist() == [0, 0, 0, 1, 1]
    assert len(found.images) == 2


def test_the_first_caption_of_a_sample_is_the_one_that_a_store_has(tmp_path: Path, tiny_clip_folder: str) -> None:
    members = []
    for number in range(4):
        further = json.dumps({"captions": [f"further words {number}", f"picture {number}"]}).encode()
        members += [(f"{number}.jpg", encoded(picture(number))), (f"{number}.txt", f"picture {number}".encode())]
        members += [(f"{number}.json", further)]
    tar = write_tar(tmp_path / "test-0.tar", members)
    store = str(tmp_path / "store")
    embed.main(embed.Config(out=store, data=(tar,), model=tiny_clip_folder, device="cpu", num_workers=0))
    dataset = load_set(f"pairs:{tar}")
    assert isinstance(dataset, PairSet)
    assert dataset.captions[:2] == ("picture 0", "further words 0")
    stored = torch.from_numpy(Store.open(store).text(0).astype(np.float32))
    live = encode_texts(load_clip(tiny_clip_folder), dataset.captions[::2])
    torch.testing.assert_close(stored, live, atol=2e-3, rtol=0)  # half precision


def test_pairs_to_validate_on_stand_in_for_those_to_test(tmp_path: Path) -> None:
    for name in ("train", "dev"):
        write_tar(tmp_path / f"{name}-0.tar", [("0.jpg", encoded(picture(0))), ("0.txt", name.encode())])
    assert paired(f"pairs:{tmp_path}").captions == ("dev",)


def test_sample_without_caption_is_kept_with_its_reason(tmp_path: Path) -> None:
    members = [("0.jpg", encoded(picture(0))), ("1.jpg", encoded(picture(1))), ("1.txt", b"a dog")]
    found = paired(f"pairs:{write_tar(tmp_path / 'a.tar', members)}")
    assert [image.error for image in found.images] == ["no caption", ""]
    assert found.image_of_text.dtype == np.int64
    assert found.image_of_text.tolist() == [1]


def test_pairs_without_any_caption_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no image with a caption"):
        load_set(f"pairs:{write_labelled_tar(tmp_path / 'a.tar', ['0', '1'])}")
