from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from distilclip import files
from distilclip.data.tensors import read_metadata, read_rows, read_tensors, write_tensors
from distilclip.errors import InputError

ARRAYS = {
    "image": np.arange(12, dtype=np.float16).reshape(4, 3),
    "text": np.linspace(0, 1, 6, dtype=np.float32).reshape(2, 3).T,
    "empty": np.zeros((0, 5), np.float32),
}


def test_the_safetensors_package_reads_what_is_written(tmp_path: Path) -> None:
    path = str(tmp_path / "a.safetensors")
    digest, quick = write_tensors(path, ARRAYS, {"b": "2", "a": "ß"})
    loaded = load_file(path)
    for name, array in ARRAYS.items():
        assert np.array_equal(loaded[name], array)
    assert digest == files.sha256(path)
    assert files.has_digest(path, digest)
    assert files.has_digest(path, quick)
    assert not files.has_digest(path, quick[::-1])
    assert read_metadata(path) == {"a": "ß", "b": "2"}


def test_what_the_safetensors_package_writes_is_read(tmp_path: Path) -> None:
    path = str(tmp_path / "a.safetensors")
    save_file({k: np.ascontiguousarray(v) for k, v in ARRAYS.items()}, path, metadata={"a": "1"})
    for name, array in read_tensors(path).items():
        assert np.array_equal(array, ARRAYS[name])


@pytest.mark.parametrize("remote", [False, True])
def test_some_rows_are_read_and_a_cut_file_is_an_error(tmp_path: Path, remote: bool) -> None:
    local = tmp_path / "a.safetensors"
    path = f"file://{local}" if remote else str(local)
    write_tensors(path, ARRAYS, {})
    assert np.array_equal(read_rows(path, "image", 1, 3), ARRAYS["image"][1:3])
    assert np.array_equal(read_rows(path, "text", 0, 3), ARRAYS["text"])
    local.write_bytes(local.read_bytes()[:-8])
    assert np.array_equal(read_rows(path, "text", 0, 2), ARRAYS["text"][:2])
    with pytest.raises(InputError, match="ends within the rows 1 to 3 of text"):
        read_rows(path, "text", 1, 3)


@pytest.mark.parametrize("remote", [False, True])
def test_round_trip_with_equal_bytes_whatever_the_order_of_metadata(tmp_path: Path, remote: bool) -> None:
    folder = "memory://tensors" if remote else str(tmp_path)
    paths = [files.join(folder, name) for name in ("a", "b")]
    write_tensors(paths[0], ARRAYS, {"x": "1", "y": "2"})
    write_tensors(paths[1], ARRAYS, {"y": "2", "x": "1"})
    assert files.read_bytes(paths[0]) == files.read_bytes(paths[1])
    arrays = read_tensors(paths[0])
    for name, array in ARRAYS.items():
        assert np.array_equal(arrays[name], array)
    assert isinstance(arrays["image"].base, np.memmap) or remote
    assert arrays["image"].ctypes.data % 64 == 0 or remote
    assert not arrays["image"].flags.writeable


def test_cut_or_foreign_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(str(path), ARRAYS, {})
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(InputError, match=r"a\.safetensors has \d+ bytes where its header says \d+: it is cut"):
        read_tensors(str(path))
    for junk in (b"", b"short", b"\x10\0\0\0\0\0\0\0" + b"no json at all..", b"\xff" * 100):
        path.write_bytes(junk)
        with pytest.raises(InputError, match=r"a\.safetensors is no safetensors file"):
            read_tensors(str(path))
    path.write_bytes(content.replace(b'"F16"', b'"F17"'))
    with pytest.raises(InputError, match="image has dtype F17"):
        read_tensors(str(path))
    path.write_bytes(content.replace(b'"shape":[4,3]', b'"shape":[4,4]'))
    with pytest.raises(InputError, match=r"the shape \(4, 4\) of image disagrees with its 24 bytes"):
        read_tensors(str(path))
