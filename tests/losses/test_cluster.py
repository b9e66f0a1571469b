import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distilclip.losses import _cluster_tiles
from distilclip.losses._cluster_tiles import (
    ClusterInputs,
    RowWeights,
    Softmaxes,
    combine,
    partial_gradients,
    partial_sums,
)
from distilclip.losses.cluster import ClusterLoss, cluster, positions, sample_classes

N, DIM, K = 13, 6, 29
OPTIONS: dict[str, Any] = {"alpha": 0.6, "temperature": 0.2, "class_scale": 3.0}
TILES = [None, (4, 7), (13, 1), (1, 29), (5, 64)]
Make = Callable[..., Tensor]
Batch = tuple[Tensor, Tensor, Tensor, Tensor]


@pytest.fixture
def batch(unit_rows: Make) -> Batch:
    """Student, teacher, centers of any length, labels (some classes twice, most never)."""
    centers = (
        unit_rows(K, DIM, seed=2).detach() * torch.linspace(0.3, 3, K, dtype=torch.float64)[:, None]
    ).requires_grad_()
    labels = torch.randint(K, (N,), generator=torch.Generator().manual_seed(3))
    return unit_rows(N, DIM), unit_rows(N, DIM, seed=1), centers, labels


def naive(
    student: Tensor,
    teacher: Tensor,
    centers: Tensor,
    labels: Tensor,
    *,
    alpha: float,
    temperature: float,
    class_scale: float,
) -> ClusterLoss:
    """Row by row, as the formulas stand in SPEC 1.3."""
    w = centers / centers.norm(dim=1, keepdim=True)
    labels_loss, divergence = [], []
    for u, t, z in zip(student, teacher, labels, strict=True):
        p, q = torch.softmax(w @ u / temperature, 0), torch.softmax(w @ t / temperature, 0)
        labels_loss.append(-torch.softmax(class_scale * w @ u, 0)[z].log())
        divergence.append((p * (p.log() - q.log())).sum())
    label, distribution = torch.stack(labels_loss).mean(), torch.stack(divergence).mean()
    return ClusterLoss(alpha * label + (1 - alpha) * distribution, label, distribution)


Tile = tuple[int, int] | None
SetTile = Callable[[Tile], None]


@pytest.fixture
def set_tile(monkeypatch: pytest.MonkeyPatch) -> SetTile:
    """Chooses the tile (rows, columns); None leaves the default."""

    def choose(tile: Tile) -> None:
        if tile is not None:
            monkeypatch.setattr(_cluster_tiles, "default_tile", lambda centers, num_rows: tile)

    return choose


def sampled(batch: Batch, classes: Tensor, **options: Any) -> ClusterLoss:
    """The loss over some of the classes."""
    return cluster(*batch, classes=classes, **options)


def assert_all_close(actual: Any, expected: Any) -> None:
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("mixture", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0.5, 2.0, -3.0)])
def test_cluster_equals_the_formula_in_value_and_gradients(
    batch: Batch, tile: Tile, set_tile: SetTile, mixture: tuple[float, float, float]
) -> None:
    set_tile(tile)
    student, teacher, centers, _ = batch
    losses = cluster(*batch, **OPTIONS), naive(*batch, **OPTIONS)
    values = [torch.stack([loss.total, loss.label, loss.distribution]) for loss in losses]
    assert_all_close(*([value] for value in values))
    # A mixture of the three outputs, as any caller may form; only what a mixture contains is differentiated.
    actual, expected = (
        torch.stack(
            [w * v for w, v in zip(mixture, (loss.total, loss.label, loss.distribution), strict=True) if w]
        ).sum()
        for loss in losses
    )
    inputs = [student, teacher, centers] if mixture != (0, 1, 0) else [student, centers]
    assert_all_close(torch.autograd.grad(actual, inputs), torch.autograd.grad(expected, inputs))


@pytest.mark.parametrize("tile", [None, (1, 1)])
def test_two_opposite_centers_by_hand(tile: Tile, set_tile: SetTile) -> None:
    set_tile(tile)
    # Unit centers (1, -1), u = 1, t = -1. Label softmax: odds exp(2 s) = 3 for the right class.
    # Distributions: odds exp(2 / tau) = 3 and 1/3, so KL = (3/4 - 1/4) log 3.
    student, teacher, centers = (
        torch.tensor(rows, dtype=torch.float64) for rows in ([[1.0]], [[-1.0]], [[2.0], [-5.0]])
    )
    half = math.log(3) / 2
    for label, expected in ((0, math.log(4 / 3)), (1, math.log(4))):
        options = {"alpha": 0.5, "class_scale": half, "temperature": 1 / half}
        loss = cluster(student, teacher, centers, torch.tensor([label]), **options)
        assert loss.label.item() == pytest.approx(expected)
        assert loss.distribution.item() == pytest.approx(math.log(3) / 2)
        assert loss.total.item() == pytest.approx((expected + math.log(3) / 2) / 2)


def test_divergence_is_zero_where_student_equals_teacher_and_positive_elsewhere(
    batch: Batch, set_tile: SetTile
) -> None:
    set_tile((4, 7))
    student, teacher, centers, labels = batch
    same = cluster(student, student.detach(), centers, labels, alpha=0.0)
    assert same.distribution.item() == pytest.approx(0, abs=1e-14)
    assert torch.autograd.grad(same.total, student)[0].abs().max().item() == pytest.approx(0, abs=1e-14)
    assert cluster(student, teacher, centers, labels).distribution.item() > 0


def test_loss_follows_rows_and_classes_through_any_order(batch: Batch, set_tile: SetTile) -> None:
    expected = cluster(*batch).total
    set_tile((4, 7))
    student, teacher, centers, labels = batch
    generator = torch.Generator().manual_seed(0)
    rows, classes = torch.randperm(N, generator=generator), torch.randperm(K, generator=generator)
    moved = cluster(student[rows], teacher[rows], centers[classes], classes.argsort()[labels[rows]])
    torch.testing.assert_close(moved.total, expected)
    torch.testing.assert_close(cluster(student, teacher, 7 * centers, labels).total, expected)


@pytest.mark.parametrize("tile", [None, (2, 3)])
def test_gradients_pass_gradcheck(unit_rows: Make, tile: Tile, set_tile: SetTile) -> None:
    set_tile(tile)
    labels = torch.tensor([0, 3, 3, 1])

    def losses(student: Tensor, teacher: Tensor, centers: Tensor) -> tuple[Tensor, ...]:
        loss = cluster(student, teacher, centers, labels, **OPTIONS)
        return loss.total, loss.label, loss.distribution

    assert torch.autograd.gradcheck(losses, (unit_rows(4, 3), unit_rows(4, 3, seed=1), unit_rows(5, 3, seed=2)))


def test_second_backward_pass_gives_the_same_gradient(batch: Batch) -> None:
    student, _, centers, _ = batch
    total = cluster(*batch).total
    first = torch.autograd.grad(2 * total, [student, centers], retain_graph=True)
    assert_all_close(torch.autograd.grad(2 * total, [student, centers]), first)


def test_all_classes_sampled_is_the_full_loss(batch: Batch) -> None:
    student, _, centers, _ = batch
    full, all_sampled = cluster(*batch, **OPTIONS), sampled(batch, torch.arange(K), **OPTIONS)
    torch.testing.assert_close(all_sampled.total, full.total)
    assert_all_close(
        torch.autograd.grad(all_sampled.total, [student, centers]), torch.autograd.grad(full.total, [student, centers])
    )


def test_sampled_classes_alone_enter_the_softmax_and_get_a_gradient(batch: Batch) -> None:
    student, teacher, centers, labels = batch
    classes = sample_classes(labels, K, 0.6, torch.Generator().manual_seed(0))
    loss = sampled(batch, classes, **OPTIONS)
    rows = centers[classes].detach().requires_grad_()
    expected = naive(student, teacher, rows, positions(labels, classes), **OPTIONS)
    torch.testing.assert_close(loss.total, expected.total)
    by_centers, by_rows = torch.autograd.grad(loss.total, centers)[0], torch.autograd.grad(expected.total, rows)[0]
    torch.testing.assert_close(by_centers[classes], by_rows)
    others = torch.ones(K, dtype=torch.bool).index_fill_(0, classes, False)
    assert others.any()
    assert (by_centers[others] == 0).all()


def test_sample_holds_every_positive_and_uniform_others() -> None:
    labels = torch.tensor([7, 7, 90, 3])
    draws = [sample_classes(labels, 100, 0.1, torch.Generator().manual_seed(seed)) for seed in range(300)]
    for classes in draws:
        assert len(classes) == 10
        assert torch.equal(classes, classes.unique())
        assert torch.isin(labels, classes).all()
    counts = torch.cat(draws).bincount(minlength=100)
    assert (counts[[3, 7, 90]] == 300).all()
    others = counts[[c for c in range(100) if c not in (3, 7, 90)]].double()  # each expects 300 * 7 / 97 = 21.6
    assert 8 <= others.min() <= others.max() <= 42
    assert torch.equal(sample_classes(labels, 100, 0.1, torch.Generator().manual_seed(5)), draws[5])
    assert sample_classes(labels, 100, 0.01).tolist() == [3, 7, 90]  # more positives than the rate allows
    assert torch.equal(sample_classes(labels, 100, 1.0), torch.arange(100))


@pytest.mark.parametrize("cuts", [(0, K), (0, 11, K), (0, 1, 1, 20, K)])
def test_shards_of_classes_join_into_the_whole(batch: Batch, cuts: tuple[int, ...], set_tile: SetTile) -> None:
    set_tile((4, 5))
    student, teacher, centers, labels = batch
    shards = [
        ClusterInputs(
            student=student,
            teacher=teacher,
            centers=centers[start:stop],
            labels=labels,
            softmaxes=Softmaxes(class_scale=3.0, temperature=0.2),
            first_class=start,
        )
        for start, stop in itertools.pairwise(cuts)
    ]
    sums = combine([partial_sums(shard) for shard in shards])
    weights = RowWeights(label=0.6 / N, distribution=0.4 / N)
    gradients = [partial_gradients(shard, weights, [True] * 3, sums)[1] for shard in shards]
    whole = naive(*batch, **OPTIONS)
    torch.testing.assert_close(sums.label_loss().mean(), whole.label)
    torch.testing.assert_close(sums.divergence().mean(), whole.distribution)
    joined = [
        torch.stack([g.student for g in gradients if g.student is not None]).sum(0),
        torch.stack([g.teacher for g in gradients if g.teacher is not None]).sum(0),
        torch.cat([g.centers for g in gradients if g.centers is not None]),
    ]
    assert_all_close(joined, torch.autograd.grad(whole.total, [student, teacher, centers]))


def test_labels_alone_are_partial_fc(batch: Batch, set_tile: SetTile) -> None:
    set_tile((4, 7))
    student, teacher, centers, labels = batch
    loss = cluster(student, teacher, centers, labels, alpha=1.0, class_scale=64.0)
    expected = F.cross_entropy(64.0 * F.linear(student, F.normalize(centers)), labels)
    torch.testing.assert_close(loss.total, expected)
    assert_all_close(
        torch.autograd.grad(loss.total, [student, centers]), torch.autograd.grad(expected, [student, centers])
    )


def partial_fc(student: Tensor, centers: Tensor, labels: Tensor, sampled: list[int], scale: float) -> Tensor:
    """An et al. 2021, the softmax over positive and sampled negative classes, as printed: one exponential at a time."""
    losses = []
    for x, y in zip(student, labels.tolist(), strict=True):
        exponentials = {j: torch.exp(scale * (centers[j] / centers[j].norm()) @ x) for j in sampled}
        losses.append(-torch.log(exponentials[y] / sum(exponentials.values())))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("class_scale", [1.0, 64.0])
@pytest.mark.parametrize("tile", [None, (4, 7)])
def test_labels_alone_with_sampled_classes_are_partial_fc(
    batch: Batch, class_scale: float, tile: Tile, set_tile: SetTile
) -> None:
    set_tile(tile)
    student, teacher, centers, labels = batch
    classes = sample_classes(labels, K, 0.7, torch.Generator().manual_seed(0))
    negatives = set(classes.tolist()) - set(labels.tolist())
    assert 0 < len(negatives) < K - len(labels.unique())
    expected = partial_fc(student, centers, labels, sorted({*labels.tolist(), *negatives}), class_scale)
    by_student, by_centers = torch.autograd.grad(expected, [student, centers])
    options: dict[str, Any] = {"alpha": 1.0, "class_scale": class_scale}

    loss = sampled(batch, classes, **options).total
    assert_all_close([loss, *torch.autograd.grad(loss, [student, centers])], [expected, by_student, by_centers])

    # As the class head trains: the sampled rows are a leaf of their own, and labels count among them.
    rows = centers[classes].detach().requires_grad_()
    loss = cluster(student, teacher, rows, positions(labels, classes), **options).total
    assert_all_close([loss, *torch.autograd.grad(loss, [student, rows])], [expected, by_student, by_centers[classes]])


@pytest.mark.parametrize("tile", [None, (4, 7)])
def test_half_precision_at_scale_100_is_finite_and_computed_in_float32(
    unit_rows: Make, tile: Tile, set_tile: SetTile
) -> None:
    set_tile(tile)
    student = unit_rows(N, 32, dtype=torch.bfloat16)
    teacher = -student.detach().half()
    centers = torch.cat([student.detach().float(), -student.detach().float()]).requires_grad_()
    labels = torch.arange(N) + N  # the opposite of every student row: log-probability about -200
    options: dict[str, Any] = {"class_scale": 100.0, "temperature": 0.01, "alpha": 0.5}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = cluster(student, teacher, centers, labels, **options)
        by_student, by_centers = torch.autograd.grad(loss.total, [student, centers])
    assert (loss.total.dtype, by_student.dtype, by_centers.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    assert torch.isfinite(torch.cat([by_student.flatten().float(), by_centers.flatten()])).all()
    exact = cluster(student.detach().double(), teacher.double(), centers.detach().double(), labels, **options)
    torch.testing.assert_close(loss.total.double(), exact.total, rtol=1e-5, atol=0)


def test_logits_of_all_rows_never_exist_at_once(unit_rows: Make, largest_storage: type, set_tile: SetTile) -> None:
    n, dim, k = 512, 8, 10_000
    student, teacher = (unit_rows(n, dim, seed=seed, dtype=torch.float32) for seed in (0, 1))
    centers, labels = unit_rows(k, dim, seed=2, dtype=torch.float32), torch.arange(n)
    with largest_storage() as largest:
        cluster(student, teacher.detach(), centers, labels).total.backward()
    assert largest.num_bytes < 4 * n * k * 0.9
    few = student[:64].detach().requires_grad_(), teacher[:64].detach(), centers[:4000], labels[:64]
    set_tile((4, 100))
    with largest_storage() as largest:
        cluster(*few).label.backward()
    assert largest.num_bytes <= max(4 * 2 * 4 * 4000, 4 * k * dim)


def test_gradient_steps_reduce_both_losses(batch: Batch, set_tile: SetTile) -> None:
    set_tile((4, 8))
    student, teacher, centers, labels = batch
    parameter = student.detach().float().requires_grad_()
    rows = centers.detach().float().requires_grad_()
    optimizer = torch.optim.Adam([parameter, rows], lr=0.05)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        unit = F.normalize(parameter, dim=1)
        loss = cluster(unit, teacher.detach().float(), rows, labels, alpha=0.5, class_scale=10.0)
        loss.total.backward()
        optimizer.step()
        losses.append((loss.label.item(), loss.distribution.item()))
    assert losses[-1][0] < 0.5 * losses[0][0]
    assert losses[-1][1] < 0.5 * losses[0][1]


def test_wrong_input_is_named_with_the_remedy(batch: Batch) -> None:
    student, teacher, centers, labels = batch
    with pytest.raises(ValueError, match=r"labels lie in .*\.\.29, but there are 29 centers"):
        cluster(student, teacher, centers, labels.index_fill(0, torch.tensor([0]), K))
    with pytest.raises(ValueError, match="is not among the 2 sampled classes"):
        sampled(batch, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"temperature=0\.0"):
        cluster(*batch, temperature=0.0)
    with pytest.raises(ValueError, match=r"sample_rate=10"):
        sample_classes(labels, K, 10.0)


@pytest.mark.usefixtures("unchecked_shapes")
def test_shapes_that_differ_are_named_with_the_remedy(batch: Batch) -> None:
    student, teacher, centers, labels = batch
    with pytest.raises(ValueError, match="student is 5 wide, teacher 6: project the student first"):
        cluster(student[:, :5], teacher, centers, labels)
    with pytest.raises(ValueError, match=r"centers are \(29, 5\), student and teacher 6 wide"):
        cluster(student, teacher, centers[:, :5], labels)
    with pytest.raises(ValueError, match=r"labels are \(12,\), but there are 13 rows"):
        cluster(student, teacher, centers, labels[1:])
