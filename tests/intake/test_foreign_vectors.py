"""Vectors in the files of other programs: what is read is what was written, and damage is said."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distilclip.errors import InputError
from distilclip.intake.embedding_files import FileChoice, choose_names, find_parts
from distilclip.intake.foreign_vectors import OpenVectors, VectorHeader, VectorPlace, open_vectors, read_vector_header
from tests.intake.made_embeddings import unit_rows, write_datacomp


def test_arrays_and_columns_give_the_numbers_that_were_written(tmp_path: Path) -> None:
    """Every form, in every precision that it has."""
    for dtype in (np.float16, np.float32, np.float64):
        rows = unit_rows(300, 8, seed=1, dtype=dtype)
        np.save(tmp_path / "a.npy", rows)
        np.savez(tmp_path / "stored.npz", a=rows, other=np.arange(3))
        np.savez_compressed(tmp_path / "packed.npz", a=rows)
        np.savez(tmp_path / "columns.npz", a=np.asfortranarray(rows))
        values = pa.array(rows.reshape(-1))
        lists = pa.ListArray.from_arrays(np.arange(0, rows.size + 1, 8, dtype=np.int32), values)
        table = pa.table({"list": lists, "fixed": pa.FixedSizeListArray.from_arrays(values, 8)})
        pq.write_table(table, tmp_path / "t.parquet", row_group_size=100)
        places = [VectorPlace(str(tmp_path / "a.npy"))]
        places += [VectorPlace(str(tmp_path / f"{name}.npz"), "a") for name in ("stored", "packed", "columns")]
        places += [VectorPlace(str(tmp_path / "t.parquet"), name) for name in ("list", "fixed")]
        for place in places:
            assert read_vector_header(place) == VectorHeader(300, 8, np.dtype(dtype)), place
            with open_vectors(place) as found:
                assert found.dtype == dtype
                np.testing.assert_array_equal(found, rows)
        opened = OpenVectors(limit=2)
        for place in (*places, places[0]):
            np.testing.assert_array_equal(opened[place], rows)
        opened.close()


def test_stored_arrays_are_mapped_and_not_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "stored.npz", a=unit_rows(10, 4, seed=0))
    with open_vectors(VectorPlace(str(tmp_path / "stored.npz"), "a")) as found:
        assert isinstance(found, np.memmap)


def test_a_vector_that_is_missing_is_nan(tmp_path: Path) -> None:
    pq.write_table(pa.table({"v": pa.array([[1.0, 0.0], None, [0.0, 1.0]])}), tmp_path / "t.parquet")
    with open_vectors(VectorPlace(str(tmp_path / "t.parquet"), "v")) as found:
        np.testing.assert_array_equal(found, [[1, 0], [np.nan, np.nan], [0, 1]])
    pq.write_table(pa.table({"v": pa.array([[1.0, 0.0], [1.0]])}), tmp_path / "u.parquet")
    with pytest.raises(InputError, match=r"u.parquet, v: the vector in row 1"):
        open_vectors(VectorPlace(str(tmp_path / "u.parquet"), "v")).__enter__()


@pytest.mark.parametrize("form", ["npy", "npz"])
def test_damaged_files_are_named(tmp_path: Path, form: str) -> None:
    path = tmp_path / f"a.{form}"
    np.save(path, unit_rows(50, 8, 0)) if form == "npy" else np.savez(path, a=unit_rows(50, 8, 0))
    place, whole = VectorPlace(str(path), "a" if form == "npz" else ""), path.read_bytes()
    if form == "npz":  # a bit that flips: the checksum of the archive tells
        path.write_bytes(whole[:500] + bytes([whole[500] ^ 1]) + whole[501:])
        with pytest.raises(InputError, match=r"a.npz is no complete file of arrays \(the checksum of a differs\)"):
            open_vectors(place).__enter__()
    for content in (whole[:300], b"", b"no array", whole[:20]):
        path.write_bytes(content)
        with pytest.raises(InputError, match=rf"a.{form} is no complete file of arrays"):
            open_vectors(place).__enter__()


def test_arrays_that_are_no_vectors_are_refused(tmp_path: Path) -> None:
    for wrong in (np.zeros(3), np.zeros((2, 3), np.int64), np.zeros((2, 3, 4))):
        np.save(tmp_path / "a.npy", wrong)
        with pytest.raises(InputError, match=r"a.npy is an array of .* of shape"):
            read_vector_header(VectorPlace(str(tmp_path / "a.npy")))
    np.save(tmp_path / "o.npy", np.array([{}], object), allow_pickle=True)
    with pytest.raises(InputError, match=r"o.npy"):
        open_vectors(VectorPlace(str(tmp_path / "o.npy"))).__enter__()


def test_names_tell_what_is_image_and_text_or_are_asked_for() -> None:
    def choose(names: list[str], **given: str) -> tuple[str, str | None]:
        return choose_names(names, FileChoice(embeddings=(), **given), where="x.npz")

    assert choose(["clip_img", "clip_txt", "dedup"]) == ("clip_img", "clip_txt")
    assert choose(["image", "text"]) == ("image", "text")
    assert choose(["image_embedding", "text_embedding"]) == ("image_embedding", "text_embedding")
    assert choose(["l14_img"]) == ("l14_img", None)
    assert choose(["b32_img", "l14_txt", "l14_img"], image_column="l14_img") == ("l14_img", "l14_txt")
    assert choose(["a", "b"], image_column="b", text_column="a") == ("b", "a")
    assert choose(["l14_img", "l14_txt"], text_column="none") == ("l14_img", None)
    with pytest.raises(InputError, match=r"it has b32_img, l14_img. Say which: --image-column b32_img"):
        choose(["b32_img", "l14_img"])
    with pytest.raises(InputError, match=r"x.npz does not tell which .* it has vector. Say which: --image-column NAME"):
        choose(["vector"])
    with pytest.raises(InputError, match=r"no vectors named 'l14' \(from --image-column\); it has l14_img"):
        choose(["l14_img"], image_column="l14")


def test_files_that_belong_together_are_found_by_their_names(tmp_path: Path) -> None:
    npz = write_datacomp(tmp_path / "pool" / "deep")
    parts = find_parts(FileChoice(embeddings=[str(tmp_path / "pool")], image_column="l14_img"))
    assert [part.image.path for part in parts] == [str(path) for path in npz]
    assert [part.uri for part in parts] == [str(path.with_suffix(".parquet")) for path in npz]
    for kind in ("img_emb", "text_emb", "metadata"):
        (tmp_path / "clip" / kind).mkdir(parents=True)
    for number in ("00", "01"):
        np.save(tmp_path / f"clip/img_emb/img_emb_{number}.npy", unit_rows(3, 4, 0))
        np.save(tmp_path / f"clip/text_emb/text_emb_{number}.npy", unit_rows(3, 4, 1))
    pq.write_table(pa.table({"image_path": ["a", "b", "c"]}), tmp_path / "clip/metadata/metadata_01.parquet")
    parts = find_parts(FileChoice(embeddings=[str(tmp_path / "clip")]))
    assert [part.text and part.text.path.rpartition("/")[2] for part in parts] == ["text_emb_00.npy", "text_emb_01.npy"]
    assert [part.uri.rpartition("/")[2] for part in parts] == ["img_emb_00.npy", "metadata_01.parquet"]
    assert find_parts(FileChoice(embeddings=[str(tmp_path / "clip")], text_column="none"))[0].text is None
    (tmp_path / "clip/text_emb/text_emb_01.npy").unlink()
    with pytest.raises(InputError, match=r"img_emb_01.npy has no text embeddings, and other files have"):
        find_parts(FileChoice(embeddings=[str(tmp_path / "clip")]))


def test_what_is_no_embedding_is_said(tmp_path: Path) -> None:
    pq.write_table(pa.table({"uid": ["a"]}), tmp_path / "0.parquet")
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "empty").mkdir()
    np.save(tmp_path / "a.npy", unit_rows(2, 4, 0))
    for given, message in (
        ({"embeddings": [str(tmp_path / "a.txt")]}, r"a.txt: embeddings are read from"),
        ({"embeddings": [str(tmp_path / "empty")]}, r"empty holds no .npz, no .npy and no Parquet file"),
        ({"embeddings": [str(tmp_path / "0.parquet")]}, r"0.parquet does not tell which .* it has none"),
        ({"embeddings": [str(tmp_path / "none.npz")]}, r"No file matches"),
        (
            {"embeddings": [str(tmp_path / "a.npy")], "texts": [str(tmp_path / "*.npy"), str(tmp_path / "0.parquet")]},
            "2",
        ),
    ):
        with pytest.raises(InputError, match=message):
            find_parts(FileChoice(**given))
    (tmp_path / "a.npy").unlink()
    with pytest.raises(InputError, match=r"no .npz beside them. DataComp's download_upstream.py fetches"):
        find_parts(FileChoice(embeddings=[str(tmp_path)]))


def test_lance_needs_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lance", None)
    (tmp_path / "d.lance").mkdir()
    with pytest.raises(InputError, match=r"d.lance is a Lance dataset.*pip install pylance. Or write it as Parquet"):
        find_parts(FileChoice(embeddings=[str(tmp_path / "d.lance")]))
