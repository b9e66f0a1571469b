"""What the system, files and packages refuse is one line with the place, the cause and the remedy."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors

from distilclip import cli, distributed, failures, files
from distilclip.errors import InputError
from tests.ranks import run_ranks

CORPUS = ["corpus", "--num-pairs", "16", "--num-eval", "4", "--image-size", "32", "--num-workers", "0", "--out"]


def test_an_output_that_is_a_file_or_a_circle_of_links(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    for place in ("file", "file/below", "a", "a/below"):
        assert cli.main([*CORPUS, str(tmp_path / place)]) == 2, place
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        assert str(tmp_path / place.split("/")[0]) in lines[0]


def test_a_full_disk_is_one_line_that_names_the_file(tmp_path: Path) -> None:
    """A limit on file sizes stands for it: EFBIG is as sudden as ENOSPC."""
    done = subprocess.run(
        [sys.executable, "-m", "distilclip", *CORPUS, str(tmp_path / "out")],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 3, done.stderr
    assert "Traceback" not in done.stderr
    assert str(tmp_path / "out") in done.stderr


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO, errno.EMFILE, errno.EACCES, errno.EDQUOT])
def test_errors_of_the_system_have_their_cause_and_exit_code(number: int) -> None:
    failure = failures.explain(OSError(number, os.strerror(number), "runs/x/table.parquet"))
    assert failure is not None
    assert failure.code == 3
    assert failure.text.startswith("runs/x/table.parquet: ")


def test_a_failed_write_names_the_file_and_not_its_temporary_name(tmp_path: Path) -> None:
    path = str(tmp_path / "table.json")
    with pytest.raises(OSError, match=r"table\.json'$"), files.atomic_write(path):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not list(tmp_path.iterdir())


def test_a_failed_renaming_names_the_file_once(tmp_path: Path) -> None:
    (tmp_path / "table.json" / "below").mkdir(parents=True)
    with pytest.raises(IsADirectoryError) as error, files.atomic_write(str(tmp_path / "table.json")) as file:
        file.write(b"{}")
    failure = failures.explain(error.value)
    assert failure is not None
    assert failure.text.startswith(f"{tmp_path}/table.json: it is a folder")
    assert [path.name for path in tmp_path.iterdir()] == ["table.json"]


def test_damaged_files_and_missing_packages_have_a_remedy(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"\0" * 20)
    found = []
    for attempt in (
        lambda: safetensors.safe_open(str(path), framework="np"),
        lambda: json.loads("{"),
        lambda: __import__("torch_that_is_not_there"),
    ):
        with pytest.raises(Exception) as error:  # noqa: PT011
            attempt()
        found.append(failures.explain(error.value))
    assert [failure and failure.code for failure in found] == [2, 2, 3]
    missing = failures.explain(ModuleNotFoundError("No module named 'torch'", name="torch"))
    assert missing == failures.Failure(3, "The package torch is not installed: pip install 'distilclip[train]'.")
    memory = failures.explain(MemoryError())
    assert memory is not None
    assert memory.code == 3


def test_a_defect_of_our_own_keeps_its_traceback() -> None:
    assert failures.explain(TypeError("unsupported operand")) is None
    assert failures.explain(ModuleNotFoundError("No module named 'distilclip.x'", name="distilclip.x")) is None


def lose_the_other() -> str:
    """What a process says of a collective whose other process has gone."""
    import torch
    import torch.distributed as dist

    with distributed.job("cpu"):
        dist.barrier()
        if distributed.rank() == 1:
            return "gone"
        try:
            for _ in range(1000):
                distributed.reduce_(torch.ones(1000))
        except Exception as error:  # of whatever kind torch makes it
            failure = failures.explain(error)
            return "" if failure is None else f"{failure.code} {failure.text}"
    return "nothing"


def test_the_loss_of_another_process_is_one_line() -> None:
    first, second = run_ranks(2, lose_the_other)
    assert second == "gone"
    assert first.startswith("3 Another process of this training has ended (")


def test_what_the_machine_refuses_is_not_taken_for_a_damaged_input() -> None:
    try:
        try:
            raise OSError(errno.EIO, os.strerror(errno.EIO), "/data/model/open_clip_config.json")
        except OSError as error:
            raise ValueError("no valid config") from error
    except ValueError as error:
        damaged = InputError("open_clip cannot build the model.")
        damaged.__cause__ = error
    found = failures.explain(damaged)
    assert found is not None
    assert found.code == failures.SYSTEM
    assert found.text.startswith("/data/model/open_clip_config.json: the device cannot read")
