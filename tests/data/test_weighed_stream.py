"""A stream whose rows are drawn by weight: parts of a mixture, and weights of rows."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from distilclip.data.bad_samples import ErrorPolicy
from distilclip.data.crops import Augmentation
from distilclip.data.side_files import WeightedRows, write_weights
from distilclip.data.stream import PairSource, PairStream, Presentation, open_stream
from distilclip.data.views import Views
from distilclip.errors import InputError
from distilclip.mixture import Weighting
from tests.conftest import encoded, picture, write_tar
from tests.data.conftest import tokenize, write_store

PairTars = Callable[..., list[str]]
ROWS = 7


@pytest.fixture
def tars(pair_tars: PairTars) -> list[str]:
    """Three tars of seven pairs."""
    return pair_tars(shards=3, rows=ROWS)


def stream(*, batch_size: int = 4, row_weights: str | None = None, num_views: int = 0, **options: Any) -> PairStream:
    place = {name: options.pop(name) for name in ("rank", "world") if name in options}
    source = PairSource(**options, weighting=Weighting(row_weights=row_weights))
    shown = Presentation(
        sizes=[8], tokenize=tokenize, seed=5, augmentation=Augmentation(min_crop=0.3), num_views=num_views
    )
    return open_stream(source, shown, batch_size=batch_size, policy=ErrorPolicy("skip", 0.3), **place)


def weights_file(folder: Path, weights: Any) -> str:
    path = folder / "weights.npy"
    np.save(path, np.asarray(weights, np.float64))
    return str(path)


def drawn(opened: PairStream, *, num_epochs: int) -> np.ndarray:
    """How often each row of the table stands in the batches of some epochs."""
    rows = [opened.rows_at(step)[1] for step in range(num_epochs * opened.steps_per_epoch)]
    return np.bincount(np.concatenate(rows), minlength=opened.num_rows)


def positions(opened: PairStream) -> list[int]:
    table = opened.loader.table
    return (table.shard * np.uint32(ROWS) + table.row).tolist()


@pytest.mark.parametrize("how", ["row weights", "shares"])
def test_equal_weights_give_the_order_and_the_crops_of_no_weights(tars: list[str], tmp_path: Path, how: str) -> None:
    plain = stream(data=tars)
    weighed = {
        "row weights": lambda: stream(data=tars, row_weights=weights_file(tmp_path, np.full(21, 0.3))),
        "shares": lambda: stream(data=[f"{tars[0]}={1 / 3}", f"{{{tars[1]},{tars[2]}}}={2 / 3}"]),
    }[how]()
    for step in (0, 3, 12, 700):
        (epoch, rows, _), (other, others, repeats) = plain.rows_at(step), weighed.rows_at(step)
        assert (epoch, rows.tobytes()) == (other, others.tobytes())
        assert not repeats.any()
    for a, b in zip(plain.batches(stop=6), weighed.batches(stop=6), strict=True):
        assert torch.equal(a.pixels, b.pixels)
        assert a.captions == b.captions


def test_the_order_without_weights_is_that_of_earlier_versions(tars: list[str]) -> None:
    opened = stream(data=tars, batch_size=21)
    for epoch in range(3):
        expected = np.random.Generator(np.random.PCG64([5, epoch])).permutation(21)
        assert np.array_equal(opened.rows_at(epoch)[1], expected)


def test_a_part_has_its_share_of_the_draws(tars: list[str]) -> None:
    """Seven rows with half of the draws, and fourteen with the other half."""
    opened = stream(data=[f"{tars[0]}=2", f"{{{tars[1]},{tars[2]}}}=2"], batch_size=3)
    assert (opened.num_rows, opened.steps_per_epoch) == (21, 7)
    counts = drawn(opened, num_epochs=2)
    assert set(counts[:7].tolist()) <= {2, 3, 4}  # 1.5 an epoch
    assert set(counts[7:].tolist()) <= {0, 1, 2}  # 0.75 an epoch
    assert counts[:7].sum() == pytest.approx(21, abs=2)
    assert [part["num_rows"] for part in opened.loader.mixture["parts"]] == [7, 14]
    assert [part["share"] for part in opened.loader.mixture["parts"]] == [0.5, 0.5]
    assert opened.loader.mixture["most_often"] == pytest.approx(1.5)
    assert opened.loader.mixture["effective_rows"] == pytest.approx(21**2 / (7 * 1.5**2 + 14 * 0.75**2), abs=0.1)


def test_rows_of_weight_0_are_left_out_and_an_epoch_is_that_much_shorter(tars: list[str], tmp_path: Path) -> None:
    weights = np.ones(21)
    weights[[2, 9, 20]] = 0
    weights[4] = 2
    opened = stream(data=tars, batch_size=3, row_weights=weights_file(tmp_path, weights))
    assert (opened.num_rows, opened.steps_per_epoch) == (18, 6)
    counts = dict(zip(positions(opened), drawn(opened, num_epochs=19).tolist(), strict=True))
    assert not {2, 9, 20} & set(counts)
    assert counts[4] == pytest.approx(36, abs=1)  # 18 draws among weights of 19: 2 x 18 / 19 an epoch
    opened = stream(data=[f"{tars[0]}=0", f"{tars[1]}=1", f"{tars[2]}=1"])
    assert opened.num_rows == 14
    assert [part["num_rows"] for part in opened.loader.mixture["parts"]] == [0, 7, 7]


def test_row_weights_divide_the_share_of_their_part(tars: list[str], tmp_path: Path) -> None:
    weights = [8.0, *[1.0] * 6, *[5.0] * 7, *[0.25] * 7]  # the second and the third part: equal rows
    opened = stream(data=[f"{uri}={w}" for uri, w in zip(tars, (0.5, 0.3, 0.2), strict=True)], batch_size=1,
                    row_weights=weights_file(tmp_path, weights))  # fmt: skip
    first = [opened.rows_at(epoch * 21)[1][0] for epoch in range(2000)]  # independent of one another
    found = np.bincount(first, minlength=21)
    expected = np.concatenate([np.array([8, *[1] * 6]) / 14 * 0.5, np.full(7, 0.3 / 7), np.full(7, 0.2 / 7)])
    assert 0.001 < chisquare(found, 2000 * expected).pvalue < 0.999
    assert chisquare(found, 2000 * np.array(weights) / sum(weights)).pvalue < 1e-9  # without the shares


def test_batches_are_the_same_for_any_ranks_workers_and_resumption(tars: list[str], tmp_path: Path) -> None:
    options: dict[str, Any] = {"data": tars, "row_weights": weights_file(tmp_path, np.arange(21) % 5), "batch_size": 8}
    whole = list(stream(**options).batches(stop=7))
    for world in (2, 4):
        ranks = [list(stream(rank=rank, world=world, **options).batches(stop=7)) for rank in range(world)]
        for step, batch in enumerate(whole):
            assert torch.equal(torch.cat([rank[step].ids for rank in ranks]), batch.ids)
            assert torch.equal(torch.cat([rank[step].pixels for rank in ranks]), batch.pixels)
    for start in range(1, 7):
        for batch, again in zip(whole[start:], stream(**options).batches(start=start, stop=7), strict=True):
            assert torch.equal(batch.ids, again.ids)
            assert torch.equal(batch.pixels, again.pixels)


def test_a_row_that_an_epoch_has_several_times_shows_another_crop_each_time(tars: list[str], tmp_path: Path) -> None:
    weights = np.ones(21)
    weights[3] = 8
    opened = stream(data=tars, row_weights=weights_file(tmp_path, weights), batch_size=21)
    batch = next(opened.batches(stop=1))
    shown = [pixels for identity, pixels in zip(batch.ids.tolist(), batch.pixels, strict=True) if identity == 3]
    assert len(shown) in (6, 7)  # 8 x 21 / 28
    assert len({pixels.numpy().tobytes() for pixels in shown}) == len(shown)


def test_repeats_show_the_next_views(tars: list[str], tmp_path: Path) -> None:
    weights = np.ones(21)
    weights[3] = 28
    opened = stream(data=tars, row_weights=weights_file(tmp_path, weights), batch_size=21)
    views = Views(num=4, seed=0, augmentation=Augmentation(min_crop=0.3))
    opened.loader.views = views
    opened.loader.presentation = Presentation(sizes=[8], tokenize=tokenize, seed=5, num_views=4)
    epoch, rows, repeats = opened.rows_at(0)
    pairs = sorted(zip(rows.tolist(), repeats.tolist(), strict=True))
    seen = Counter(opened.loader._draw(epoch, row, repeat).view for row, repeat in pairs if row == 3)
    assert max(seen.values()) - min(seen[view] for view in range(4)) <= 1


def test_a_sample_that_cannot_be_used_is_never_replaced_by_a_row_of_weight_0(tmp_path: Path) -> None:
    members = []
    for row in range(12):
        image = encoded(picture(row))
        members += [(f"{row}.jpg", image[: len(image) // 2] if row < 3 else image), (f"{row}.txt", b"words")]
    data = [write_tar(tmp_path / "a.tar", members)]
    weights = weights_file(tmp_path, [*[1.0] * 6, *[0.0] * 6])
    opened = stream(data=data, row_weights=weights, batch_size=3)
    opened.policy.max_bad_ratio = 1.0
    shown = {identity for batch in opened.batches(stop=20) for identity in batch.ids.tolist()}
    assert shown == {3, 4, 5}


def test_weights_of_the_rows_that_groups_keep(joined: dict[str, str], tmp_path: Path) -> None:
    """A folder as a stage writes it: rows that are not kept need no weight, and those of weight 0 no label."""
    for shard in range(3):
        rows = np.array([1, 3, 4, 5, 6], np.uint32)
        write_weights(str(tmp_path / "w"), shard, WeightedRows(rows, np.array([0.0, 1, 1, 1, 3])))
    source: dict[str, Any] = {"stores": [joined["store"]], "groups": joined["groups"], "clusters": joined["clusters"]}
    opened = stream(**source, row_weights=str(tmp_path / "w"), batch_size=3)
    assert opened.loader.table.row.tolist() == [3, 4, 5, 6] * 3
    batch = next(opened.batches(stop=1))
    assert batch.labels is not None
    assert [f"picture number {label}" for label in batch.labels.tolist()] == batch.captions
    counts = dict(zip(positions(opened), drawn(opened, num_epochs=2).tolist(), strict=True))
    assert all(count == 4 for position, count in counts.items() if position % ROWS == 6)  # 3 of 6: half of all draws


def test_the_parts_of_a_store_are_named_in_any_order_and_after_a_move_in_its_own(
    tars: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store = str(tmp_path / "store")
    write_store(store, [os.path.relpath(uri, tmp_path) for uri in tars])
    for data in (
        [f"{tars[0]}=0.5", f"{{{tars[1]},{tars[2]}}}=0.5"],
        [f"{{{tars[2]},{tars[1]}}}=0.5", f"{tars[0]}=0.5"],
    ):
        opened = stream(stores=[store], data=data)
        assert opened.loader.table.uris == tars
        by_shard = drawn(opened, num_epochs=4).reshape(3, ROWS).sum(1)
        assert by_shard[0] == pytest.approx(by_shard[1:].sum(), abs=10)
        assert [part["share"] for part in opened.loader.mixture["parts"]] == [0.5, 0.5]
    moved = [str(Path(uri).rename(tmp_path / f"{number}.tar")) for number, uri in enumerate(tars)]
    opened = stream(stores=[store], data=[f"{moved[0]}=0", f"{{{moved[1]},{moved[2]}}}=1"])
    assert set(opened.loader.table.shard.tolist()) == {1, 2}
    with pytest.raises(InputError, match=r"1\.tar, row 0: the key is '00007' where the store has '00000'"):
        stream(stores=[store], data=[f"{moved[1]}=1", f"{moved[0]}=1", f"{moved[2]}=1"])


def test_parts_that_do_not_fit_are_refused(tars: list[str], joined: dict[str, str], tmp_path: Path) -> None:
    folder = os.path.dirname(tars[0])
    with pytest.raises(InputError, match=r"00000\.tar belongs to two parts, .*pairs and .*00000\.tar"):
        stream(data=[f"{folder}=1", f"{tars[0]}=1"])
    with pytest.raises(InputError, match=r"No file matches '.*9\.tar'"):
        stream(data=[f"{tars[0]}=1", f"{folder}/9.tar=1"])
    with pytest.raises(InputError, match=r"The data are 2 files, but the store .* was made from 3"):
        stream(stores=[joined["store"]], data=[f"{tars[0]}=1", f"{tars[1]}=1"])
    weights = weights_file(tmp_path, [*[0.0] * 7, *[1.0] * 14])
    with pytest.raises(InputError, match=r"the part .*00000\.tar has the weight 0.7 and no row to train on.*--groups"):
        stream(data=[f"{tars[0]}=0.7", f"{tars[1]}=0.2", f"{tars[2]}=0.1"], row_weights=weights)
    with pytest.raises(InputError, match=r"weights\.npy has 21 weights where the data have 7 rows"):
        stream(data=tars[:1], row_weights=weights)
    with pytest.raises(InputError, match="There are 7 usable pairs, fewer than one batch of 8"):
        stream(data=[f"{tars[0]}=1", f"{tars[1]}=0"], batch_size=8)
