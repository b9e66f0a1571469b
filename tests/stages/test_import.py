"""`distilclip import`: stores of embeddings that other programs computed, and round trips with our own exports."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import distilclip as dc
from distilclip import cli
from distilclip.data.pairs import join_stores
from distilclip.data.shards import open_shard, read_texts
from distilclip.data.store import Store
from distilclip.errors import InputError
from distilclip.export.uids import read_subset
from distilclip.stage_calls import build_config
from distilclip.stages.import_ import Config, main
from tests.conftest import encoded, picture, write_tar
from tests.export.conftest import Made, make
from tests.intake.made_embeddings import TEACHER, uid, unit_rows, write_datacomp
from tests.stages.conftest import contents


def import_store(out: Path, embeddings: object, **options: Any) -> dict[str, Any]:
    """Run the stage; the folder's result."""
    values = {"embeddings": [str(embeddings)], "out": str(out), **TEACHER, **options}
    return main(build_config(Config, values, stage="import"))


def captions_of(store: Store, shard: int) -> list[str | None]:
    rows = store.rows(shard)
    texts = read_texts(store.shards[shard].uri, rows.key, rows.offset, rows.size, columns=store.csv_columns)
    return [text.caption for text in texts]


def test_datacomps_files_become_a_store(tmp_path: Path) -> None:
    files = write_datacomp(tmp_path / "pool")
    result = import_store(tmp_path / "store", tmp_path / "pool", image_column="l14_img", teacher_scale=100.0)
    assert (result["num_rows"], result["num_valid"], result["dim"], result["num_shards"]) == (24, 24, 24, 2)
    assert (result["has_pictures"], result["num_normalised"], result["rounded"]) == (False, 0, False)
    store = Store.open(str(tmp_path / "store"))
    store.verify()
    assert store.teacher["digest"] == TEACHER["teacher_digest"]
    assert store.scale == 100.0
    for shard, path in enumerate(files):
        arrays = np.load(path)
        np.testing.assert_array_equal(store.image(shard), arrays["l14_img"])
        np.testing.assert_array_equal(store.text(shard), arrays["l14_txt"])
        rows = store.rows(shard)
        assert rows.key == [uid(shard, row) for row in range(12)]
        assert rows.image_sha256[3].tobytes() == hashlib.sha256(f"{shard} 3".encode()).digest()
        assert captions_of(store, shard)[3] == f"picture 3 of part {shard}"


def test_later_stages_read_it_as_a_store_of_embed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The way of someone who never trains here: import, balance, select, cluster, export, report, verify."""
    write_datacomp(tmp_path / "pool")
    at = {name: str(tmp_path / name) for name in ("store", "groups", "best", "clusters", "subset", "page", "tars")}
    lines = (
        f"import --embeddings {tmp_path}/pool --image-column l14_img --teacher-name ViT-L-14 --teacher-digest d "
        f"--teacher-scale 100 --out {at['store']}",
        f"balance --store {at['store']} --metric cosine --threshold 0.4 --out {at['groups']}",
        f"select --store {at['store']} --groups {at['groups']} --score neg-clip-loss --top 0.5 --out {at['best']}",
        f"cluster --store {at['store']} --groups {at['best']} --num-centers 2 --out {at['clusters']}",
        f"export --what subset --store {at['store']} --groups {at['best']} --out {at['subset']}",
        f"report --folders {at['store']} {at['groups']} {at['clusters']} --out {at['page']}",
        f"verify {tmp_path} --sources keys",
    )
    commands = [line.split() for line in lines]
    for argv in commands:
        assert cli.main(argv) == 0, argv
    result = json.loads((tmp_path / "best/result.json").read_text())
    subset = read_subset(f"{at['subset']}/subset.npy")
    assert len(subset) == result["num_kept"]
    known = {tuple(divmod(int(uid(part, row), 16), 2**64)) for part in range(2) for row in range(12)}
    assert {tuple(pair) for pair in subset.tolist()} <= known
    by_key = cli.main([*commands[4][:-1], f"{at['subset']}-by-key", "--uid", "key"])
    assert by_key == 0
    np.testing.assert_array_equal(read_subset(f"{at['subset']}-by-key/subset.npy"), subset)
    capsys.readouterr()
    assert cli.main(["export", "--what", "tars", "--store", at["store"], "--out", at["tars"]]) == 2
    assert "was imported without its pictures, which are needed here" in capsys.readouterr().err
    page = (tmp_path / "page/index.html").read_text()
    assert "24 rows in 2 shards, embedded by ViT-L-14" in page
    assert "store was imported without its pictures, which are needed here" in page


@pytest.fixture
def made(tmp_path: Path) -> Made:
    """A store of three tars, two of them with the same keys; one row is not valid."""
    return make(tmp_path)


@pytest.mark.parametrize("what", ["datacomp", "clip-retrieval"])
def test_what_is_exported_is_imported_bit_for_bit(made: Made, tmp_path: Path, what: str) -> None:
    before = Store.open(made.store)
    dc.stages.export(
        what=what, store=made.store, out=tmp_path / "out", **({"name": "l14"} if what == "datacomp" else {})
    )
    teacher = {f"teacher_{name}": before.teacher[name] for name in ("name", "digest", "scale")}
    place = tmp_path / "out" / ("metadata" if what == "datacomp" else "")
    import_store(tmp_path / "again", place, **teacher)
    after = Store.open(str(tmp_path / "again"))
    after.verify()
    assert after.num_shards == before.num_shards == 3
    for shard in range(3):
        rows, found = before.rows(shard), after.rows(shard)
        np.testing.assert_array_equal(after.image(shard), before.image(shard)[rows.valid])
        np.testing.assert_array_equal(after.text(shard), before.text(shard)[rows.valid])
        assert found.key == [key for key, valid in zip(rows.key, rows.valid, strict=True) if valid]
        assert captions_of(after, shard) == [
            text.caption
            for text in read_texts(before.shards[shard].uri, found.key, rows.offset[rows.valid], rows.size[rows.valid])
        ]
        if what == "datacomp":
            np.testing.assert_array_equal(found.image_sha256, rows.image_sha256[rows.valid])


@pytest.mark.parametrize("what", ["datacomp", "clip-retrieval"])
def test_with_the_pairs_the_store_is_the_one_that_was_embedded(made: Made, tmp_path: Path, what: str) -> None:
    """Keys that two tars share are told apart by the number of the file; what was never exported has no embedding."""
    before = Store.open(made.store)
    dc.stages.export(what=what, store=made.store, out=tmp_path / "out")
    place = tmp_path / "out" / ("metadata" if what == "datacomp" else "")
    result = import_store(tmp_path / "again", place, data=made.tars, max_bad_ratio=0.2)
    assert (result["num_without_picture"], result["has_pictures"]) == (0, True)
    after = Store.open(str(tmp_path / "again"))
    after.verify()
    assert [line.uri for line in after.shards] == made.tars
    for shard in range(3):
        rows, found = before.rows(shard), after.rows(shard)
        np.testing.assert_array_equal(after.image(shard), before.image(shard))
        np.testing.assert_array_equal(after.text(shard), before.text(shard))
        for name in ("key", "offset", "size", "valid", "image_sha256"):
            np.testing.assert_array_equal(getattr(found, name), getattr(rows, name), err_msg=name)
    assert dc.stages.export(what="tars", store=tmp_path / "again", out=tmp_path / "tars")["num_samples"] == 18


def test_datacomps_pictures_are_found_by_the_uid_in_their_json(tmp_path: Path) -> None:
    """img2dataset's tars: keys of their own, other shards than the metadata, and pictures that could not be fetched."""
    write_datacomp(tmp_path / "pool")
    order = np.random.default_rng(0).permutation(24)
    tars = []
    for number, places in enumerate((order[:8], order[8:15], order[15:20])):
        members = []
        for key, place in enumerate(places.tolist()):
            meta = {"uid": uid(*divmod(place, 12)), "key": f"{key:09d}"}
            if (number, key) == (2, 4):
                meta["uid"] = uid(7, 7)
            name = f"{number}{key:08d}"
            members += [(f"{name}.jpg", encoded(picture(place))), (f"{name}.txt", b"a caption")]
            members += [(f"{name}.json", json.dumps(meta).encode())]
        tars.append(write_tar(tmp_path / "shards" / f"{number:05d}.tar", members))
    result = import_store(tmp_path / "store", tmp_path / "pool", image_column="l14_img", data=tars)
    assert result["reasons"] == {"no embedding": 1}
    assert (result["num_rows"], result["num_valid"], result["num_without_picture"]) == (20, 19, 5)
    store = Store.open(str(tmp_path / "store"))
    arrays = [np.load(path) for path in sorted((tmp_path / "pool").glob("*.npz"))]
    for shard, places in enumerate((order[:8], order[8:15], order[15:20])):
        for row, place in enumerate(places.tolist()):
            if (shard, row) != (2, 4):
                part, source = divmod(place, 12)
                np.testing.assert_array_equal(store.image(shard)[row], arrays[part]["l14_img"][source])
                digest = hashlib.sha256(encoded(picture(place))).digest()
                assert store.rows(shard).image_sha256[row].tobytes() == digest
    other = write_tar(
        tmp_path / "other.tar", [("a.jpg", encoded(picture(1))), ("a.txt", b"x"), ("a.json", b'{"uid": "f"}')]
    )
    with pytest.raises(InputError, match=r"None of the 1 samples of --data has an embedding: no key of .*other.tar"):
        import_store(tmp_path / "none", tmp_path / "pool", image_column="l14_img", data=[other], max_bad_ratio=1)


def test_columns_of_parquet_and_plain_arrays_are_imported(tmp_path: Path) -> None:
    image, text = unit_rows(9, 6, 1, np.float32), unit_rows(9, 6, 2, np.float32)
    image[2], text[4], image[5] = np.nan, 0, image[5] * 3
    valid = np.isin(np.arange(9), [2, 4], invert=True)
    columns = {"key": [f"k{row}" for row in range(9)], "caption": [f"c{row}" for row in range(9)]}
    table = pa.table({**columns, "image_embedding": list(image), "text_embedding": list(text)})
    pq.write_table(table, tmp_path / "t.parquet")
    np.save(tmp_path / "i.npy", image)
    np.save(tmp_path / "x.npy", text)
    pq.write_table(pa.table(columns), tmp_path / "names.parquet")
    beside = {"texts": [str(tmp_path / "x.npy")], "tables": [str(tmp_path / "names.parquet")]}
    for name, path, options in (("t", "t.parquet", {}), ("n", "i.npy", beside)):
        result = import_store(tmp_path / name, tmp_path / path, max_bad_ratio=0.3, **options)
        assert result["reasons"] == {"embedding is no finite unit vector": 2}
        assert (result["num_normalised"], result["rounded"], result["has_pictures"]) == (1, True, False)
        store = Store.open(str(tmp_path / name))
        store.verify()
        exact = image.astype(np.float64) / np.linalg.norm(image.astype(np.float64), axis=1, keepdims=True)
        expected = np.where((np.arange(9) == 5)[:, None], exact, image).astype(np.float16)
        np.testing.assert_array_equal(store.image(0), np.where(valid[:, None], expected, 0))
        assert store.rows(0).key == columns["key"]
        assert store.rows(0).valid.tolist() == valid.tolist()
        assert captions_of(store, 0) == columns["caption"]
    with pytest.raises(InputError, match=r"22.2%|over the budget"):
        import_store(tmp_path / "strict", tmp_path / "t.parquet")
    with pytest.raises(InputError, match=r"t.parquet: k2: embedding is no finite unit vector"):
        import_store(tmp_path / "raise", tmp_path / "t.parquet", on_error="raise")


def test_parquet_that_holds_the_pictures_is_a_store_with_pictures(tmp_path: Path) -> None:
    """As img2dataset writes it: its digests are of the files that it fetched, and not of those in the table."""
    columns = {
        "key": [f"k{row}" for row in range(4)],
        "jpg": [encoded(picture(row)) for row in range(4)],
        "caption": [f"c{row}" for row in range(4)],
        "sha256": ["0a" * 32] * 4,
        "image_emb": list(unit_rows(4, 6, 1)),
        "text_emb": list(unit_rows(4, 6, 2)),
    }
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    assert import_store(tmp_path / "store", tmp_path / "t.parquet")["has_pictures"]
    store = Store.open(str(tmp_path / "store"))
    assert not store.rows(0).image_sha256.any()
    table = join_stores([store])
    assert table.key.to_pylist() == columns["key"]
    sample = open_shard(table.uris[0]).read(2, 0)
    assert (sample.image, sample.caption) == (columns["jpg"][2], "c2")


def test_images_alone_are_a_store_without_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "i.npy", unit_rows(9, 6, 1))
    assert import_store(tmp_path / "store", tmp_path / "i.npy")["num_valid"] == 9
    store = Store.open(str(tmp_path / "store"))
    assert (store.rows(0).has_image.all(), store.rows(0).has_text.any()) == (True, False)
    store.verify()
    assert store.rows(0).key[8] == "000000008"
    path = str(tmp_path / "store")
    assert cli.main(["verify", path]) == 0
    balance = ["balance", "--store", path, "--metric", "cosine", "--threshold", "0.3", "--out", f"{path}-groups"]
    assert cli.main(balance) == 0
    assert dc.stages.export(what="keys", store=path, out=f"{path}-keys")["num_keys"] == 9
    exported = dc.stages.export(what="datacomp", store=path, uid="md5", out=f"{path}-datacomp")
    assert exported["num_samples"] == 9
    again = import_store(tmp_path / "again", f"{path}-datacomp/metadata")
    assert again["num_valid"] == 9
    np.testing.assert_array_equal(Store.open(str(tmp_path / "again")).image(0), store.image(0))
    capsys.readouterr()
    train = ["train", "--store", path, "--student", "ViT-B-32", "--batch-size", "4", "--num-steps", "200"]
    for argv, said in (
        (
            ["select", "--store", path, "--score", "clip-score", "--top", "0.5"],
            "9 rows have no caption, and clip-score",
        ),
        (train, "was imported without its pictures, which are needed here"),
    ):
        assert cli.main([*argv, "--out", f"{path}-{argv[0]}"]) == 2
        assert said in capsys.readouterr().err


def test_rows_may_lack_a_side_where_that_is_said(tmp_path: Path) -> None:
    image, text = unit_rows(5, 6, 1), unit_rows(5, 6, 2)
    image[1], text[2], image[3], text[3] = 0, 0, np.nan, 0
    np.savez(tmp_path / "a.npz", a_img=image, a_txt=text)
    result = import_store(tmp_path / "store", tmp_path / "a.npz", may_lack=["caption", "image"], max_bad_ratio=0.2)
    assert (result["num_valid"], result["reasons"]) == (4, {"embedding is no finite unit vector": 1})
    store = Store.open(str(tmp_path / "store"))
    store.verify()
    assert store.rows(0).has_image.tolist() == [True, False, True, False, True]
    assert store.rows(0).has_text.tolist() == [True, True, False, False, True]
    dc.stages.export(what="datacomp", store=tmp_path / "store", uid="md5", out=tmp_path / "out")
    again = import_store(tmp_path / "again", tmp_path / "out" / "metadata", may_lack=["caption", "image"])
    assert again["num_valid"] == 4
    for kind in ("image", "text"):
        found = getattr(Store.open(str(tmp_path / "again")), kind)(0)
        np.testing.assert_array_equal(found, getattr(store, kind)(0)[store.rows(0).valid])


def test_a_run_that_was_stopped_goes_on_and_engines_change_no_byte(tmp_path: Path) -> None:
    write_datacomp(tmp_path / "pool", parts=3)
    options = {"image_column": "l14_img"}
    import_store(tmp_path / "whole", tmp_path / "pool", **options)
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    for name in ("result.json", "manifest.parquet", "000001.rows.parquet", "000002.safetensors", "000002.rows.parquet"):
        (tmp_path / "part" / name).unlink()
    import_store(tmp_path / "part", tmp_path / "pool", **options)
    import_store(tmp_path / "processes", tmp_path / "pool", engine="processes", engine_workers=2, **options)
    for name in ("part", "processes"):
        assert contents(tmp_path / name) == contents(tmp_path / "whole")


def test_files_that_changed_are_refused(tmp_path: Path) -> None:
    first, second = write_datacomp(tmp_path / "pool")
    options: dict[str, Any] = {"image_column": "l14_img"}
    import_store(tmp_path / "store", tmp_path / "pool", **options)
    import_store(tmp_path / "store", tmp_path / "pool", **options)
    whole = second.read_bytes()
    np.savez(second, l14_img=unit_rows(12, 24, 0), l14_txt=unit_rows(12, 24, 1))
    with pytest.raises(
        InputError, match=rf"store is finished, and was made from {second} when it had {len(whole)} bytes"
    ):
        import_store(tmp_path / "store", tmp_path / "pool", **options)
    (tmp_path / "store/result.json").unlink()
    with pytest.raises(InputError, match=rf"made from other inputs .* {second} came, went or changed"):
        import_store(tmp_path / "store", tmp_path / "pool", **options)
    np.savez(second, l14_img=unit_rows(12, 20, 0), l14_txt=unit_rows(12, 20, 1))
    with pytest.raises(InputError, match=rf"{second}, l14_img has vectors of 20 numbers, and {first}, l14_img of 24"):
        import_store(tmp_path / "other", tmp_path / "pool", **options)
    np.savez(second, l14_img=unit_rows(11, 24, 0), l14_txt=unit_rows(12, 24, 1))
    with pytest.raises(InputError, match=r"has 12 vectors, and .* has 11: they do not belong together"):
        import_store(tmp_path / "other", tmp_path / "pool", **options)
    np.savez(second, l14_img=unit_rows(11, 24, 0), l14_txt=unit_rows(11, 24, 1))
    with pytest.raises(InputError, match=r".parquet has 12 rows, and .*.npz, l14_img has 11 vectors"):
        import_store(tmp_path / "other", tmp_path / "pool", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher_name": " "}, "teacher_name is empty: say which model made the embeddings"),
        ({"teacher_digest": ""}, "teacher_digest is empty"),
        ({"teacher_scale": 0.0}, "teacher_scale is 0.0; it must be above 0"),
        ({"max_bad_ratio": 2.0}, "max_bad_ratio is a share"),
        ({"tables": ["a.parquet"], "image_column": "l14_img"}, "--texts and --tables go with .npy files"),
    ],
)
def test_wrong_values_are_named(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    write_datacomp(tmp_path / "pool", parts=1, rows=2)
    with pytest.raises(InputError, match=message):
        import_store(tmp_path / "store", tmp_path / "pool", **options)
