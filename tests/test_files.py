from __future__ import annotations

import hashlib
import os
from pathlib import Path

import fsspec
import pytest

from distilclip import files
from distilclip.errors import InputError


def test_braces_expand_as_webdataset_writes_them() -> None:
    assert files.expand_braces("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert files.expand_braces("{x,y}/{0..1}") == ["x/0", "x/1", "y/0", "y/1"]
    assert files.expand_braces("{9..10}") == ["9", "10"]
    assert files.expand_braces("plain.tar") == ["plain.tar"]


@pytest.mark.parametrize(("pattern", "message"), [("{5..3}", r"write \{3..5\}"), ("{oops}", "neither a range")])
def test_bad_braces_say_what_is_meant(pattern: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        files.expand_braces(pattern)


def test_patterns_expand_in_order_and_each_file_once(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.tar").write_bytes(b"")
    assert files.expand([str(tmp_path / "c.tar"), str(tmp_path / "*.tar")]) == [
        str(tmp_path / f"{name}.tar") for name in ("c", "a", "b")
    ]
    with pytest.raises(InputError, match=r"No file matches .*missing.*quoting"):
        files.expand(str(tmp_path / "missing-{0..3}.tar"))


def test_remote_patterns_keep_their_protocol() -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe({"/glob/1.tar": b"", "/glob/0.tar": b""})
    assert files.expand("memory://glob/*.tar") == ["memory:///glob/0.tar", "memory:///glob/1.tar"]
    assert files.expand("memory://glob/{0..1}.tar") == ["memory://glob/0.tar", "memory://glob/1.tar"]


@pytest.mark.parametrize("remote", [False, True])
def test_a_failed_write_leaves_nothing(tmp_path: Path, remote: bool) -> None:
    folder = "memory://atomic" if remote else str(tmp_path / "new" / "folder")
    path = files.join(folder, "part")
    files.write_bytes(path, b"whole")
    assert files.read_bytes(path) == b"whole"

    def fail() -> None:
        with files.atomic_write(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert files.read_bytes(path) == b"whole"
    names = [os.path.basename(p) for p in files.filesystem(folder)[0].ls(files.filesystem(folder)[1], detail=False)]
    assert names == ["part"]


@pytest.mark.parametrize("remote", [False, True])
def test_ranges_and_digests(tmp_path: Path, remote: bool) -> None:
    path = "memory://reads/a" if remote else str(tmp_path / "a")
    files.write_bytes(path, b"0123456789")
    assert files.read_range(path, 3, 4) == b"3456"
    assert files.read_range(path, 8, 4) == b"89"
    assert files.size(path) == 10
    assert files.sha256(path) == hashlib.sha256(b"0123456789").hexdigest()


def test_a_local_copy_is_the_file_itself_or_a_download_that_goes_away(tmp_path: Path) -> None:
    path = str(tmp_path / "a")
    files.write_bytes(path, b"x")
    with files.local_copy(path) as copy:
        assert copy == path
    files.write_bytes("memory://copies/a.tar", b"remote")
    with files.local_copy("memory://copies/a.tar") as copy:
        assert os.path.basename(copy) == "a.tar"
        assert Path(copy).read_bytes() == b"remote"
    assert not os.path.exists(copy)
    assert os.path.exists(path)
