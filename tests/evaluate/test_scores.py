from __future__ import annotations

import numpy as np
import pytest
import torch

from distilclip.evaluate.scores import describe_classes, retrieval_scores, zero_shot_scores
from distilclip.evaluate.zero_shot import ZeroShot
from distilclip.measures.metrics import share_interval
from distilclip.measures.retrieval import retrieval
from distilclip.sets.score import Score
from tests.measures.test_retrieval import unit


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


def test_classes_and_confusions_by_hand() -> None:
    # Of class 0 one of three is right, and both others are taken for 2; class 1 has no image; of class 2 one of one.
    found = ZeroShot(
        predictions=torch.tensor([0, 2, 2, 2]), rank=torch.tensor([0, 1, 2, 0]), labels=torch.tensor([0, 0, 0, 2])
    )
    told = describe_classes(found, ["cat", "dog", "owl"])
    assert told == {"classes": [["cat", 3, 1], ["owl", 1, 1]], "confusions": [["cat", "owl", 2]]}
    base = Score(set="s", task="zero-shot", metric="", value=None, num_classes=3)
    scores = {
        score.metric: score for score in zero_shot_scores(found, base, headline="top1", names=["cat", "dog", "owl"])
    }
    assert scores["top1"].details == told
    assert scores["mean_per_class"].details == {}
    assert zero_shot_scores(found, base, headline="top1")[0].details == {}


def test_of_many_classes_either_end_is_listed() -> None:
    labels = torch.arange(300)
    rank = (labels < 120).long()
    found = ZeroShot(predictions=torch.where(rank > 0, 299, labels), rank=rank, labels=labels)
    told = describe_classes(found, [str(label) for label in range(300)])
    assert [row[0] for row in told["classes"]] == [str(n) for n in [*range(50), *range(250, 300)]]
    assert len(told["confusions"]) == 20
