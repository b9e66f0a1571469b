"""Validate a student while it learns: when, with which weights, and whether the training still gets better."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from distilclip.data.stream import Batch, PairStream
from distilclip.losses.contrastive import row_block
from distilclip.models.clip import Clip
from distilclip.models.teacher import Teacher
from distilclip.sets.specs import HELD_OUT, VALIDATED
from distilclip.train.checkpoint import Training
from distilclip.train.checkpoint_files import is_better
from distilclip.train.objective import Objective
from distilclip.train.parallel import Towers, copy_whole_
from distilclip.train.step import Student, make_inputs, measure_terms

Measure = Callable[[Clip], Mapping[str, float]]
"""From a model in evaluation mode to the values of one set; every process calls it and gets the same."""
COST = 0.02
"""Share of a training's work that validation may have by default."""


def default_interval(num_pairs: int, *, batch_size: int, checkpoint_every: int) -> int:
    """Return the steps between validations over `num_pairs` pictures and texts: a multiple of `checkpoint_every`.

    A step is a forward and a backward pass, three times the work of the forward pass of its `batch_size` pairs; the
    interval is the shortest in which `COST` of that work is enough for a validation.

    >>> default_interval(50_000, batch_size=1024, checkpoint_every=500)  # 50,000 / (3 x 1,024 x 0.02) = 814 steps
    1000
    """
    steps = num_pairs / (3 * batch_size * COST)
    return checkpoint_every * max(1, math.ceil(steps / checkpoint_every))


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Pairs that are kept aside, in the same batches at every validation, with their teachers and their classes."""

    stream: PairStream
    objective: Objective
    teacher: Teacher | None
    micro_batch: int
    seed: int
    centers: Float[Tensor, "k dim"] | None = None
    """of the clusters, for the cluster term: a held-out pair is of the class whose center is nearest"""
    _labels: dict[int, Int[Tensor, " n"]] = field(default_factory=dict)

    def measure(self, student: Student) -> dict[str, float]:
        """Return the means of the loss, its terms and cosines over all whole batches of the held-out pairs."""
        device = student.clip.device
        sums: dict[str, float] = {}
        num_batches = self.stream.steps_per_epoch
        for number, batch in enumerate(self.stream.batches(stop=num_batches)):
            inputs = make_inputs(batch, self.teacher, device)
            if self.centers is not None:
                inputs = replace(inputs, labels=self._labels_of(number, batch).to(device))
            generator = torch.Generator(device).manual_seed(self.seed * 1_000_003 + number)
            values = measure_terms(student, self.objective, inputs, micro_batch=self.micro_batch, generator=generator)
            sums = {name: sums.get(name, 0.0) + value for name, value in values.items()}
        return {name: total / num_batches for name, total in sums.items()}

    def _labels_of(self, number: int, batch: Batch) -> Int[Tensor, " n"]:
        """The classes of a batch by the first teacher's images, found once: the batches are always the same."""
        if number not in self._labels:
            assert self.centers is not None
            teacher = F.normalize(batch.teacher_image[0].float(), dim=-1)
            products = (rows @ self.centers.T for rows in teacher.split(row_block(self.centers)))
            self._labels[number] = torch.cat([part.argmax(dim=1) for part in products])
        return self._labels[number]


class Validator:
    """Measures the averaged weights where there are some, else the student's, every `every` steps and after the last.

    `shown` is a copy of the student, made before it was wrapped for several processes; it takes the weights. `measures`
    are by set, and `held_out` are pairs that are also measured. `best_by` is the column that tells which validation is
    best; after `stop_after` in a row that are not, the training is to stop. `best` goes on from a checkpoint.
    """

    def __init__(
        self,
        shown: Clip,
        measures: Mapping[str, Measure],
        *,
        held_out: HeldOut | None = None,
        every: int,
        precision: torch.dtype,
        best_by: str | None = None,
        stop_after: int | None = None,
    ) -> None:
        self.every, self.best_by, self.stop_after = every, best_by, stop_after
        self.best: dict[str, Any] = {}
        self._shown, self._measures, self._held_out, self._precision = shown, measures, held_out, precision
        shown.model.eval().requires_grad_(False)

    def due(self, done: int, *, num_steps: int) -> bool:
        """Say whether the student is validated after `done` steps."""
        return done % self.every == 0 or done == num_steps

    def wants_checkpoint(self, done: int, *, num_steps: int) -> bool:
        """Say whether the state after `done` steps is to be kept, since it may be the best of the validations."""
        by_validation = self.best_by is not None and self.best_by.startswith(VALIDATED)
        return by_validation and self.due(done, num_steps=num_steps)

    @property
    def gives_up(self) -> bool:
        """Whether the last `stop_after` validations were no better than the best before them."""
        return self.stop_after is not None and self.best.get("num_worse", 0) >= self.stop_after

    def measure(self, training: Training, done: int) -> dict[str, float]:
        """Return the values of all sets by their columns of metrics.jsonl. Every process must call it."""
        student = training.student
        copy_whole_(
            self._shown.model,
            student.clip.model.state_dict() if training.average is None else training.average.values,
        )
        by_set = {name: measure(self._shown) for name, measure in self._measures.items()}
        if self._held_out is not None:
            towers = Towers(self._shown, self._precision)
            shown = replace(student, clip=self._shown, towers=towers, runs=("image", "text"))
            by_set[HELD_OUT] = self._held_out.measure(shown)
        found = {f"{VALIDATED}{name}/{metric}": v for name, values in by_set.items() for metric, v in values.items()}
        if self.best_by is not None and self.best_by in found:
            self._judge(done, found[self.best_by])
        return found

    def _judge(self, done: int, value: float) -> None:
        assert self.best_by is not None
        if not self.best or is_better(self.best_by, value, than=self.best["value"]):
            self.best = {"step": done, "value": value, "num_worse": 0}
        else:
            self.best = {**self.best, "num_worse": self.best["num_worse"] + 1}
