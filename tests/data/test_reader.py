from __future__ import annotations

import hashlib
import os
import pickle
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from distilclip import files
from distilclip.data import reader as reader_module
from distilclip.data.reader import COPY_AFTER, Reader
from distilclip.data.stream import PairSource, Presentation, open_stream
from distilclip.errors import InputError
from tests.data.conftest import tokenize, write_store

CONTENT = bytes(range(200))


@pytest.fixture(params=["local", "remote"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    path = "memory://reader/a" if request.param == "remote" else str(tmp_path / "a")
    files.write_bytes(path, CONTENT)
    return path


@pytest.mark.parametrize("sequential", [False, True])
def test_ranges_in_any_order(path: str, sequential: bool) -> None:
    with Reader(path, sequential=sequential) as reader:
        assert reader.size == 200
        assert reader.read(150, 10) == CONTENT[150:160]
        assert reader.read(0, 3) == CONTENT[:3]
        assert reader.read(190, 50) == CONTENT[190:]


def test_what_was_fetched_ahead_is_what_is_read(path: str) -> None:
    reader = Reader(path)
    for offset in (0, 30, 60):
        reader.prefetch(offset, 20)
    assert [reader.read(offset, 20) for offset in (60, 0, 30, 5)] == [CONTENT[o : o + 20] for o in (60, 0, 30, 5)]
    reader.prefetch(100, 10)
    reader.close()
    assert reader.read(100, 10) == CONTENT[100:110]


def test_a_copy_in_another_process_opens_the_file_anew(path: str) -> None:
    with Reader(path) as reader:
        reader.read(0, 1)
        reader.prefetch(7, 2)
        copy = pickle.loads(pickle.dumps(reader))
    assert copy.read(5, 5) == CONTENT[5:10]


def test_a_forked_process_does_not_share_the_file_position(tmp_path: Path) -> None:
    path = str(tmp_path / "a")
    files.write_bytes(path, CONTENT)
    reader = Reader(path)
    reader.read(0, 10)
    child = os.fork()
    if not child:
        os._exit(0 if reader.read(50, 5) == CONTENT[50:55] and reader._file.tell() == 55 else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert reader._file.tell() == 10


@pytest.fixture
def copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of copies."""
    monkeypatch.setenv("DISTILCLIP_COPIES", str(tmp_path / "copies"))
    monkeypatch.setattr(reader_module, "FREE_SHARE", 0.0)  # however full the disk of this machine is
    reader_module._Copier.of_process.cache_clear()
    return tmp_path / "copies"


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The path of each range that is requested."""
    made: list[str] = []
    read_range = files.read_range

    def counted(path: str, offset: int, length: int) -> bytes:
        made.append(path)
        return read_range(path, offset, length)

    monkeypatch.setattr(files, "read_range", counted)
    return made


def read_until(read: Callable[[], bytes], condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert read() == CONTENT[20:25]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_is_read_often_is_copied_and_a_changed_file_is_another(copies: Path, requests: list[str]) -> None:
    path = "memory://reader/often"
    files.write_bytes(path, CONTENT)
    reader, other = Reader(path, copied=True), Reader(path, copied=True)
    reader.prefetch(0, 5)
    for _ in range(COPY_AFTER - 1):
        reader.read(20, 5)
    assert not copies.exists()
    assert len(requests) >= COPY_AFTER - 1  # what was asked for ahead may be under way
    read_until(lambda: reader.read(20, 5), lambda: reader.path != path)
    read_until(lambda: other.read(20, 5), lambda: other.path != path)
    assert len(list(copies.iterdir())) == 1
    made = len(requests)
    assert reader.read(0, 5) == CONTENT[:5]  # as it was asked for ahead
    assert reader.read(190, 50) == CONTENT[190:]
    assert pickle.loads(pickle.dumps(reader)).read(7, 3) == CONTENT[7:10]
    assert len(requests) == made
    files.write_bytes(path, CONTENT[::-1])
    reader_module._Copier.of_process.cache_clear()
    changed = Reader(path, copied=True)
    for _ in range(2 * COPY_AFTER):
        time.sleep(0.01)
        assert changed.read(0, 3) == CONTENT[::-1][:3]


def test_a_copy_with_another_digest_is_an_error(copies: Path) -> None:
    path = "memory://reader/damaged"
    files.write_bytes(path, CONTENT)
    whole, damaged = (hashlib.sha256(content).hexdigest() for content in (CONTENT, CONTENT[1:]))
    reader = Reader(path, copied=True, digest=whole)
    read_until(lambda: reader.read(20, 5), lambda: reader.path != path)
    (copy,) = copies.iterdir()
    copy.unlink()
    reader_module._Copier.of_process.cache_clear()
    reader = Reader(path, copied=True, digest=damaged)
    with pytest.raises(InputError, match="damaged is not the file that was written"):
        read_until(lambda: reader.read(20, 5), lambda: False)
    assert list(copies.iterdir()) == []


@pytest.mark.parametrize("why", ["no room", "not wanted", "no access"])
def test_without_a_copy_the_file_is_read_where_it_lies(
    why: str, copies: Path, requests: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = "memory://reader/never"
    files.write_bytes(path, CONTENT)
    if why == "no room":
        monkeypatch.setattr(reader_module, "FREE_SHARE", 1.0)
    elif why == "not wanted":
        monkeypatch.setenv("DISTILCLIP_COPIES", "0")
    else:
        copies.write_text("a file")
        monkeypatch.setattr(reader_module, "_open_folder", lambda: str(copies))
    reader = Reader(path, copied=True)
    read_until(lambda: reader.read(20, 5), lambda: reader._reads_to_copy < 0)
    assert reader.path == path
    assert reader.read(20, 5) == CONTENT[20:25]
    assert not copies.is_dir() or not list(copies.iterdir())
    assert ("could not be copied" in capsys.readouterr().err) == (why == "no access")


def test_training_makes_one_request_for_a_sample(
    copies: Path, requests: list[str], pair_tars: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    tars = []
    for path in pair_tars(shards=2, rows=12):
        tars.append(f"memory://training/{Path(path).name}")
        files.write_bytes(tars[-1], Path(path).read_bytes())
    write_store("memory://training/store", tars)
    requests.clear()  # those that made the store
    presentation = Presentation(sizes=[32], tokenize=tokenize, seed=0)
    stream = open_stream(PairSource(stores=["memory://training/store"]), presentation, batch_size=8)
    first = next(iter(stream.batches(stop=1)))
    # The tar's span, a row of image and of text embeddings; once, two headers and the first key of two tars.
    assert len(requests) - 4 == 3 * len(first)
    monkeypatch.setattr(reader_module, "COPY_AFTER", 8)
    last = first
    for batch in stream.batches(start=1, stop=60):
        time.sleep(0.01)
        last = batch
    assert last.teacher_image[0].shape == first.teacher_image[0].shape
    requests.clear()
    for batch in stream.batches(start=60, stop=63):
        assert len(batch) == 8
    assert len(requests) == 3 * 8
    assert all(path.endswith(".tar") for path in requests)
