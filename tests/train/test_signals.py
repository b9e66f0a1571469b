from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from distilclip.train import signals as signals_module
from distilclip.train.signals import OverdueError, Signals, terminate


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


def test_a_second_sigterm_ends_the_process_but_not_one_that_torchrun_passes_on() -> None:
    code = """
import signal, time
from distilclip.train import signals
signals.REPEAT_SECONDS = 0.3
with signals.Signals() as noted:
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)  # the scheduler's and torchrun's
    print("alive", noted.stop, flush=True)
    time.sleep(0.4)
    signal.raise_signal(signal.SIGTERM)
    print("still alive")
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.stdout == "alive True\n"
    assert done.returncode == -signal.SIGTERM


def test_a_wait_for_data_ends_soon_after_sigterm_and_only_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals_module, "DATA_SECONDS", 0.2)
    with Signals() as signals:
        with signals.waiting():
            time.sleep(0.3)
        signal.raise_signal(signal.SIGTERM)
        with signals.waiting():
            pass
        time.sleep(0.3)  # a step is not a wait
        with pytest.raises(OverdueError), signals.waiting():
            time.sleep(5)
    timer = threading.Timer(0.1, os.kill, [os.getpid(), signal.SIGTERM])
    timer.start()
    with Signals() as signals, pytest.raises(OverdueError), signals.waiting():
        time.sleep(5)
    timer.join()


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
