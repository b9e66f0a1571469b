import numpy as np
import pytest
import torch

from distilclip.vectors.points import Points
from distilclip.vectors.projection import Projection


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
    projection = Projection.fit(points, np.arange(300), width=width)
    result = projection.project(points, np.arange(300))
    values = result.values.double().numpy()
    assert values.shape == (300, min(width, 90))
    before = np.linalg.norm(x[:, None].astype(np.float64) - x[None].astype(np.float64), axis=2)
    after = np.linalg.norm(values[:, None] - values[None], axis=2)
    assert (after <= before + 2 * result.error).all()
    assert np.linalg.norm(values, axis=1).max() <= result.radius
    assert np.linalg.norm(x.astype(np.float64) - projection.mean.double().numpy(), axis=1).max() <= result.radius


def test_leading_directions_keep_most_of_a_distance_and_errors_are_small() -> None:
    x = rows_of("power law")
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    points = Points.of(x, metric="euclidean")
    result = Projection.fit(points, np.arange(300), width=30).project(points, np.arange(300))
    assert result.error < 0.01
    values = result.values.double().numpy()
    before = np.linalg.norm(x[:150] - x[150:], axis=1)
    assert np.median(np.linalg.norm(values[:150] - values[150:], axis=1) / before) > 0.8


def test_the_example_of_the_docstring() -> None:
    projection = Projection(mean=torch.zeros(3), directions=torch.tensor([[1.0], [0.0], [0.0]]))
    x = np.array([[3.0, 0.0, 4.0], [3.0, 4.0, 0.0], [0.0, 0.0, 1.0]])
    result = projection.project(Points.of(x, metric="euclidean"), np.arange(3))
    assert result.values.tolist() == [[3, 4], [3, 4], [0, 1]]
    assert np.linalg.norm(x[0] - x[[1, 2]], axis=1) == pytest.approx([5.66, 4.24], abs=0.01)


def test_what_is_left_over_of_a_point_tightens_the_bound() -> None:
    # One direction kept: the two points agree along it, and differ in what the projection leaves over.
    x = np.zeros((200, 70))
    x[:, 0] = np.linspace(-5, 5, 200)
    x[7, 5] = x[7, 0]
    x[7, 0] = x[8, 0]
    points = Points.of(x, metric="euclidean")
    result = Projection.fit(points, np.arange(200), width=2).project(points, np.arange(200))
    values = result.values.double().numpy()
    assert np.linalg.norm(values[7] - values[8]) == pytest.approx(np.linalg.norm(x[7] - x[8]), rel=0.05)
