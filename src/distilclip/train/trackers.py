"""Metrics to TensorBoard or Weights & Biases as well, where the user asks for it; neither is needed to train."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from distilclip.errors import InputError

Tracker = Literal["tensorboard", "wandb"]


class TensorBoard:
    """Event files in `FOLDER/tensorboard`; on resumption TensorBoard drops what a killed run wrote from `start` on."""

    def __init__(self, folder: str, *, start: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise InputError("--track tensorboard needs the package: pip install 'distilclip[tensorboard]'.") from error
        self._writer = SummaryWriter(os.path.join(folder, "tensorboard"), purge_step=start + 1 if start else None)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One scalar a value."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush the event file."""
        self._writer.close()


class WeightsAndBiases:
    """A run named after the folder, resumed under the same name; project and account come from wandb's environment."""

    def __init__(self, folder: str, *, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise InputError("--track wandb needs the package: pip install 'distilclip[wandb]'.") from error
        name = os.path.basename(folder.rstrip("/"))
        self._run = wandb.init(dir=folder, name=name, id=name, resume="allow", config=dict(config))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One step's values."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


Writer = TensorBoard | WeightsAndBiases
"""Takes the lines of metrics.jsonl."""


def open_trackers(names: Sequence[Tracker], folder: str, *, config: Mapping[str, Any], start: int) -> list[Writer]:
    """Writers for the trackers asked for; `InputError` where their package is missing."""
    return [
        TensorBoard(folder, start=start) if name == "tensorboard" else WeightsAndBiases(folder, config=config)
        for name in names
    ]
