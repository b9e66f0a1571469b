from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from distilclip.measures.agreement import agreement, linear_cka, mean_cosine, mean_kl, top_k_overlap


def unit(num_rows: int, dim: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(num_rows, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def classifier(weight: torch.Tensor, scale: float = 5.0) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda image: scale * image @ weight.T


def test_a_model_agrees_with_itself() -> None:
    x, head = unit(30, 6, seed=3), classifier(unit(4, 6, seed=4))
    found = agreement(x, x, classifiers=(head, head), num_classes=4)
    assert found.top1 == 1.0
    assert found.kl == pytest.approx(0, abs=1e-12)
    assert found.cka == pytest.approx(1)
    assert found.cosine == pytest.approx(1)


def test_agreement_equals_its_parts_written_out() -> None:
    student, teacher = unit(25, 6, seed=5), unit(25, 8, seed=6)
    heads = classifier(unit(4, 6, seed=7), scale=3.0), classifier(unit(4, 8, seed=8), scale=7.0)
    found = agreement(student, teacher, classifiers=heads, num_classes=4)
    ours, theirs = heads[0](student), heads[1](teacher)
    divergence = F.kl_div(ours.log_softmax(1), theirs.log_softmax(1), reduction="batchmean", log_target=True)
    assert found.kl == pytest.approx(divergence.item(), rel=1e-5)
    assert found.top1 == (ours.argmax(1) == theirs.argmax(1)).double().mean().item()
    assert found.cosine is None


def test_rotated_embeddings_agree_in_decision_but_not_in_cosine() -> None:
    x, weight = unit(30, 6, seed=9), unit(4, 6, seed=10)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(11)))[0]
    found = agreement(x, x @ rotation, classifiers=(classifier(weight), classifier(weight @ rotation)), num_classes=4)
    assert found.top1 == 1.0
    assert found.cka == pytest.approx(1, abs=1e-6)
    assert found.cosine is not None
    assert found.cosine < 0.9


def test_without_classes_only_embeddings_are_compared() -> None:
    found = agreement(unit(10, 4, seed=12), unit(10, 4, seed=13))
    assert found.top1 is None
    assert found.kl is None
    assert 0 <= found.cka <= 1


def test_the_modules_worked_example() -> None:
    x = unit(20, 2, seed=14)
    found = agreement(x, torch.stack([-x[:, 1], x[:, 0]], dim=1))
    assert (found.cosine, found.cka) == (pytest.approx(0, abs=1e-6), pytest.approx(1))
    student, teacher = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.75, 0.25]]).log()
    assert mean_kl(student, teacher) == pytest.approx(0.131, abs=5e-4)


# Its parts


def kernel_cka(x: torch.Tensor, y: torch.Tensor) -> float:
    """HSIC of the centred n x n kernels, from its definition."""
    center = torch.eye(len(x), dtype=torch.float64) - 1 / len(x)
    k, m = center @ x.double() @ x.double().T @ center, center @ y.double() @ y.double().T @ center
    return ((k * m).sum() / (k.norm() * m.norm())).item()


def test_cka_in_feature_form_equals_its_kernel_form() -> None:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(40, 5, generator=generator) + 3
    y = torch.cat([x[:, :2] ** 2, torch.randn(40, 6, generator=generator)], dim=1)
    assert linear_cka(x, y) == pytest.approx(kernel_cka(x, y), rel=1e-9)


def test_cka_ignores_rotation_scale_and_shift() -> None:
    x = torch.randn(30, 4, generator=torch.Generator().manual_seed(5))
    rotation = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(6)))[0]
    assert linear_cka(x, 7 * x @ rotation - 2) == pytest.approx(1, abs=1e-6)


def test_a_constant_representation_is_aligned_with_nothing() -> None:
    assert linear_cka(torch.ones(5, 3), torch.randn(5, 3)) == 0.0


def test_kl_is_zero_for_equal_and_known_for_simple_distributions() -> None:
    logits = torch.tensor([[0.3, -1.0, 2.0]])
    assert mean_kl(logits, logits + 5) == pytest.approx(0, abs=1e-12)
    teacher, student = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    assert mean_kl(student, teacher) == pytest.approx(0.5 * np.log(2) + 0.5 * np.log(2 / 3), rel=1e-6)


def test_mean_cosine_by_hand() -> None:
    x, y = torch.tensor([[2.0, 0.0], [1.0, 1.0]]), torch.tensor([[3.0, 0.0], [0.0, 5.0]])
    assert mean_cosine(x, y) == pytest.approx((1 + 0.5**0.5) / 2)


def test_overlap_counts_the_teachers_first_classes_among_the_students() -> None:
    teacher = torch.tensor([[5.0, 4.0, 3.0, 2.0], [1.0, 2.0, 3.0, 4.0]])
    student = torch.tensor([[4.0, 5.0, 3.0, 2.0], [4.0, 3.0, 2.0, 1.0]])
    assert top_k_overlap(student, teacher, top_k=1) == 0
    assert top_k_overlap(student, teacher, top_k=2) == 0.5  # the first row both, the second none
    assert top_k_overlap(student, teacher, top_k=4) == 1
