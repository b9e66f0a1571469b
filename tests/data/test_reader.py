from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest

from distilclip import files
from distilclip.data.reader import Reader

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
