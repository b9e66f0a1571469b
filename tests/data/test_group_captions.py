"""`--captions of-group`: which picture is shown with which caption, and its embedding."""

from __future__ import annotations

import itertools
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
from distilclip.data.side_files import Groups, write_groups
from distilclip.data.store import Store, sample_id
from distilclip.data.stream import Batch, PairSource, PairStream, Presentation, open_stream
from distilclip.errors import InputError
from distilclip.mixture import Weighting
from tests.data.conftest import embedding, tokenize, write_store
from tests.data.test_views import store_with_views

PairTars = Callable[..., list[str]]
SHARDS, ROWS, SEED = 3, 12, 5
MEMBERS = {3: [3, 4, 12, 31], 0: [0], 15: [1, 15, 16], 35: [35, 30, 20, 21, 22], 7: [7, 8], 33: [33]}
"""Of every kept row, the rows that it stands for: numbers through the shards, as in the keys and captions."""


def write_members(store: Store, folder: str, members: dict[int, list[int]] = MEMBERS) -> str:
    """Groups of these members; each other valid row is one that a row outside of the table stands for."""
    kept_for = {member: kept for kept, own in members.items() for member in own}
    for shard in range(store.num_shards):
        rows = store.rows(shard)
        valid = np.flatnonzero(rows.valid).astype(np.uint32)
        kept = np.array([kept_for.get(int(rows.key[row]), 9) for row in valid])
        ids = sample_id(kept // ROWS, kept % ROWS)
        keep = np.array([int(rows.key[row]) in members for row in valid])
        write_groups(folder, shard, Groups(valid, ids, ids, np.zeros(len(valid), np.float32), keep))
    return folder


@pytest.fixture
def source(tmp_path: Path, pair_tars: PairTars) -> dict[str, Any]:
    store = write_store(str(tmp_path / "store"), pair_tars(shards=SHARDS, rows=ROWS), invalid=[5])
    return {"stores": [store.path], "groups": write_members(store, str(tmp_path / "groups"))}


def stream(source: dict[str, Any], *, captions: Any = "of-group", batch_size: int = 4, **options: Any) -> PairStream:
    shown: dict[str, Any] = {"sizes": [8], "augmentation": Augmentation(min_crop=0.3), "seed": SEED}
    shown |= {"num_views": options.pop("num_views", 0), "tokenize": tokenize}
    return open_stream(
        PairSource(captions=captions, weighting=options.pop("weighting", Weighting()), **source),
        Presentation(**shown),
        batch_size=batch_size,
        policy=ErrorPolicy("raise"),
        **options,
    )


def told(kept: int, turn: int) -> int:
    """The row whose caption is shown at a turn: all of a group one after the other, from another one in each round."""
    members = sorted(MEMBERS[kept])
    start = kept // ROWS + kept % ROWS + SEED
    return members[(turn + turn // len(members) + start) % len(members)]


def number(identity: int) -> int:
    return (identity >> 32) * ROWS + (identity & 0xFFFFFFFF)


def test_batches_equal_a_naive_reference(source: dict[str, Any]) -> None:
    opened, own = stream(source), stream(source, captions="own")
    assert opened.num_rows == own.num_rows == 6
    assert opened.loader.group_captions == {"num_captions": 16, "most_for_a_picture": 5}
    assert own.loader.group_captions == {}
    for step, (batch, plain) in enumerate(zip(opened.batches(stop=40), own.batches(stop=40), strict=True)):
        kept = [number(identity) for identity in batch.ids.tolist()]
        tellers = [told(row, opened.rows_at(step)[0]) for row in kept]
        assert batch.captions == [f"picture number {teller}" for teller in tellers]
        assert torch.equal(batch.tokens, tokenize(batch.captions))
        expected = -np.stack([embedding(str(teller)) for teller in tellers]).astype(np.float32)
        assert np.array_equal(batch.teacher_text[0].numpy(), expected)
        assert torch.equal(batch.ids, plain.ids)
        assert torch.equal(batch.pixels, plain.pixels)
        assert torch.equal(batch.teacher_image[0], plain.teacher_image[0])
        assert plain.captions == [f"picture number {row}" for row in kept]


def test_each_caption_of_a_group_is_seen_as_often_as_the_others(source: dict[str, Any]) -> None:
    opened = stream(source, batch_size=6)
    rounds = 60  # divisible by the size of every group
    seen = Counter(caption for batch in opened.batches(stop=rounds) for caption in batch.captions)
    for members in MEMBERS.values():
        assert {seen[f"picture number {member}"] for member in members} == {rounds // len(members)}
    # At turns drawn by chance, too: nothing prefers a caption at some turns.
    turns = np.random.default_rng(0).integers(0, 10**6, 1500).tolist()
    for index, members in enumerate(MEMBERS[row] for row in sorted(MEMBERS)):
        found = Counter(opened.loader._teller(index, turn)[0] for turn in turns)
        assert len(found) == len(members)
        assert len(members) == 1 or chisquare(list(found.values())).pvalue > 1e-4


def test_a_row_that_an_epoch_has_several_times_is_shown_with_another_caption_each_time(
    source: dict[str, Any], tmp_path: Path
) -> None:
    """Each picture counts for its group: 16 x 6 / 16 draws an epoch, so a group of five has one or two."""
    weights = np.zeros(SHARDS * ROWS)
    weights[35] = 1
    weights[3] = 1e-3
    np.save(tmp_path / "w.npy", weights)
    opened = stream(source, batch_size=2, weighting=Weighting(row_weights=str(tmp_path / "w.npy")))
    assert opened.loader.group_captions == {"num_captions": 9, "most_for_a_picture": 5}
    for batch in opened.batches(stop=20):
        captions = [c for c, i in zip(batch.captions, batch.ids.tolist(), strict=True) if number(i) == 35]
        assert len(set(captions)) == len(captions) >= 1


def test_batches_are_the_same_for_any_ranks_and_resumption(source: dict[str, Any]) -> None:
    def same(a: list[Batch], b: Batch) -> None:
        for name in ("ids", "pixels", "tokens"):
            assert torch.equal(torch.cat([getattr(part, name) for part in a]), getattr(b, name))
        assert torch.equal(torch.cat([part.teacher_text[0] for part in a]), b.teacher_text[0])
        assert list(itertools.chain(*(part.captions for part in a))) == b.captions

    whole = list(stream(source).batches(stop=9))
    ranks = [list(stream(source, rank=rank, world=2).batches(stop=9)) for rank in range(2)]
    for step, batch in enumerate(whole):
        same([rank[step] for rank in ranks], batch)
    for batch, again in zip(whole[5:], stream(source).batches(start=5, stop=9), strict=True):
        same([again], batch)


def test_views_go_with_captions_of_other_rows(tmp_path: Path, pair_tars: PairTars) -> None:
    """Three views, three captions each; row 1 of shard 0 stands for two rows of shard 1."""
    store = store_with_views(tmp_path / "store", pair_tars(shards=2, rows=4), num_captions=3)
    first, kept = np.arange(4, dtype=np.uint32), [[1], []]
    for shard in range(2):
        ids = np.full(4, 1, np.uint64)  # rows 0 and 1 of shard 0, and 2 and 3 of shard 1: their own where they are kept
        write_groups(str(tmp_path / "groups"), shard,
                     Groups(first, ids, ids, np.zeros(4, np.float32), np.isin(first, kept[shard])))  # fmt: skip
    opened = stream({"stores": [store.path], "groups": str(tmp_path / "groups")}, batch_size=1, num_views=3)
    assert opened.loader.group_captions == {"num_captions": 8, "most_for_a_picture": 8}
    loader, pairs = opened.loader, set()
    for turn in range(3 * 8 * 3):
        teller, own_turn = loader._teller(0, turn)
        assert own_turn == turn // 8
        pairs.add((turn % 3, teller))
    assert len(pairs) == 3 * 8  # every view meets every row


def test_a_removed_picture_that_has_changed_is_noticed(source: dict[str, Any]) -> None:
    opened = stream(source, batch_size=6)
    table = opened.loader.texts
    at = table.ids(np.arange(len(table))).tolist().index(4)  # row 4, which row 3 stands for
    path = Path(table.uris[0])
    content = bytearray(path.read_bytes())
    begin = int(table.offset[at]) + 512 + 200  # within the picture, which is the first member
    content[begin : begin + 4] = bytes(255 - value for value in content[begin : begin + 4])
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"00000\.tar: 00004: its picture is not the one that was embedded"):
        list(opened.batches(stop=4))


def test_groups_of_one_and_no_groups_are_refused(source: dict[str, Any], tmp_path: Path) -> None:
    alone = write_members(Store.open(source["stores"][0]), str(tmp_path / "alone"), {row: [row] for row in (0, 1, 3)})
    with pytest.raises(InputError, match="none of the rows that are trained on stands for another one"):
        stream({**source, "groups": alone}, batch_size=2)
    with pytest.raises(InputError, match="captions of-group needs groups"):
        stream({**source, "groups": None}, batch_size=2)
