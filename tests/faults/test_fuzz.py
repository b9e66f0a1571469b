from pathlib import Path

from tests.faults.children import run_in_fresh_process


def test_a_seeded_hundred_of_made_up_inputs_all_end_in_order(tmp_path: Path) -> None:
    outcomes = run_in_fresh_process("fuzz", tmp_path, size="small")
    assert sum(outcome.num_cases for outcome in outcomes) >= 100
    for outcome in outcomes:
        assert outcome.num_survived == outcome.num_cases, outcome.notes
