from __future__ import annotations

import pytest

from distilclip.progress import progress, track


def test_silent_where_nobody_watches(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("DISTILCLIP_PROGRESS", raising=False)
    assert list(track(range(3), "train", num_samples=8)) == [0, 1, 2]
    assert capfd.readouterr() == ("", "")


def test_shows_speed_when_asked_to(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("DISTILCLIP_PROGRESS", "1")
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


def test_a_failure_inside_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        with progress("embed", 1.0):
            raise KeyError("inside")

    for shown in ("0", "1"):
        monkeypatch.setenv("DISTILCLIP_PROGRESS", shown)
        with pytest.raises(KeyError, match="inside"):
            fail()
