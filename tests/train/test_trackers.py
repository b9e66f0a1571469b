from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest

from distilclip.errors import InputError
from distilclip.train.trackers import open_trackers


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


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_named_with_its_extra(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    imported = builtins.__import__

    def without(module: str, *args: Any, **values: Any) -> Any:
        if module in ("torch.utils.tensorboard", "wandb"):
            raise ImportError(module)
        return imported(module, *args, **values)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=rf"distilclip\[{name}\]"):
        open_trackers([name], str(tmp_path), config={}, start=0)


def test_nothing_is_imported_unless_asked_for(tmp_path: Path) -> None:
    assert open_trackers([], str(tmp_path), config={}, start=0) == []
    assert not list(tmp_path.iterdir())
