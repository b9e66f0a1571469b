"""What `distilclip balance` says of a store whose rows do not have unit length, as another program may write it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors
import safetensors.numpy

import distilclip as dc
from distilclip.errors import InputError


def lengthen(path: Path, row: int, factor: float) -> None:
    """Make one image embedding of a shard longer, and leave everything else as it is."""
    with safetensors.safe_open(path, "numpy") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors["image"] = tensors["image"].copy()
    tensors["image"][row] *= factor
    safetensors.numpy.save_file(tensors, path, metadata=metadata)


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
