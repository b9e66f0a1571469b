"""`embed --views`: the teacher embeds the very pixels and captions that training will show."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distilclip.data.bad_samples import ErrorPolicy
from distilclip.data.crops import Augmentation
from distilclip.data.samples import decode_image
from distilclip.data.store import Store
from distilclip.data.stream import PairSource, Presentation, open_stream
from distilclip.errors import InputError
from distilclip.models.clip import load_clip, normalise_pixels
from distilclip.stages.embed import Config, main
from tests.conftest import encoded, picture, write_tar
from tests.stages.conftest import contents

PairTars = Callable[..., list[str]]
OPTIONS: dict[str, Any] = {
    "views": 2,
    "augmentation": Augmentation(min_crop=0.3, flip=0.5),
    "seed": 4,
    "num_workers": 0,
    "batch_size": 4,
}


def members() -> list[tuple[str, bytes]]:
    """Five samples: one of one caption, one of three, a repeated one, one whose image is cut, one more of two."""
    captions = [["a"], ["b", "b2", "b3"], ["c", "c"], ["d", "d2"], ["e", "e2"]]
    found = []
    for row, several in enumerate(captions):
        image = encoded(picture(row, (96, 72)))
        found.append((f"{row}.jpg", image[:300] if row == 3 else image))
        found.append((f"{row}.json", json.dumps({"caption": several[0], "captions": several}).encode()))
    return found


@pytest.fixture
def store(tmp_path: Path, tiny_clip_folder: str) -> Store:
    data = (write_tar(tmp_path / "a.tar", members()),)
    main(Config(data=data, out=str(tmp_path / "store"), model=tiny_clip_folder, max_bad_ratio=0.5, **OPTIONS))
    return Store.open(str(tmp_path / "store"))


def test_the_student_sees_what_the_teacher_embedded(store: Store, tiny_clip_folder: str) -> None:
    clip = load_clip(tiny_clip_folder)
    opened = open_stream(
        PairSource(stores=[store.path]),
        Presentation(sizes=[32], tokenize=clip.tokenizer, seed=9, num_views=2),
        batch_size=4,
        policy=ErrorPolicy("skip", 0.5),
    )
    captions = set()
    for batch in opened.batches(stop=6):
        with torch.no_grad():
            image = clip.encode_image(normalise_pixels(batch.pixels, clip.preprocess_cfg))
            text = clip.encode_text(clip.tokenizer(batch.captions))
        assert (image - batch.teacher_image[0]).abs().max() < 1e-3
        assert (text - batch.teacher_text[0]).abs().max() < 1e-3
        captions |= set(batch.captions)
    assert captions == {"a", "b", "b2", "b3", "c", "e", "e2"}


def test_views_differ_from_each_other_and_from_the_canonical_one(store: Store) -> None:
    views = store.view_embeddings(0)
    store.verify()
    valid = store.rows(0).valid
    assert valid.tolist() == [True, True, True, False, True]
    assert not views.image[~valid].any()
    for row in np.flatnonzero(valid):
        three = np.stack([store.image(0)[row], *views.image[row]]).astype(np.float32)
        assert (three @ three.T - np.eye(3)).max() < 0.9999
    assert np.diff(views.text_first).tolist() == [0, 2, 0, 0, 1]


def test_without_views_nothing_is_added(tmp_path: Path, store: Store, tiny_clip_folder: str) -> None:
    plain = tmp_path / "plain"
    options = {**OPTIONS, "views": 0, "max_bad_ratio": 0.5}
    main(Config(data=(str(tmp_path / "a.tar"),), out=str(plain), model=tiny_clip_folder, **options))
    assert not (plain / "views").exists()
    assert Store.open(str(plain)).image(0).tobytes() == store.image(0).tobytes()


def test_the_bytes_do_not_depend_on_workers_or_a_kill(
    tmp_path: Path, pair_tars: PairTars, tiny_clip_folder: str
) -> None:
    data = tuple(pair_tars(shards=2, rows=5))
    main(Config(data=data, out=str(tmp_path / "here"), model=tiny_clip_folder, **OPTIONS))
    there = Config(data=data, out=str(tmp_path / "there"), model=tiny_clip_folder, **{**OPTIONS, "num_workers": 2})
    main(there)
    assert contents(tmp_path / "here") == contents(tmp_path / "there")
    assert "views/000001.safetensors" in contents(tmp_path / "here")
    for name in ("result.json", "manifest.parquet", "000001.rows.parquet", "views/000001.safetensors"):
        (tmp_path / "there" / name).unlink()
    main(there)
    assert contents(tmp_path / "here") == contents(tmp_path / "there")


def test_a_view_that_is_the_whole_square_picture_is_nearly_the_canonical_one(
    tmp_path: Path, tiny_clip_folder: str
) -> None:
    image = picture(3, (64, 64))
    data = (write_tar(tmp_path / "a.tar", [("0.jpg", encoded(image)), ("0.txt", b"words")]),)
    main(
        Config(
            data=data,
            out=str(tmp_path / "store"),
            model=tiny_clip_folder,
            **{**OPTIONS, "augmentation": Augmentation(min_crop=1.0)},
        )
    )
    store = Store.open(str(tmp_path / "store"))
    views = store.view_embeddings(0).image[0].astype(np.float32)
    clip = load_clip(tiny_clip_folder)
    with torch.no_grad():
        canonical = clip.encode_image(clip.preprocess(decode_image(encoded(image)))[None])[0].numpy()
    assert (views @ canonical).max() > 0.97


def test_a_negative_number_of_views_is_refused() -> None:
    with pytest.raises(InputError, match="views is -1"):
        Config(data=("a.tar",), out="o", model="m", views=-1)
