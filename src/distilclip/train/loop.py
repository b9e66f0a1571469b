"""The one training loop. It knows data, step, schedule, checkpoint and log, and nothing of CLIP-CID or CLIP-KD."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from distilclip import run
from distilclip.data.policy import ErrorPolicy
from distilclip.data.stream import Batch
from distilclip.errors import InputError
from distilclip.models.teacher import Teacher
from distilclip.progress import track
from distilclip.train.checkpoint import folder_name, prune_checkpoints, save_checkpoint
from distilclip.train.objective import Objective
from distilclip.train.optimizer import schedule, set_learning_rate
from distilclip.train.step import StepResult, Student, compute_gradients

LOG_EVERY = 10


@dataclass(kw_only=True)
class _Log:
    """Sums of the last few steps' values, kept on the device: one transfer per line, not one per value and step."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    num_steps: int = 0
    num_samples: int = 0
    data_seconds: float = 0.0
    started: float = field(default_factory=time.perf_counter)

    def add(self, result: StepResult, gradient_norm: Tensor, num_samples: int) -> None:
        values = {"loss": result.loss, **result.terms, "gradient_norm": gradient_norm}
        if result.cosine_image is not None and result.cosine_text is not None:
            values |= {"cosine_image": result.cosine_image, "cosine_text": result.cosine_text}
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach()
        self.num_steps += 1
        self.num_samples += num_samples

    def line(self) -> dict[str, float]:
        elapsed = time.perf_counter() - self.started
        values = {name: float(value) / self.num_steps for name, value in self.sums.items()}
        return {
            **values,
            "samples_per_second": round(self.num_samples / elapsed, 1),
            "data_share": round(self.data_seconds / elapsed, 4),
        }


def fit(
    folder: run.Folder,
    batches: Iterator[Batch],
    *,
    policy: ErrorPolicy,
    student: Student,
    teacher: Teacher | None,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    start: int,
    num_steps: int,
    warmup_steps: int,
    batch_size: int,
    micro_batch: int,
    gradient_clip: float,
    checkpoint_every: int,
    keep_checkpoints: int,
    seed: int,
) -> None:
    """Train from step `start` to `num_steps`; `batches` begins at `start`, `policy` counts its unusable samples.

    Raises `InputError` naming step and terms when the loss or its gradient stops being finite; nothing is updated then.
    """
    metrics = run.Metrics(folder.child("metrics.jsonl"), resume_at=start + 1)
    device = student.clip.device
    student.clip.model.train()
    log = _Log()
    for step in track(range(start, num_steps), "train", num_samples=batch_size):
        waiting = time.perf_counter()
        batch = next(batches)
        log.data_seconds += time.perf_counter() - waiting
        rate = set_learning_rate(optimizer, schedule(step, num_steps=num_steps, warmup_steps=warmup_steps))
        optimizer.zero_grad(set_to_none=True)
        result = compute_gradients(
            student,
            objective,
            pixels=batch.pixels.to(device, non_blocking=True),
            tokens=batch.tokens.to(device, non_blocking=True),
            teacher=teacher(batch) if teacher is not None else None,
            labels=batch.labels.to(device) if batch.labels is not None else None,
            micro_batch=micro_batch,
            generator=torch.Generator(device).manual_seed(seed * 1_000_003 + step),
        )
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), gradient_clip or math.inf)
        _assert_finite(step, result, norm)
        optimizer.step()
        student.limit_scales()
        log.add(result, norm, len(batch.pixels))
        done = step + 1
        checkpoint = done % checkpoint_every == 0 or done == num_steps
        if done % LOG_EVERY == 0 or checkpoint:  # a line never spans a checkpoint, so a resumed run writes the same
            scale = float(student.clip.scale.detach())
            metrics.write(step=done, **log.line(), learning_rate=rate, scale=round(scale, 4))
        if checkpoint:
            save_checkpoint(folder.child(folder_name(done)), student, optimizer, step=done, policy=policy)
            prune_checkpoints(folder.path, keep=keep_checkpoints)
        if done % LOG_EVERY == 0 or checkpoint:
            log = _Log()


def _assert_finite(step: int, result: StepResult, norm: Tensor) -> None:
    if bool(torch.isfinite(result.loss) & torch.isfinite(norm)):
        return
    terms = {name: float(value) for name, value in result.terms.items()}
    raise InputError(
        f"Step {step + 1}: the loss or its gradient is not finite (terms {terms}, gradient norm {float(norm)}). "
        "Nothing was updated. Lower learning_rate, set gradient_clip, or use precision fp32."
    )
