"""Handle a student's batch norms: with them, a row's embedding depends on the other rows of the batch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import timm.layers
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from distilclip.errors import InputError
from distilclip.models.clip import Clip


def batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """Return every layer that normalises over the batch, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}


def require_exact_accumulation(clip: Clip) -> None:
    """Raise `InputError` for a student whose embedding of a pair depends on the others in its micro-batch."""
    for name in batch_norms(clip.model):
        raise InputError(
            f"{clip.name} normalises over the batch ({name}): micro-batches would train another model than the "
            "batch. Leave out --micro-batch, choose a student with layer norm, or take the other model: --batch-norm "
            "per-micro-batch."
        )


def synchronise_batch_norms(clip: Clip) -> None:
    """Let batch norms use the rows of all processes. Raises `InputError` where that needs CUDA."""
    for name in batch_norms(clip.model):
        if clip.device.type != "cuda":
            raise InputError(
                f"{clip.name} normalises over the batch ({name}), which processes can share on CUDA only. Train it in "
                "one process, choose a student with layer norm, or let each process normalise over its own pairs: "
                "--batch-norm per-process."
            )
    timm.layers.convert_sync_batchnorm(clip.model)  # torch's own drops the activation inside timm's norms


@contextlib.contextmanager
def fixed_statistics(model: nn.Module) -> Iterator[None]:
    """Keep the running statistics as they are in a block in which batch norms normalise as in training."""
    norms = [norm for norm in batch_norms(model).values() if norm.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


class RunningStatistics:
    """The running statistics of a model's batch norms, which can be set back."""

    def __init__(self, model: nn.Module) -> None:
        self._buffers = [buffer for norm in batch_norms(model).values() for buffer in norm.buffers(recurse=False)]
        self._remembered = [buffer.clone() for buffer in self._buffers]

    def remember(self) -> None:
        """Remember the current values."""
        _copy(self._buffers, self._remembered)

    def put_back(self) -> None:
        """Set the statistics back to the remembered values."""
        _copy(self._remembered, self._buffers)


@torch.no_grad()
def _copy(source: list[Tensor], target: list[Tensor]) -> None:
    if target:
        torch._foreach_copy_(target, source)
