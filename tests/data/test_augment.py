from __future__ import annotations

import numpy as np
import pytest

from distilclip.data.decode import Augmentation
from distilclip.errors import InputError


def generator(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("size", [(40, 30), (1, 1), (500, 3), (3, 500)])
def test_the_crop_lies_inside_and_shows_the_stated_share(size: tuple[int, int]) -> None:
    for seed in range(200):
        crop = Augmentation(min_crop=0.6).draw(*size, generator(seed))
        assert 0 <= crop.left < crop.right <= 1 + 1e-9
        assert 0 <= crop.top < crop.bottom <= 1 + 1e-9
        if size == (40, 30):  # aspects of 3/4 to 4/3 fit, so only the largest areas are clipped
            assert (crop.right - crop.left) * (crop.bottom - crop.top) >= 0.55


def test_areas_aspects_and_flips_are_spread_as_stated() -> None:
    crops = [Augmentation(min_crop=0.2, flip=0.3).draw(1000, 1000, generator(seed)) for seed in range(2000)]
    area = np.array([(c.right - c.left) * (c.bottom - c.top) for c in crops])
    aspect = np.array([(c.right - c.left) / (c.bottom - c.top) for c in crops])
    free = (area < 0.5) & (area > 0.2)  # no crop so small is narrowed by the picture
    assert np.allclose(np.quantile(np.log(aspect[free]), [0.01, 0.5, 0.99]), np.log([0.755, 1, 1.325]), atol=0.05)
    assert (area < 0.5).mean() == pytest.approx(0.3 / 0.8, abs=0.04)
    assert np.mean([crop.flip for crop in crops]) == pytest.approx(0.3, abs=0.03)


def test_the_crop_is_a_function_of_the_generator_and_not_of_the_share_of_flips() -> None:
    first, again, other = (Augmentation(min_crop=0.5).draw(40, 30, generator(seed)) for seed in (1, 1, 2))
    assert first == again != other
    mirrored = Augmentation(min_crop=0.5, flip=1.0).draw(40, 30, generator(1))
    assert mirrored.flip
    assert (mirrored.left, mirrored.bottom) == (first.left, first.bottom)


def test_the_whole_square_picture_is_one_crop() -> None:
    widest = max(
        crop.right - crop.left for crop in (Augmentation(min_crop=1.0).draw(32, 32, generator(i)) for i in range(9))
    )
    assert widest == 1


@pytest.mark.parametrize(
    ("values", "message"), [({"min_crop": 0.0}, "min_crop is 0.0"), ({"flip": 1.5}, "flip is 1.5")]
)
def test_shares_that_are_none_are_refused(values: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Augmentation(**values)
