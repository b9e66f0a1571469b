"""List, compare, check and remove the checkpoints of a train folder. Imports no torch."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from distilclip import digests, files, stage_folder
from distilclip.data.reader import Reader
from distilclip.data.tensors import read_header
from distilclip.errors import InputError, OtherVersionError, other_version
from distilclip.messages import warn
from distilclip.sets.specs import HELD_OUT, VALIDATED
from distilclip.train.settings import MEASURES, Checkpoints

STATE_FILE = "state.json"
FORMAT = 2
"""Version of the files of a checkpoint."""


def folder_name(step: int) -> str:
    """Return a checkpoint's path in the train folder, such as `checkpoints/step-000100`."""
    return f"checkpoints/step-{step:06d}"


def read_state(folder: str) -> dict[str, Any]:
    """Read the state.json of a checkpoint.

    Raises `InputError` where it is not as it was written, `OtherVersionError` where another version wrote it.
    """
    path = files.join(folder, STATE_FILE)
    state = _read_own_version(path)
    if not digests.is_unchanged(state):
        raise InputError(digests.describe_change(path, _remedy(folder)))
    return state


def _read_own_version(path: str) -> dict[str, Any]:
    state = stage_folder.read_json(path)
    if state.get("format", FORMAT) != FORMAT:
        raise other_version(path, state["format"], known=FORMAT)
    return state


def refuse_other_version(train_folder: str) -> None:
    """Raise `OtherVersionError` where the last checkpoint of a folder is of a version that cannot be gone on from."""
    for step in complete_checkpoints(train_folder)[-1:]:
        try:
            _read_own_version(files.join(train_folder, folder_name(step), STATE_FILE))
        except OtherVersionError:
            raise
        except InputError:
            return  # damaged: training goes on from the one before


def find_damage(folder: str) -> list[str]:
    """Say which files of a complete checkpoint are not as they were written; empty where all are.

    A checkpoint of an older version has no digests: of its files of tensors, only the length is compared.

    Raises `OtherVersionError` for one of another format: whether it is damaged cannot be said.
    """
    try:
        state = read_state(folder)
    except OtherVersionError:
        raise
    except InputError as error:
        return [str(error)]
    found = []
    for name, sha256 in state.get("digests", {}).items():
        path = files.join(folder, name)
        if not files.exists(path):
            found.append(f"{path} is missing")
        elif not digests.is_same(path, sha256):
            found.append(digests.describe_change(path))
    return found if "digests" in state else _find_cut(folder)


def has_digests(folder: str) -> bool:
    """Return whether a checkpoint lists the digests of its files; those of older versions do not."""
    return "digests" in stage_folder.read_json(files.join(folder, STATE_FILE))


def _find_cut(folder: str) -> list[str]:
    found = []
    for at, names in files.walk(folder):
        for name in names:
            path = files.join(at, name)
            try:
                with Reader(path) as reader:
                    whole = not name.endswith(".safetensors") or read_header(reader).end == reader.size
            except InputError:
                whole = False
            if not whole:
                found.append(f"{path} is cut, or no file of tensors")
    return found


def last_whole_checkpoint(train_folder: str) -> int:
    """Return the steps done in the last checkpoint that is as it was written, 0 where there is none at all.

    What a kill left of others is removed, and so are damaged checkpoints after that one: training makes them again.

    Raises:
        InputError: there are checkpoints, and all are damaged.
    """
    remove_incomplete_checkpoints(train_folder)
    damaged: dict[int, list[str]] = {}
    for step in reversed(complete_checkpoints(train_folder)):
        found = find_damage(files.join(train_folder, folder_name(step)))
        if not found:
            for later, damage in damaged.items():
                warn(f"train {train_folder}: {'; '.join(damage)}. Goes on from the checkpoint before, step {step}.")
                remove_checkpoint(train_folder, later)
            return step
        damaged[step] = found
    if damaged:
        faults = "; ".join(fault for found in damaged.values() for fault in found)
        raise InputError(
            f"{train_folder} has no checkpoint that is whole: {faults}. Restore one, or remove them with "
            f"`distilclip verify {train_folder} --repair`; training then begins anew."
        )
    return 0


def _remedy(folder: str) -> str:
    return digests.repair_with(folder.rpartition("/checkpoints/")[0] or folder, "train")()


def complete_checkpoints(train_folder: str) -> list[int]:
    """Return the steps of the complete checkpoints in a train folder, ascending."""
    steps = _steps(train_folder)
    return [s for s in steps if files.exists(files.join(train_folder, folder_name(s), STATE_FILE))]


def remove_incomplete_checkpoints(train_folder: str) -> None:
    """Remove what a kill left of checkpoints that were being written or removed."""
    for step in set(_steps(train_folder)) - set(complete_checkpoints(train_folder)):
        fs, inner = files.filesystem(files.join(train_folder, folder_name(step)))
        fs.rm(inner, recursive=True)


def remove_checkpoint(train_folder: str, step: int) -> None:
    """Remove a complete checkpoint, its state.json first, so that a kill leaves none that looks complete."""
    fs, inner = files.filesystem(files.join(train_folder, folder_name(step)))
    fs.rm(files.join(inner, STATE_FILE))
    fs.rm(inner, recursive=True)


def _steps(train_folder: str) -> list[int]:
    fs, inner = files.filesystem(files.join(train_folder, "checkpoints"))
    if not fs.exists(inner):
        return []
    names = [os.path.basename(path.rstrip("/")) for path in fs.ls(inner, detail=False)]
    return sorted(int(match.group(1)) for name in names if (match := re.fullmatch(r"step-(\d+)", name)))


def select_measures(line: Mapping[str, float]) -> dict[str, float]:
    """Return what a checkpoint remembers of a line of metrics.jsonl: nothing that depends on the clock."""
    return {name: value for name, value in line.items() if name in MEASURES or name.startswith(VALIDATED)}


def is_better(name: str, value: float, than: float) -> bool:
    """Say whether a value of a column of metrics.jsonl beats another: lower losses and terms, higher others."""
    lower = name == "loss" or (name.startswith(f"{VALIDATED}{HELD_OUT}/") and "cosine" not in name)
    return value < than if lower else value > than


def best_checkpoint(train_folder: str, checkpoints: Checkpoints) -> tuple[int, float] | None:
    """Return the step and value of the best scheduled checkpoint there is by `keep_best`, the last of equal ones."""
    return _best_of(_read_states(train_folder), checkpoints.best_by) if checkpoints.best_by else None


def _best_of(states: Mapping[int, dict[str, Any]], best_by: str | None) -> tuple[int, float] | None:
    best: tuple[int, float] | None = None
    for step, state in states.items() if best_by is not None else ():
        value = state["metrics"].get(best_by)
        counts = state["scheduled"] and value is not None
        if counts and (best is None or not is_better(str(best_by), best[1], than=value)):
            best = step, value
    return best


def _read_states(train_folder: str) -> dict[int, dict[str, Any]]:
    steps = complete_checkpoints(train_folder)
    return {step: read_state(files.join(train_folder, folder_name(step))) for step in steps}


def prune_checkpoints(train_folder: str, checkpoints: Checkpoints) -> None:
    """Remove every complete checkpoint but the last ones, the best one, and the newest."""
    states = _read_states(train_folder)
    scheduled = [step for step, state in states.items() if state["scheduled"]]
    kept = {*scheduled[-checkpoints.keep_checkpoints :], *list(states)[-1:]}
    if (best := _best_of(states, checkpoints.best_by)) is not None:
        kept.add(best[0])
    for step in set(states) - kept:
        remove_checkpoint(train_folder, step)
