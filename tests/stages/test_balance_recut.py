"""An earlier search cut at another threshold: the same groups as a search of its own, without one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distilclip.errors import InputError
from distilclip.stages import balance as stage
from distilclip.stages.balance import Config, main
from tests.stages.conftest import contents, write_store


@pytest.fixture
def searched(tmp_path: Path) -> tuple[str, str]:
    """A store, and a balance of it that was searched up to 0.5."""
    store, _, _ = write_store(tmp_path / "store")
    out = str(tmp_path / "searched")
    main(config(store, out, threshold=0.3, max_threshold=0.5))
    return store, out


def config(store: str, out: str, **options: Any) -> Config:
    return Config(store=store, out=out, metric="euclidean", device="cpu", **options)


CUTS: list[dict[str, Any]] = [{"threshold": 0.2}, {"target_removed": 0.1}, {"threshold": 0.4, "rule": "cover"}]


@pytest.mark.parametrize("options", CUTS)
def test_a_cut_equals_a_search_of_its_own(
    options: dict[str, Any], searched: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, source = searched
    before = contents(Path(source))
    own = main(config(store, str(tmp_path / "own"), max_threshold=0.5, **options))
    monkeypatch.setattr(stage, "_search", None)  # a search would fail
    cut = main(config(store, str(tmp_path / "cut"), from_folder=source, **options))
    assert cut == own
    assert contents(tmp_path / "cut") == contents(tmp_path / "own")
    assert contents(Path(source)) == before
    assert main(config(store, str(tmp_path / "cut"), from_folder=source, **options)) == cut


def test_a_search_that_ends_below_its_target_is_kept_and_can_be_cut(tmp_path: Path) -> None:
    store, _, _ = write_store(tmp_path / "store")
    short = str(tmp_path / "short")
    with pytest.raises(InputError, match=rf"out of reach.*is kept: .*--from-folder {short}.*--max-threshold"):
        main(config(store, short, target_removed=0.99, max_threshold=0.3))
    cut = main(config(store, str(tmp_path / "cut"), from_folder=short, threshold=0.3))
    own = main(config(store, str(tmp_path / "own"), threshold=0.3))
    assert {name: cut[name] for name in ("num_kept", "num_groups")} == {n: own[n] for n in ("num_kept", "num_groups")}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 0.6}, "was searched up to euclidean 0.5, not 0.6"),
        ({"threshold": 0.2, "max_threshold": 0.4}, "has its own --max-threshold"),
        ({"threshold": 0.2, "rule": "topk", "top_k": 3}, "has its own --top-k"),
        ({}, "either threshold or target_removed"),
        ({"threshold": -1.0}, "positive"),
    ],
)
def test_what_a_cut_cannot_have_is_refused(
    options: dict[str, Any], message: str, searched: tuple[str, str], tmp_path: Path
) -> None:
    store, source = searched
    with pytest.raises(InputError, match=message):
        main(config(store, str(tmp_path / "out"), from_folder=source, **options))


def test_a_folder_of_another_store_metric_or_stage_is_refused(searched: tuple[str, str], tmp_path: Path) -> None:
    store, source = searched
    other, _, _ = write_store(tmp_path / "other", rows=20)
    for values, message in (
        ({"store": other, "from_folder": source}, "another store"),
        ({"metric": "cosine", "from_folder": source}, "searched with --metric euclidean"),
        ({"from_folder": store}, "no balance folder whose search has ended"),
    ):
        chosen = {"store": store, "metric": "euclidean", "threshold": 0.1, "device": "cpu", **values}
        with pytest.raises(InputError, match=message):
            main(Config(out=str(tmp_path / message[:7]), **chosen))  # type: ignore[arg-type]
