from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from distilclip.errors import InputError
from distilclip.train.classhead import ClassHead, head_memory
from distilclip.train.rowadamw import RowState, update_rows_
from distilclip.train.sharding import class_range

K, DIM, RATE = 10, 4, 1e-2
VISITS = [[0, 3, 9], [3, 4], [0, 1, 3, 9], [3], list(range(K))]


def gradients() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(len(rows), DIM, generator=generator) for rows in VISITS]


def start() -> Tensor:
    return torch.randn(K, DIM, generator=torch.Generator().manual_seed(0))


def head(centers: Tensor | None = None, **values: object) -> ClassHead:
    return ClassHead(start() if centers is None else centers, learning_rate=RATE, **values)


def train(trained: ClassHead, steps: range) -> None:
    """Give the head the gradients of some steps, as a loss over the sampled classes would."""
    for step in steps:
        classes = torch.tensor(VISITS[step])
        inside = (classes >= trained.first) & (classes < trained.stop)
        taken = trained.of_step(classes[:1], classes)
        taken.centers.grad = gradients()[step][inside]
        trained.update(taken, share=0.5)


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_a_row_moves_as_torch_adamw_moves_it_over_its_own_gradients(weight_decay: float) -> None:
    values, state = start(), RowState.zeros(K, DIM)
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


def test_all_rows_every_time_is_torch_adamw() -> None:
    values, state, expected = start(), RowState.zeros(K, DIM), torch.nn.Parameter(start())
    optimizer = torch.optim.AdamW([expected], lr=RATE, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.0)
    for seed in range(20):
        expected.grad = torch.randn(K, DIM, generator=torch.Generator().manual_seed(seed))
        update_rows_(values, expected.grad, state, rows=None, learning_rate=RATE)
        optimizer.step()
    torch.testing.assert_close(values, expected.detach(), rtol=1e-6, atol=1e-7)


def test_a_step_changes_the_state_of_its_rows_alone_in_any_block(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for entries in (1 << 17, DIM):  # the second: one row in a block
        monkeypatch.setattr("distilclip.train.rowadamw._BLOCK_ENTRIES", {"cpu": entries})
        values, state = start(), RowState.zeros(K, DIM)
        update_rows_(values, gradients()[0], state, rows=torch.tensor(VISITS[0]), learning_rate=RATE)
        touched = torch.zeros(K, dtype=torch.bool).index_fill_(0, torch.tensor(VISITS[0]), True)
        assert torch.equal((values != start()).any(1), touched)
        for moment in (state.exp_avg, state.exp_avg_sq):
            assert torch.equal(moment.any(1), touched)
        assert torch.equal(state.step, touched.long())
        results.append(values)
    assert torch.equal(*results)


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
    assert vars(head_memory(K, DIM, world=2, sample_rate=0.4)) == {"device": tensors + state, "host": 0}
    assert vars(head_memory(K, DIM, world=2, sample_rate=0.4, state="host")) == {"device": tensors, "host": state}
    assert head_memory(1_000_000, 1280).device == 4 * 1280 * 10**6 * 4 + 8 * 10**6
