"""docs/formats.md is a contract: what it documents equals what is written."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors import safe_open

from distilclip.data.bad_samples import _REMEDIES
from distilclip.data.columns import FORMAT_VERSION
from distilclip.data.side_files import ForestEdges, WeightedRows, write_centers, write_forest, write_weights
from distilclip.data.store import Store
from distilclip.packs.pack import INDEX_FILE, PackFacts, RowCounts, ShardPackets, pack_schema, write_index
from distilclip.scoring.near_tables import NearPictures, write_near
from tests.data.conftest import TEACHER

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "formats.md").read_text()


def documented(heading: str, first_column: str) -> list[list[str]]:
    """The lines of the first table after `heading` whose first column has that name."""
    after = TEXT[TEXT.index(heading) :]
    table = after[after.index(f"| {first_column} |") :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def columns(heading: str) -> dict[str, str]:
    return {name.strip("`"): type_ for name, type_, _ in documented(heading, "column")}


def test_a_documented_pack_is_the_written_one(tmp_path: Path) -> None:
    schema = pack_schema(4, 2)
    found = {field.name: str(field.type).replace("[pyarrow]", "") for field in schema}
    assert list(columns("### `shards/000000.arrow`").items()) == list(found.items())
    one = np.zeros(1, np.int64)
    counts = RowCounts(num_images=0, num_texts=0, num_pairs=0, num_resized=0)
    places = {"start": one, "size": one.astype(np.int32), "digest": one.astype(np.uint64)}
    shard = ShardPackets(num_rows=1, counts=counts, sha256="", **places)
    facts = PackFacts(packet_rows=16, max_side=256, has_clusters=False, counts=counts)
    write_index(str(tmp_path), [shard], facts, teacher=Store("", [], 4, TEACHER))
    with safe_open(str(tmp_path / INDEX_FILE), "np") as file:
        tensors = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
        assert set(file.metadata()) >= {"format", "dim", "packet_rows", "max_side", "has_clusters", *vars(counts)}
    table = documented("### `index.safetensors`", "tensor")
    assert {name.strip("`"): dtype.split()[0] for name, dtype, _ in table} == tensors


def written(path: Path) -> dict[str, str]:
    return {field.name: str(field.type) for field in pq.read_schema(path)}


@pytest.fixture
def folders(joined: dict[str, str]) -> dict[str, Path]:
    ids = np.array([0, 1], np.uint64)
    write_forest(joined["groups"], ForestEdges(ids[:1], ids[1:], np.zeros(1, np.float32)))
    write_centers(joined["clusters"], np.eye(2, dtype=np.float32))
    none, narrow = np.zeros(0, np.uint64), np.zeros(0, np.uint32)
    near = NearPictures(
        picture=narrow, uri=[], key=[], offset=none, size=narrow, nearest=none, similarity=np.zeros(0, np.float32)
    )
    write_near(joined["clusters"], 0, near)
    joined["weights"] = f"{joined['clusters']}-weights"
    write_weights(joined["weights"], 0, WeightedRows(np.zeros(1, np.uint32), np.ones(1)))
    return {name: Path(folder) for name, folder in joined.items()}


def test_documented_columns_are_the_written_ones(folders: dict[str, Path]) -> None:
    cases = {
        "### `manifest.parquet`": folders["store"] / "manifest.parquet",
        "### `000000.rows.parquet`": folders["store"] / "000000.rows.parquet",
        "`groups/000000.parquet`": folders["groups"] / "groups" / "000000.parquet",
        "`forest.parquet`: a": folders["groups"] / "forest.parquet",
        "`labels/000000.parquet`": folders["clusters"] / "labels" / "000000.parquet",
        "`weights/000000.parquet`": folders["weights"] / "weights" / "000000.parquet",
        "`near/00.parquet`": folders["clusters"] / "near" / "00.parquet",
    }
    for heading, path in cases.items():
        assert columns(heading) == written(path), heading
        assert list(columns(heading)) == list(written(path)), heading


def test_documented_tensors_and_metadata_are_the_written_ones(folders: dict[str, Path]) -> None:
    cases = {
        "### `000000.safetensors`": folders["store"] / "000000.safetensors",
        "`centers.safetensors`": folders["clusters"] / "centers.safetensors",
    }
    for heading, path in cases.items():
        tensors = {name.strip("`"): dtype.split()[0] for name, dtype, _ in documented(heading, "tensor")}
        with safe_open(str(path), "np") as file:
            assert tensors == {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata()
        assert metadata["format"] == FORMAT_VERSION
        if "store" in str(path):
            keys = {key.strip("`") for key, _ in documented(heading, "key")}
            assert keys == set(metadata)


def test_the_documented_version_is_the_written_one() -> None:
    assert f"format version is **{FORMAT_VERSION}**" in TEXT


def test_every_reason_in_the_source_is_documented() -> None:
    phrases = set(_REMEDIES)
    for name in ("samples", "tars", "tabular", "scan", "stream"):
        source = (ROOT / "src" / "distilclip" / "data" / f"{name}.py").read_text()
        phrases |= set(re.findall(r'BadSample\("([a-z][^"]+)"', source))
        phrases |= {phrase.split(":")[0] for phrase in re.findall(r'CutError\(f?"([^"]+)"', source)}
        phrases |= set(re.findall(r'error = (?:error or )?"([a-z][^"]+)"', source))
    documented_reasons = {
        r for cells in documented("holds one of these reasons", "reason") for r in re.findall("`([^`]+)`", cells[0])
    }
    assert len(phrases) >= 15
    assert phrases <= documented_reasons, phrases - documented_reasons
