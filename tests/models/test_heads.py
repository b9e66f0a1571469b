from __future__ import annotations

import torch
from torch.nn import functional as F

from distilclip.losses.features import Features, RankRows, Sides
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


def test_a_queue_holds_the_last_rows_of_any_batches() -> None:
    """Three batches of 4 rows, the last one of 9, in a queue of 6."""
    heads, seen = Heads(8, 8, queue_length=6), torch.zeros(0, 8)
    assert heads.queued("image").shape == (0, 8)
    for seed, num_rows in enumerate((4, 4, 4, 9)):
        teacher = features(num_rows, 8, seed)
        heads.remember([teacher], RankRows.alone(num_rows), None)
        seen = torch.cat([seen, teacher.image])[-6:]
        assert sorted(heads.queued("image").tolist()) == sorted(seen.tolist())
    assert {"queue.image", "queue.num_text"} <= set(heads.state_dict())


def test_a_queue_takes_only_the_rows_that_a_teacher_saw() -> None:
    heads, teacher = Heads(8, 8, queue_length=6), features(4, 8, 0)
    has_image, has_text = torch.tensor([True, False, True, False]), torch.tensor([False, True, True, True])
    heads.remember([teacher], RankRows.alone(4), Sides.of(has_image, has_text, RankRows.alone(4)))
    assert torch.equal(heads.queued("image"), teacher.image[has_image])
    assert torch.equal(heads.queued("text"), teacher.text[has_text])
