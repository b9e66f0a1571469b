from __future__ import annotations

import numpy as np
import pytest

from distilclip.errors import InputError
from distilclip.scoring.cut import cut_share, cut_value, share_curve
from distilclip.scoring.pair_scores import BLOCK_ROWS, clip_score, nearest_targets, neg_clip_loss, norm_similarity


def rows(num: int, dim: int = 24, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(num, dim)).astype(np.float16)


def unit(x: np.ndarray) -> np.ndarray:
    exact = x.astype(np.float64)
    return exact / np.linalg.norm(exact, axis=1, keepdims=True)


@pytest.mark.parametrize("num", [1, 300, BLOCK_ROWS + 7])
def test_scores_equal_a_reference_in_float64(num: int) -> None:
    image, text, other_image, other_text = rows(num), rows(num, seed=1), rows(50, seed=2), rows(50, seed=3)
    x, y, p, q = (unit(part) for part in (image, text, other_image, other_text))
    np.testing.assert_allclose(clip_score(image, text), (x * y).sum(axis=1), atol=1e-7)
    np.testing.assert_allclose(norm_similarity(image, other_image), (x @ p.T).max(axis=1), atol=1e-6)
    scale = 30.0
    same = np.where(np.arange(num) % 3 == 0, np.arange(num) % 50, -1)
    left_out = same[:, None] == np.arange(50)

    def log_mean_exp(cosines: np.ndarray) -> np.ndarray:
        values = np.where(left_out, 0.0, np.exp(scale * cosines))
        return np.log(values.sum(axis=1) / (~left_out).sum(axis=1))

    expected = (x * y).sum(axis=1) - (log_mean_exp(x @ q.T) + log_mean_exp(y @ p.T)) / (2 * scale)
    found = neg_clip_loss(image, text, others=(other_image, other_text), scale=scale, same=same)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_neg_clip_loss_takes_off_what_fits_everything() -> None:
    """Both captions have the cosine 0.6 to their pictures; the second fits every other picture as well."""
    image, others = np.eye(5)[[0, 1]], np.eye(5)[[2, 3]]
    text = np.array([[0.6, 0, 0, 0, 0.8], [0, 0.6, 0.8 / 2**0.5, 0.8 / 2**0.5, 0]])
    np.testing.assert_allclose(clip_score(image, text), [0.6, 0.6])
    scores = neg_clip_loss(image, text, others=(others, others), scale=10.0)
    # Of the first, all cosines to others are 0; of the second caption, both are 0.8 / sqrt(2).
    np.testing.assert_allclose(scores, [0.6, 0.6 - 0.8 / 2**0.5 / 2], atol=1e-6)


def test_a_share_keeps_the_best_and_all_that_are_equal_to_the_last() -> None:
    scores = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    cut = cut_share(scores, share=0.3)
    assert cut.num_kept == 300
    assert (scores >= np.float32(cut.threshold)).sum() == 300
    assert cut_share(np.zeros(10, np.float32), share=0.1).num_kept == 10
    assert cut_share(scores, share=1.0).num_kept == 1000
    assert cut_value(scores, threshold=0.0, side="at-least").num_kept == (scores >= 0).sum()
    assert cut_value(scores, threshold=0.0, side="below").num_kept == (scores < 0).sum()
    with pytest.raises(InputError, match=r"No row has a score of 9 or more: the largest is 3\.\d+"):
        cut_value(scores, threshold=9.0, side="at-least")
    with pytest.raises(InputError, match=r"No row has a score below -9: the smallest is -\d"):
        cut_value(scores, threshold=-9.0, side="below")
    curve = share_curve(scores)
    assert [point["share"] for point in curve][-1] == 1.0
    assert [cut_share(scores, share=point["share"]).threshold for point in curve] == [p["threshold"] for p in curve]


def test_the_nearest_target_is_found_over_several_blocks() -> None:
    image, targets = rows(60), rows(BLOCK_ROWS + 500, seed=5)
    targets[[3, 4200, 4500]] = image[[10, 20, 20]]  # equal rows, two of them of one row
    found = nearest_targets(image, targets)
    cosines = unit(image) @ unit(targets).T
    np.testing.assert_array_equal(found.place, cosines.argmax(axis=1))  # of equal targets the first
    np.testing.assert_array_equal(found.similarity, norm_similarity(image, targets))
    assert found.place[[10, 20]].tolist() == [3, 4200]
    assert found.similarity[[10, 20]].tolist() == [1.0, 1.0]
    np.testing.assert_allclose(found.similarity, cosines.max(axis=1), atol=1e-7)
