from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from distilclip.data.crops import Augmentation
from distilclip.data.store import Store
from distilclip.data.views import ViewEmbeddings, Views, caption_in, read_views, view_in, write_views
from distilclip.errors import InputError
from tests.data.conftest import DIM, TEACHER, write_store
from tests.data.test_stream import stream

VIEWS = Views(num=3, seed=1, augmentation=Augmentation(min_crop=0.4, flip=0.5))


def unit(*shape: int, seed: int) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((*shape, DIM))
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float16)


def store_with_views(folder: Path, uris: list[str], *, num_captions: int = 1, views: Views = VIEWS) -> Store:
    """A store whose view v of row r of shard s has the embedding `unit` of a seed made from the three."""
    for shard in range(len(uris)):
        rows = 4
        image = np.stack([[unit(seed=1000 * shard + 10 * row + v) for v in range(views.num)] for row in range(rows)])
        text = unit(rows * (num_captions - 1), seed=5)
        first = np.arange(rows + 1) * (num_captions - 1)
        write_views(str(folder), shard, ViewEmbeddings(image, text, first), {"teacher_digest": TEACHER["digest"]})
    return write_store(str(folder), uris, views=views)


def test_a_view_is_a_function_of_seed_sample_and_number() -> None:
    crops = {
        (seed, shard, row, view): Views(num=9, seed=seed, augmentation=VIEWS.augmentation).crop(
            40, 30, shard=shard, row=row, view=view
        )
        for seed in (0, 1)
        for shard in (0, 1)
        for row in (0, 1)
        for view in (0, 1)
    }
    assert len(set(crops.values())) == 16
    assert crops[1, 1, 0, 1] == VIEWS.crop(40, 30, shard=1, row=0, view=1)


def test_every_view_has_its_epoch_and_meets_every_caption() -> None:
    for m, c in ((3, 2), (2, 2), (4, 6), (1, 5), (5, 1)):
        pairs = [
            (view_in(epoch, 2, 7, num_views=m), caption_in(epoch, 2, 7, num_views=m, num_captions=c))
            for epoch in range(m * c)
        ]
        assert len(set(pairs)) == m * c
        assert sorted(view for view, _ in pairs[:m]) == list(range(m))
    assert {view_in(0, 0, row, num_views=3) for row in range(3)} == {0, 1, 2}


def test_the_plan_survives_the_manifest(tmp_path: Path, pair_tars: Callable[..., list[str]]) -> None:
    assert store_with_views(tmp_path / "store", pair_tars(shards=1, rows=4)).views == VIEWS
    assert write_store(str(tmp_path / "plain"), pair_tars(shards=1, rows=4)).views is None


def test_training_shows_the_stored_view_with_its_embedding(tmp_path: Path, pair_tars: Callable[..., list[str]]) -> None:
    store = store_with_views(tmp_path / "store", pair_tars(shards=2, rows=4))
    seen: dict[int, set[int]] = {}
    opened = stream(store=str(tmp_path / "store"), batch_size=8, num_views=3)
    for epoch, batch in enumerate(opened.batches(stop=3)):
        for place, identity in enumerate(batch.ids.tolist()):
            shard, row = divmod(identity, 2**32)
            view = view_in(epoch, shard, row, num_views=3)
            expected = unit(seed=1000 * shard + 10 * row + view).astype(np.float32)
            assert np.array_equal(batch.teacher_image[0][place].numpy(), expected)
            assert np.array_equal(batch.teacher_text[0][place].numpy(), store.text(shard)[row].astype(np.float32))
            seen.setdefault(identity, set()).add(view)
    assert all(views == {0, 1, 2} for views in seen.values())


def test_a_view_has_the_same_pixels_whenever_and_with_whatever_seed_it_is_shown(
    tmp_path: Path, pair_tars: Callable[..., list[str]]
) -> None:
    store_with_views(tmp_path / "store", pair_tars(shards=2, rows=4))
    shown: dict[tuple[int, int], torch.Tensor] = {}
    for seed in (1, 2):
        opened = stream(store=str(tmp_path / "store"), batch_size=8, num_views=3, seed=seed)
        for epoch, batch in enumerate(opened.batches(stop=6)):
            for identity, pixels in zip(batch.ids.tolist(), batch.pixels, strict=True):
                view = view_in(epoch, *divmod(identity, 2**32), num_views=3)
                assert torch.equal(shown.setdefault((identity, view), pixels), pixels)
    assert len(shown) == 8 * 3
    assert len({pixels.numpy().tobytes() for pixels in shown.values()}) == 8 * 3


def test_samples_whose_captions_changed_are_noticed(tmp_path: Path, pair_tars: Callable[..., list[str]]) -> None:
    store_with_views(tmp_path / "store", pair_tars(shards=1, rows=4), num_captions=2)
    with pytest.raises(InputError, match="other captions than when it was embedded"):
        next(stream(store=str(tmp_path / "store"), num_views=3).batches(stop=1))


def test_views_that_a_store_lacks_are_refused(tmp_path: Path, pair_tars: Callable[..., list[str]]) -> None:
    uris = pair_tars(shards=1, rows=4)
    write_store(str(tmp_path / "plain"), uris)
    store_with_views(tmp_path / "store", uris)
    with pytest.raises(InputError, match="plain has 0 views, not 2"):
        stream(store=str(tmp_path / "plain"), num_views=2)
    with pytest.raises(InputError, match="has 3 views, not 4"):
        stream(store=str(tmp_path / "store"), num_views=4)
    with pytest.raises(InputError, match="name the store too"):
        stream(data=uris, num_views=1)
    other = Views(num=3, seed=2, augmentation=VIEWS.augmentation)
    store_with_views(tmp_path / "other", uris, views=other)
    with pytest.raises(InputError, match=r"views of .*other are not those of .*store"):
        stream(stores=[str(tmp_path / "store"), str(tmp_path / "other")], num_views=3)


def test_views_of_another_store_are_refused(tmp_path: Path) -> None:
    embeddings = ViewEmbeddings(unit(4, 3, seed=0), unit(0, seed=0), np.zeros(5, np.int64))
    write_views(str(tmp_path), 0, embeddings, {"teacher_digest": "1"})
    wanted = {"num_rows": 4, "num_views": 3, "dim": DIM, "teacher": "1"}
    assert read_views(str(tmp_path), 0, **wanted).image.shape == (4, 3, DIM)
    for other in ({"num_rows": 5}, {"num_views": 2}, {"dim": 5}, {"teacher": "2"}):
        with pytest.raises(InputError, match="does not belong to the store"):
            read_views(str(tmp_path), 0, **{**wanted, **other})
    with pytest.raises(InputError, match=r"000001\.safetensors is missing"):
        read_views(str(tmp_path), 1, **wanted)
