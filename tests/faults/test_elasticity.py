"""Batches for numbers of processes that change: `make torture` also trains so."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.children import run_in_fresh_process


@pytest.mark.slow
def test_batches_do_not_depend_on_how_many_processes_share_them_at_any_step(tmp_path: Path) -> None:
    for outcome in run_in_fresh_process("elasticity", tmp_path, size="small"):
        assert outcome.num_cases == 40
        assert outcome.num_survived == outcome.num_cases, outcome.notes
