"""The one training loop. It knows data, step, schedule, checkpoint and log, and nothing of CLIP-CID or CLIP-KD."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NoReturn

import torch
from torch import Tensor

from distilclip import distributed, run
from distilclip.data.stream import Batch
from distilclip.errors import InputError
from distilclip.models.teacher import Teacher
from distilclip.progress import track
from distilclip.train.checkpoint import Progress, Training, complete_checkpoints, folder_name, save_checkpoint
from distilclip.train.keeping import Checkpoints
from distilclip.train.log import Log
from distilclip.train.objective import Objective
from distilclip.train.optimizer import Optimization, schedule, set_learning_rate
from distilclip.train.parallel import clip_gradients_, non_finite_gradients
from distilclip.train.signals import Signals
from distilclip.train.step import Inputs, StepResult, compute_gradients
from distilclip.train.trackers import Writer

LOG_EVERY = 10


def fit(
    folder: run.Folder,
    batches: Iterator[Batch],
    training: Training,
    progress: Progress,
    *,
    teacher: Teacher | None,
    objective: Objective,
    optimization: Optimization,
    checkpoints: Checkpoints,
    trackers: Sequence[Writer],
    num_steps: int,
    batch_size: int,
    micro_batch: int,
    seed: int,
) -> None:
    """Train from `progress` to `num_steps`; `batches` begins there. Every process must call it.

    `batch_size` counts the rows of all processes, `micro_batch` those of one. SIGUSR1 writes a checkpoint, SIGTERM
    writes one and ends the process. Raises `InputError` naming step, terms and rank when the loss or its gradient stops
    being finite; nothing is updated then, and the state before that step is saved.
    """
    lines = _Lines(folder, trackers, start=progress.step)
    student, device = training.student, training.student.clip.device
    student.clip.model.train()
    log = Log(device, carried=progress.log)
    saved_at = time.monotonic()
    steps = range(progress.step, num_steps)
    with Signals() as signals:
        for step in track(steps, "train", num_samples=batch_size) if distributed.rank() == 0 else steps:
            scheduled = checkpoints.scheduled(step + 1, num_steps=num_steps)
            counted = copy.deepcopy(training.policy)
            with log.stopwatch.measure("data"):
                batch = next(batches)
            with log.stopwatch.measure("teacher"):
                inputs = _inputs(batch, teacher, device)
            share = schedule(step, num_steps=num_steps, warmup_steps=optimization.warmup_steps)
            rate = set_learning_rate(training.optimizer, share)
            training.optimizer.zero_grad(set_to_none=True)
            result = compute_gradients(
                student,
                objective,
                inputs,
                micro_batch=micro_batch,
                generator=torch.Generator(device).manual_seed(seed * 1_000_003 + step),
                stopwatch=log.stopwatch,
                diagnosing=scheduled,
            )
            with log.stopwatch.measure("optimizer"):
                norm = _clip(training, result, max_norm=optimization.gradient_clip)
                asked = signals.save or checkpoints.due(time.monotonic() - saved_at)
                loss, saving, stopping = _agree(result.loss, asked, signals.stop)
                if not (math.isfinite(loss) and math.isfinite(norm)):
                    before = Progress(step=step, log=log.state())
                    _stop_non_finite(folder, replace(training, policy=counted), before, result)
                _update(training, result, share=share)
            log.add(result, norm, batch_size)
            values = {}
            if (step + 1) % LOG_EVERY == 0 or scheduled:  # a line never spans a scheduled checkpoint
                values = {**log.line(), "learning_rate": rate, "scale": round(float(student.clip.scale.detach()), 4)}
                values |= result.diagnosis.line() if result.diagnosis is not None else {}
                lines.write(step + 1, values)
            if scheduled or saving:
                signals.save = False
                after = Progress(step=step + 1, log=log.state())
                path = folder.child(folder_name(after.step))
                measures = checkpoints.measures(values)
                save_checkpoint(path, training, after, scheduled=scheduled, metrics=measures)
                if distributed.rank() == 0:
                    checkpoints.prune(folder.path)
                saved_at = time.monotonic()
            if stopping and step + 1 < num_steps:
                lines.close()
                signals.end()
    lines.close()


class _Lines:
    """metrics.jsonl and the trackers, written by the first process."""

    def __init__(self, folder: run.Folder, trackers: Sequence[Writer], *, start: int) -> None:
        self._trackers = trackers
        first = distributed.rank() == 0
        self._metrics = run.Metrics(folder.child("metrics.jsonl"), resume_at=start + 1) if first else None

    def write(self, step: int, values: dict[str, float]) -> None:
        if self._metrics is not None:
            self._metrics.write(step=step, **values)
        for tracker in self._trackers:
            tracker.write(step, values)

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.close()


def _inputs(batch: Batch, teacher: Teacher | None, device: torch.device) -> Inputs:
    teachers = teacher(batch) if teacher is not None else ()
    return Inputs(
        pixels=batch.pixels.to(device, non_blocking=True),
        tokens=batch.tokens.to(device, non_blocking=True),
        teacher=teachers[0] if teachers else None,
        others=teachers[1:],
        labels=batch.labels.to(device) if batch.labels is not None else None,
    )


def _clip(training: Training, result: StepResult, *, max_norm: float) -> Tensor:
    centers = [] if result.classes is None else [result.classes.centers]
    return clip_gradients_(training.student.parameters(), sharded=centers, max_norm=max_norm)


def _update(training: Training, result: StepResult, *, share: float) -> None:
    student = training.student
    training.optimizer.step()
    if result.classes is not None:
        assert student.class_head is not None
        student.class_head.update(result.classes, share=share)
    student.limit_scales()
    if training.average is not None:
        training.average.update(student.clip.model)


def _agree(loss: Tensor, saving: bool, stopping: bool) -> tuple[float, bool, bool]:
    """The loss of the global batch, and whether any process is to save or to stop: one message, one transfer."""
    flags = torch.tensor([float(saving), float(stopping)], device=loss.device)
    total, save, stop = distributed.reduce_(torch.cat([loss.view(1), flags])).tolist()
    return total, save > 0, stop > 0


def _stop_non_finite(folder: run.Folder, training: Training, progress: Progress, result: StepResult) -> NoReturn:
    """Save the state before the step, unless that is there already, and say what is not finite on which rank."""
    step = progress.step
    there = distributed.on_first(lambda: step == 0 or step in complete_checkpoints(folder.path))
    if not there:
        save_checkpoint(folder.child(folder_name(step)), training, progress, scheduled=False)
    terms = {name: float(value) for name, value in result.terms.items()}
    bad = [name for name, value in terms.items() if not math.isfinite(value)]
    reports = distributed.gather_objects((terms, bad, non_finite_gradients(training.student.named_parameters())))
    found = [
        f"rank {rank}: terms {terms}, not finite: {bad or 'none'}, gradients not finite: {gradients[:3] or 'none'}"
        for rank, (terms, bad, gradients) in enumerate(reports)
        if bad or gradients
    ]
    raise InputError(
        f"Step {step + 1}: the loss or its gradient is not finite. {'; '.join(found)}. Nothing was updated; the state "
        f"after {step} steps is saved. Lower learning_rate, set gradient_clip, or use precision fp32."
    )
