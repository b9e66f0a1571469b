from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from distilclip.errors import InputError
from distilclip.plan.costs import HeadSize
from distilclip.train.class_head import ClassHead, class_range
from distilclip.train.settings import Optimization

K, DIM, RATE = 10, 4, 1e-2
OPTIMIZATION = Optimization(centers_learning_rate=RATE)
VISITS = [[0, 3, 9], [3, 4], [0, 1, 3, 9], [3], list(range(K))]


def gradients() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(len(rows), DIM, generator=generator) for rows in VISITS]


def start() -> Tensor:
    return torch.randn(K, DIM, generator=torch.Generator().manual_seed(0))


def head(centers: Tensor | None = None, optimization: Optimization = OPTIMIZATION, **values: object) -> ClassHead:
    return ClassHead(start() if centers is None else centers, optimization, **values)


def train(trained: ClassHead, steps: range) -> None:
    """Give the head the gradients of some steps, as a loss over the sampled classes would."""
    for step in steps:
        classes = torch.tensor(VISITS[step])
        inside = (classes >= trained.first) & (classes < trained.stop)
        taken = trained.of_step(classes[:1], classes)
        taken.centers.grad = gradients()[step][inside]
        trained.update(taken, share=0.5)


def test_classes_of_a_step_are_this_ranks_and_labels_count_among_all() -> None:
    shard = head(start()[4:8], first=4, num_classes=K)
    step = shard.of_step(torch.tensor([9, 5, 5]), torch.tensor([1, 5, 6, 9]))
    assert step.rows is not None
    assert (step.rows.tolist(), step.first, step.labels.tolist()) == ([1, 2], 1, [3, 1, 1])
    assert torch.equal(step.centers.detach(), start()[5:7])
    everything = shard.of_step(torch.tensor([9, 5]), None)
    assert (everything.rows, everything.first, everything.labels.tolist()) == (None, 4, [9, 5])
    with pytest.raises(ValueError, match="same `cluster` run"):
        shard.of_step(torch.tensor([K]), None)


def test_the_optimizers_constants_reach_the_centers() -> None:
    other = Optimization(centers_learning_rate=RATE, centers_weight_decay=0.3, beta1=0.5, beta2=0.9, eps=1e-2)
    trained = head(optimization=other)
    expected = torch.nn.Parameter(start())
    optimizer = torch.optim.AdamW([expected], lr=RATE, betas=(0.5, 0.9), eps=1e-2, weight_decay=0.3)
    for seed in range(3):
        taken = trained.of_step(torch.tensor([0]), None)
        gradient = torch.randn(K, DIM, generator=torch.Generator().manual_seed(seed))
        taken.centers.grad, expected.grad = gradient, gradient.clone()
        trained.update(taken, share=1.0)
        optimizer.step()
    torch.testing.assert_close(trained.centers, expected.detach(), rtol=1e-6, atol=1e-7)


def test_ranges_of_ranks_cover_every_class_once_and_evenly() -> None:
    ranges = [class_range(K, rank, 3) for rank in range(3)]
    assert [c for first, stop in ranges for c in range(first, stop)] == list(range(K))
    assert {stop - first for first, stop in ranges} == {3, 4}
    assert [class_range(2, rank, 3) for rank in range(3)] == [(0, 0), (0, 1), (1, 2)]


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 1), (3, 2), (4, 4)])
def test_a_head_goes_on_under_any_number_of_ranks(before: int, after: int, tmp_path: Path) -> None:
    whole = head()
    train(whole, range(5))
    folder = str(tmp_path / "centers")
    for rank in range(before):
        first, stop = class_range(K, rank, before)
        part = head(start()[first:stop], first=first, num_classes=K)
        train(part, range(3))
        part.save(folder)
    found = []
    for rank in range(after):
        first, stop = class_range(K, rank, after)
        part = head(torch.zeros(stop - first, DIM), first=first, num_classes=K)
        part.load(folder)
        train(part, range(3, 5))
        found.append(part)
    assert torch.equal(torch.cat([part.centers for part in found]), whole.centers)
    assert torch.equal(torch.cat([part.state.exp_avg_sq for part in found]), whole.state.exp_avg_sq)
    assert torch.equal(torch.cat([part.state.step for part in found]), whole.state.step)


def test_a_missing_range_is_named(tmp_path: Path) -> None:
    head(start()[:4], num_classes=K).save(str(tmp_path))
    head(start()[6:], first=6, num_classes=K).save(str(tmp_path))
    with pytest.raises(InputError, match="from 4 on"):
        head().load(str(tmp_path))


def test_memory_is_what_the_tensors_take() -> None:
    shard = head(start()[:5], num_classes=K)
    step = shard.of_step(torch.tensor([0]), torch.tensor([0, 2, 7, 8, 9]))  # two of five rows are here
    state = sum(t.nbytes for t in vars(shard.state).values())
    step.centers.grad = torch.zeros_like(step.centers)
    tensors = shard.centers.nbytes + step.centers.nbytes + step.centers.grad.nbytes
    size = HeadSize(num_centers=K, dim=DIM, sample_rate=0.4)
    assert vars(size.memory(world=2)) == {"device": tensors + state, "host": 0}
    assert vars(replace(size, state="host").memory(world=2)) == {"device": tensors, "host": state}
    assert HeadSize(num_centers=1_000_000, dim=1280).memory().device == 4 * 1280 * 10**6 * 4 + 8 * 10**6
