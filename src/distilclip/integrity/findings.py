"""Collect what is found in the folder of a stage: what is whole, what is not, and what to remove for it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from distilclip import digests, files, folder_lock, stage_folder
from distilclip.errors import InputError, OtherVersionError

RESULT = "result.json"
STAGES_OF_INPUTS = {"store": "embed", "groups": "balance", "clusters": "cluster", "pack": "pack"}
"""Options that name the folder of another stage."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What is wrong, and the files and folders to remove so that a rerun makes them anew; none where it cannot."""

    text: str
    remove: tuple[str, ...] = ()


@dataclass(kw_only=True)
class Findings:
    """What was found in one folder; names of files are relative to it."""

    path: str
    stage: str
    config: dict[str, Any] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)
    changed: set[str] = field(default_factory=set)
    """files that are missing, or have not the digest that result.json has of them"""
    whole: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    is_of_other_version: bool = False
    """whether another version of distilclip wrote it; then nothing in it is repaired"""

    def child(self, name: str) -> str:
        """Return the path of a file in the folder."""
        return files.join(self.path, name)

    def add_fault(self, text: str, *, remove: Sequence[str] = ()) -> None:
        """Add what is wrong. With parts to `remove`, result.json goes too, so that the stage makes them anew."""
        repairable = remove and not self.is_of_other_version
        self.faults.append(Fault(text=text, remove=(RESULT, *remove) if repairable else ()))

    def add_other_version(self, error: OtherVersionError) -> None:
        """Add, once, that another version wrote the folder: what this one would make anew does not go with the rest."""
        if not self.is_of_other_version:
            self.is_of_other_version = True
            self.faults = [Fault(text=fault.text) for fault in self.faults]
            self.add_fault(str(error))

    def compare_digests(self) -> None:
        """Compare every file with its digest in result.json; what differs is in `changed`, to be reported with it."""
        known = digests.read_digests(self.path)
        if not known:
            if self.result:
                self.notes.append("no digests (made by an older version): its files are checked by their contents only")
            return
        for name, sha256 in known.items():
            if not files.exists(self.child(name)) or files.sha256(self.child(name)) != sha256:
                self.changed.add(name)
        self.whole.append(f"{len(known) - len(self.changed)} of {len(known)} files have their SHA-256")

    def describe_change(self, name: str) -> str:
        """Say what is wrong with a file in `changed`."""
        path = self.child(name)
        return digests.describe_change(path) if files.exists(path) else f"{path} is missing"

    def repair(self) -> list[str]:
        """Remove what the faults name, result.json first; return the paths of what was removed."""
        names = dict.fromkeys(name for fault in self.faults for name in fault.remove)
        if not names:
            return []
        removed = []
        folder_lock.hold(self.path)
        try:
            for name in sorted(names, key=lambda name: name != RESULT):
                path = self.child(name)
                if not files.exists(path):
                    continue
                if files.is_folder(path):
                    files.remove_folder(path)
                else:
                    files.remove(path)
                removed.append(path)
        finally:
            folder_lock.release(self.path)
        return removed


def open_findings(path: str) -> Findings | None:
    """Read the small files of a stage's folder and begin its findings; None where no stage has written."""
    found = Findings(path=path, stage="")
    contents: dict[str, dict[str, Any]] = {}
    for name in ("config.json", "env.json", "inputs.json", RESULT, "extended.json"):
        if not files.exists(found.child(name)):
            continue
        try:
            value = json.loads(files.read_bytes(found.child(name)))
            if not isinstance(value, dict):
                raise ValueError(f"a {type(value).__name__} and no object")
            contents[name] = value
        except (ValueError, RecursionError) as error:  # also bytes that are no UTF-8
            again = () if name != RESULT else (RESULT,)
            advice = "" if again else " Restore it, or remove the folder and make it again."
            found.add_fault(f"{found.child(name)} is no valid JSON ({error}).{advice}", remove=again)
    stage = next((c["stage"] for c in contents.values() if isinstance(c.get("stage"), str)), "")
    if not stage:
        return found if found.faults else None
    found.stage = stage
    found.config, found.result = contents.get("config.json", {}), contents.get(RESULT, {})
    if RESULT not in contents:
        found.notes.append("unfinished (no result.json): only what is there is checked")
    for option, stage in STAGES_OF_INPUTS.items():
        inputs = contents.get("inputs.json", {})
        known = [digest for name, digest in inputs.items() if name == stage or name.startswith(f"{stage} ")]
        given = found.config.get(option)
        for path, expected in zip([given] if isinstance(given, str) else given or [], known, strict=False):
            _check_input(found, option, path, expected)
    return found


def _check_input(found: Findings, option: str, path: str, expected: str) -> None:
    """Compare a folder that this one was made from with what inputs.json says of it."""
    if not files.exists(files.join(path, RESULT)):
        found.notes.append(f"{path}, which it was made from, is not there or unfinished")
    elif stage_folder.growth(path, expected) is not None:
        found.notes.append(f"{path}, which it was made from, has grown since (embed --append)")
    elif stage_folder.result_digest(path) != expected:
        text = f"{found.path} was made from another {option} than {path} is now. Restore it, or make this folder again."
        found.add_fault(text)


def input_of(found: Findings, option: str) -> str | None:
    """Return the path of a finished folder that this one was made from; None where it is not there or has grown."""
    path = found.config.get(option)
    if not isinstance(path, str) or stage_folder.read_finished(path, stage=STAGES_OF_INPUTS[option]) is None:
        return None
    made_from = found.child("inputs.json")
    expected = stage_folder.read_json(made_from) if files.exists(made_from) else {}
    return path if stage_folder.growth(path, expected.get(STAGES_OF_INPUTS[option])) is None else None


def list_parts(folder: str, suffix: str) -> Iterator[int]:
    """Yield the numbers of the shards that have a file in a folder, ascending."""
    names = files.file_sizes(folder) if files.is_folder(folder) else {}
    stems = (name.removesuffix(suffix) for name in sorted(names) if name.endswith(suffix))
    yield from (int(stem) for stem in stems if stem.isdigit())


def read_or_report(found: Findings, read: Any, name: str, *, remove: Sequence[str]) -> Any:
    """Read a file by `read`, or report that it cannot be read and return None."""
    try:
        return read()
    except OtherVersionError as error:
        found.add_other_version(error)
        return None
    except (InputError, OSError, ValueError, KeyError) as error:
        said = str(error).splitlines()[0]
        found.add_fault(f"{found.child(name)} cannot be read ({said})", remove=remove)
        return None
