from pathlib import Path

import pytest

from tests.faults.children import run_in_fresh_process


@pytest.mark.slow
def test_numbers_that_are_not_finite_are_stopped_or_skipped_and_never_kept(tmp_path: Path) -> None:
    for outcome in run_in_fresh_process("numbers", tmp_path, size="small"):
        assert outcome.num_survived == outcome.num_cases > 0, outcome.notes
