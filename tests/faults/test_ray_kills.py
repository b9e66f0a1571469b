"""Ray workers killed while balance searches: `make torture` also takes embed and cluster."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.children import run_in_fresh_process


@pytest.mark.xdist_group("ray")
@pytest.mark.slow
def test_killed_workers_and_a_killed_node_change_nothing(tmp_path: Path) -> None:
    for outcome in run_in_fresh_process("ray_kills", tmp_path, size="small"):
        assert outcome.num_cases > 1
        assert outcome.num_survived == outcome.num_cases, outcome.notes
