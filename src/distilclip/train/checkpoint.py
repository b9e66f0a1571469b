"""Checkpoints: an open_clip model folder with heads, optimizer state and step beside it; state.json last.

Nothing is pickled: tensors are safetensors, the rest is JSON.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from typing import Any

import safetensors.torch
import torch

from distilclip import run
from distilclip.data import files
from distilclip.data.policy import ErrorPolicy
from distilclip.errors import InputError
from distilclip.train.step import Student

FORMAT = 1


def folder_name(step: int) -> str:
    """`checkpoints/step-000100`, relative to the train folder."""
    return f"checkpoints/step-{step:06d}"


def save_checkpoint(
    folder: str, student: Student, optimizer: torch.optim.Optimizer, *, step: int, policy: ErrorPolicy
) -> None:
    """Write all of a checkpoint; `state.json` marks it complete. `step` counts the steps done."""
    student.clip.save(folder)
    heads = {name: value.detach().cpu().contiguous() for name, value in student.heads.state_dict().items()}
    files.write_bytes(files.join(folder, "heads.safetensors"), safetensors.torch.save(heads))
    state = {
        f"{index}.{name}": value.detach().cpu().contiguous()
        for index, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
    }
    files.write_bytes(files.join(folder, "optimizer.safetensors"), safetensors.torch.save(state))
    run.write_json(files.join(folder, "state.json"), _state(step, policy))


def _state(step: int, policy: ErrorPolicy) -> dict[str, Any]:
    unusable = {"num_seen": policy.num_seen, "reasons": dict(sorted(policy.reasons.items())), "first": policy.first}
    return {"step": step, "format": FORMAT, "unusable": unusable}


def load_checkpoint(folder: str, student: Student, optimizer: torch.optim.Optimizer, *, policy: ErrorPolicy) -> int:
    """Restore student, heads, optimizer and the count of unusable samples in place; returns the number of steps done.

    Raises `InputError` for a checkpoint of a format that this version does not know.
    """
    found = run.read_json(files.join(folder, "state.json"))
    if found["format"] != FORMAT:
        raise InputError(f"{folder} has format {found['format']}; this version reads format {FORMAT}.")
    weights = safetensors.torch.load(files.read_bytes(files.join(folder, "open_clip_model.safetensors")))
    student.clip.model.load_state_dict(weights)
    student.heads.load_state_dict(safetensors.torch.load(files.read_bytes(files.join(folder, "heads.safetensors"))))
    state: dict[int, dict[str, Any]] = {}
    for key, value in safetensors.torch.load(files.read_bytes(files.join(folder, "optimizer.safetensors"))).items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    policy.num_seen, policy.first = found["unusable"]["num_seen"], found["unusable"]["first"]
    policy.reasons = Counter(found["unusable"]["reasons"])
    return int(found["step"])


def complete_checkpoints(train_folder: str) -> list[int]:
    """Steps of the complete checkpoints in a train folder, ascending."""
    steps = _steps(train_folder)
    return [s for s in steps if files.exists(files.join(train_folder, folder_name(s), "state.json"))]


def remove_incomplete_checkpoints(train_folder: str) -> None:
    """Remove what a kill left of checkpoints that were being written or removed."""
    for step in set(_steps(train_folder)) - set(complete_checkpoints(train_folder)):
        fs, inner = files.filesystem(files.join(train_folder, folder_name(step)))
        fs.rm(inner, recursive=True)


def _steps(train_folder: str) -> list[int]:
    fs, inner = files.filesystem(files.join(train_folder, "checkpoints"))
    if not fs.exists(inner):
        return []
    names = [os.path.basename(path.rstrip("/")) for path in fs.ls(inner, detail=False)]
    return sorted(int(match.group(1)) for name in names if (match := re.fullmatch(r"step-(\d+)", name)))


def prune_checkpoints(train_folder: str, *, keep: int) -> None:
    """Remove all but the last `keep` complete checkpoints; each loses its state.json first, so none is left half."""
    for step in complete_checkpoints(train_folder)[:-keep]:
        folder = files.join(train_folder, folder_name(step))
        fs, inner = files.filesystem(folder)
        fs.rm(files.join(inner, "state.json"))
        fs.rm(inner, recursive=True)
