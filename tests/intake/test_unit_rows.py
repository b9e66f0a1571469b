"""Vectors as rows of unit length in half precision."""

from __future__ import annotations

import numpy as np
import pytest

from distilclip.data.store import not_unit
from distilclip.intake import unit_rows
from distilclip.intake.unit_rows import to_unit_rows
from tests.intake.made_embeddings import unit_rows as made_rows


def test_rows_of_unit_length_keep_their_bits_and_their_memory() -> None:
    rows = made_rows(100, 16, seed=0)
    found = to_unit_rows(rows)
    assert found.rows is rows
    assert found.num_normalised == 0
    assert found.usable.all()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_other_rows_are_divided_by_their_length(dtype: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unit_rows, "BLOCK_ROWS", 7)
    rows = made_rows(50, 16, seed=1, dtype=np.float64)
    long = np.arange(50) % 3 == 1
    vectors = np.where(long[:, None], rows * np.linspace(0.2, 5, 50)[:, None], rows).astype(dtype)
    found = to_unit_rows(vectors)
    exact = vectors.astype(np.float64)
    naive = (exact / np.linalg.norm(exact, axis=1, keepdims=True)).astype(np.float16)
    changed = not_unit(vectors.astype(np.float16))
    np.testing.assert_array_equal(found.rows, np.where(changed[:, None], naive, vectors.astype(np.float16)))
    assert found.num_normalised == changed.sum() > 10
    assert found.usable.all()
    assert not not_unit(found.rows).any()


def test_what_has_no_direction_is_not_usable() -> None:
    vectors = np.eye(6, dtype=np.float32)
    vectors[1, 2], vectors[2], vectors[3, 0] = np.nan, 0, np.inf
    vectors[4] *= 1e30  # finite, though beyond half precision
    vectors[5] *= 1e-30
    found = to_unit_rows(vectors)
    assert found.usable.tolist() == [True, False, False, False, True, True]
    assert not found.rows[~found.usable].any()
    np.testing.assert_array_equal(found.rows[found.usable], np.eye(6, dtype=np.float16)[found.usable])
    assert found.num_normalised == 2
