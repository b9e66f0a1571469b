"""A sample of the races: `make torture` takes more."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.children import run_in_fresh_process


@pytest.mark.slow
def test_one_of_several_processes_completes_a_folder_and_the_others_say_who(tmp_path: Path) -> None:
    for outcome in run_in_fresh_process("two_at_once", tmp_path, size="small"):
        assert outcome.num_cases == 2
        assert outcome.num_survived == outcome.num_cases, outcome.notes
