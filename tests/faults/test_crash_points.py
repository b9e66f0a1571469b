"""A sample of the crash points: `make torture` takes all."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.children import run_in_fresh_process


@pytest.mark.slow
def test_stages_survive_kills_at_file_operations(tmp_path: Path) -> None:
    for outcome in run_in_fresh_process("crash_points", tmp_path, size="small"):
        assert outcome.num_cases > 5
        assert outcome.num_survived == outcome.num_cases, outcome.notes
