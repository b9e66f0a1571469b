"""A store and tars in the small: `make torture` has a million rows and 5,000 tars."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest

from tests.faults.children import run_in_fresh_process
from tests.faults.large_store import make_tar, sample_bytes


def test_tars_that_are_made_at_once_are_tars() -> None:
    content = make_tar(np.array([7, 123456789]), 40)
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        assert tar.getnames() == ["000000007.jpg", "000000007.txt", "123456789.jpg", "123456789.txt"]
        captions = [tar.extractfile(name).read() for name in ("000000007.txt", "123456789.txt")]  # type: ignore[union-attr]
        assert tar.getmember("123456789.jpg").offset == sample_bytes(40)
    assert captions == [b"a picture of a number, a pictur000000007", b"a picture of a number, a pictur123456789"]


@pytest.mark.slow
def test_stages_measure_their_memory(tmp_path: Path) -> None:
    for outcome in run_in_fresh_process("large_store", tmp_path, size="small"):
        assert outcome.num_survived == outcome.num_cases, outcome.notes
        assert " MB, " in outcome.how
