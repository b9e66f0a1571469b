"""Hold the trainable class centers, sharded by row: each rank has a range of them, with AdamW's state of each row."""

from __future__ import annotations

import os
import re

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from distilclip import distributed, files
from distilclip.data.tensors import read_tensors, write_tensors
from distilclip.errors import InputError
from distilclip.losses.cluster import positions
from distilclip.losses.terms import StepClasses
from distilclip.train.row_adamw import RowMoments, update_rows_
from distilclip.train.settings import Optimization


def class_range(num_classes: int, rank: int, world: int) -> tuple[int, int]:
    """Return first and past-the-last class of a rank: consecutive ranges whose sizes differ by one at most."""
    return num_classes * rank // world, num_classes * (rank + 1) // world


class ClassHead:
    """Rows `first` to `stop` of k class centers, each with its AdamW state; a rank of a sharded head has one range.

    Gradient, state and update touch the classes of a step only. `state_device` may be the host, where the two moments
    (8 of 12 bytes a value) then live. `optimization` gives rates and AdamW's constants.
    """

    def __init__(
        self,
        centers: Float[Tensor, "rows dim"],
        optimization: Optimization,
        *,
        num_classes: int | None = None,
        first: int = 0,
        state_device: torch.device | str | None = None,
    ) -> None:
        self.centers = centers
        self.optimization = optimization
        self.num_classes = len(centers) if num_classes is None else num_classes
        self.first = first
        self.state = RowMoments.zeros(*centers.shape, device=state_device or centers.device)

    @classmethod
    def of_this_rank(
        cls,
        centers: Float[np.ndarray, "k dim"],
        optimization: Optimization,
        *,
        device: torch.device,
        state_device: torch.device | str,
    ) -> ClassHead:
        """Take this process's range of all k centers, which may be a memory map, to `device`."""
        first, stop = class_range(len(centers), distributed.rank(), distributed.world())
        own = torch.tensor(centers[first:stop], device=device)
        return cls(own, optimization, num_classes=len(centers), first=first, state_device=state_device)

    @property
    def stop(self) -> int:
        """Past the last row."""
        return self.first + len(self.centers)

    def of_step(self, labels: Int[Tensor, " n"], classes: Int[Tensor, " c"] | None) -> StepClasses:
        """Return what a step needs of the classes sampled for it, ascending (None: all); `labels` of the global batch.

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
        """Take one AdamW step on the classes of a step, at `share` of the peak learning rate."""
        if classes.centers.grad is None:
            return
        update_rows_(
            self.centers,
            classes.centers.grad,
            self.state,
            rows=classes.rows,
            learning_rate=self.optimization.centers_learning_rate * share,
            weight_decay=self.optimization.centers_weight_decay,
            betas=(self.optimization.beta1, self.optimization.beta2),
            eps=self.optimization.eps,
        )

    def save(self, folder: str) -> dict[str, str]:
        """Write this range as `FIRST-STOP.safetensors`; the ranges of all ranks make the head.

        Returns the SHA-256 of the file by its name.
        """
        arrays = {name: value.cpu().numpy() for name, value in self._tensors().items()}
        metadata = {"first": str(self.first), "stop": str(self.stop), "num_classes": str(self.num_classes)}
        name = f"{self.first:09d}-{self.stop:09d}.safetensors"
        return {name: write_tensors(files.join(folder, name), arrays, metadata).sha256}

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
