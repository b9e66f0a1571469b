from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from distilclip.data.side_files import write_centers
from distilclip.data.store import Store
from distilclip.errors import InputError
from distilclip.report.embedding_map import MapSize, lay_out, make_map, map_data, principal_components, write_map
from tests.report.made_run import NASTY, write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = write_run(tmp_path_factory.mktemp("map"))
    store = Store.open(str(run / "embed"))
    # Each center is the text embedding of one of its own rows: 8 and 9 of the first shard, 11 of the second.
    texts = np.stack([store.text(0)[8], store.text(0)[9], store.text(1)[11]]).astype(np.float32)
    write_centers(str(run / "cluster"), texts / np.linalg.norm(texts, axis=1, keepdims=True))
    return run


def test_principal_components_equal_those_of_a_decomposition() -> None:
    rows = np.random.default_rng(0).normal(size=(30, 6)) * [5, 4, 3, 2, 1, 0.5]
    found = principal_components(rows, 3)
    _, _, directions = np.linalg.svd(rows - rows.mean(axis=0), full_matrices=False)
    expected = (rows - rows.mean(axis=0)) @ directions[:3].T
    assert np.allclose(np.abs(found), np.abs(expected))
    assert np.array_equal(found, principal_components(rows, 3))
    assert principal_components(rows[:, :2], 3).shape == (30, 3), "a direction that is not there is 0"


def test_a_layout_by_hand_and_of_equal_rows() -> None:
    method, place = lay_out(np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]), method="auto", seed=0)
    assert method == "pca", "few rows have no neighbourhoods"
    assert np.allclose(np.sort(place[:, 0]), [0, 1, 1]) or np.allclose(np.sort(place[:, 0]), [0, 0, 1])
    assert np.allclose(place[:, 1], 0.5)
    assert np.isfinite(lay_out(np.ones((4, 3)), method="pca", seed=0)[1]).all()


@pytest.mark.slow
def test_t_sne_keeps_groups_together_and_gives_the_same_places_again() -> None:
    pytest.importorskip("sklearn", reason="no scikit-learn: install the extra map")
    random = np.random.default_rng(0)
    group = np.repeat(np.arange(4), 30)
    rows = np.eye(4)[group] @ random.normal(size=(4, 16)) + 0.1 * random.normal(size=(120, 16))
    method, place = lay_out(rows, method="t-sne", seed=1)
    assert method == "t-sne"
    distance = np.linalg.norm(place[:, None] - place, axis=2) + 9 * np.eye(120)
    assert (group[distance.argmin(axis=1)] == group).all()
    assert np.array_equal(place, lay_out(rows, method="t-sne", seed=1)[1])


def test_a_map_holds_valid_rows_with_what_is_known_of_each(run: Path, tmp_path: Path) -> None:
    store = Store.open(str(run / "embed"))
    found = make_map(store, MapSize(num_rows=99), groups=str(run / "balance"), clusters=str(run / "cluster"))
    assert (len(found.samples), found.num_valid, found.method) == (22, 22, "pca")
    kept = found.categories["kept"]
    assert dict(zip(kept.names, kept.counts, strict=True)) == {"kept": 14, "removed": 8}
    cluster = found.categories["cluster"]
    assert cluster.names == (
        "0: picture 8 of shard 0",
        "1: picture 9 of shard 0",
        "2: picture 11 of shard 1",
        "no cluster",
    )
    assert cluster.counts == [8, 4, 2, 8]
    assert cluster.without == 3
    assert "data_set" not in found.categories, "all shards lie in one folder"
    write_map(str(tmp_path / "map.parquet"), found)
    table = pq.read_table(tmp_path / "map.parquet").to_pylist()
    assert table[0]["text"] == NASTY
    assert (table[0]["row"], table[0]["kept"], table[0]["data_set"]) == (0, "kept", None)
    assert table[0]["shard"].endswith("00000.tar")
    assert Image.open(io.BytesIO(table[0]["image"]["bytes"])).size == (96, 64)
    assert all(0 <= line["x"] <= 1 and 0 <= line["y"] <= 1 for line in table)


def test_a_sample_is_drawn_by_its_seed_and_the_page_has_its_thumbnails(run: Path) -> None:
    store = Store.open(str(run / "embed"))
    found = make_map(store, MapSize(num_rows=10, seed=3))
    assert len(found.samples) == len(set(found.samples.tolist())) == 10
    assert np.array_equal(found.samples, make_map(store, MapSize(num_rows=10, seed=3)).samples)
    assert not np.array_equal(found.samples, make_map(store, MapSize(num_rows=10, seed=4)).samples)
    values = map_data(found)
    assert json.loads(json.dumps(values)) == values
    assert len(values["x"]) == len(values["captions"]) == 10
    assert len(values["sheets"]) == 1
    assert values["categories"] == []


def test_a_store_whose_pictures_are_gone_has_a_map_without_thumbnails(run: Path, tmp_path: Path) -> None:
    moved = write_run(tmp_path)
    for tar in (moved / "pairs").iterdir():
        tar.unlink()
    found = make_map(Store.open(str(moved / "embed")), MapSize(num_rows=99))
    assert map_data(found)["sheets"] == []
    write_map(str(tmp_path / "map.parquet"), found)
    assert pq.read_table(tmp_path / "map.parquet").column("image").null_count == 22


def test_clusters_without_centers_are_an_error_that_names_them(run: Path, tmp_path: Path) -> None:
    (run / "cluster/centers.safetensors").rename(tmp_path / "centers.safetensors")
    with pytest.raises(InputError, match=r"centers\.safetensors is missing"):
        make_map(Store.open(str(run / "embed")), MapSize(num_rows=9), clusters=str(run / "cluster"))
    (tmp_path / "centers.safetensors").rename(run / "cluster/centers.safetensors")
