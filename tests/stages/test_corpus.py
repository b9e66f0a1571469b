"""`distilclip corpus`: the folder contract, a finished folder, and a kill in the middle."""

from __future__ import annotations

import dataclasses
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distilclip import cli, progress
from distilclip.errors import InputError
from distilclip.stages import corpus


def config(out: Path, **changes: int) -> corpus.Config:
    sizes = {"num_pairs": 60, "seed": 1, "image_size": 32, "shard_size": 20, "num_eval": 12, "num_workers": 0}
    return corpus.Config(out=str(out), **{**sizes, **changes})


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder that does not tell where and when it was written."""
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name not in ("env.json", "config.json")
    }


def test_writes_the_corpus_and_counts_its_truth(tmp_path: Path) -> None:
    result = corpus.main(config(tmp_path / "a"))
    assert result["stage"] == "corpus"
    assert result["num_pairs"] == sum(result["copies"].values()) == sum(result["captions"].values()) == 60
    assert result["removable_ratio"] == 1 - result["num_groups"] / 60
    assert len(result["held_out"]) == 24
    assert set(result["num_eval"]) == {
        str(p.relative_to(tmp_path / "a")) for p in (tmp_path / "a").rglob("eval/*/*.tar")
    }
    assert json.loads((tmp_path / "a/result.json").read_text()) == result


def test_finished_folder_is_left_alone_and_refuses_another_config(tmp_path: Path) -> None:
    corpus.main(config(tmp_path / "a"))
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "a").rglob("*")}
    corpus.main(config(tmp_path / "a", num_workers=1))
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "a").rglob("*")} == before
    with pytest.raises(InputError, match="seed was 1, now 2"):
        corpus.main(config(tmp_path / "a", seed=2))


def test_missing_tars_are_written_again_and_finished_ones_are_not(tmp_path: Path) -> None:
    corpus.main(config(tmp_path / "a"))
    whole = contents(tmp_path / "a")
    kept = (tmp_path / "a/train/00000.tar").stat().st_mtime_ns
    for name in ("result.json", "train/00001.tar", "eval/sketch/test-00000.tar", "eval/shape/classnames.txt"):
        (tmp_path / "a" / name).unlink()
    corpus.main(config(tmp_path / "a"))
    assert contents(tmp_path / "a") == whole
    assert (tmp_path / "a/train/00000.tar").stat().st_mtime_ns == kept


def test_killed_and_run_again_gives_the_same_files(tmp_path: Path) -> None:
    sizes = {"num_pairs": 240, "shard_size": 10}
    corpus.main(config(tmp_path / "whole", **sizes))
    cut = config(tmp_path / "cut", **sizes)
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in dataclasses.asdict(cut).items()]
    process = subprocess.Popen([sys.executable, "-m", "distilclip.cli", "corpus", *flags], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "cut").glob("train/*.tar"))) < 2:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "cut/result.json").exists()
    corpus.main(cut)
    for leftover in (tmp_path / "cut").rglob("*.tmp"):  # what a kill inside a write leaves beside the files
        leftover.unlink()
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_negative_workers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="num-workers"):
        config(tmp_path, num_workers=-1)


def test_progress_is_silent_when_asked_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in dataclasses.asdict(config(tmp_path / "a")).items()]
    assert cli.main(["corpus", *flags, "--quiet"]) == 0
    assert capfd.readouterr() == ("", "")
    monkeypatch.setattr(progress, "FIRST_LINES", (0,))
    assert cli.main(["corpus", *flags[1:], f"--out={tmp_path / 'b'}"]) == 0
    shown = capfd.readouterr().err.splitlines()
    assert any(re.search(r"corpus .*b: 11 of 11 \(100%\)", line) for line in shown[:-1])
    assert re.match(
        r"\d\d:\d\d:\d\d corpus: 60 pairs, .*% of them copies of others, in \d+ s, written to .*b$", shown[-1]
    )
