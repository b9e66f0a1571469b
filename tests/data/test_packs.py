"""A pack holds what its store holds, in another order; batches of it are those of the store."""

from __future__ import annotations

import dataclasses
import io
import itertools
import pickle
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import pyarrow as pa
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from PIL import Image

from distilclip import stage_folder
from distilclip.data.bad_samples import ErrorPolicy
from distilclip.data.crops import Augmentation
from distilclip.data.decode import shrink_picture
from distilclip.data.side_files import write_centers
from distilclip.data.store import Store, sample_id, split_id
from distilclip.data.stream import Batch, PairSource, PairStream, Presentation, Task, open_stream
from distilclip.errors import InputError
from distilclip.packs.pack import (
    INDEX_FILE,
    Pack,
    PackFacts,
    RowCounts,
    ShardPackets,
    shard_name,
    write_index,
)
from distilclip.packs.pack_loader import BlockOrder, PackLoader, open_pack_stream
from distilclip.packs.packing import Packing
from distilclip.stages import pack
from tests.conftest import encoded, picture
from tests.data.conftest import DIM, TEACHER, tokenize
from tests.data.test_stream import same

SHOWN = Presentation(sizes=[8], augmentation=Augmentation(min_crop=0.3), tokenize=tokenize, seed=5)


def finish(folders: dict[str, str], name: str, stage: str, made_from: dict[str, str]) -> None:
    """Let a folder look as its stage would have left it."""
    path = Path(folders[name])
    stage_folder.write_json(str(path / "config.json"), {"stage": stage, "store": folders["store"]})
    stage_folder.write_json(str(path / "inputs.json"), made_from)
    stage_folder.write_json(str(path / "result.json"), {"stage": stage})


@pytest.fixture
def stages(joined: dict[str, str]) -> dict[str, str]:
    """The folders of `joined` as stages leave them: 15 kept rows in three shards."""
    finish(joined, "store", "embed", {})
    made_from = {"embed": stage_folder.result_digest(joined["store"])}
    finish(joined, "groups", "balance", made_from)
    write_centers(joined["clusters"], np.eye(DIM, dtype=np.float32))
    finish(joined, "clusters", "cluster", made_from)
    return joined


def packed(folders: dict[str, str], out: Path, **options: Any) -> Pack:
    sides = {name: folders[name] for name in ("store", "groups", "clusters")}
    pack.main(pack.Config(**{**sides, "out": str(out), "packet_rows": 2, "shard_rows": 6, **options}))
    return Pack.open(str(out))


def of_same_rows(found: Batch, folders: dict[str, str], shown: Presentation, epoch: int) -> Batch:
    """The batch that the store gives for the rows of a pack's."""
    source = PairSource(stores=[folders["store"]], groups=folders["groups"], clusters=folders["clusters"])
    loader = open_stream(source, shown, batch_size=1).loader
    table = loader.table  # type: ignore[attr-defined]
    place = {int(identity): index for index, identity in enumerate(table.ids(np.arange(len(table))))}
    rows = np.array([place[identity] for identity in found.ids.tolist()])
    return loader.load(Task(epoch, rows, np.zeros_like(rows)))


def test_a_batch_of_a_pack_is_that_of_the_store_bit_for_bit(stages: dict[str, str], tmp_path: Path) -> None:
    stream = open_pack_stream(packed(stages, tmp_path / "pack"), SHOWN, batch_size=4)
    for step, batch in enumerate(stream.batches(stop=6)):
        assert same(batch, of_same_rows(batch, stages, SHOWN, epoch=step // 3))


def test_pictures_that_are_made_smaller_look_alike_and_all_else_keeps_its_bits(
    stages: dict[str, str], tmp_path: Path
) -> None:
    opened = packed(stages, tmp_path / "pack", max_side=20, quality=95)
    assert opened.facts.counts == RowCounts(num_images=15, num_texts=15, num_pairs=15, num_resized=15)
    for batch in open_pack_stream(opened, SHOWN, batch_size=5).batches(stop=3):
        expected = of_same_rows(batch, stages, SHOWN, epoch=0)
        found, others = expected.pixels.double(), expected.pixels.roll(1, 0).double()
        difference = (batch.pixels - found).abs().mean()
        assert 0 < difference < 0.4 * (batch.pixels - others).abs().mean()  # pictures of noise
        assert same(dataclasses.replace(batch, pixels=expected.pixels), expected)


def test_an_epoch_has_every_kept_row_once_in_another_order(stages: dict[str, str], tmp_path: Path) -> None:
    stream = open_pack_stream(packed(stages, tmp_path / "pack"), SHOWN, batch_size=5)
    epochs = [
        [i for batch in stream.batches(start=3 * e, stop=3 * e + 3) for i in batch.ids.tolist()] for e in range(3)
    ]
    kept = {int(sample_id(shard, row)) for shard in range(3) for row in (1, 3, 4, 5, 6)}
    assert all(set(ids) == kept and len(ids) == len(kept) for ids in epochs)
    assert len({tuple(ids) for ids in epochs}) == 3


def test_one_two_and_three_processes_see_the_same_global_batches(stages: dict[str, str], tmp_path: Path) -> None:
    opened = packed(stages, tmp_path / "pack")
    loader, policy = PackLoader(opened, SHOWN), ErrorPolicy("skip")
    for step in (0, 1, 2, 5):
        whole = PairStream(loader, policy, batch_size=6).rows_at(step)
        for world in (2, 3):
            parts = [PairStream(loader, policy, batch_size=6, rank=r, world=world).rows_at(step) for r in range(world)]
            assert np.array_equal(np.concatenate([rows for _, rows, _ in parts]), whole[1])
            assert {epoch for epoch, _, _ in parts} == {whole[0]}


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a machine of one core
def test_batches_do_not_depend_on_loader_processes_or_where_one_begins(
    stages: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = open_pack_stream(packed(stages, tmp_path / "pack"), SHOWN, batch_size=7)
    expected = list(stream.batches(stop=5))
    monkeypatch.setattr("distilclip.data.stream.TASK_ROWS", 3)
    again = open_pack_stream(Pack.open(str(tmp_path / "pack")), SHOWN, batch_size=7)
    for found in (list(again.batches(start=2, stop=5, num_workers=2)), list(again.batches(start=2, stop=5))):
        assert all(same(a, b) for a, b in zip(found, expected[2:], strict=True))
    task = Task(*stream.rows_at(0))
    assert same(pickle.loads(pickle.dumps(stream.loader)).load(task), stream.loader.load(task))


def test_the_same_command_gives_the_same_bytes_and_another_seed_another_order(
    stages: dict[str, str], tmp_path: Path
) -> None:
    first, second = (packed(stages, tmp_path / name) for name in ("first", "second"))
    other = packed(stages, tmp_path / "other", seed=1)
    for name in [INDEX_FILE, *map(shard_name, range(len(first.first_row) - 1))]:
        content = (tmp_path / "first" / name).read_bytes()
        assert content == (tmp_path / "second" / name).read_bytes()
        assert content != (tmp_path / "other" / name).read_bytes()
    assert first.num_rows == second.num_rows == other.num_rows == 15
    assert not (tmp_path / "first/parts").exists()


def test_other_programs_read_the_shards(stages: dict[str, str], tmp_path: Path) -> None:
    opened = packed(stages, tmp_path / "pack")
    tables = [pa.ipc.open_file(tmp_path / "pack" / shard_name(shard)).read_all() for shard in range(3)]
    table = pa.concat_tables(tables)
    assert len(table) == opened.num_rows
    store = Store.open(stages["store"])
    for line in table.to_pylist():
        shard, row = (int(part) for part in split_id(line["id"]))
        assert line["captions"] == [f"picture number {int(store.rows(shard).key[row])}"]
        assert np.array_equal(np.array(line["image_embedding"], np.float16), store.image(shard)[row])
        assert np.array_equal(np.array(line["text_embedding"], np.float16), store.text(shard)[row])
        assert line["cluster"] == int(store.rows(shard).key[row])


def made_up(path: Path, num_rows: list[int], *, packet_rows: int) -> Pack:
    """An index without shards."""
    shards = []
    for count in num_rows:
        packets = -(-count // packet_rows)
        numbers = np.arange(packets)
        counts = RowCounts(num_images=count, num_texts=count, num_pairs=count, num_resized=0)
        places = {"start": numbers, "size": numbers.astype(np.int32), "digest": numbers.astype(np.uint64)}
        shards.append(ShardPackets(num_rows=count, counts=counts, sha256="", **places))
    facts = PackFacts(
        packet_rows=packet_rows, max_side=256, has_clusters=False, counts=RowCounts.total([s.counts for s in shards])
    )
    write_index(str(path), shards, facts, teacher=Store("", [], DIM, TEACHER))
    return Pack.open(str(path))


@pytest.mark.parametrize("num_rows", [[100], [7], [33, 1, 40, 26], [5, 0, 3]])
@pytest.mark.parametrize("block_rows", [1000, 24, 8])
def test_the_order_is_a_permutation_whatever_the_blocks(tmp_path: Path, num_rows: list[int], block_rows: int) -> None:
    opened = made_up(tmp_path, num_rows, packet_rows=4)
    order, n = BlockOrder(opened, 3, block_rows), sum(num_rows)
    epochs = [order.rows(epoch, 0, n) for epoch in range(2)]
    for rows in epochs:
        assert sorted(rows.tolist()) == list(range(n))
    bounds = sorted({0, n, *np.random.default_rng(0).integers(0, n, 5).tolist()})
    parts = [BlockOrder(opened, 3, block_rows).rows(1, a, b) for a, b in itertools.pairwise(bounds)]
    assert np.array_equal(np.concatenate(parts), epochs[1])
    assert n < 10 or not np.array_equal(*epochs)


def test_a_block_is_shown_at_a_time_and_a_packet_stays_together(tmp_path: Path) -> None:
    opened = made_up(tmp_path, [64, 64], packet_rows=4)
    rows = BlockOrder(opened, 0, 32).rows(0, 0, 128).reshape(4, 8, 4)
    assert (np.diff(rows, axis=2) == 1).all()  # rows of a packet
    assert (rows[:, :, 0] % 4 == 0).all()
    assert all(len(set((block // 32).ravel().tolist())) == 1 for block in rows)
    first = Counter(int(BlockOrder(opened, seed, 32).rows(0, 0, 1)[0]) for seed in range(2000))
    assert len(first) == 32  # every packet comes first for some seed, each about as often
    assert max(first.values()) < 62.5 + 5 * 62.5**0.5


def test_an_index_of_100_million_rows_opens_at_once_in_a_few_bytes_a_row(tmp_path: Path) -> None:
    """At a hundredth of the size; the whole is measured by benchmarks/data.py."""
    opened = made_up(tmp_path, [65_536] * 16, packet_rows=16)
    assert (tmp_path / INDEX_FILE).stat().st_size < 1.5 * opened.num_rows
    started = time.perf_counter()
    again = Pack.open(str(tmp_path))
    assert time.perf_counter() - started < 1
    assert isinstance(again.start.base, np.memmap)  # which the processes of a machine share


def test_a_packet_that_has_changed_is_an_error_that_names_it(stages: dict[str, str], tmp_path: Path) -> None:
    opened = packed(stages, tmp_path / "pack")
    path = tmp_path / "pack" / shard_name(0)
    _, start, size = opened.place(0)
    content = bytearray(path.read_bytes())
    content[start + size - 9] ^= 1
    path.write_bytes(content)
    stream = open_pack_stream(Pack.open(str(tmp_path / "pack")), SHOWN, batch_size=15)
    with pytest.raises(InputError, match=r"000000.arrow is not the file that was written .* in packet 0"):
        next(stream.batches(stop=1))


class AskedFileSystem(LocalFileSystem):
    """Local files behind a URL; notes for what is asked."""

    protocol = "asked"
    asked: ClassVar[list[str]] = []

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.removeprefix("asked://"))

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        self.asked.append(path)
        return super().cat_file(path, start=start, end=end, **options)


def test_a_remote_pack_is_read_by_one_request_a_packet_and_its_index_is_shared(
    stages: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = packed(stages, tmp_path / "pack")
    fsspec.register_implementation("asked", AskedFileSystem, clobber=True)
    monkeypatch.setenv("DISTILCLIP_COPIES", str(tmp_path / "copies"))
    opened = Pack.open(f"asked://{tmp_path}/pack")
    assert isinstance(opened.start.base, np.memmap)
    expected = list(open_pack_stream(local, SHOWN, batch_size=7).batches(stop=4))
    AskedFileSystem.asked.clear()
    found = list(open_pack_stream(opened, SHOWN, batch_size=7).batches(stop=4))
    assert all(same(a, b) for a, b in zip(found, expected, strict=True))
    assert len(AskedFileSystem.asked) <= 2 * opened.num_packets  # two epochs; what two batches share is kept


def test_a_student_that_sees_more_than_the_pack_has_is_refused(stages: dict[str, str], tmp_path: Path) -> None:
    shown = dataclasses.replace(SHOWN, sizes=[28])
    assert open_pack_stream(packed(stages, tmp_path / "whole"), shown, batch_size=4).num_rows == 15
    with pytest.raises(InputError, match=r"was made 20 pixels, and 28 are to be shown. .* --max-side 32 or more"):
        open_pack_stream(packed(stages, tmp_path / "small", max_side=20), shown, batch_size=4)


def test_a_picture_is_made_smaller_upright_and_only_where_it_is_larger() -> None:
    wide = Image.fromarray(np.asarray(picture(0).resize((300, 200))))
    turned = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    wide.save(turned, "JPEG", exif=exif)
    smaller = shrink_picture(turned.getvalue(), max_side=100, quality=90)
    assert smaller is not None
    assert Image.open(io.BytesIO(smaller)).size == (100, 150)
    assert shrink_picture(encoded(wide), max_side=200, quality=90) is None
    whole = np.asarray(wide.resize((150, 100), Image.Resampling.BICUBIC)).astype(float)
    found = np.asarray(Image.open(io.BytesIO(shrink_picture(encoded(wide), max_side=100, quality=95) or b""))).astype(
        float
    )
    assert np.abs(found - whole).mean() < 4


def test_a_kill_between_the_passes_costs_what_is_not_written(
    stages: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = packed(stages, tmp_path / "whole")
    scatter: Callable[..., Any] = Packing.scatter

    def killed(self: Packing, num_parts: int, shard: int) -> Any:
        if shard == 1:
            raise KeyboardInterrupt
        return scatter(self, num_parts, shard)

    with monkeypatch.context() as patch:
        patch.setattr(Packing, "scatter", killed)
        with pytest.raises(KeyboardInterrupt):
            packed(stages, tmp_path / "killed")
    assert (tmp_path / "killed" / shard_name(0)).exists()
    before = (tmp_path / "killed" / shard_name(0)).stat().st_mtime_ns
    packed(stages, tmp_path / "killed")
    assert (tmp_path / "killed" / shard_name(0)).stat().st_mtime_ns == before
    for name in [INDEX_FILE, *map(shard_name, range(len(expected.first_row) - 1))]:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_batches_of_pixels_are_what_the_models_take(stages: dict[str, str], tmp_path: Path) -> None:
    shown = dataclasses.replace(SHOWN, sizes=[8, 12])
    batch = next(open_pack_stream(packed(stages, tmp_path / "pack"), shown, batch_size=4).batches(stop=1))
    assert batch.pixels.shape == (4, 3, 8, 8)
    assert batch.teacher_pixels is not None
    assert batch.teacher_pixels.shape == (4, 3, 12, 12)
    assert batch.pixels.dtype == torch.uint8
