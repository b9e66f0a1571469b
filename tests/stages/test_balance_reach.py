"""A target that `max_threshold` cannot reach is told on a sample, before the search."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distilclip.errors import InputError
from distilclip.stages import balance as stage
from distilclip.stages.balance import Config, main
from tests.stages.conftest import contents, write_store


def config(store: str, out: Path, **options: Any) -> Config:
    return Config(store=store, out=str(out), metric="euclidean", device="cpu", target_removed=0.3, **options)


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many rows as a test has are as many as are looked at first."""
    monkeypatch.setattr(stage, "FORECAST_FROM", 100)


@pytest.mark.usefixtures("checked")
@pytest.mark.parametrize("options", [{}, {"block_rows": 30}, {"rule": "topk", "top_k": 3}])
def test_nothing_is_searched_and_the_folder_takes_a_larger_threshold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    store, _, _ = write_store(tmp_path / "store")
    with monkeypatch.context() as patched:
        patched.setattr(stage, "connected", None)  # a search would fail
        with pytest.raises(InputError, match=r"target_removed=0\.3 is out of reach of max_threshold=0\.01"):
            main(config(store, tmp_path / "out", max_threshold=0.01, **options))
    result = main(config(store, tmp_path / "out", max_threshold=1.0, **options))
    assert result["removed_ratio"] == pytest.approx(0.3, abs=0.01)


def test_a_run_that_passes_is_the_run_without_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, _, _ = write_store(tmp_path / "store", same_file=[(1, 5), (2, 9)])
    main(config(store, tmp_path / "plain", max_threshold=0.9))
    monkeypatch.setattr(stage, "FORECAST_FROM", 100)
    main(config(store, tmp_path / "checked", max_threshold=0.9))
    assert contents(tmp_path / "checked") == contents(tmp_path / "plain")


def test_few_rows_are_searched_at_once(tmp_path: Path) -> None:
    store, _, _ = write_store(tmp_path / "store")
    with pytest.raises(InputError, match=r"below the largest threshold searched only .* The search is kept"):
        main(config(store, tmp_path / "out", max_threshold=0.01))


@pytest.mark.usefixtures("checked")
def test_copies_of_one_file_count_as_near(tmp_path: Path) -> None:
    copies = [(row, row + 60) for row in range(60)]
    store, _, _ = write_store(tmp_path / "store", same_file=copies)
    assert main(config(store, tmp_path / "out", max_threshold=0.01))["removed_ratio"] > 0.25
