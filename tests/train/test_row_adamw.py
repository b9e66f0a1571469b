from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from distilclip.train import row_adamw
from distilclip.train.row_adamw import RowMoments, update_rows_

K, DIM, RATE = 10, 4, 1e-2
VISITS = [[0, 3, 9], [3, 4], [0, 1, 3, 9], [3], list(range(K))]
WAYS = ["on_cpu", "by_torch"]


def gradients() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(len(rows), DIM, generator=generator) for rows in VISITS]


def start() -> Tensor:
    return torch.randn(K, DIM, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The kernel for CPUs, and torch's operations in its place."""
    chosen: Callable[..., None] = getattr(row_adamw, f"_update_{request.param}")
    monkeypatch.setattr(row_adamw, "_update_on_cpu", chosen)
    return request.param


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_a_row_moves_as_torch_adamw_moves_it_over_its_own_gradients(weight_decay: float, way: str) -> None:
    values, state = start(), RowMoments.zeros(K, DIM)
    alone = [torch.nn.Parameter(row.clone()) for row in values]
    settings = {"betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": weight_decay}
    optimizers = [torch.optim.AdamW([row], lr=RATE, **settings) for row in alone]
    for rows, gradient in zip(VISITS, gradients(), strict=True):
        update_rows_(values, gradient, state, rows=torch.tensor(rows), learning_rate=RATE, weight_decay=weight_decay)
        for row, own in zip(rows, gradient, strict=True):
            alone[row].grad = own
            optimizers[row].step()
    torch.testing.assert_close(values, torch.stack([row.detach() for row in alone]), rtol=1e-6, atol=1e-7)
    assert state.step.tolist() == [sum(row in rows for rows in VISITS) for row in range(K)]


def test_all_rows_every_time_is_torch_adamw(way: str) -> None:
    values, state, expected = start(), RowMoments.zeros(K, DIM), torch.nn.Parameter(start())
    optimizer = torch.optim.AdamW([expected], lr=RATE, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.0)
    for seed in range(20):
        expected.grad = torch.randn(K, DIM, generator=torch.Generator().manual_seed(seed))
        update_rows_(values, expected.grad, state, rows=None, learning_rate=RATE)
        optimizer.step()
    torch.testing.assert_close(values, expected.detach(), rtol=1e-6, atol=1e-7)


def test_a_step_changes_the_state_of_its_rows_alone_in_any_block(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for entries in (1 << 17, DIM):  # the second: one row in a block
        monkeypatch.setattr(row_adamw, "_BLOCK_ENTRIES", entries)
        values, state = start(), RowMoments.zeros(K, DIM)
        update_rows_(values, gradients()[0], state, rows=torch.tensor(VISITS[0]), learning_rate=RATE)
        touched = torch.zeros(K, dtype=torch.bool).index_fill_(0, torch.tensor(VISITS[0]), True)
        assert torch.equal((values != start()).any(1), touched)
        for moment in (state.exp_avg, state.exp_avg_sq):
            assert torch.equal(moment.any(1), touched)
        assert torch.equal(state.step, touched.long())
        results.append(values)
    assert torch.equal(*results)


def test_threads_share_the_rows_and_change_nothing(
    monkeypatch: pytest.MonkeyPatch, set_threads: Callable[[int], None]
) -> None:
    monkeypatch.setattr(row_adamw, "_ROWS_OF_A_THREAD", 1)
    results = []
    for num_threads in (1, 2):
        set_threads(num_threads)
        values, state = start(), RowMoments.zeros(K, DIM)
        update_rows_(values, gradients()[2], state, rows=torch.tensor(VISITS[2]), learning_rate=RATE)
        results.append(values)
    assert torch.equal(*results)
