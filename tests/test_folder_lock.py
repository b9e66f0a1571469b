"""One process at a time writes a folder: others are told who, and the lock of a dead process is taken over."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest

from distilclip import files, folder_lock, stage_folder
from distilclip.errors import InputError

HOLD = """
import sys, time
from dataclasses import dataclass
from distilclip import stage_folder
@dataclass(frozen=True, kw_only=True)
class Config:
    out: str
    threshold: float = 0.1
stage_folder.open_folder(sys.argv[1], stage="balance", config=Config(out=sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


@dataclass(frozen=True, kw_only=True)
class Config:
    out: str
    threshold: float = 0.1


def holder_of(out: str) -> subprocess.Popen[str]:
    """A process that has opened a folder and holds it until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, out], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.close()
    process.wait(20)
    process.stdout.close()


def open_again(out: str) -> stage_folder.Folder:
    return stage_folder.open_folder(out, stage="balance", config=Config(out=out))


def test_a_second_process_is_told_who_holds_the_folder_and_may_have_it_afterwards(tmp_path: Path) -> None:
    out = str(tmp_path / "balance")
    first = holder_of(out)
    before = {path: path.read_bytes() for path in Path(out).iterdir()}
    (Path(out) / "table.parquet.17.0123abcd.tmp").write_text("being written by the first")
    with pytest.raises(InputError, match=rf"is held by process {first.pid} on .*, since 20\d\d-"):
        open_again(out)
    assert {path: path.read_bytes() for path in Path(out).iterdir() if path.suffix != ".tmp"} == before
    assert (Path(out) / "table.parquet.17.0123abcd.tmp").exists()
    end(first)
    assert not (Path(out) / "lock.json").exists()  # given back at the end of the process
    open_again(out).finish({})
    assert not list(Path(out).glob("*.tmp"))
    assert sorted(path.name for path in Path(out).iterdir()) == ["config.json", "env.json", "result.json"]


def test_a_killed_holder_is_taken_over_at_once(tmp_path: Path) -> None:
    out = str(tmp_path / "balance")
    first = holder_of(out)
    first.kill()
    while Path(f"/proc/{first.pid}/stat").read_bytes().split()[2] != b"Z":  # nobody has asked for its exit code
        time.sleep(0.01)
    open_again(out).finish({})
    end(first)


def test_a_process_number_that_another_process_got_is_no_holder(tmp_path: Path) -> None:
    out = str(tmp_path / "balance")
    first = holder_of(out)
    record = json.loads((tmp_path / "balance/lock.json").read_text())
    (tmp_path / "balance/lock.json").write_text(json.dumps({**record, "started": "1"}))
    open_again(out).finish({})
    end(first)


def write_lock_of_elsewhere(out: str) -> Path:
    os.makedirs(out, exist_ok=True)
    lock = Path(out) / "lock.json"
    lock.write_text(json.dumps(asdict(replace(folder_lock._this_process(), host="node7", machine="other"))))
    return lock


def test_a_holder_on_another_machine_is_taken_over_after_silence_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_lock, "BEAT_SECONDS", 0.2)
    monkeypatch.setattr(folder_lock, "SILENT_SECONDS", 1.0)
    out = str(tmp_path / "balance")
    lock = write_lock_of_elsewhere(out)
    touch = "import os, sys, time\nwhile True: os.utime(sys.argv[1]); time.sleep(0.05)"
    beating = subprocess.Popen([sys.executable, "-c", touch, str(lock)])
    time.sleep(0.3)
    with pytest.raises(InputError, match=r"on node7, since .* If that process is dead, remove .*lock\.json"):
        open_again(out)
    beating.kill()
    beating.wait()
    started = time.monotonic()
    open_again(out).finish({})
    assert 0.3 < time.monotonic() - started < 10


def test_a_holder_gives_signs_of_life(tmp_path: Path) -> None:
    code = "from distilclip import folder_lock; folder_lock.BEAT_SECONDS = 0.1\n" + HOLD
    out = str(tmp_path / "balance")
    process = subprocess.Popen(
        [sys.executable, "-c", code, out], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    seen = set()
    for _ in range(30):
        seen.add((tmp_path / "balance/lock.json").stat().st_mtime_ns)
        time.sleep(0.05)
    end(process)
    assert len(seen) > 3


def test_finished_folders_are_read_by_many_and_not_written(tmp_path: Path) -> None:
    out = tmp_path / "balance"
    open_again(str(out)).finish({})
    write_lock_of_elsewhere(str(out))  # were it looked at, this would wait for minutes
    assert open_again(str(out)).finished


@pytest.mark.slow
def test_many_processes_at_once_and_one_works(tmp_path: Path) -> None:
    """Also where a dead process's lock is in their way."""
    code = """
import sys, time
from distilclip import folder_lock
from distilclip.errors import InputError
while time.time() < float(sys.argv[2]): pass
try: folder_lock.hold(sys.argv[1])
except InputError: raise SystemExit(2)
time.sleep(1.5)
"""
    out = str(tmp_path / "balance")
    for _ in range(3):
        dead = holder_of(out)
        dead.kill()
        end(dead)
        start = str(time.time() + 1.5)
        processes = [subprocess.Popen([sys.executable, "-c", code, out, start]) for _ in range(6)]
        assert sorted(process.wait() for process in processes) == [0, 2, 2, 2, 2, 2]


def fail_in(folder: Path) -> None:
    open_again(str(folder / "balance"))
    assert (folder / "balance/lock.json").exists()
    raise InputError("a bad value")


def test_a_lock_taken_in_a_block_is_given_back_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError), folder_lock.held_for_block():
        fail_in(tmp_path)
    assert not (tmp_path / "balance/lock.json").exists()


def test_a_url_has_one_holder_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    out = "memory://test-lock/balance"
    open_again(out)
    assert files.exists(f"{out}/lock.json")
    monkeypatch.setattr(folder_lock, "_held", {})
    files.write_bytes(
        f"{out}/lock.json",
        json.dumps(
            asdict(replace(folder_lock._this_process(), pid=1, started=folder_lock._start_of(1) or ""))
        ).encode(),
    )
    with pytest.raises(InputError, match="is held by process 1 on"):
        open_again(out)
    files.remove(f"{out}/lock.json")
    open_again(out).finish({})
    assert not files.exists(f"{out}/lock.json")


def test_another_programs_temporary_files_are_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "balance"
    open_again(str(out))
    (out / "notes.tmp").write_text("the user's")
    (out / "a.parquet.12.0123abcd.tmp").write_text("of a killed run")
    open_again(str(out))
    assert (out / "notes.tmp").exists()
    assert not (out / "a.parquet.12.0123abcd.tmp").exists()


def test_a_new_file_is_created_once(tmp_path: Path) -> None:
    for path in (str(tmp_path / "a.json"), "memory://test-create/a.json"):
        assert files.create_bytes(path, b"first")
        assert not files.create_bytes(path, b"second")
        assert files.read_bytes(path) == b"first"
    assert os.listdir(tmp_path) == ["a.json"]


def test_the_lock_of_a_process_killed_after_its_last_file_is_removed_with_the_next_look(tmp_path: Path) -> None:
    out = str(tmp_path / "balance")
    open_again(out).finish({})
    first = holder_of(str(tmp_path / "other"))
    (tmp_path / "other" / "lock.json").rename(tmp_path / "balance" / "lock.json")
    open_again(out)
    assert (tmp_path / "balance" / "lock.json").exists()  # its process lives
    first.kill()
    first.wait()
    assert open_again(out).finished
    assert not (tmp_path / "balance" / "lock.json").exists()
    assert first.stdout is not None
    assert first.stdin is not None
    first.stdout.close()
    first.stdin.close()


def test_a_lock_that_another_process_is_writing_is_left_alone(tmp_path: Path) -> None:
    """Who has taken the folder removes what killed processes left: not a lock that is being written just now."""
    other = tmp_path / "lock.json.12345.0123abcd.tmp"
    left = tmp_path / "table.12345.0123abcd.tmp"
    other.touch()
    left.touch()
    files.remove_temporaries(str(tmp_path), keep="config.json", shared=folder_lock.NAME)
    assert other.exists()
    assert not left.exists()
    folder_lock.hold(str(tmp_path))  # alone with the folder, it removes that, too
    assert [path.name for path in tmp_path.iterdir()] == ["lock.json"]
    folder_lock.release(str(tmp_path))
