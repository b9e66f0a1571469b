"""Every published set, read from a small copy of its real layout, which torchvision's own reader accepts too."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision.datasets as torchvision

from distilclip.errors import InputError
from distilclip.sets.catalogue import CATALOGUE, GROUPS, KnownSet
from distilclip.sets.dataset import ImageRef, LabelledSet, MissingSet, PairSet
from distilclip.sets.imagenet import wordnet_ids
from distilclip.sets.labelled import Labelled
from distilclip.sets.locate import describe_catalogue, locate, places_looked_at
from distilclip.sets.open import CAPTIONED, LISTINGS, load_known_set
from tests.conftest import encoded, picture
from tests.sets import made_sets


def listing(name: str, root: Path, patch: pytest.MonkeyPatch) -> Any:
    """The set's own reader on its original layout, without any names: a small copy lacks most classes."""
    made_sets.write(name, root, patch)
    place = locate(CATALOGUE[name], str(root))
    assert place is not None
    assert place.layout == "archive"
    return {**LISTINGS, **CAPTIONED}[name](place.path)


def pairs(rows: Labelled) -> list[tuple[str, str]]:
    return [(os.path.basename(image.uri), label) for image, label in rows]


def test_there_are_fourteen_five_and_two() -> None:
    assert [len(GROUPS[group]) for group in ("paper", "robustness", "retrieval")] == [14, 5, 2]
    assert set(CATALOGUE) == {*LISTINGS, *CAPTIONED} == set(made_sets.WRITERS)


@pytest.mark.parametrize("name", CATALOGUE)
def test_what_is_not_there_is_missing_and_where_it_was_looked_for_is_known(name: str, tmp_path: Path) -> None:
    known = CATALOGUE[name]
    found = load_known_set(known, data_root=str(tmp_path))
    assert isinstance(found, MissingSet)
    assert found.kind == ("pairs" if known.group == "retrieval" else "labelled")
    assert str(tmp_path) in found.reason
    assert len(places_looked_at(known, str(tmp_path))) >= 2


def test_the_list_says_of_each_set_whether_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_sets.write("dtd", tmp_path, monkeypatch)
    paragraphs = describe_catalogue(str(tmp_path)).split("\n\n")
    assert [p.split()[0] for p in paragraphs] == list(CATALOGUE)
    (dtd,) = (p for p in paragraphs if p.startswith("dtd"))
    assert f"found: {tmp_path} (archive)" in dtd
    assert "47 classes, 3,760 to train, 1,880 to test" in dtd
    (food,) = (p for p in paragraphs if p.startswith("food101"))
    assert f"not found; looked for {tmp_path}/food-101/meta" in food
    assert "torchvision.datasets.Food101" in food
    (cifar,) = (p for p in paragraphs if p.startswith("cifar10 "))
    assert "to test, top-1; 0.2 GB; terms: ask its publisher" in cifar
    assert "get it: " in describe_catalogue(None)


# Original layouts, against torchvision's readers

TORCHVISION: dict[str, Any] = {
    "food101": lambda root, split: torchvision.Food101(root, split=split),
    "cars": lambda root, split: torchvision.StanfordCars(root, split=split),
    "aircraft": lambda root, split: torchvision.FGVCAircraft(root, split=split),
    "dtd": lambda root, split: torchvision.DTD(root, split=split),
    "flowers102": lambda root, split: torchvision.Flowers102(root, split=split),
    "pets": lambda root, split: torchvision.OxfordIIITPet(root, split="trainval" if split == "train" else split),
    "cifar10": lambda root, split: torchvision.CIFAR10(root, train=split == "train"),
    "cifar100": lambda root, split: torchvision.CIFAR100(root, train=split == "train"),
    "stl10": lambda root, split: torchvision.STL10(root, split=split),
}


def same_class(ours: str, theirs: str) -> bool:
    return ours.replace("_", " ").casefold() == theirs.replace("_", " ").casefold()


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_reads_the_same_pictures_with_the_same_classes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = listing(name, tmp_path, monkeypatch)
    for split in ("train", "test"):
        theirs = TORCHVISION[name](str(tmp_path), split)
        assert len(theirs) == len(found.splits[split]) > 1
        for (image, label), (pixels, number) in zip(found.splits[split], theirs, strict=True):
            assert same_class(label, theirs.classes[number])
            assert np.array_equal(read(image), np.asarray(pixels.convert("RGB")))


def read(image: ImageRef) -> np.ndarray:
    if image.pixels is not None:
        return image.pixels
    from PIL import Image

    return np.asarray(Image.open(image.uri).convert("RGB"))


def test_sun397_torchvision_finds_the_same_pictures_but_has_no_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = listing("sun397", tmp_path, monkeypatch)
    assert pairs(found.splits["test"]) == [
        ("sun_testing.jpg", "abbey"),
        ("sun_testing.jpg", "church/indoor"),
        ("sun_testing.jpg", "church/outdoor"),
    ]
    theirs = torchvision.SUN397(str(tmp_path))
    both = [image.uri for split in ("train", "test") for image, _ in found.splits[split]]
    assert sorted(map(str, theirs._image_files)) == sorted(both)
    assert list(found.labels) == theirs.classes


def test_eurosat_and_caltech_are_torchvisions_class_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    eurosat = listing("eurosat", tmp_path, monkeypatch)
    assert list(eurosat.labels) == torchvision.EuroSAT(str(tmp_path)).classes
    caltech = listing("caltech101", tmp_path, monkeypatch)
    assert caltech.labels == ("BACKGROUND_Google", "Faces", "accordion")
    assert torchvision.Caltech101(str(tmp_path)).categories == ["Faces", "accordion"]  # it drops a class


def test_a_drawn_split_is_the_same_wherever_the_set_lies_and_has_a_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = (listing("caltech101", tmp_path / name, monkeypatch) for name in ("a", "b"))
    assert [len(here.splits[split]) for split in ("train", "test")] == [90, 6]
    assert pairs(here.splits["test"]) == pairs(there.splits["test"])
    assert here.record == there.record
    assert len(here.record["drawn_split_sha256"]) == 64
    assert not set(here.splits["train"]) & set(here.splits["test"])


def test_the_file_of_caltech_that_is_no_image_is_not_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The archive has 9,145 files, BACKGROUND_Google/tmp among them: 30 each for training leave 6,084 images."""
    clean = listing("caltech101", tmp_path, monkeypatch)
    folder = tmp_path / "caltech101" / "101_ObjectCategories"
    (folder / "BACKGROUND_Google" / "tmp").write_bytes(b"")
    assert LISTINGS["caltech101"](str(tmp_path)).record == clean.record
    assert CATALOGUE["caltech101"].num_train + CATALOGUE["caltech101"].num_test == 9_144


def test_official_validation_splits_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("aircraft", "dtd", "flowers102"):
        found = listing(name, tmp_path / name, monkeypatch)
        assert len(found.splits["validation"]) == len(found.splits["test"]) > 1


def test_stl10_folds_are_rows_of_the_training_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = listing("stl10", tmp_path, monkeypatch)
    assert len(found.folds) == 10
    third = torchvision.STL10(str(tmp_path), split="train", folds=3)
    ours = [found.splits["train"][row] for row in found.folds[3]]
    assert [found.labels.index(label) for _, label in ours] == third.labels.tolist()
    assert np.array_equal(ours[1][0].pixels, np.asarray(third[1][0]))


def test_birdsnap_keeps_what_could_be_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = listing("birdsnap", tmp_path, monkeypatch)
    assert found.labels == ("Acadian_Flycatcher", "Blue_Jay", "Cactus_Wren")
    assert [label for _, label in found.splits["test"]] == ["Acadian_Flycatcher", "Blue_Jay"]
    assert len(found.splits["train"]) == 3


# ImageNet and its variants


def labelled(name: str, root: Path, patch: pytest.MonkeyPatch) -> LabelledSet:
    made_sets.write(name, root, patch)
    found = load_known_set(CATALOGUE[name], data_root=str(root))
    assert isinstance(found, LabelledSet)
    return found


def test_imagenet_goes_by_wordnet_id_and_keeps_both_pairs_of_equal_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = labelled("imagenet", tmp_path, monkeypatch)
    assert found.classes.labels == wordnet_ids()
    assert found.test.labels.tolist() == list(range(1000))
    assert len(set(found.classes.names)) == 998
    assert found.classes.names[0] == "tench"
    assert len(found.templates) == 80
    assert found.templates[0] == "a bad photo of a {}."
    assert torchvision.ImageFolder(str(tmp_path / "imagenet" / "val")).classes == list(found.classes.labels)


def test_imagenet_v2_folders_are_numbers_not_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = labelled("imagenet-v2", tmp_path, monkeypatch)
    folder = {
        os.path.basename(os.path.dirname(image.uri)): label
        for image, label in zip(found.test.images, found.test.labels, strict=True)
    }
    assert folder == {str(number): number for number in range(1000)}
    plain = torchvision.ImageFolder(str(tmp_path / "imagenetv2-matched-frequency-format-val"))
    agreeing = sum(int(name) == number for name, number in plain.class_to_idx.items())
    assert agreeing == 12  # what a plain ImageFolder gets right


@pytest.mark.parametrize(("name", "first"), [("imagenet-a", "stingray"), ("imagenet-r", "goldfish")])
def test_subsets_have_two_hundred_classes_among_themselves(
    name: str, first: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = labelled(name, tmp_path, monkeypatch)
    assert len(found.classes) == 200
    assert found.classes.names[0] == first
    assert found.test.labels.tolist() == list(range(200))


def test_objectnet_keeps_the_shared_classes_and_loses_its_frame(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = labelled("objectnet", tmp_path, monkeypatch)
    assert found.classes.labels == ("Alarm clock", "Banana")
    assert found.classes.names == ("alarm clock", "banana")
    assert found.test.labels.tolist() == [0, 0, 1, 1]
    assert {image.border for image in found.test.images} == {2}
    assert found.record["border"] == 2
    assert len(found.templates) == 80


def test_objectnets_frame_is_cut_off_in_a_webdataset_too(tmp_path: Path) -> None:
    made_sets.write_webdataset(tmp_path / "wds_objectnet", ["alarm clock", "banana"], ["a {c}."])
    found = load_known_set(CATALOGUE["objectnet"], data_root=str(tmp_path))
    assert isinstance(found, LabelledSet)
    assert {image.border for image in found.test.images} == {2}


@pytest.mark.parametrize(
    ("slip", "message"),
    [
        ("n0153117", "'n0153117' is none of the 200 WordNet ids of this set. Did you mean 'n01531178'"),
        ("n01440764", "ImageNet's class 'tench': is this the folder of another set"),
        ("Goldfinch", "Rename it: 'Goldfinch' has the id 'n01531178'"),
        ("11", "Numbers need classnames.txt"),
    ],
)
def test_a_class_folder_that_is_no_wordnet_id_of_the_set_gets_a_suggestion(
    slip: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_sets.write("imagenet-a", tmp_path, monkeypatch)
    folder = tmp_path / "imagenet-a" / "n01531178"
    folder.rename(folder.with_name(slip))
    assert message in broken(CATALOGUE["imagenet-a"], tmp_path)


def test_a_slip_in_a_wordnet_id_is_told_in_folders_of_splits_too(tmp_path: Path) -> None:
    made_sets.write_class_folders(tmp_path / "imagenet-sketch" / "test", ["n01440764", "n0144353"], count=1)
    message = broken(CATALOGUE["imagenet-sketch"], tmp_path)
    assert "the class 'n0144353' is none of the 1000 WordNet ids of this set. Did you mean 'n01443537'" in message


def test_numbered_shards_of_imagenet_need_names(tmp_path: Path) -> None:
    made_sets.write_webdataset(tmp_path / "wds_imagenet1k", ["tench", "goldfish"], ["a {c}."])
    (tmp_path / "wds_imagenet1k" / "classnames.txt").unlink()
    assert "the class '0' is none of the 1000 WordNet ids" in broken(CATALOGUE["imagenet"], tmp_path)


def test_a_class_folder_too_few_or_too_many_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_sets.write("imagenet-a", tmp_path, monkeypatch)
    folder = tmp_path / "imagenet-a" / "n01531178"
    folder.rename(folder.with_name("n00000000"))
    with pytest.raises(InputError, match="'n00000000' is none of the 200 WordNet ids"):
        load_known_set(CATALOGUE["imagenet-a"], data_root=str(tmp_path))
    folder.with_name("n00000000").rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="1 of 200 class folders are missing, first n01531178"):
        load_known_set(CATALOGUE["imagenet-a"], data_root=str(tmp_path))


def test_imagenet_as_it_is_downloaded_is_to_be_sorted(tmp_path: Path) -> None:
    made_sets.write_class_folders(tmp_path / "imagenet" / "train", ["n01440764", "n01443537"], count=1)
    made_sets.write_picture(tmp_path / "imagenet" / "val" / "ILSVRC2012_val_00000001.JPEG")
    assert "the images in val lie in no class folder" in broken(CATALOGUE["imagenet"], tmp_path)


# Captions


@pytest.mark.parametrize("name", ["coco", "flickr30k"])
def test_karpathys_test_split_has_all_captions_of_its_images(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_sets.write(name, tmp_path, monkeypatch)
    found = load_known_set(CATALOGUE[name], data_root=str(tmp_path))
    assert isinstance(found, PairSet)
    assert [os.path.basename(image.uri) for image in found.images] == ["0.jpg", "2.jpg", "3.jpg"]
    assert found.image_of_text.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert found.captions[5] == "caption 0 of picture 2"


def test_clip_benchmarks_caption_files_are_read(tmp_path: Path) -> None:
    for number in (7, 9):
        made_sets.write_picture(tmp_path / "coco" / "val2014" / f"{number}.jpg", number)
        made_sets.write_picture(tmp_path / "flickr30k" / f"{number}.jpg", number)
    annotations = {
        "images": [{"id": 9, "file_name": "9.jpg"}, {"id": 7, "file_name": "7.jpg"}],
        "annotations": [
            {"image_id": 9, "caption": "nine"},
            {"image_id": 7, "caption": "seven"},
            {"image_id": 9, "caption": "again"},
        ],
    }
    (tmp_path / "coco" / "coco_test_karpathy.json").write_text(json.dumps(annotations))
    coco = load_known_set(CATALOGUE["coco"], data_root=str(tmp_path))
    assert isinstance(coco, PairSet)
    assert coco.captions == ("seven", "nine", "again")
    lines = ["image,caption", '9.jpg,"A man, a dog"', "7.jpg,Two cats.", "9.jpg,A dog."]
    made_sets.write_lines(tmp_path / "flickr30k" / "flickr30k_test_karpathy.txt", lines)
    flickr = load_known_set(CATALOGUE["flickr30k"], data_root=str(tmp_path))
    assert isinstance(flickr, PairSet)
    assert flickr.captions == ("A man, a dog", "A dog.", "Two cats.")
    (tmp_path / "flickr30k" / "9.jpg").unlink()
    with pytest.raises(InputError, match=r"has captions, but not the image 9\.jpg"):
        load_known_set(CATALOGUE["flickr30k"], data_root=str(tmp_path))


def test_captions_keep_their_own_quotation_marks(tmp_path: Path) -> None:
    made_sets.write_picture(tmp_path / "flickr30k" / "9.jpg")
    lines = [
        '9.jpg,"A sign reads ""stop"", in red."',
        '9.jpg,A sign that reads "stop"',
        '9.jpg,"Stop" says the sign, in red.',
        "9.jpg,A man, a dog.",
        '9.jpg,"A man, a dog."',
    ]
    made_sets.write_lines(tmp_path / "flickr30k" / "flickr30k_test_karpathy.txt", ["image,caption", *lines])
    found = load_known_set(CATALOGUE["flickr30k"], data_root=str(tmp_path))
    assert isinstance(found, PairSet)
    assert found.captions == (
        'A sign reads "stop", in red.',
        'A sign that reads "stop"',
        '"Stop" says the sign, in red.',
        "A man, a dog.",
        "A man, a dog.",
    )


@pytest.mark.parametrize(
    ("images", "message"),
    [([9, 7], "coco_test_karpathy.json has no caption for the image 7.jpg"), ([], "coco_test_karpathy.json lists no")],
)
def test_an_image_without_captions_names_the_file(images: list[int], message: str, tmp_path: Path) -> None:
    made_sets.write_picture(tmp_path / "coco" / "val2014" / "9.jpg")
    content = {
        "images": [{"id": number, "file_name": f"{number}.jpg"} for number in images],
        "annotations": [{"image_id": 9, "caption": "nine"}, {"image_id": 7, "caption": " "}],
    }
    (tmp_path / "coco" / "coco_test_karpathy.json").write_text(json.dumps(content))
    assert message in broken(CATALOGUE["coco"], tmp_path)


def test_images_of_coco_without_the_split_are_missing_what_names_it(tmp_path: Path) -> None:
    for folder in ("train2014", "val2014"):
        made_sets.write_picture(tmp_path / "coco" / folder / "9.jpg")
    found = load_known_set(CATALOGUE["coco"], data_root=str(tmp_path))
    assert isinstance(found, MissingSet)
    assert "with its dataset_coco.json or coco_test_karpathy.json" in found.reason
    (coco,) = (p for p in describe_catalogue(str(tmp_path)).split("\n\n") if p.startswith("coco"))
    assert "found: " not in coco
    assert f"not found; looked for {tmp_path}/coco/dataset_coco.json" in coco


# Webdatasets and folders


@pytest.mark.parametrize("folder", ["wds/vtab-pets", "wds_vtab-pets", "pets"])
def test_a_webdataset_brings_its_own_names_and_templates(tmp_path: Path, folder: str) -> None:
    made_sets.write_webdataset(tmp_path / folder, ["Pug", "Beagle"], ["a photo of a {c}, a pet."])
    found = load_known_set(CATALOGUE["pets"], data_root=str(tmp_path))
    assert isinstance(found, LabelledSet)
    assert found.classes.names == ("Pug", "Beagle")
    assert found.templates == ("a photo of a {}, a pet.",)
    assert found.metric == "mean_per_class"
    assert found.test.labels.tolist() == [0, 1, 0, 1]
    assert found.train is not None
    assert found.record["layout"] == "webdataset"


def test_a_webdataset_of_captions_has_one_a_line(tmp_path: Path) -> None:
    made_sets.write_retrieval_webdataset(tmp_path / "wds_flickr30k", [["a cat", "a tabby"], ["a dog"]])
    found = load_known_set(CATALOGUE["flickr30k"], data_root=str(tmp_path))
    assert isinstance(found, PairSet)
    assert found.captions == ("a cat", "a tabby", "a dog")
    assert found.image_of_text.tolist() == [0, 0, 1]


SMALL = dataclasses.replace(CATALOGUE["pets"], benchmark="", prompts="")  # of any classes, under their own names


def test_folders_of_images_go_by_their_names(tmp_path: Path) -> None:
    for split in ("train", "test"):
        made_sets.write_class_folders(tmp_path / "pets" / split, ["red_fox", "Pug"], count=2)
    found = load_known_set(SMALL, data_root=str(tmp_path))
    assert isinstance(found, LabelledSet)
    assert found.classes.names == ("Pug", "red fox")
    assert found.record["clips_prompts"] is False
    assert found.record["layout"] == "folder"


def test_a_class_folder_with_a_slip_gets_a_suggestion(tmp_path: Path) -> None:
    pytest.importorskip("clip_benchmark")
    made_sets.write_class_folders(tmp_path / "eurosat" / "test", [*made_sets.EUROSAT[:-1], "SeaLakes"], count=1)
    with pytest.raises(InputError, match="the class 'SeaLakes' has no name in clip-benchmark"):
        load_known_set(CATALOGUE["eurosat"], data_root=str(tmp_path))


# What is wrong with a set is said


def broken(known: KnownSet, root: Path) -> str:
    with pytest.raises(InputError) as error:
        load_known_set(known, data_root=str(root))
    return str(error.value)


def test_a_damaged_archive_names_the_set_and_where_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_sets.write("cifar10", tmp_path, monkeypatch)
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(b"cut")
    message = broken(CATALOGUE["cifar10"], tmp_path)
    assert "cifar10 in" in message
    assert "torchvision.datasets.CIFAR10" in message


@pytest.mark.parametrize(
    ("name", "path", "content"),
    [
        ("food101", "food-101/meta/test.json", "[1]"),  # AttributeError of torchvision's reader
        ("aircraft", "fgvc-aircraft-2013b/data/images_variant_test.txt", "0000201\n"),
        ("pets", "oxford-iiit-pet/annotations/test.txt", "Bengal_1\n"),  # IndexError, and ValueError of our own
        ("coco", "coco/dataset_coco.json", "[]"),  # TypeError
        ("cars", "stanford_cars/devkit/cars_train_annos.mat", ""),
    ],
)
def test_a_list_that_makes_no_sense_names_the_set(
    name: str, path: str, content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_sets.write(name, tmp_path, monkeypatch)
    (tmp_path / path).write_text(content)
    message = broken(CATALOGUE[name], tmp_path)
    assert f"{name} in {tmp_path}" in message
    assert "Get it again" in message


@pytest.mark.parametrize(
    ("name", "path", "expected"),
    [
        ("sun397", "SUN397/Testing_01.txt", "lacks Testing_01.txt"),
        ("birdsnap", "birdsnap/download", "has no download/images"),
        ("stl10", "stl10_binary/fold_indices.txt", "does not exist"),
        ("dtd", "dtd/dtd/labels/test1.txt", "cannot be read"),
    ],
)
def test_a_part_that_is_missing_is_named(
    name: str, path: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_sets.write(name, tmp_path, monkeypatch)
    (tmp_path / path).rename(tmp_path / "elsewhere")
    assert expected in broken(CATALOGUE[name], tmp_path)


def test_an_image_without_its_file_is_told_when_it_is_read(tmp_path: Path) -> None:
    from distilclip.data.bad_samples import ErrorPolicy
    from distilclip.evaluate.encode import encode_images
    from distilclip.models.clip import create_clip
    from tests.conftest import TINY_CLIP

    (tmp_path / "a.jpg").write_bytes(encoded(picture(0)))
    refs: Sequence[ImageRef] = [ImageRef(uri=f"{tmp_path}/a.jpg"), ImageRef(uri=f"{tmp_path}/b.jpg")]
    clip = create_clip(json.dumps(TINY_CLIP), seed=0)
    with pytest.raises(InputError, match=r"b\.jpg: missing image file"):
        encode_images(clip, refs)
    found = encode_images(clip, refs, policy=ErrorPolicy("skip", 0.5))
    assert found.unreadable == ((1, "missing image file"),)
