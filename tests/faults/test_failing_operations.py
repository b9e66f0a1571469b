"""A sample of failing file operations: `make torture` takes more of all stages."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.children import run_in_fresh_process


@pytest.mark.slow
def test_stages_say_which_file_failed_and_go_on_afterwards(tmp_path: Path) -> None:
    for outcome in run_in_fresh_process("failing_operations", tmp_path, size="small"):
        assert outcome.num_cases == 3
        assert outcome.num_survived == outcome.num_cases, outcome.notes
