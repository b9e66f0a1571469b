"""Folders that another version wrote: `make torture` takes those of more stages, and an older version too."""

from __future__ import annotations

from pathlib import Path

from tests.faults.children import run_in_fresh_process


def test_a_store_of_another_version_is_refused_and_left_alone(tmp_path: Path) -> None:
    for outcome in run_in_fresh_process("format_versions", tmp_path, size="small"):
        assert outcome.num_cases == 5
        assert outcome.num_survived == outcome.num_cases, outcome.notes
