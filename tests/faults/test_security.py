from pathlib import Path

import pytest

from tests.faults.children import run_in_fresh_process


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pickles", "hostile_files", "private_words"])
def test_nothing_is_run_let_out_or_let_grow(name: str, tmp_path: Path) -> None:
    for outcome in run_in_fresh_process(name, tmp_path, size="small"):
        assert outcome.num_survived == outcome.num_cases > 0, f"{outcome.promise} {outcome.notes}"
