"""Write down the SHA-256 of the files of a finished folder, and check each file against it when it is first read.

The digests stand in the `digests` of a stage's result.json or of a checkpoint's state.json, by the names of the files.
A folder of an older version has none, and its files are read without this check.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from distilclip import files
from distilclip.errors import InputError

RECORDS = ("result.json", "state.json")
"""Files that hold the digests of those beside and below them."""
NUM_AT_ONCE = 8
AT_ONCE_BYTES = 1 << 30
"""Bytes that are checked before work begins: less than a second's. The rest is checked while it goes on."""

_known: dict[str, dict[str, str]] = {}  # the digests of finished folders
_checked: set[tuple[Any, ...]] = set()  # files that this process has found unchanged


def digest_files(folder: str, names: Sequence[str]) -> dict[str, str]:
    """Return the SHA-256 of files below a folder, by name, as result.json has them in `digests`."""
    with ThreadPoolExecutor(NUM_AT_ONCE) as pool:
        found = pool.map(lambda name: files.sha256(files.join(folder, name)), names)
        return dict(zip(names, found, strict=True))


def read_digests(folder: str) -> dict[str, str]:
    """Return the digests that a folder's result.json or state.json has; empty where there are none."""
    return _read_record(folder) or {}


def _read_record(folder: str) -> dict[str, str] | None:
    """Return the digests of a finished folder, None for an unfinished one."""
    for name in RECORDS:
        path = files.join(folder, name)
        if files.exists(path):
            try:
                found = json.loads(files.read_bytes(path)).get("digests", {})
            except (ValueError, AttributeError):  # who needs the file itself says what is wrong with it
                found = {}
            return found if isinstance(found, dict) else {}
    return None


def seal(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a JSON file with the SHA-256 of all its other fields as its field `sha256`."""
    return {**content, "sha256": _digest_of_fields(content)}


def is_unchanged(content: Mapping[str, Any]) -> bool:
    """Return whether a JSON file still holds what was sealed; true for one that was never sealed."""
    return "sha256" not in content or content["sha256"] == _digest_of_fields(content)


def check_file(folder: str, name: str, *, remedy: Callable[[], str]) -> None:
    """Raise `InputError` unless a file has the digest that its folder has of it; once in a process for each file.

    A file without a digest, or that is missing, is left to who reads it. `remedy` ends the message.
    """
    place = files.absolute(folder)
    known = _known.get(place)
    if known is None:
        known = _read_record(folder)
        if known is None:
            return
        _known[place] = known
    path, expected = files.join(folder, name), known.get(name)
    if expected is None or is_same(path, expected):
        return
    _known.pop(place, None)  # has the folder been made anew since?
    expected = read_digests(folder).get(name)
    if expected is not None and not is_same(path, expected):
        raise InputError(describe_change(path, remedy()))


def forget() -> None:
    """Let the next check of every file read it again, whether or not this process has read it before."""
    _known.clear()
    _checked.clear()


def is_same(path: str, digest: str) -> bool:
    """Return whether a file has this digest, reading it once in a process as long as it is not written again.

    `digest` is a SHA-256 or an XXH3, in hex (`files.has_digest`).

    Raises no error for a missing file: it is left to who reads it.
    """
    try:
        key = (files.absolute(path), digest, *_version(path))
        if key not in _checked and files.has_digest(path, digest):
            _checked.add(key)
    except FileNotFoundError:
        return True
    return key in _checked


class BackgroundCheck:
    """Checks files against their digests in a thread, where work reads single rows of them and not the whole files.

    `wanted` are paths, each with its digest and the remedy. The first ones, up to `at_once` bytes, are checked here.
    """

    def __init__(self, wanted: Sequence[tuple[str, str, Callable[[], str]]], *, at_once: int = AT_ONCE_BYTES) -> None:
        self._found = ""
        num_bytes, rest = 0, list(wanted)
        while rest and not self._found and (num_bytes := num_bytes + _size(rest[0][0])) <= at_once:
            self._check(*rest.pop(0))
        self.raise_found()
        self._thread = threading.Thread(target=self._check_all, args=(rest,), daemon=True)
        self._thread.start()

    def raise_found(self) -> None:
        """Raise `InputError` for a file that has changed, if one was found so far."""
        if self._found:
            raise InputError(self._found)

    def wait(self) -> None:
        """Wait until all files are checked."""
        self._thread.join()

    def _check_all(self, wanted: Sequence[tuple[str, str, Callable[[], str]]]) -> None:
        for path, digest, remedy in wanted:
            try:
                self._check(path, digest, remedy)
            except OSError:  # who reads the rows says so, with more right
                return
            if self._found:
                return

    def _check(self, path: str, digest: str, remedy: Callable[[], str]) -> None:
        if not is_same(path, digest):
            self._found = describe_change(path, remedy())


def describe_change(path: str, remedy: str = "", *, what: str = "") -> str:
    """Return what is said of a file that has not the bytes that were written: a sentence with a remedy, or a clause."""
    said = f"{path} is not the file that was written (its digest differs{what})"
    return f"{said}. {remedy}" if remedy else said


def repair_with(folder: str, stage: str) -> Callable[[], str]:
    """Return what says how to repair a folder: what to run, and that it makes again only what is damaged.

    `stage` made it, unless its config.json, which is read only then, says that another did whose folders stand for its.
    """

    def say() -> str:
        made_by = stage
        with contextlib.suppress(ValueError, AttributeError, OSError):
            made_by = json.loads(files.read_bytes(files.join(folder, "config.json"))).get("stage", stage)
        return (
            f"`distilclip verify {folder} --repair` removes what is damaged; "
            f"`distilclip {made_by} {folder}/config.json` then makes that again."
        )

    return say


def _size(path: str) -> int:
    return files.size(path) if files.exists(path) else 0


def _version(path: str) -> tuple[int, ...]:
    if files.is_url(path):
        return ()
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns, status.st_ino


def _digest_of_fields(content: Mapping[str, Any]) -> str:
    fields = json.loads(json.dumps({name: value for name, value in content.items() if name != "sha256"}))
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
