from __future__ import annotations

import numpy as np
import pytest
import torch

from distilclip.data.augment import crop_box, random_resized_crop
from tests.conftest import picture


def test_a_view_is_a_function_of_its_generator() -> None:
    transform = random_resized_crop(16, min_scale=0.5)
    views = [transform(picture(0), np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert torch.equal(views[0], views[1])
    assert not torch.equal(views[0], views[2])
    assert views[0].dtype == torch.uint8
    assert views[0].shape == (3, 16, 16)


@pytest.mark.parametrize("size", [(40, 30), (1, 1), (500, 3), (3, 500)])
def test_the_crop_lies_inside_and_shows_the_stated_share(size: tuple[int, int]) -> None:
    width, height = size
    for seed in range(200):
        left, top, right, bottom = crop_box(width, height, min_scale=0.6, generator=np.random.default_rng(seed))
        assert 0 <= left < right <= width + 1e-9
        assert 0 <= top < bottom <= height + 1e-9
        if size == (40, 30):  # aspects of 3/4 to 4/3 fit, so only the largest areas are clipped
            assert (right - left) * (bottom - top) >= 0.55 * width * height


def test_the_whole_picture_is_a_plain_resize() -> None:
    image = picture(1, (32, 32))
    view = random_resized_crop(32, min_scale=1.0)(image, np.random.default_rng(0))
    assert view.float().mean() == pytest.approx(np.asarray(image).mean(), abs=12)
