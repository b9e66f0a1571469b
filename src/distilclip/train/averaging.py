"""An exponential moving average of the student's weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from distilclip.train.parallel import local


class Average:
    """average <- decay x average + (1 - decay) x weights after every step; buffers that are no floats are copied.

    Starts as the initial weights. Under FSDP2 each process averages the part that it holds.
    """

    def __init__(self, model: nn.Module, *, decay: float) -> None:
        self.decay = decay
        self.values: dict[str, Tensor] = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the weights of a step."""
        pairs = [(local(self.values[name]), local(value)) for name, value in model.state_dict().items()]
        floats = [pair for pair in pairs if pair[0].is_floating_point()]
        get_ema_multi_avg_fn(self.decay)([a for a, _ in floats], [b for _, b in floats], None)
        for average, value in pairs:
            if not average.is_floating_point():
                average.copy_(value)
