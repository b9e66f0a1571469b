from __future__ import annotations

import torch
from torch.nn import functional as F

from distilclip.losses.features import Features
from distilclip.models.heads import Heads


def features(n: int, dim: int, seed: int) -> Features:
    generator = torch.Generator().manual_seed(seed)
    image, text = (F.normalize(torch.randn(n, dim, generator=generator), dim=1) for _ in range(2))
    return Features(image=image, text=text, scale=torch.tensor(10.0))


def test_equal_widths_need_no_projection() -> None:
    student = features(4, 8, 0)
    heads = Heads(8, 8)
    projected = heads.project(student)
    assert torch.allclose(projected.image, student.image)
    assert not any("projection" in name for name, _ in heads.named_parameters())


def test_projection_is_the_linear_map_then_unit_length() -> None:
    student = features(4, 8, 0)
    heads = Heads(8, 6)
    projected = heads.project(student)
    expected = student.text @ heads.text_projection.weight.T
    assert torch.allclose(projected.text, expected / expected.norm(dim=1, keepdim=True))
    assert projected.image.shape == (4, 6)


def test_fused_embeddings_work_when_widths_differ() -> None:
    heads = Heads(8, 6, augmented=True)
    teacher = features(4, 6, 1)
    image, text = heads.fuse(heads.project(features(4, 8, 0)), teacher)
    assert image.shape == text.shape == (4, 6)
    assert torch.allclose(image.norm(dim=1), torch.ones(4))


def test_scales_start_at_the_papers_temperature() -> None:
    heads = Heads(8, 8)
    for term in ("instance", "interactive", "augmented"):
        assert torch.isclose(heads.scale(term), torch.tensor(1 / 0.07))
