import numpy as np
import pytest

from distilclip.vectors.points import Points
from distilclip.vectors.projection import Contraction


def rows_of(kind: str) -> np.ndarray:
    random = np.random.default_rng(0)
    x: np.ndarray = random.standard_normal((300, 90))
    if kind == "power law":
        x = x / np.arange(1, 91) ** 0.7
    elif kind == "a plane":
        x = x[:, :2] @ random.standard_normal((2, 90))
    elif kind == "far from the origin":
        x = 0.01 * x + 40
    elif kind == "all equal":
        x = np.ones((300, 90))
    return x


@pytest.mark.parametrize("kind", ["sphere", "power law", "a plane", "far from the origin", "all equal"])
@pytest.mark.parametrize("dtype", [np.float16, np.float64])
@pytest.mark.parametrize("width", [20, 100])
def test_no_two_points_move_apart(kind: str, dtype: type, width: int) -> None:
    x = rows_of(kind).astype(dtype)
    points = Points.of(x, metric="euclidean")
    contraction = Contraction.fit(points, np.arange(300), width=width)
    result = contraction.images(points, np.arange(300))
    image = result.image.double().numpy()
    assert image.shape == (300, min(width, 90))
    before = np.linalg.norm(x[:, None].astype(np.float64) - x[None].astype(np.float64), axis=2)
    after = np.linalg.norm(image[:, None] - image[None], axis=2)
    assert (after <= before + 2 * result.error).all()
    assert np.linalg.norm(image, axis=1).max() <= result.radius
    assert np.linalg.norm(x.astype(np.float64) - contraction.mean.double().numpy(), axis=1).max() <= result.radius


def test_leading_directions_keep_most_of_a_distance_and_errors_are_small() -> None:
    x = rows_of("power law")
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    points = Points.of(x, metric="euclidean")
    result = Contraction.fit(points, np.arange(300), width=30).images(points, np.arange(300))
    assert result.error < 0.01
    image = result.image.double().numpy()
    before = np.linalg.norm(x[:150] - x[150:], axis=1)
    assert np.median(np.linalg.norm(image[:150] - image[150:], axis=1) / before) > 0.8


def test_what_is_left_over_of_a_point_tightens_the_bound() -> None:
    # One direction kept: the two points agree along it, and differ in what the projection leaves over.
    x = np.zeros((200, 70))
    x[:, 0] = np.linspace(-5, 5, 200)
    x[7, 5] = x[7, 0]
    x[7, 0] = x[8, 0]
    points = Points.of(x, metric="euclidean")
    result = Contraction.fit(points, np.arange(200), width=2).images(points, np.arange(200))
    image = result.image.double().numpy()
    assert np.linalg.norm(image[7] - image[8]) == pytest.approx(np.linalg.norm(x[7] - x[8]), rel=0.05)
