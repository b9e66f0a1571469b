"""Write the metrics to TensorBoard or Weights & Biases too, if the user asks; neither is needed to train."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

from distilclip import files
from distilclip.errors import InputError
from distilclip.train.settings import Tracker


class TensorBoard:
    """Event files in `FOLDER/tensorboard`; TensorBoard then drops what a killed run wrote after step `start`."""

    def __init__(self, folder: str, *, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(files.join(folder, "tensorboard"), purge_step=start + 1 if start else None)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One scalar a value."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush the event file."""
        self._writer.close()


class WeightsAndBiases:
    """A run named after the folder, resumed with it; project and account come from wandb's environment.

    The id is a digest of the folder's env.json, which says when and where the run began, so two folders of one name
    never share a run. On resumption wandb leaves out the steps that it has.
    """

    def __init__(self, folder: str, *, config: Mapping[str, Any]) -> None:
        import wandb

        self._run = wandb.init(
            id=files.sha256(files.join(folder, "env.json"))[:16],
            name=files.absolute(folder).rsplit("/", 1)[-1],
            dir=None if files.is_url(folder) else folder,
            resume="allow",
            config=dict(config),
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One step's values."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


Writer = TensorBoard | WeightsAndBiases
"""Takes the lines of metrics.jsonl."""


def require_packages(names: Sequence[Tracker]) -> None:
    """Raise `InputError` where the package of a tracker is missing."""
    for name in names:
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:  # a folder of that name, such as wandb's own logs, is no package
            raise InputError(f"--track {name} needs the package: pip install 'distilclip[{name}]'.")


def open_trackers(names: Sequence[Tracker], folder: str, *, config: Mapping[str, Any], start: int) -> list[Writer]:
    """Return a writer for each tracker, in a training folder whose first `start` steps are done."""
    return [
        TensorBoard(folder, start=start) if name == "tensorboard" else WeightsAndBiases(folder, config=config)
        for name in names
    ]
