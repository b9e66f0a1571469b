from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from distilclip.measures.logistic import CURVATURE_ROWS, Block, LogisticProblem, fit_logistic


def blobs(
    num_rows: int, dim: int, num_classes: int, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Overlapping classes with a decaying spectrum and an offset, as features of CLIP have."""
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.arange(1, dim + 1, dtype=torch.float64) ** -0.7
    labels = torch.arange(num_rows) % num_classes
    centers = torch.randn(num_classes, dim, generator=generator, dtype=torch.float64)
    noise = torch.randn(num_rows, dim, generator=generator, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))[0]
    return ((centers[labels] + noise) * spectrum @ rotation + 0.5).to(dtype), labels


def objective(weight: torch.Tensor, bias: torch.Tensor, x: torch.Tensor, y: torch.Tensor, l2: float) -> torch.Tensor:
    """J from its formula."""
    return F.cross_entropy(x @ weight + bias, y, reduction="sum") + l2 / 2 * weight.square().sum()


def test_value_and_gradient_equal_autograd_of_the_formula() -> None:
    x, y = blobs(60, 5, 3, dtype=torch.float64)
    problem = LogisticProblem([Block(features=x, labels=y)], num_classes=3)
    weight = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True)
    value = objective(weight, bias, x, y, 0.7)
    value.backward()
    found, gradient = problem.objective(problem.rotate(weight.detach(), bias.detach()), l2=0.7)
    assert weight.grad is not None
    assert bias.grad is not None
    # With b' = b + m W held, dJ/dW loses m times the gradient of the intercepts.
    along = problem.axes.T @ (weight.grad - problem.mean[:, None] * bias.grad)
    assert found == pytest.approx(value.item(), rel=1e-12)
    torch.testing.assert_close(gradient, torch.cat([along, bias.grad[None]]), rtol=1e-9, atol=1e-9)


def test_rotation_of_the_coordinates_is_undone_exactly() -> None:
    x, y = blobs(60, 5, 3, dtype=torch.float64)
    problem = LogisticProblem([Block(features=x, labels=y)], num_classes=3)
    weight, bias = torch.randn(5, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    torch.testing.assert_close(problem.unrotate(problem.rotate(weight, bias)), (weight, bias))


@pytest.mark.parametrize("l2", [1e2, 1.0, 1e-2])
def test_optimum_has_no_gradient_and_no_better_neighbour(l2: float) -> None:
    x, y = blobs(300, 8, 4, dtype=torch.float64)
    fit = fit_logistic(LogisticProblem([Block(features=x, labels=y)], num_classes=4), l2=l2, tolerance=1e-13)
    weight, bias = fit.weight.clone().requires_grad_(), fit.bias.clone().requires_grad_()
    value = objective(weight, bias, x, y, l2)
    value.backward()
    assert fit.converged
    assert fit.objective == pytest.approx(value.item(), rel=1e-10)
    assert weight.grad is not None
    assert weight.grad.abs().max() < 1e-4
    for step in torch.randn(5, *weight.shape, dtype=torch.float64) * 1e-2:
        assert objective(weight + step, bias, x, y, l2) > value


def test_two_points_by_hand() -> None:
    # Points -1 and 1, classes 0 and 1: by symmetry W = (-a, a), b = 0, and 2 / (1 + e^2a) = l2 a for the margin 2a.
    x, y = torch.tensor([[-1.0], [1.0]], dtype=torch.float64), torch.tensor([0, 1])
    fit = fit_logistic(LogisticProblem([Block(features=x, labels=y)], num_classes=2), l2=0.5, tolerance=1e-14)
    a = fit.weight[0, 1].item()
    assert fit.weight[0, 0].item() == pytest.approx(-a)
    assert (fit.bias[1] - fit.bias[0]).item() == pytest.approx(0, abs=1e-8)
    assert 2 / (1 + torch.tensor(2 * a).exp().item()) == pytest.approx(0.5 * a, rel=1e-5)


@pytest.mark.parametrize("l2", [10.0, 0.1, 1e-3])
def test_the_default_tolerance_ends_near_the_optimum(l2: float) -> None:
    x, y = blobs(400, 12, 5)
    exact = LogisticProblem([Block(features=x.double(), labels=y)], num_classes=5)
    best = fit_logistic(exact, l2=l2, tolerance=1e-13).objective
    fit = fit_logistic(LogisticProblem([Block(features=x, labels=y)], num_classes=5), l2=l2)
    assert fit.converged
    assert fit.objective == pytest.approx(best, rel=3e-5)


def test_a_fit_from_a_neighbours_solution_ends_at_the_same_optimum_sooner() -> None:
    x, y = blobs(2000, 12, 5)
    problem = LogisticProblem([Block(features=x, labels=y)], num_classes=5)
    cold = fit_logistic(problem, l2=1.0)
    warm = fit_logistic(problem, l2=1.0, start=fit_logistic(problem, l2=1.33))
    assert warm.objective == pytest.approx(cold.objective, rel=1e-5)
    assert warm.num_evaluations < cold.num_evaluations


def test_blocks_and_chosen_rows_equal_one_block_of_those_rows() -> None:
    x, y = blobs(200, 6, 3, dtype=torch.float64)
    rows = torch.arange(0, 150, 2)
    blocks = [Block(features=x[:150], labels=y[:150], rows=rows), Block(features=x[150:], labels=y[150:])]
    parts = fit_logistic(LogisticProblem(blocks, num_classes=3), l2=1.0, tolerance=1e-13)
    chosen = torch.cat([rows, torch.arange(150, 200)])
    whole = fit_logistic(
        LogisticProblem([Block(features=x[chosen], labels=y[chosen])], num_classes=3), l2=1.0, tolerance=1e-13
    )
    torch.testing.assert_close(parts.weight, whole.weight, rtol=1e-4, atol=1e-5)


def test_half_precision_features_are_read_as_they_are() -> None:
    x, y = blobs(200, 6, 3)
    half = fit_logistic(LogisticProblem([Block(features=x.half(), labels=y)], num_classes=3), l2=1.0)
    full = fit_logistic(LogisticProblem([Block(features=x.half().float(), labels=y)], num_classes=3), l2=1.0)
    assert half.objective == full.objective
    assert half.weight.dtype == torch.float32


def test_more_dimensions_than_rows() -> None:
    x, y = blobs(30, 50, 3)
    fit = fit_logistic(LogisticProblem([Block(features=x, labels=y)], num_classes=3), l2=1e-3)
    assert fit.converged
    assert torch.equal((x @ fit.weight + fit.bias).argmax(dim=1), y)


def test_a_fit_without_penalty_is_refused() -> None:
    x, y = blobs(30, 5, 3)
    problem = LogisticProblem([Block(features=x, labels=y)], num_classes=3)
    with pytest.raises(ValueError, match="must be positive"):
        fit_logistic(problem, l2=0.0)


def test_running_out_of_iterations_is_told() -> None:
    x, y = blobs(200, 6, 3)
    problem = LogisticProblem([Block(features=x, labels=y)], num_classes=3)
    assert not fit_logistic(problem, l2=1e-3, max_iterations=2).converged


@pytest.mark.parametrize("scale", [1.0, 30.0, 1000.0])
def test_confident_fits_keep_their_value_and_gradient(scale: float) -> None:
    # Probabilities far below the smallest float: what is cut off must not be seen.
    x, y = blobs(80, 6, 4)
    problem = LogisticProblem([Block(features=x, labels=y)], num_classes=4)
    weight, bias = scale * torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.zeros(4)
    exact = LogisticProblem([Block(features=x.double(), labels=y)], num_classes=4)
    exact.mean, exact.axes = problem.mean.double(), problem.axes.double()
    found, gradient = problem.objective(problem.rotate(weight, bias), l2=0.1)
    value, slope = exact.objective(exact.rotate(weight.double(), bias.double()), l2=0.1)
    assert found == pytest.approx(value, rel=1e-5)
    torch.testing.assert_close(gradient.double(), slope, rtol=1e-3, atol=1e-4 * float(slope.abs().max()))


def test_many_rows_are_scaled_by_a_sample_of_them_and_end_at_the_same_optimum() -> None:
    x, y = blobs(CURVATURE_ROWS + 500, 6, 3)
    order = y.argsort()  # sorted by class: a sample of the first rows would know one class only
    half = len(x) // 2
    blocks = [Block(features=x[order[:half]], labels=y[order[:half]]), Block(features=x, labels=y, rows=order[half:])]
    problem = LogisticProblem(blocks, num_classes=3)
    sampled = problem.preconditioner(problem.prior(), l2=1.0)
    whole = 1 / (problem.variance[0] * len(x) * (2 / 9) + 1.0)
    assert sampled[0].tolist() == pytest.approx([float(whole)] * 3, rel=0.05)
    fit = fit_logistic(problem, l2=1.0)
    exact = fit_logistic(
        LogisticProblem([Block(features=x.double(), labels=y)], num_classes=3), l2=1.0, tolerance=1e-12
    )
    assert fit.objective == pytest.approx(exact.objective, rel=1e-5)
