import numpy as np
import pytest

from distilclip.vectors.kernels import product_error
from distilclip.vectors.points import Points


def test_the_examples_of_the_docstrings() -> None:
    points = Points.of([[3.0, 4.0], [0.0, 2.0]], metric="cosine")
    assert points.block(np.arange(2)).numpy() == pytest.approx(np.array([[0.6, 0.8], [0, 1]]))
    assert points.scale == pytest.approx([0.2, 0.5])
    assert points.squared(np.array([0]), np.array([1])) == pytest.approx([0.4])
    assert product_error(512, 1.0) == pytest.approx(1.2e-4, rel=0.05)
