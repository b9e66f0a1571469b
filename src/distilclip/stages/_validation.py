"""Open what `train` validates a student on, and decide when. No stage of its own."""

from __future__ import annotations

import torch

from distilclip import distributed
from distilclip.configs.train import Config
from distilclip.data.workers import default_workers
from distilclip.devices import PRECISIONS
from distilclip.evaluate.encode import Encoding
from distilclip.evaluate.validation_set import ValidationSet, count_pairs, open_datasets
from distilclip.models.clip import Clip
from distilclip.train.settings import steps_of
from distilclip.train.validation import HeldOut, Measure, Validator, default_interval

LARGE_BATCH = 256
WORTH_WORKERS = 5000  # pairs of a set from which on starting loader processes for it pays


def open_validator(config: Config, shown: Clip, *, held_out: HeldOut | None, num_rows: int) -> Validator:
    """Read the sets, before the training begins. `shown` is a copy of the student, which the validator will fill.

    `num_rows` pairs are trained on. Raises `InputError` for a set that is not there or that nothing can be measured on.
    """
    values, rank, world = config.validation, distributed.rank(), distributed.world()
    workers = default_workers() if config.num_workers is None else config.num_workers
    measures: dict[str, Measure] = {}
    num_pairs = 0
    for dataset in open_datasets(values.validate, data_root=values.data_root, prompts=values.prompts):
        num_here = count_pairs(dataset)
        encoding = Encoding(
            batch_size=min(config.micro_batch or config.batch_size, LARGE_BATCH),
            dtype=torch.bfloat16 if config.precision == "bf16" else torch.float32,
            num_workers=workers if num_here >= WORTH_WORKERS else 0,
        )
        measures[dataset.name] = ValidationSet(
            dataset=dataset, encoding=encoding, rank=rank, world=world, gather=distributed.gather_objects
        ).measure
        num_pairs += num_here
    if held_out is not None:
        num_pairs += held_out.stream.num_rows
    every = values.validate_every
    if values.validate_every_epochs is not None:
        every = steps_of(values.validate_every_epochs, num_rows=num_rows, batch_size=config.batch_size)
    checkpoint_every = config.checkpoints.checkpoint_every
    return Validator(
        shown,
        measures,
        held_out=held_out,
        every=every or default_interval(num_pairs, batch_size=config.batch_size, checkpoint_every=checkpoint_every),
        precision=PRECISIONS[config.precision],
        best_by=config.checkpoints.best_by,
        stop_after=values.stop_after,
    )
