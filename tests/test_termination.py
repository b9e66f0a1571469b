"""At SIGTERM a process leaves its work in order, and within seconds even where it cannot."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from multiprocessing.synchronize import Event
from pathlib import Path
from threading import Thread

from distilclip import files, folder_lock, termination
from tests.ranks import server


def exit_code_of(work: Callable[[str, Event], None], place: Path) -> int | None:
    """The exit code of a process that gets SIGTERM in the middle of a function, which says when it is there."""
    is_at_work = server().Event()
    process = server().Process(target=work, args=(str(place), is_at_work))
    process.start()
    assert is_at_work.wait(60)
    os.kill(process.pid or 0, signal.SIGTERM)
    os.kill(process.pid or 0, signal.SIGTERM)  # torchrun passes on what the scheduler sent to all
    process.join(20)
    return process.exitcode


def write_for_ever(place: str, is_at_work: Event) -> None:
    try:
        with termination.ending_in_order(), folder_lock.held_for_block(), files.atomic_write(f"{place}/table") as file:
            folder_lock.hold(place)
            while True:
                file.write(b"1")
                is_at_work.set()
    except termination.Terminated:
        termination.end_by_signal()


def hang(place: str, is_at_work: Event) -> None:
    termination.SECONDS = 0.3
    with termination.ending_in_order():
        folder_lock.hold(place)
        while True:
            try:
                is_at_work.set()
                time.sleep(60)
            except BaseException:  # as a callback of a library swallows it
                continue


def test_what_was_in_work_is_removed_and_the_folder_given_back(tmp_path: Path) -> None:
    assert exit_code_of(write_for_ever, tmp_path) == -signal.SIGTERM
    assert not list(tmp_path.iterdir())


def test_a_process_that_does_not_leave_its_work_is_ended(tmp_path: Path) -> None:
    started = time.monotonic()
    assert exit_code_of(hang, tmp_path) == 128 + signal.SIGTERM
    assert time.monotonic() - started < 20
    assert not (tmp_path / "lock.json").exists()


def test_a_handler_of_the_program_itself_stays() -> None:
    before = signal.signal(signal.SIGTERM, lambda number, frame: None)
    own = signal.getsignal(signal.SIGTERM)
    try:
        with termination.ending_in_order():
            assert signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, before)


def test_only_the_main_thread_is_changed() -> None:
    seen = []

    def look() -> None:
        with termination.ending_in_order():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGTERM)]
