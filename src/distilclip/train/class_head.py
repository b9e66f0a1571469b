"""The class centers W as a training citizen: a rank's range of rows, AdamW state per row, checkpoints by row range."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from distilclip import distributed, files
from distilclip.data.tensors import read_tensors, write_tensors
from distilclip.errors import InputError
from distilclip.losses.cluster import positions
from distilclip.train.row_adamw import RowState, update_rows_
from distilclip.train.sharding import class_range


@dataclass(frozen=True, kw_only=True)
class StepClasses:
    """The classes of one step: this rank's, and the labels of the global batch among those of all ranks."""

    centers: Float[Tensor, "c dim"]
    """This rank's centers, a leaf: `grad` is the gradient of these rows alone."""
    labels: Int[Tensor, " n"]
    """Of the global batch, numbered among the classes of all ranks in this step."""
    first: int
    """The number of this rank's first class among them."""
    rows: Int[Tensor, " c"] | None
    """The rows of the head that `centers` are; None for all of them, in place."""


class ClassHead:
    """Rows `first` to `stop` of k class centers, each with its AdamW state; a rank of a sharded head has one range.

    Gradient, state and update touch the classes of a step only. `state_device` may be the host, where the two moments
    (8 of 12 bytes a value) then live.
    """

    def __init__(
        self,
        centers: Float[Tensor, "rows dim"],
        *,
        learning_rate: float,
        num_classes: int | None = None,
        first: int = 0,
        weight_decay: float = 0.0,
        state_device: torch.device | str | None = None,
    ) -> None:
        self.centers = centers
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.num_classes = len(centers) if num_classes is None else num_classes
        self.first = first
        self.state = RowState.zeros(*centers.shape, device=state_device or centers.device)

    @classmethod
    def of_this_rank(cls, centers: Float[np.ndarray, "k dim"], *, device: torch.device, **values: Any) -> ClassHead:
        """This process's range of all k centers, which may be a memory map, on `device`; `values` as for the class."""
        first, stop = class_range(len(centers), distributed.rank(), distributed.world())
        return cls(torch.tensor(centers[first:stop], device=device), num_classes=len(centers), first=first, **values)

    @property
    def stop(self) -> int:
        """Past the last row."""
        return self.first + len(self.centers)

    def of_step(self, labels: Int[Tensor, " n"], classes: Int[Tensor, " c"] | None) -> StepClasses:
        """What a step needs: `labels` of the global batch, and the sampled classes, ascending (None: all).

        Raises `ValueError` for a label without a center.
        """
        if classes is None:
            if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
                raise ValueError(
                    f"labels lie in {int(labels.min())}..{int(labels.max())}, but there are {self.num_classes} "
                    "centers: labels and centers must come from the same `cluster` run."
                )
            return StepClasses(
                centers=self.centers.detach().requires_grad_(), labels=labels, first=self.first, rows=None
            )
        start, stop = (int(torch.searchsorted(classes, edge)) for edge in (self.first, self.stop))
        rows = classes[start:stop] - self.first
        return StepClasses(
            centers=self.centers.index_select(0, rows).requires_grad_(),
            labels=positions(labels, classes),
            first=start,
            rows=rows,
        )

    def update(self, classes: StepClasses, *, share: float) -> None:
        """One AdamW step on the classes of a step, at `share` of the peak learning rate."""
        if classes.centers.grad is None:
            return
        update_rows_(
            self.centers,
            classes.centers.grad,
            self.state,
            rows=classes.rows,
            learning_rate=self.learning_rate * share,
            weight_decay=self.weight_decay,
        )

    def save(self, folder: str) -> None:
        """Write this range as `FIRST-STOP.safetensors`; the ranges of all ranks make the head."""
        arrays = {name: value.cpu().numpy() for name, value in self._tensors().items()}
        metadata = {"first": str(self.first), "stop": str(self.stop), "num_classes": str(self.num_classes)}
        write_tensors(files.join(folder, f"{self.first:09d}-{self.stop:09d}.safetensors"), arrays, metadata)

    def load(self, folder: str) -> None:
        """Read this range, whatever ranges wrote it; of local files only the wanted rows are read.

        Raises `InputError` where the files do not hold the range.
        """
        reached = self.first
        for first, stop, path in _parts(folder):
            if stop <= self.first or first >= self.stop:
                continue
            if first > reached:
                break
            source = slice(max(first, self.first) - first, min(stop, self.stop) - first)
            target = slice(first + source.start - self.first, first + source.stop - self.first)
            stored = read_tensors(path)
            for name, tensor in self._tensors().items():
                tensor[target] = torch.from_numpy(np.array(stored[name][source])).to(tensor.device)
            reached = stop
        if reached < self.stop:
            raise InputError(f"{folder} lacks the class centers from {reached} on: a file of it is missing.")

    def _tensors(self) -> dict[str, Tensor]:
        return {
            "centers": self.centers,
            "exp_avg": self.state.exp_avg,
            "exp_avg_sq": self.state.exp_avg_sq,
            "step": self.state.step,
        }


def _parts(folder: str) -> list[tuple[int, int, str]]:
    """First row, stop and path of the files of a saved head, ascending; empty ranges left out."""
    fs, inner = files.filesystem(folder)
    names = [os.path.basename(path) for path in fs.ls(inner, detail=False)] if fs.exists(inner) else []
    found = [(m, name) for name in names if (m := re.fullmatch(r"(\d+)-(\d+)\.safetensors", name))]
    parts = [(int(m.group(1)), int(m.group(2)), files.join(folder, name)) for m, name in found]
    return sorted(part for part in parts if part[0] < part[1])
