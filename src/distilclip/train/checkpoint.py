"""Checkpoints: an open_clip model folder with heads, optimizer state and step beside it; state.json last.

Nothing is pickled: tensors are safetensors, the rest is JSON.
"""

from __future__ import annotations

import os
import re
import shutil
from typing import Any

import safetensors.torch
import torch

from distilclip import run
from distilclip.data import files
from distilclip.train.step import Student


def folder_name(step: int) -> str:
    """`checkpoints/step-000100`, relative to the train folder."""
    return f"checkpoints/step-{step:06d}"


def save_checkpoint(folder: str, student: Student, optimizer: torch.optim.Optimizer, *, step: int) -> None:
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
    run.write_json(files.join(folder, "state.json"), {"step": step, "format": 1})


def load_checkpoint(folder: str, student: Student, optimizer: torch.optim.Optimizer) -> int:
    """Restore student, heads and optimizer in place; returns the number of steps done."""
    weights = safetensors.torch.load(files.read_bytes(files.join(folder, "open_clip_model.safetensors")))
    student.clip.model.load_state_dict(weights)
    student.heads.load_state_dict(safetensors.torch.load(files.read_bytes(files.join(folder, "heads.safetensors"))))
    state: dict[int, dict[str, Any]] = {}
    for key, value in safetensors.torch.load(files.read_bytes(files.join(folder, "optimizer.safetensors"))).items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(run.read_json(files.join(folder, "state.json"))["step"])


def complete_checkpoints(train_folder: str) -> list[int]:
    """Steps of the complete checkpoints in a train folder, ascending."""
    fs, inner = files.filesystem(files.join(train_folder, "checkpoints"))
    if not fs.exists(inner):
        return []
    names = [os.path.basename(path.rstrip("/")) for path in fs.ls(inner, detail=False)]
    steps = [int(match.group(1)) for name in names if (match := re.fullmatch(r"step-(\d+)", name))]
    return sorted(s for s in steps if files.exists(files.join(train_folder, folder_name(s), "state.json")))


def prune_checkpoints(train_folder: str, *, keep: int) -> None:
    """Remove all but the last `keep` complete checkpoints; each loses its state.json first, so none is left half."""
    for step in complete_checkpoints(train_folder)[:-keep]:
        folder = files.join(train_folder, folder_name(step))
        fs, inner = files.filesystem(folder)
        fs.rm(files.join(inner, "state.json"))
        if files.is_url(folder):
            fs.rm(inner, recursive=True)
        else:
            shutil.rmtree(inner)
