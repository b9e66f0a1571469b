from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from distilclip.evaluate.agreement import agreement
from distilclip.evaluate.scores import Score, retrieval_scores
from distilclip.evaluate.zero_shot import TextClassifier
from distilclip.measures.metrics import share_interval
from distilclip.measures.retrieval import retrieval


def unit(num_rows: int, dim: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(num_rows, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def classifier(weight: torch.Tensor, scale: float = 5.0) -> TextClassifier:
    return TextClassifier(weight=weight, scale=scale)


def test_matching_pairs_are_all_found() -> None:
    x = unit(20, 8, seed=0)
    found = retrieval(x, x, torch.arange(20))
    assert found.image_to_text_recall(1) == found.text_to_image_recall(1) == 1.0


def test_recall_counts_ranks_below_k() -> None:
    image = torch.eye(3)
    text = torch.tensor([[0.9, 0.1, 0.0], [0.0, 0.2, 0.9], [0.0, 0.3, 0.8]])
    found = retrieval(image, text, torch.arange(3))
    assert found.image_to_text.tolist() == [0, 1, 1]
    assert found.text_to_image.tolist() == [0, 1, 0]
    assert found.image_to_text_recall(1) == pytest.approx(1 / 3)
    assert found.text_to_image_recall(1) == pytest.approx(2 / 3)
    assert found.image_to_text_recall(2) == found.text_to_image_recall(2) == 1.0


def test_recall_grows_with_k_to_one() -> None:
    found = retrieval(unit(10, 4, seed=1), unit(30, 4, seed=2), torch.arange(30) % 10)
    recalls = [found.image_to_text_recall(k) for k in range(1, 31)]
    assert recalls == sorted(recalls)
    assert recalls[-1] == found.text_to_image_recall(10) == 1.0


def test_captions_are_as_uncertain_as_their_images() -> None:
    """Five captions of an image that are found or missed together are one observation."""
    image = unit(40, 8, seed=9)
    pairs = torch.arange(40).repeat_interleave(5)
    text = torch.where(torch.arange(40)[:, None] % 2 == 0, image, image.roll(1, 0)).repeat_interleave(5, 0)
    scores = retrieval_scores(
        retrieval(image, text, pairs), pairs, Score(set="a", task="retrieval", metric="", value=None)
    )
    found = {score.metric: score for score in scores}["text_to_image_r1"]
    assert found.value == 0.5
    assert found.num_test == 200
    assert (found.low, found.high) == pytest.approx(share_interval(np.arange(40) % 2 == 0), abs=0.01)


def test_a_model_agrees_with_itself() -> None:
    x, head = unit(30, 6, seed=3), classifier(unit(4, 6, seed=4))
    found = agreement(x, x, classifiers=(head, head))
    assert found.top1 == 1.0
    assert found.kl == pytest.approx(0, abs=1e-12)
    assert found.cka == pytest.approx(1)
    assert found.cosine == pytest.approx(1)


def test_agreement_equals_its_parts_written_out() -> None:
    student, teacher = unit(25, 6, seed=5), unit(25, 8, seed=6)
    heads = classifier(unit(4, 6, seed=7), scale=3.0), classifier(unit(4, 8, seed=8), scale=7.0)
    found = agreement(student, teacher, classifiers=heads)
    ours, theirs = 3 * student @ heads[0].weight.T, 7 * teacher @ heads[1].weight.T
    divergence = F.kl_div(ours.log_softmax(1), theirs.log_softmax(1), reduction="batchmean", log_target=True)
    assert found.kl == pytest.approx(divergence.item(), rel=1e-5)
    assert found.top1 == (ours.argmax(1) == theirs.argmax(1)).double().mean().item()
    assert found.cosine is None


def test_rotated_embeddings_agree_in_decision_but_not_in_cosine() -> None:
    x, weight = unit(30, 6, seed=9), unit(4, 6, seed=10)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(11)))[0]
    found = agreement(x, x @ rotation, classifiers=(classifier(weight), classifier(weight @ rotation)))
    assert found.top1 == 1.0
    assert found.cka == pytest.approx(1, abs=1e-6)
    assert found.cosine is not None
    assert found.cosine < 0.9


def test_without_classes_only_embeddings_are_compared() -> None:
    found = agreement(unit(10, 4, seed=12), unit(10, 4, seed=13))
    assert found.top1 is None
    assert found.kl is None
    assert 0 <= found.cka <= 1
