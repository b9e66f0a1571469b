"""What the loop itself decides; tests/stages has whole trainings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from distilclip import distributed, stage_folder
from distilclip.data.bad_samples import ErrorPolicy
from distilclip.errors import InputError
from distilclip.train.checkpoint import Training
from distilclip.train.checkpoint_files import complete_checkpoints
from distilclip.train.log import Log
from distilclip.train.loop import _exchange_flags, _Saving, _stop_non_finite
from distilclip.train.objective import Objective
from distilclip.train.optimizer import build_optimizer
from distilclip.train.settings import Checkpoints, Optimization
from distilclip.train.step import compute_gradients
from tests.ranks import run_ranks
from tests.train.made import make_inputs, make_student
from tests.train.test_checkpoint import made_checkpoints


def build(architecture: str) -> Training:
    student = make_student(architecture)
    optimizer = build_optimizer(student.named_parameters(), Optimization(learning_rate=1e-3, weight_decay=0.1))
    return Training(student=student, optimizer=optimizer, policy=ErrorPolicy("skip"))


def bad_step_on_a_rank(architecture: str) -> tuple[str, tuple[float, bool, bool]]:
    """The message of a step in which rank 1 alone has embeddings that are not finite; and what the ranks agree on."""
    with distributed.job("cpu"):
        training = build(architecture)
        if distributed.rank() == 1:
            training.student.clip.model.visual.proj.data[0, 0] = torch.nan
        generator = torch.Generator().manual_seed(0)
        result = compute_gradients(training.student, Objective(), make_inputs(4), micro_batch=2, generator=generator)
        agreed = _exchange_flags(result.loss, save=False, stop=distributed.rank() == 1)
        with pytest.raises(InputError) as refusal:
            _stop_non_finite(6, training, result, kept="the state after 6 steps is saved")
        return str(refusal.value), agreed


def test_a_loss_that_is_not_finite_names_step_term_and_the_rank_it_came_from(tiny_clip_json: str) -> None:
    (message, agreed), (other, _) = run_ranks(2, bad_step_on_a_rank, tiny_clip_json)
    assert message == other
    assert message.startswith("Step 7: the loss or its gradient is not finite. rank 0: terms {'task': nan}")
    first, second = message.split("rank 1: ")
    assert "terms ['task']" in first
    assert "embeddings" not in first
    assert "terms ['task'], embeddings ['image']" in second
    assert "the state after 6 steps is saved" in message
    assert agreed[0] != agreed[0]  # NaN, on every rank
    assert agreed[1:] == (True, True)  # one rank's SIGTERM saves and stops all


def test_what_a_kill_left_of_old_checkpoints_goes_when_training_goes_on(tmp_path: Path, tiny_clip_json: str) -> None:
    folder = made_checkpoints(tmp_path, {2: {}, 4: {}, 6: {}})
    training = build(tiny_clip_json)
    log = Log(torch.device("cpu"))
    _Saving(stage_folder.Folder(folder, "train"), training, Checkpoints(keep_checkpoints=1), log)
    assert complete_checkpoints(folder) == [6]
