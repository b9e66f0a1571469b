from __future__ import annotations

import numpy as np
import pytest
import torch

from distilclip.evaluate.scores import retrieval_scores
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
