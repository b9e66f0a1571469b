"""The cluster loss on 2 and 3 ranks is that of one process, in value and in every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from distilclip import distributed
from distilclip.distributed import rows_of_this_rank
from distilclip.losses.cluster import ClassShard, cluster, positions
from distilclip.train.class_head import class_range
from tests.ranks import run_ranks

N, DIM, K = 12, 6, 11
OPTIONS: dict[str, Any] = {"alpha": 0.6, "temperature": 0.2, "class_scale": 3.0}
SAMPLED = torch.tensor([0, 1, 2, 3, 5])  # none of them on the last of three ranks


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher, centers = (torch.randn(rows, DIM, dtype=torch.float64, generator=generator) for rows in (N, N, K))
    return F.normalize(student, dim=1), F.normalize(teacher, dim=1), centers


def loss_and_gradients(classes: Tensor, labels: Tensor) -> list[Tensor]:
    """Of this rank's rows and its share of `classes`; on one process, of everything."""
    student, teacher, centers = inputs()
    world, rank = distributed.world(), distributed.rank()
    rows = slice(N // world * rank, N // world * (rank + 1))
    own = student[rows].requires_grad_()
    first, stop = class_range(K, rank, world)
    here = (classes >= first) & (classes < stop)
    held = centers[classes[here]].requires_grad_()
    shard = ClassShard(rows=rows_of_this_rank(N // world), first=int((classes < first).sum()))
    loss = cluster(own, teacher[rows], held, positions(labels, classes), **OPTIONS, shard=shard).total
    (5 * loss).backward()
    assert own.grad is not None
    assert held.grad is not None
    return [loss.detach(), own.grad, held.grad]


def on_a_rank() -> list[list[Tensor]]:
    with distributed.job("cpu"):
        return [loss_and_gradients(classes, labels) for classes, labels in cases()]


def cases() -> list[tuple[Tensor, Tensor]]:
    labels = torch.arange(N) % K
    return [(torch.arange(K), labels), (SAMPLED, SAMPLED[torch.arange(N) % len(SAMPLED)])]


@pytest.mark.parametrize("world", [2, 3])
def test_classes_on_several_ranks_give_the_loss_and_gradients_of_one(world: int) -> None:
    by_rank = run_ranks(world, on_a_rank)
    for case, (classes, labels) in enumerate(cases()):
        loss, by_student, by_centers = loss_and_gradients(classes, labels)
        parts = [ranks[case] for ranks in by_rank]
        torch.testing.assert_close(torch.stack([part[0] for part in parts]).sum(), loss, rtol=1e-12, atol=0)
        torch.testing.assert_close(torch.cat([part[1] for part in parts]), by_student, rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(torch.cat([part[2] for part in parts]), by_centers, rtol=1e-10, atol=1e-14)
