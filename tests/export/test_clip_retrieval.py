from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from distilclip.data.store import Store
from distilclip.export.clip_retrieval import PartitionWriter
from distilclip.export.selection import open_selection
from tests.export.conftest import Made, write_balance


def test_partitions_hold_embeddings_and_metadata_row_by_row(made: Made, tmp_path: Path) -> None:
    store = Store.open(made.store)
    writer = PartitionWriter(open_selection(made.store, groups=made.groups), str(tmp_path))
    assert [writer(shard) for shard in range(3)] == [4, 4, 4]
    for shard in range(3):
        kept = [row for s, row in made.kept if s == shard]
        for folder, embeddings in (("img_emb", store.image(shard)), ("text_emb", store.text(shard))):
            found = np.load(tmp_path / folder / f"{folder}_{shard}.npy")
            assert found.dtype == np.float16
            np.testing.assert_array_equal(found, embeddings[kept])
        metadata = pq.read_table(tmp_path / "metadata" / f"metadata_{shard}.parquet").to_pydict()
        assert metadata["image_path"] == [store.rows(shard).key[row] for row in kept]
        assert metadata["caption"] == [f"picture number {100 * shard + row}" for row in kept]
        assert list(zip(metadata["shard"], metadata["row"], strict=True)) == [(shard, row) for row in kept]


def test_a_partition_without_metadata_is_written_again_and_an_empty_one_has_no_files(
    made: Made, tmp_path: Path
) -> None:
    write_balance(str(tmp_path / "none"), Store.open(made.store), none_of=1)
    writer = PartitionWriter(open_selection(made.store, groups=str(tmp_path / "none")), str(tmp_path / "out"))
    assert [writer(shard) for shard in (0, 1, 2)] == [4, 0, 4]
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert len(before) == 6
    (tmp_path / "out/metadata/metadata_2.parquet").unlink()
    (tmp_path / "out/img_emb/img_emb_2.npy").write_bytes(b"of another run")
    assert [writer(shard) for shard in (0, 1, 2)] == [4, 0, 4]
    assert {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()} == before
