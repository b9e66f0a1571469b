from __future__ import annotations

import doctest
import os
import pty
import re
import subprocess
import sys
import time

import pytest

from distilclip import progress as module
from distilclip.messages import say, set_up_messages
from distilclip.progress import duration, progress, summarise, track


def test_a_short_loop_in_a_log_file_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    assert list(track(range(3), "train", num_samples=8)) == [0, 1, 2]
    assert capfd.readouterr() == ("", "")


def test_shows_speed_when_asked_to(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(module, "FIRST_LINES", (0,))
    assert list(track(range(3), "train", num_samples=8)) == [0, 1, 2]
    with progress("embed", 1.0) as advance:
        advance(0.5, 100)
        advance(0.5, 100)
    shown = capfd.readouterr()
    assert shown.out == ""
    assert "train" in shown.err
    assert "embed" in shown.err
    assert "samples/s" in shown.err
    assert "100%" in shown.err


def test_a_long_loop_in_a_log_file_is_not_silent(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also while one part takes long: lines come by the clock, not by the parts."""
    monkeypatch.setattr(module, "FIRST_LINES", (0.05, 0.1, 0.15, 59))
    with progress("embed runs/a", 40) as advance:
        time.sleep(0.2)
        advance(10, 640, "loss 2.5")
        say("embed: a word")
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 5
    assert re.fullmatch(r"\d\d:\d\d:\d\d embed runs/a: 0 of 40 \(0%\), \d+ s so far", lines[0])
    assert re.fullmatch(r"\d\d:\d\d:\d\d embed: a word", lines[3])
    last = r"\d\d:\d\d:\d\d embed runs/a: 10 of 40 \(25%\), [\d,]+ samples/s, \d+ s so far, \d+ s left, loss 2.5"
    assert re.fullmatch(last, lines[4])
    assert "\x1b" not in "".join(lines)


@pytest.mark.parametrize("variable", ["DISTILCLIP_LOG_LEVEL=warning", "RANK=1"])
def test_silence_where_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], variable: str
) -> None:
    monkeypatch.setenv(*variable.split("="))
    monkeypatch.setattr(module, "FIRST_LINES", (0.01,))
    with progress("embed", 2) as advance:
        time.sleep(0.05)
        advance(2, 2)
    say("a word")
    assert capfd.readouterr() == ("", "")


def shown_on_a_terminal(program: str) -> str:
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    subprocess.run([sys.executable, "-c", program], check=True, stderr=slave, env=environment)
    os.close(slave)
    return os.read(master, 100_000).decode()


def test_a_terminal_gets_a_bar() -> None:
    program = "from distilclip.progress import track; list(track(range(3), 'train', num_samples=8))"
    shown = shown_on_a_terminal(program)
    assert "\x1b" in shown
    assert "100%" in shown
    assert "samples/s" in shown


def test_a_bar_within_a_bar_is_silent() -> None:
    program = (
        "from distilclip.progress import track; "
        "[list(track(range(3), 'inner', num_samples=8)) for _ in track(range(3), 'outer', num_samples=8)]"
    )
    shown = shown_on_a_terminal(program)
    assert "outer" in shown
    assert "inner" not in shown


def test_a_failure_inside_is_not_hidden() -> None:
    def fail() -> None:
        with progress("embed", 1.0):
            raise KeyError("inside")

    for level in ("info", "warning"):
        set_up_messages(level=level)
        with pytest.raises(KeyError, match="inside"):
            fail()


def test_the_summary_is_one_line() -> None:
    assert doctest.testmod(module).failed == 0
    result = {"stage": "balance", "num_kept": 7080, "num_valid": 12000, "removed_ratio": 0.41, "curve": []}
    line = summarise(result, seconds=150.0, out="runs/balance")
    assert line == "balance: kept 7,080 of 12,000 images (41.0% removed), in 2.5 min, written to runs/balance"
    evaluated = {"stage": "evaluate", "rows": [1, 2], "models": [1], "sets": [1, 2, 3]}
    assert "measured 1 models on 3 sets" in summarise(evaluated, seconds=1.0, out="x")
    assert summarise({}, seconds=1.0, out="x") == ""
    seconds = (3.0, 119.0, 120.0, 7200.0, 200_000.0)
    assert [duration(s) for s in seconds] == ["3 s", "119 s", "2.0 min", "2.0 h", "2.3 days"]
