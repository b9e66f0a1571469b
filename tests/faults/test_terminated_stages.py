"""A sample of the moments at which SIGTERM comes: `make torture` takes more of all stages."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.children import run_in_fresh_process


@pytest.mark.slow
def test_stages_end_in_order_at_sigterm_and_go_on_afterwards(tmp_path: Path) -> None:
    for outcome in run_in_fresh_process("terminated_stages", tmp_path, size="small"):
        assert outcome.num_cases > 0
        assert outcome.num_survived == outcome.num_cases, outcome.notes
