"""Run the training loop: data, steps, checkpoints and log; it knows nothing of CLIP-CID or CLIP-KD."""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

import torch
from torch import Tensor

from distilclip import distributed, stage_folder
from distilclip.data.bad_samples import ErrorPolicy
from distilclip.data.stream import Batch
from distilclip.errors import InputError
from distilclip.messages import say
from distilclip.models.batch_norm import RunningStatistics
from distilclip.models.freezing import begin_training
from distilclip.models.teacher import Teacher
from distilclip.progress import track
from distilclip.sets.specs import VALIDATED
from distilclip.train.checkpoint import Progress, Training, save_checkpoint
from distilclip.train.checkpoint_files import complete_checkpoints, folder_name, prune_checkpoints, select_measures
from distilclip.train.log import Lines, Log, Stopwatch
from distilclip.train.objective import Objective
from distilclip.train.optimizer import Schedule, set_learning_rate
from distilclip.train.parallel import average_statistics_, clip_gradients_, non_finite_gradients, non_finite_values
from distilclip.train.settings import Checkpoints, Optimization
from distilclip.train.signals import OverdueError, Signals, terminate
from distilclip.train.step import StepResult, compute_gradients, make_inputs
from distilclip.train.trackers import Writer
from distilclip.train.validation import Validator

LOG_EVERY = 10
_LOWER = "Lower learning_rate, set gradient_clip, or use precision fp32."


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """What a run is to do."""

    objective: Objective
    optimization: Optimization
    checkpoints: Checkpoints
    schedule: Schedule
    batch_size: int
    """rows of all processes"""
    micro_batch: int
    """rows of this process whose activations are held at once"""
    seed: int

    @property
    def num_steps(self) -> int:
        """Steps of the whole run."""
        return self.schedule.num_steps


def fit(
    folder: stage_folder.Folder,
    batches: Iterator[Batch],
    training: Training,
    progress: Progress,
    *,
    plan: TrainingPlan,
    teacher: Teacher | None,
    trackers: Sequence[Writer],
    validator: Validator | None = None,
) -> int:
    """Train from `progress` to the end of the plan; `batches` begins there. Every process must call it.

    Returns the steps done: those of the plan, or fewer where the validator gives up.

    SIGUSR1 writes a checkpoint, SIGTERM writes one and ends the process. Where the next batch does not come, a process
    that trains alone saves the state before it; several end without, since they can only save together.

    Raises `InputError` naming step, terms and rank when the loss or its gradient stops being finite; nothing is updated
    then, and the state before that step is saved. A state that is not finite itself is never saved. With a gradient
    scale, a gradient that overflows only costs its step.
    """
    begin_training(training.student.clip.model)
    if validator is not None:
        validator.best = dict(progress.best)
        if validator.gives_up:
            return progress.step
    log = Log(training.student.clip.device, carried=progress.log)
    steps = _Steps(training=training, teacher=teacher, plan=plan, stopwatch=log.stopwatch)
    saving = _Saving(folder, training, plan.checkpoints, log, validator)
    with Signals() as signals, contextlib.closing(Lines(folder, trackers, start=progress.step)) as lines:
        done = _take_steps(steps, batches, saving, lines, signals, start=progress.step)
    return terminate() if done is None else done


def _take_steps(
    steps: _Steps, batches: Iterator[Batch], saving: _Saving, lines: Lines, signals: Signals, *, start: int
) -> int | None:
    """Take the steps from `start` on; return how many are then done, or None where the process is to end before."""
    plan, training, log, validator = steps.plan, steps.training, saving.log, saving.validator
    statistics = RunningStatistics(training.student.clip.model)
    for step in _count_steps(start, plan, lines):
        scheduled = plan.checkpoints.scheduled(step + 1, num_steps=plan.num_steps)
        scheduled |= validator is not None and validator.wants_checkpoint(step + 1, num_steps=plan.num_steps)
        counted = copy.deepcopy(training.policy)
        statistics.remember()
        try:
            with log.stopwatch.measure("data"), signals.waiting():
                batch = next(batches)
        except OverdueError:
            if distributed.world() == 1:
                saving.save_before(step, counted)
            return None
        result, norm = steps.gradients(step, batch, diagnosing=scheduled)
        loss, save, stop = _exchange_flags(result.loss, save=signals.take() or saving.due, stop=signals.stop)
        overflows = math.isfinite(loss) and not math.isfinite(norm) and steps.lower_scale()
        if not (overflows or (math.isfinite(loss) and math.isfinite(norm))):
            statistics.put_back()
            _stop_non_finite(step, training, result, kept=saving.save_before(step, counted))
        learning_rate = steps.update(step, result, leave_out=overflows)
        log.add({"loss": result.loss, **result.terms, **result.cosines}, norm.nan_to_num(0, 0, 0), plan.batch_size)
        line: dict[str, float] = {}
        validated = _validate(validator, training, log, step + 1, plan.num_steps) if validator is not None else {}
        ends = step + 1 == plan.num_steps or (validator is not None and validator.gives_up)
        scheduled = scheduled or ends
        if (step + 1) % LOG_EVERY == 0 or scheduled or validated:  # a line never spans a scheduled checkpoint
            line = {**log.line(), "learning_rate": learning_rate, **_measure_now(training, result), **validated}
            lines.write(step + 1, line)
        if scheduled or save:
            saving.save(step + 1, scheduled=scheduled, line=line)
        if ends and step + 1 < plan.num_steps:
            return step + 1
        if stop and not ends:
            return None
    return plan.num_steps


def _validate(validator: Validator, training: Training, log: Log, done: int, num_steps: int) -> dict[str, float]:
    """Validate where it is time to, and say what came of it."""
    if not validator.due(done, num_steps=num_steps):
        return {}
    with log.stopwatch.measure("validation"):
        values = validator.measure(training, done)
    said = ", ".join(f"{name.removeprefix(VALIDATED)} {value:.4g}" for name, value in values.items())
    say(f"train: validation after {done} steps: {said}")
    if validator.gives_up:
        best = f"the best, after {validator.best['step']:g} steps"
        say(f"train: {validator.stop_after} validations in a row were no better than {best}: the training ends here.")
    return values


def _count_steps(start: int, plan: TrainingPlan, lines: Lines) -> Iterable[int]:
    """Yield the steps; on the first process, show progress with the loss and its terms."""
    steps = range(start, plan.num_steps)
    if distributed.rank() > 0:
        return steps
    names = ("loss", *plan.objective.weights)
    return track(steps, "train", num_samples=plan.batch_size, note=lambda: lines.describe(names))


@dataclass(frozen=True, kw_only=True)
class _Steps:
    """Takes the steps of a run: from a batch to gradients, from gradients to weights."""

    training: Training
    teacher: Teacher | None
    plan: TrainingPlan
    stopwatch: Stopwatch

    def gradients(self, step: int, batch: Batch, *, diagnosing: bool) -> tuple[StepResult, Tensor]:
        """Compute the step's gradients, clipped, and their norm before that."""
        student = self.training.student
        device = student.clip.device
        with self.stopwatch.measure("teacher"):
            inputs = make_inputs(batch, self.teacher, device)
        self.training.optimizer.zero_grad(set_to_none=True)
        result = compute_gradients(
            student,
            self.plan.objective,
            inputs,
            micro_batch=self.plan.micro_batch,
            generator=torch.Generator(device).manual_seed(self.plan.seed * 1_000_003 + step),
            stopwatch=self.stopwatch,
            diagnosing=diagnosing,
            gradient_scale=1.0 if self.training.scale is None else self.training.scale.value,
        )
        centers = [] if result.classes is None else [result.classes.centers]
        with self.stopwatch.measure("optimizer"):
            max_norm = self.plan.optimization.gradient_clip
            norm = clip_gradients_(student.parameters(), sharded=centers, max_norm=max_norm)
        return result, norm

    def lower_scale(self) -> bool:
        """Lower the gradient scale after an overflow; False where there is none, or none to lower."""
        return self.training.scale is not None and self.training.scale.lower()

    def update(self, step: int, result: StepResult, *, leave_out: bool = False) -> float:
        """Update weights, class centers and the average of weights; return the student's learning rate.

        A step that is left out, for its gradient overflowed, changes no weight.
        """
        training, student = self.training, self.training.student
        share = self.plan.schedule.share(step)
        learning_rate = set_learning_rate(training.optimizer, share)
        if leave_out:
            return learning_rate
        if training.scale is not None:
            training.scale.grow()
        average_statistics_(student.clip.model)
        with self.stopwatch.measure("optimizer"):
            training.optimizer.step()
            if result.classes is not None:
                assert student.class_head is not None
                student.class_head.update(result.classes, share=share)
            student.limit_scales()
            if result.rows is not None:
                student.heads.remember(result.teachers, result.rows.here, result.rows.sides)
            if training.average is not None:
                training.average.update(student.clip.model)
        return learning_rate


class _Saving:
    """Writes checkpoints, and removes those that are no longer to be kept."""

    def __init__(
        self,
        folder: stage_folder.Folder,
        training: Training,
        checkpoints: Checkpoints,
        log: Log,
        validator: Validator | None = None,
    ) -> None:
        self._folder, self._training, self._checkpoints, self.log = folder, training, checkpoints, log
        self.validator = validator
        self._saved_at = time.monotonic()
        self._prune()  # a kill may have come between a checkpoint and this

    @property
    def due(self) -> bool:
        """Whether the clock asks for a checkpoint."""
        return self._checkpoints.due(time.monotonic() - self._saved_at)

    def save(self, done: int, *, scheduled: bool, line: Mapping[str, float]) -> None:
        """Write the state after `done` steps; `line` is what metrics.jsonl says of it.

        Raises `InputError` where a weight, or what the optimizer remembers of it, is not finite.
        """
        if bad := _find_non_finite(self._training):
            raise InputError(f"Step {done}: {self._refuse(done, bad)}. {_LOWER}")
        progress = self._progress(done)
        measures = select_measures(line)
        path = self._folder.child(folder_name(done))
        save_checkpoint(path, self._training, progress, scheduled=scheduled, metrics=measures)
        self._prune()
        self._saved_at = time.monotonic()

    def save_before(self, step: int, policy: ErrorPolicy) -> str:
        """Write the state before a step that is not taken, unless it is there; say what became of it.

        `policy` has not counted that step.
        """
        if step == 0:
            return "no step was done yet"
        if bad := _find_non_finite(self._training):
            return self._refuse(step, bad)
        if not distributed.on_first(lambda: step in complete_checkpoints(self._folder.path)):
            progress = self._progress(step)
            path = self._folder.child(folder_name(step))
            save_checkpoint(path, replace(self._training, policy=policy), progress, scheduled=False)
        return f"the state after {step} steps is saved"

    def _refuse(self, done: int, bad: Sequence[str]) -> str:
        """Say that the state after `done` steps is not saved, and from where the training can go on."""
        steps = distributed.on_first(lambda: complete_checkpoints(self._folder.path))
        last = f"the last checkpoint is that of step {steps[-1]}" if steps else "there is no checkpoint"
        return f"the state after {done} steps is not finite ({', '.join(bad[:3])}) and is not saved; {last}"

    def _progress(self, done: int) -> Progress:
        best = {} if self.validator is None else self.validator.best
        return Progress(step=done, log=self.log.state(), best=best)

    def _prune(self) -> None:
        if distributed.rank() == 0:
            prune_checkpoints(self._folder.path, self._checkpoints)


def _measure_now(training: Training, result: StepResult) -> dict[str, float]:
    """What a line says of the moment, not of the steps since the line before."""
    scale = round(float(training.student.clip.scale.detach()), 4)
    factor = {} if training.scale is None else {"gradient_scale": training.scale.value}
    return {"scale": scale, **factor, **({} if result.diagnosis is None else result.diagnosis.line())}


def _exchange_flags(loss: Tensor, *, save: bool, stop: bool) -> tuple[float, bool, bool]:
    """The loss of the global batch, and whether any process is to save or to stop: one message, one transfer.

    Who stops saves.
    """
    flags = torch.tensor([float(save or stop), float(stop)], device=loss.device)
    total, num_saving, num_stopping = distributed.reduce_(torch.cat([loss.view(1), flags])).tolist()
    return total, num_saving > 0, num_stopping > 0


def _find_non_finite(training: Training) -> list[str]:
    """Return what of a state is not finite on any process. Every process must call it."""
    student, state = training.student, training.optimizer.state
    values = {**student.clip.model.state_dict(), **student.named_parameters()}
    for name, parameter in student.named_parameters().items():
        values |= {f"{name}, {kind} of the optimizer": moment for kind, moment in state.get(parameter, {}).items()}
    if student.class_head is not None:
        values["centers"] = student.class_head.centers
    return list(
        dict.fromkeys(name for found in distributed.gather_objects(non_finite_values(values)) for name in found)
    )


def _stop_non_finite(step: int, training: Training, result: StepResult, *, kept: str) -> NoReturn:
    """Say what is not finite on which rank, and what was kept of the state before the step.

    What the processes have exchanged is bad on all of them; the student's embeddings of a rank's own rows are not.
    """
    terms = {name: float(value) for name, value in result.terms.items()}
    parameters: dict[str, Tensor] = {**training.student.named_parameters()}
    if result.classes is not None:
        parameters["centers"] = result.classes.centers
    bad = {
        "terms": [name for name, value in terms.items() if not math.isfinite(value)],
        "embeddings": [name for name, rows in result.embeddings.items() if not bool(torch.isfinite(rows).all())],
        "gradients": non_finite_gradients(parameters)[:3],
    }
    found = [
        f"rank {rank}: terms {terms}, not finite: {_name_kinds(bad)}"
        for rank, (terms, bad) in enumerate(distributed.gather_objects((terms, bad)))
    ]
    raise InputError(
        f"Step {step + 1}: the loss or its gradient is not finite. {'; '.join(found)}. Nothing was "
        f"updated; {kept}. {_LOWER}"
    )


def _name_kinds(bad: Mapping[str, Sequence[str]]) -> str:
    """The names of each kind that has any, as one phrase."""
    return ", ".join(f"{kind} {list(names)}" for kind, names in bad.items() if names) or "none"
