"""A batch in which some rows lack their picture or their caption: exact in micro-batches, and on two ranks."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from distilclip import distributed
from distilclip.methods import TERMS
from distilclip.train.objective import Objective
from distilclip.train.parallel import whole
from distilclip.train.step import Inputs, compute_gradients, measure_terms
from tests.ranks import run_ranks
from tests.train.made import make_inputs, make_student

N = 12
EVERYTHING = Objective(**dict.fromkeys(TERMS, 1.0), sample_rate=0.8)
# The second rank has no pair; of the whole batch four rows are pairs.
HAS_IMAGE = torch.tensor([1, 1, 1, 0, 1, 1, 1, 1, 1, 0, 0, 0]).bool()
HAS_TEXT = torch.tensor([1, 1, 0, 1, 1, 1, 0, 0, 0, 1, 1, 1]).bool()


def inputs_of_this_rank(has_image: torch.Tensor, has_text: torch.Tensor) -> Inputs:
    size = N // distributed.world()
    here = slice(distributed.rank() * size, (distributed.rank() + 1) * size)
    return dataclasses.replace(make_inputs(N), has_image=has_image[here], has_text=has_text[here])


def one_step(architecture: str, micro_batch: int) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Loss, terms, cosines and measured terms of the global batch, and every gradient."""
    student, inputs = make_student(architecture), inputs_of_this_rank(HAS_IMAGE, HAS_TEXT)
    result = compute_gradients(
        student,
        EVERYTHING,
        inputs,
        micro_batch=micro_batch,
        generator=torch.Generator().manual_seed(3),
        diagnosing=True,
    )
    assert result.diagnosis is not None
    values = {"loss": result.loss, **result.terms, **result.cosines}
    found = {name: float(distributed.reduce_(value.clone())) for name, value in values.items()}
    gradients = {name: p.grad.clone() for name, p in student.named_parameters().items() if p.grad is not None}
    found |= result.diagnosis.line()
    generator = torch.Generator().manual_seed(3)
    measured = measure_terms(student, EVERYTHING, inputs, micro_batch=micro_batch, generator=generator)
    return found | {f"measured {name}": value for name, value in measured.items()}, whole(gradients)


def on_a_rank(architecture: str) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    with distributed.job("cpu"):
        return one_step(architecture, 4)


def test_micro_batches_and_two_ranks_give_the_step_of_the_whole_batch(tiny_clip_json: str) -> None:
    expected, gradients = one_step(tiny_clip_json, N)
    for found, others in (one_step(tiny_clip_json, 5), run_ranks(2, on_a_rank, tiny_clip_json)[0]):
        assert found == pytest.approx(expected, rel=2e-5, abs=1e-6)
        assert set(others) == set(gradients)
        for name, gradient in gradients.items():
            assert (others[name] - gradient).norm() <= 2e-5 * gradient.norm() + 1e-7, name


def test_all_rows_with_both_are_the_batch_as_it_was(tiny_clip_json: str) -> None:
    """Bit for bit where nothing is said of the rows, and in value where every row says that it has both."""
    both = torch.ones(N).bool()
    results = []
    for inputs in (make_inputs(N), inputs_of_this_rank(both, both)):
        generator = torch.Generator().manual_seed(3)
        results.append(
            measure_terms(make_student(tiny_clip_json), EVERYTHING, inputs, micro_batch=N, generator=generator)
        )
    assert results[0] == pytest.approx(results[1], rel=1e-6)
