from __future__ import annotations

import signal
import subprocess
import sys
import threading

import pytest

from distilclip.train.signals import Signals, terminate


def test_a_request_is_taken_once_and_a_later_one_is_not_lost() -> None:
    with Signals() as signals:
        assert not signals.take()
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGUSR1)
        assert signals.take()
        assert not signals.take()
        signal.raise_signal(signal.SIGUSR1)
        assert signals.take()
        assert not signals.stop


def test_sigterm_asks_to_save_and_to_stop() -> None:
    with Signals() as signals:
        signal.raise_signal(signal.SIGTERM)
        assert signals.take()
        assert signals.stop


def test_the_handlers_of_before_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)
    with Signals():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)) == before


def test_other_threads_note_nothing_and_fail_in_nothing() -> None:
    found: list[bool] = []

    def work() -> None:
        with Signals() as signals:
            found.append(signals.take() or signals.stop)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False]


def test_the_process_ends_by_sigterm() -> None:
    code = "from distilclip.train.signals import terminate; terminate()"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGTERM


def test_a_handler_that_returns_does_not_let_training_seem_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "raise_signal", lambda number: None)
    with pytest.raises(SystemExit) as ended:
        terminate()
    assert ended.value.code == 128 + signal.SIGTERM
