from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from distilclip.errors import InputError
from distilclip.train.trackers import open_trackers, require_packages


def test_tensorboard_gets_every_value_and_forgets_what_a_killed_run_wrote(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, values in ((0, {10: 5.0, 20: 9.0}), (10, {20: 4.0})):
        (tracker,) = open_trackers(["tensorboard"], str(tmp_path), config={}, start=start)
        for step, loss in values.items():
            tracker.write(step, {"loss": loss, "task": 1.0})
        tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(10, 5.0), (20, 4.0)]
    assert len(events.Scalars("task")) == 2


class RecordedRun:
    """Stands in for a wandb run, which would need an account."""

    def __init__(self, **options: Any) -> None:
        self.options, self.lines, self.finished = options, [], False

    def log(self, values: dict[str, float], *, step: int) -> None:
        self.lines.append((step, values))

    def finish(self) -> None:
        self.finished = True


def test_wandb_gets_every_line_under_an_id_that_belongs_to_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[RecordedRun] = []
    module = ModuleType("wandb")
    module.init = lambda **options: runs.append(RecordedRun(**options)) or runs[-1]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    for parent in ("a", "a", "b"):
        folder = tmp_path / parent / "student"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "env.json").write_text(f'{{"started": "{parent}"}}')
        (tracker,) = open_trackers(["wandb"], str(folder), config={"seed": 3}, start=0)
        tracker.write(10, {"loss": 5.0})
        tracker.close()
    assert all(run.lines == [(10, {"loss": 5.0})] and run.finished for run in runs)
    first, again, other = (run.options for run in runs)
    assert first == again
    assert (first["name"], first["resume"], first["config"]) == ("student", "allow", {"seed": 3})
    assert other["name"] == "student"
    assert other["id"] != first["id"]


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_named_with_its_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    with pytest.raises(InputError, match=rf"distilclip\[{name}\]"):
        require_packages([name])
    require_packages([])


def test_a_folder_of_a_packages_name_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wandb").mkdir()  # where wandb itself keeps its logs
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    assert importlib.util.find_spec("wandb") is not None
    with pytest.raises(InputError, match=r"distilclip\[wandb\]"):
        require_packages(["wandb"])


def test_nothing_is_imported_unless_asked_for(tmp_path: Path) -> None:
    assert open_trackers([], str(tmp_path), config={}, start=0) == []
    assert not list(tmp_path.iterdir())
