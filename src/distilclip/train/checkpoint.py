"""Write and read checkpoints: an open_clip model folder, with heads, centers and optimizer state; state.json last.

Nothing is pickled: tensors are safetensors, the rest is JSON. The files do not depend on the number of processes or on
how they share the weights, except for the class centers: every process writes its range of them, and any number of
processes reads any ranges.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from distilclip import distributed, files, stage_folder
from distilclip.data.bad_samples import ErrorPolicy
from distilclip.errors import InputError
from distilclip.models.clip import WEIGHTS_FILE
from distilclip.sets.specs import VALIDATED
from distilclip.train.gradient_scale import GradientScale
from distilclip.train.optimizer import Average
from distilclip.train.parallel import like, place_, whole
from distilclip.train.settings import HELD_OUT, MEASURES, Checkpoints
from distilclip.train.step import Student

FORMAT = 2
TRAINED_FILE = "trained.safetensors"


@dataclass(frozen=True, kw_only=True)
class Training:
    """Everything that a checkpoint holds and a resumed run goes on from."""

    student: Student
    optimizer: torch.optim.Optimizer
    policy: ErrorPolicy
    average: Average | None = None
    scale: GradientScale | None = None


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands."""

    step: int = 0
    """steps done"""
    log: dict[str, Any] = field(default_factory=dict)
    """what the log has added up since its last line (train.log)"""
    best: dict[str, Any] = field(default_factory=dict)
    """the best validation so far: its `step` and `value`, and `num_worse`, how many since were no better"""


def folder_name(step: int) -> str:
    """Return a checkpoint's path in the train folder, such as `checkpoints/step-000100`."""
    return f"checkpoints/step-{step:06d}"


def save_checkpoint(
    folder: str,
    training: Training,
    progress: Progress,
    *,
    scheduled: bool = True,
    metrics: Mapping[str, float] | None = None,
) -> None:
    """Write a whole checkpoint; `state.json` marks it complete. Every process must call it.

    `scheduled` checkpoints are the same in every run of this configuration; others were asked for by clock or signal.
    `metrics` are the values by which checkpoints are compared.
    """
    student = training.student
    weights = whole(student.clip.model.state_dict())
    average = None if training.average is None else whole(training.average.values)
    state = whole(_optimizer_state(training))
    unusable = count_unusable(training.policy)
    if student.class_head is not None:
        student.class_head.save(files.join(folder, "centers"))
    if distributed.rank() == 0:
        student.clip.save(folder, weights=average or weights)
        if average is not None:
            files.write_bytes(files.join(folder, TRAINED_FILE), safetensors.torch.save(weights))
        heads = {name: value.detach().cpu().contiguous() for name, value in student.heads.state_dict().items()}
        files.write_bytes(files.join(folder, "heads.safetensors"), safetensors.torch.save(heads))
        files.write_bytes(files.join(folder, "optimizer.safetensors"), safetensors.torch.save(state))
    distributed.barrier()  # every range of the centers is there
    if distributed.rank() == 0:
        content = {"step": progress.step, "format": FORMAT, "scheduled": scheduled, "unusable": unusable}
        content |= {"log": progress.log, "metrics": dict(metrics or {})}
        content |= {"best": progress.best} if progress.best else {}
        content |= {} if training.scale is None else {"gradient_scale": training.scale.state()}
        stage_folder.write_json(files.join(folder, "state.json"), content)
    distributed.barrier()


def load_checkpoint(folder: str, training: Training) -> Progress:
    """Read everything back in place; any number of processes may have written it. Every process must call it.

    Raises `InputError` for a checkpoint of a format that this version does not know.
    """
    found = stage_folder.read_json(files.join(folder, "state.json"))
    if found["format"] != FORMAT:
        raise InputError(f"{folder} has format {found['format']}; this version reads format {FORMAT}.")
    student = training.student
    weights = _read(folder, WEIGHTS_FILE if training.average is None else TRAINED_FILE)
    for name, value in student.clip.model.state_dict().items():
        place_(value, weights[name])
    if training.average is not None:
        averaged = _read(folder, WEIGHTS_FILE)
        for name, value in training.average.values.items():
            place_(value, averaged[name])
    student.heads.load_state_dict(_read(folder, "heads.safetensors"))
    _load_optimizer_state(training, _read(folder, "optimizer.safetensors"))
    if student.class_head is not None:
        student.class_head.load(files.join(folder, "centers"))
    if training.scale is not None:
        training.scale.value = found["gradient_scale"]["value"]
        training.scale.num_good = found["gradient_scale"]["num_good"]
    if distributed.rank() == 0:
        restore_unusable(training.policy, found["unusable"])
    return Progress(step=int(found["step"]), log=found["log"], best=found.get("best", {}))


def count_unusable(policy: ErrorPolicy) -> dict[str, Any]:
    """Count the samples seen and the unusable ones of all processes. Every process must call it."""
    counts = distributed.gather_objects((policy.num_seen, policy.reasons, policy.first))
    reasons = sum((reasons for _, reasons, _ in counts), Counter[str]())
    return {
        "num_seen": sum(seen for seen, _, _ in counts),
        "reasons": dict(sorted(reasons.items())),
        "first": next((first for _, _, first in counts if first), ""),
    }


def restore_unusable(policy: ErrorPolicy, counts: Mapping[str, Any]) -> None:
    """Let a process's policy go on from these counts."""
    policy.num_seen, policy.first = counts["num_seen"], counts["first"]
    policy.reasons = Counter(counts["reasons"])


def _optimizer_state(training: Training) -> dict[str, Tensor]:
    state = training.optimizer.state
    return {
        f"{name}.{key}": value
        for name, parameter in training.student.named_parameters().items()
        for key, value in state.get(parameter, {}).items()
    }


def _load_optimizer_state(training: Training, state: Mapping[str, Tensor]) -> None:
    by_parameter: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        name, _, kind = key.rpartition(".")
        by_parameter.setdefault(name, {})[kind] = value
    for name, parameter in training.student.named_parameters().items():
        if name in by_parameter:
            training.optimizer.state[parameter] = {k: like(parameter, v) for k, v in by_parameter[name].items()}


def _read(folder: str, name: str) -> dict[str, Tensor]:
    return safetensors.torch.load(files.read_bytes(files.join(folder, name)))


def complete_checkpoints(train_folder: str) -> list[int]:
    """Return the steps of the complete checkpoints in a train folder, ascending."""
    steps = _steps(train_folder)
    return [s for s in steps if files.exists(files.join(train_folder, folder_name(s), "state.json"))]


def remove_incomplete_checkpoints(train_folder: str) -> None:
    """Remove what a kill left of checkpoints that were being written or removed."""
    for step in set(_steps(train_folder)) - set(complete_checkpoints(train_folder)):
        fs, inner = files.filesystem(files.join(train_folder, folder_name(step)))
        fs.rm(inner, recursive=True)


def remove_checkpoint(train_folder: str, step: int) -> None:
    """Remove a complete checkpoint, its state.json first, so that a kill leaves none that looks complete."""
    fs, inner = files.filesystem(files.join(train_folder, folder_name(step)))
    fs.rm(files.join(inner, "state.json"))
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
    best: tuple[int, float] | None = None
    for step in complete_checkpoints(train_folder) if checkpoints.best_by else ():
        state = _read_state(train_folder, step)
        value = state["metrics"].get(checkpoints.best_by)
        counts = state["scheduled"] and value is not None
        if counts and (best is None or not is_better(str(checkpoints.best_by), best[1], than=value)):
            best = step, value
    return best


def prune_checkpoints(train_folder: str, checkpoints: Checkpoints) -> None:
    """Remove every complete checkpoint but the last ones, the best one, and the newest."""
    states = {step: _read_state(train_folder, step) for step in complete_checkpoints(train_folder)}
    scheduled = [step for step, state in states.items() if state["scheduled"]]
    kept = {*scheduled[-checkpoints.keep_checkpoints :], *list(states)[-1:]}
    if (best := best_checkpoint(train_folder, checkpoints)) is not None:
        kept.add(best[0])
    for step in set(states) - kept:
        remove_checkpoint(train_folder, step)


def _read_state(train_folder: str, step: int) -> dict[str, Any]:
    return stage_folder.read_json(files.join(train_folder, folder_name(step), "state.json"))
