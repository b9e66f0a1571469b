"""What `distilclip balance` says of a store whose rows do not have unit length, as another program may write it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import safetensors
import safetensors.numpy

import distilclip as dc
from distilclip.errors import InputError


def lengthen(path: Path, row: int, factor: float) -> None:
    """Make one image embedding of a shard longer, as a program would that writes stores of its own, digest and all."""
    with safetensors.safe_open(path, "numpy") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors["image"] = tensors["image"].copy()
    tensors["image"][row] *= factor
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    safetensors.numpy.save_file(tensors, path, metadata=metadata)
    manifest = pq.read_table(path.parent / "manifest.parquet")
    after = hashlib.sha256(path.read_bytes()).hexdigest()
    digests = [after if digest == before else digest for digest in manifest["sha256"].to_pylist()]
    column = manifest.column_names.index("sha256")
    manifest = manifest.set_column(column, "sha256", [digests]).drop_columns("xxh3")
    pq.write_table(manifest, path.parent / "manifest.parquet")
    result = json.loads((path.parent / "result.json").read_text())
    (path.parent / "result.json").write_text(json.dumps({key: result[key] for key in result if key != "digests"}))


def test_euclidean_distances_of_a_store_need_unit_rows_and_cosine_does_not(
    tmp_path: Path, tiny_clip_folder: str, pair_tars: Callable[..., list[str]]
) -> None:
    store = tmp_path / "store"
    dc.stages.embed(data=pair_tars(shards=2, rows=6), out=store, model=tiny_clip_folder, num_workers=0)
    unit = dc.stages.balance(store=store, out=tmp_path / "unit", metric="cosine", threshold=1e-5)
    lengthen(next(store.glob("*1.safetensors")), row=4, factor=4.0)
    for metric in ("euclidean", "sqeuclidean"):
        with pytest.raises(InputError, match=r"embedding of row 4 of shard 1 has length 4.*or use --metric cosine"):
            dc.stages.balance(store=store, out=tmp_path / metric, metric=metric, threshold=1e-3)
    long = dc.stages.balance(store=store, out=tmp_path / "long", metric="cosine", threshold=1e-5)
    assert long["num_kept"] == unit["num_kept"]
