from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torchvision.datasets as torchvision

from distilclip.errors import InputError
from distilclip.sets import prompts
from distilclip.sets.catalogue import CATALOGUE
from distilclip.sets.classes import Classes, classes_digest
from distilclip.sets.prompts import (
    PromptSet,
    match_names,
    parse_prompts,
    prompts_of,
    read_prompts,
    readable,
    wording_of,
)

TEXT = """# Prompts

Introduction with `classes` in it.

## Pets

```bash
classes = [
    'Abyssinian',
    "colt's foot",
]

templates = [
    'a photo of a "{}".',
]
```

## Faces

```bash
classes = [['happy', 'smiling'], ['sad']]
templates = ['they look {}.', 'a {} face.']
```
"""


def test_lists_are_read_as_python_literals() -> None:
    found = parse_prompts(TEXT, source="test")
    assert list(found) == ["Pets", "Faces"]
    assert found["Pets"].classes == ("Abyssinian", "colt's foot")
    assert found["Pets"].templates == ('a photo of a "{}".',)
    assert found["Faces"].classes == (("happy", "smiling"), ("sad",))


def test_anything_but_a_literal_is_not_run() -> None:
    with pytest.raises(ValueError, match="malformed node"):
        parse_prompts("## X\n```\nclasses = [open('/etc/passwd')]\ntemplates = []\n```\n", source="test")


def test_missing_list_is_named() -> None:
    with pytest.raises(InputError, match="'X' lacks"):
        parse_prompts("## X\n```\nclasses = []\n```\n", source="test")


def test_edited_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "prompts.md").write_text(TEXT)
    with pytest.raises(InputError, match="edited, or cut"):
        read_prompts(str(tmp_path / "prompts.md"))
    with pytest.raises(InputError, match="does not exist"):
        read_prompts(str(tmp_path / "absent.md"))


def test_set_is_found_by_name_with_a_suggestion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "prompts.md").write_text(TEXT)
    monkeypatch.setattr(prompts, "SHA256", hashlib.sha256(TEXT.encode()).hexdigest())
    assert prompts_of(str(tmp_path / "prompts.md"), "Faces").templates[0] == "they look {}."
    with pytest.raises(InputError, match="Did you mean 'Pets'"):
        prompts_of(str(tmp_path / "prompts.md"), "Pet")


# The words of a set


def match(labels: list[str], names: list[str], **aliases: str) -> tuple[str, ...]:
    return match_names(labels, names, aliases=aliases, source="the list", where="here")


def test_names_are_matched_by_their_words_not_by_position() -> None:
    assert match(["Abyssinian", "american_bulldog"], ["american bulldog", "Abyssinian"]) == (
        "Abyssinian",
        "american bulldog",
    )
    assert match(["church/outdoor", "church/indoor"], ["indoor church", "outdoor church"]) == (
        "outdoor church",
        "indoor church",
    )
    assert match(["colts_foot"], ["colt's foot"]) == ("colt's foot",)


def test_an_alias_goes_before_the_words() -> None:
    assert match(["Faces", "face"], ["face", "off-center face"], Faces="off-center face") == ("off-center face", "face")


@pytest.mark.parametrize(
    ("labels", "names", "message"),
    [
        (["cat", "dgo"], ["cat", "dog"], "'dgo' has no name in the list. Did you mean 'dog'"),
        (["red fox", "fox_red"], ["red fox"], "'red fox' and 'fox_red' are both 'red fox'"),
        (["cat"], ["cat", "dog"], "1 of 2 classes in the list are not there, first 'dog'"),
    ],
)
def test_every_label_gets_exactly_one_name(labels: list[str], names: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        match(labels, names)


def test_labels_become_words() -> None:
    assert readable("church/outdoor", blanks="_/") == "church outdoor"
    assert readable("red_fox") == "red fox"


@pytest.mark.parametrize("source", ["clip-benchmark", "the labels"])
def test_a_slash_is_a_blank_in_the_names_of_sun397_only(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if source == "clip-benchmark":
        pytest.importorskip("clip_benchmark")
    else:
        monkeypatch.setattr(prompts, "_clip_benchmark", lambda: {"names": {}, "templates": {}})

    def names(known: str, *labels: str) -> tuple[str, ...]:
        return wording_of(CATALOGUE[known]).names_of(labels, aliases={}, where="here")

    assert names("aircraft", "F/A-18", "F-16A/B") == ("F/A-18", "F-16A/B")
    assert names("cars", "Ram C/V Cargo Van Minivan 2012") == ("Ram C/V Cargo Van Minivan 2012",)
    assert names("sun397", "church/outdoor", "art_gallery") == ("church outdoor", "art gallery")


def test_classes_digest_is_of_the_names_in_prompts_and_their_classes() -> None:
    labels, names = ("n01", "n02"), ("tench", "goldfish")
    found = classes_digest(Classes(labels, names, "here"))
    assert found == hashlib.sha256(b"0\ttench\n1\tgoldfish\n").hexdigest()


def test_imagenet_is_named_by_open_clip() -> None:
    found = wording_of(CATALOGUE["imagenet-sketch"], prompts="never/read")
    assert found.is_clips
    assert len(found.templates) == 80
    assert found.names_of(["n01440764"], aliases={}, where="here") == ("tench",)


def test_a_label_that_is_no_wordnet_id_gets_a_suggestion() -> None:
    with pytest.raises(InputError, match="Did you mean 'n01440764'"):
        wording_of(CATALOGUE["imagenet"]).names_of(["n0144076"], aliases={}, where="here")


def test_templates_without_names_say_whose_the_names_are() -> None:
    pytest.importorskip("clip_benchmark")
    assert wording_of(CATALOGUE["sun397"]).source.endswith("class names of the set itself")
    assert "itself" not in wording_of(CATALOGUE["pets"]).source


def test_without_any_source_the_labels_are_the_names_and_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "_clip_benchmark", lambda: {"names": {}, "templates": {}})
    found = wording_of(CATALOGUE["food101"])
    assert not found.is_clips
    assert found.templates == ("a photo of a {}.",)
    assert found.names_of(["apple_pie"], aliases={}, where="here") == ("apple pie",)


def test_clips_own_file_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    own = PromptSet((("happy", "smiling"), "sad"), ("a {} face.",))
    monkeypatch.setattr(
        prompts, "prompts_of", lambda path, name: own if (path, name) == ("p.md", "DescribableTextures") else None
    )
    found = wording_of(CATALOGUE["dtd"], prompts="p.md")
    assert found.names == ("happy", "sad")  # of several names the first
    assert found.templates == ("a {} face.",)
    assert found.source == "openai/CLIP prompts.md"


def test_clip_benchmarks_lists_are_matched_to_the_labels_of_the_archives() -> None:
    pytest.importorskip("clip_benchmark")
    flowers = wording_of(CATALOGUE["flowers102"])
    assert flowers.names is not None
    # Its list and torchvision's are both in the order of the labels, though two names differ.
    aliases = CATALOGUE["flowers102"].aliases
    assert flowers.names_of(torchvision.Flowers102.classes, aliases=aliases, where="here") == flowers.names
    eurosat = wording_of(CATALOGUE["eurosat"])
    labels = sorted(CATALOGUE["eurosat"].aliases)
    assert eurosat.names_of(labels, aliases=CATALOGUE["eurosat"].aliases, where="here") == eurosat.names
    assert eurosat.templates[0] == "a centered satellite photo of {}."
    caltech = wording_of(CATALOGUE["caltech101"])
    assert caltech.names is not None
    known = {prompts._words(name) for name in caltech.names}
    assert all(prompts._words(name) in known for name in CATALOGUE["caltech101"].aliases.values())


def test_every_papers_set_but_birdsnap_has_clips_templates_in_clip_benchmark() -> None:
    pytest.importorskip("clip_benchmark")
    numbers = {name: len(wording_of(known).templates) for name, known in CATALOGUE.items() if known.group == "paper"}
    assert numbers == {
        "food101": 1,
        "cifar10": 18,
        "cifar100": 18,
        "birdsnap": 1,
        "sun397": 2,
        "cars": 8,
        "aircraft": 2,
        "dtd": 8,
        "pets": 1,
        "caltech101": 34,
        "flowers102": 1,
        "stl10": 2,
        "eurosat": 3,
        "imagenet": 80,
    }
