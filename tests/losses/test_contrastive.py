import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from distilclip.losses.contrastive import contrastive, info_nce, instance
from distilclip.losses.features import Features

SCALE = 14.0
TILES = [None, (4, 3), (1, 13), (13, 1), (5, 5), (64, 64)]
Make = Callable[..., Tensor]


def naive_info_nce(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    losses = [
        -torch.log_softmax(torch.stack([scale * x[i] @ y[j] for j in range(len(y))]), 0)[i] for i in range(len(x))
    ]
    return torch.stack(losses).mean()


def naive_contrast(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    return (naive_info_nce(x, y, scale) + naive_info_nce(y, x, scale)) / 2


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("tile", TILES)
def test_contrastive_equals_the_formula_in_value_and_gradients(unit_rows: Make, tile: tuple[int, int] | None) -> None:
    x, y, scale = unit_rows(13, 6), unit_rows(13, 6, seed=1), scalar(SCALE)
    expected, actual = naive_contrast(x, y, scale), contrastive(x, y, scale=scale, tile=tile)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
    for got, want in zip(
        torch.autograd.grad(3 * actual, [x, y, scale]), torch.autograd.grad(3 * expected, [x, y, scale]), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("block", [None, 1, 4, 100])
def test_info_nce_equals_the_formula_in_value_and_gradients(unit_rows: Make, block: int | None) -> None:
    x, y, scale = unit_rows(9, 6), unit_rows(9, 6, seed=1), scalar(SCALE)
    expected, actual = naive_info_nce(x, y, scale), info_nce(x, y, scale=scale, block=block)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
    for got, want in zip(
        torch.autograd.grad(actual, [x, y, scale]), torch.autograd.grad(expected, [x, y, scale]), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("tile", [None, (1, 1)])
def test_two_orthogonal_pairs_by_hand(tile: tuple[int, int] | None) -> None:
    # Logits log 3 on the diagonal, 0 beside it: each softmax gives its own pair 3 / 4.
    rows = torch.eye(2, dtype=torch.float64)
    # Tight: a scale given as a Python number must not pass through float32.
    assert contrastive(rows, rows, scale=math.log(3), tile=tile).item() == pytest.approx(math.log(4 / 3), rel=1e-14)
    assert contrastive(rows, rows.flip(0), scale=math.log(3), tile=tile).item() == pytest.approx(math.log(4), rel=1e-14)


def test_instance_by_hand() -> None:
    # The student's images meet their own texts (log 4/3 as above), its texts the wrong images (log 4).
    rows = torch.eye(2, dtype=torch.float64)
    one = torch.ones((), dtype=torch.float64)
    student, teacher = Features(rows, rows, one), Features(rows.flip(0), rows, one)
    expected = 0.25 * math.log(4 / 3) + 0.75 * math.log(4)
    assert instance(student, teacher, scale=math.log(3), gamma=0.25).item() == pytest.approx(expected)


def test_instance_equals_the_formula(unit_rows: Make) -> None:
    u, v, image, text = (unit_rows(7, 5, seed=seed) for seed in range(4))
    scale, other = scalar(SCALE), torch.ones((), dtype=torch.float64)
    expected = 0.3 * naive_contrast(u, text, scale) + 0.7 * naive_contrast(v, image, scale)
    actual = instance(Features(u, v, other), Features(image, text, other), scale=scale, gamma=0.3)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("tile", [None, (4, 3)])
def test_loss_ignores_the_order_of_pairs_and_of_modalities(unit_rows: Make, tile: tuple[int, int] | None) -> None:
    x, y = unit_rows(13, 6), unit_rows(13, 6, seed=1)
    order = torch.randperm(13, generator=torch.Generator().manual_seed(0))
    loss = contrastive(x, y, scale=SCALE, tile=tile)
    torch.testing.assert_close(contrastive(y, x, scale=SCALE, tile=tile), loss)
    torch.testing.assert_close(contrastive(x[order], y[order], scale=SCALE, tile=tile), loss)


@pytest.mark.parametrize("tile", [None, (2, 3)])
def test_gradients_pass_gradcheck(unit_rows: Make, tile: tuple[int, int] | None) -> None:
    inputs = unit_rows(5, 3), unit_rows(5, 3, seed=1), scalar(3.0)
    assert torch.autograd.gradcheck(lambda x, y, s: contrastive(x, y, scale=s, tile=tile), inputs)


@pytest.mark.parametrize("block", [None, 3])
def test_shares_of_the_rows_add_up_to_the_whole_batch(unit_rows: Make, block: int | None) -> None:
    x, y, scale = unit_rows(11, 6), unit_rows(11, 6, seed=1), scalar(SCALE)
    whole = contrastive(x, y, scale=scale)
    shares = torch.stack(
        [
            info_nce(queries[a:b], keys, scale=scale, offset=a, count=11, block=block) / 2
            for a, b in ((0, 4), (4, 5), (5, 11))
            for queries, keys in ((x, y), (y, x))
        ]
    ).sum()
    torch.testing.assert_close(shares, whole)
    for got, want in zip(
        torch.autograd.grad(shares, [x, y, scale]), torch.autograd.grad(whole, [x, y, scale]), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("tile", [None, (3, 4)])
def test_half_precision_at_scale_100_is_finite_and_computed_in_float32(
    unit_rows: Make, tile: tuple[int, int] | None
) -> None:
    x = unit_rows(9, 32, dtype=torch.bfloat16)
    y = -x.detach()  # the worst case: every pair at similarity -1, its log-probability about -200
    scale = torch.tensor(100.0, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = contrastive(x, y, scale=scale, tile=tile)
    assert loss.dtype == torch.float32
    by_x, by_scale = torch.autograd.grad(loss, [x, scale])
    assert by_x.dtype == torch.bfloat16
    assert torch.isfinite(torch.cat([loss[None], by_x.flatten().float(), by_scale[None]])).all()
    expected = contrastive(x.detach().double(), y.double(), scale=100.0)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)


def test_large_batch_never_holds_all_similarities(unit_rows: Make, largest_storage: type) -> None:
    n, dim = 2300, 4
    x, y = unit_rows(n, dim, dtype=torch.float32), unit_rows(n, dim, seed=1, dtype=torch.float32)
    with largest_storage() as largest:
        (contrastive(x, y, scale=SCALE) + info_nce(x, y, scale=SCALE)).backward()
    assert largest.num_bytes < 4 * n * n * 0.9
    with largest_storage() as largest:
        (contrastive(x, y, scale=SCALE, tile=(50, 100)) + info_nce(x, y, scale=SCALE, block=8)).backward()
    assert largest.num_bytes <= max(4 * 2 * 50 * 100, 4 * 8 * n, 4 * n * dim)


def test_gradient_steps_align_the_pairs(unit_rows: Make) -> None:
    x, y = unit_rows(16, 8, dtype=torch.float32), unit_rows(16, 8, seed=1, dtype=torch.float32)
    log_scale = torch.tensor(math.log(5.0), requires_grad=True)
    optimizer = torch.optim.Adam([x, y, log_scale], lr=0.1)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        unit = [torch.nn.functional.normalize(rows, dim=1) for rows in (x, y)]
        loss = contrastive(*unit, scale=log_scale.exp(), tile=(8, 8))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.usefixtures("unchecked_shapes")
def test_shapes_that_differ_are_named_with_the_remedy() -> None:
    one = torch.ones(())
    with pytest.raises(ValueError, match="image has 3 rows, text 4"):
        contrastive(torch.ones(3, 2), torch.ones(4, 2), scale=1.0)
    with pytest.raises(ValueError, match="no rows"):
        contrastive(torch.ones(0, 2), torch.ones(0, 2), scale=1.0)
    with pytest.raises(ValueError, match="queries is 2 wide, keys 3"):
        info_nce(torch.ones(3, 2), torch.ones(4, 3), scale=1.0)
    with pytest.raises(ValueError, match=r"offset=2 with 3 queries and 4 keys"):
        info_nce(torch.ones(3, 2), torch.ones(4, 2), scale=1.0, offset=2)
    narrow, wide = (
        Features(torch.ones(3, 64), torch.ones(3, 64), one),
        Features(torch.ones(3, 128), torch.ones(3, 128), one),
    )
    with pytest.raises(ValueError, match="student is 64 wide, teacher 128: project the student first"):
        instance(narrow, wide, scale=1.0)
