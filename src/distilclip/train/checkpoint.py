"""Write and read checkpoints: an open_clip model folder, with heads, centers and optimizer state; state.json last.

Nothing is pickled: tensors are safetensors, the rest is JSON. The files do not depend on the number of processes or on
how they share the weights, except for the class centers: every process writes its range of them, and any number of
processes reads any ranges.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from distilclip import digests, distributed, files, stage_folder
from distilclip.data.bad_samples import ErrorPolicy
from distilclip.models.clip import WEIGHTS_FILE
from distilclip.train.checkpoint_files import FORMAT, STATE_FILE, read_state
from distilclip.train.gradient_scale import GradientScale
from distilclip.train.optimizer import Average
from distilclip.train.parallel import like, place_, whole
from distilclip.train.step import Student

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
    written: dict[str, str] = {}
    if student.class_head is not None:
        written = {f"centers/{name}": d for name, d in student.class_head.save(files.join(folder, "centers")).items()}
    if distributed.rank() == 0:
        written |= student.clip.save(folder, weights=average or weights)
        heads = {name: value.detach().cpu().contiguous() for name, value in student.heads.state_dict().items()}
        tensors = {"heads.safetensors": heads, "optimizer.safetensors": state}
        tensors |= {} if average is None else {TRAINED_FILE: weights}
        for name, values in tensors.items():
            written[name] = files.write_bytes(files.join(folder, name), safetensors.torch.save(values))
    everything = distributed.gather_objects(written)  # waits until every range of the centers is there
    if distributed.rank() == 0:
        content = {"step": progress.step, "format": FORMAT, "scheduled": scheduled, "unusable": unusable}
        content |= {"log": progress.log, "metrics": dict(metrics or {})}
        content |= {"best": progress.best} if progress.best else {}
        content |= {} if training.scale is None else {"gradient_scale": training.scale.state()}
        content |= {"digests": dict(sorted(item for part in everything for item in part.items()))}
        stage_folder.write_json(files.join(folder, STATE_FILE), digests.seal(content))
    distributed.barrier()


def load_checkpoint(folder: str, training: Training) -> Progress:
    """Read everything back in place; any number of processes may have written it. Every process must call it.

    Raises `InputError` for a checkpoint of a format that this version does not know.
    """
    found = read_state(folder)
    student = training.student
    weights = _read(folder, WEIGHTS_FILE if training.average is None else TRAINED_FILE)
    for name, value in student.clip.model.state_dict().items():
        place_(value, weights[name])
    if training.average is not None:
        averaged = _read(folder, WEIGHTS_FILE)
        for name, value in training.average.values.items():
            place_(value, averaged[name])
    scales = {name: value for name, value in student.heads.state_dict().items() if name.endswith("_log_scale")}
    student.heads.load_state_dict(scales | _read(folder, "heads.safetensors"))  # an older version had fewer terms
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
