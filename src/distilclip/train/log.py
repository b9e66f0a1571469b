"""The lines of metrics.jsonl: means over the steps since the line before, and where the time went."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from distilclip import distributed
from distilclip.train.step import StepResult
from distilclip.train.stopwatch import Stopwatch


class Log:
    """Sums of the last few steps' values, kept on the device: one transfer per line, not one per value and step.

    `state` is what `carried` begins with in a run that goes on between two lines.
    """

    def __init__(self, device: torch.device, carried: Mapping[str, Any] | None = None) -> None:
        self.stopwatch = Stopwatch(device)
        self._device = device
        carried = carried or {"parts": {}, "wholes": {}, "num_steps": 0}
        # Each process has its rows' part of a value, or the whole of it; the sums on rank 0 hold what was carried over.
        first = distributed.rank() == 0
        self._parts = {name: self._tensor(value if first else 0.0) for name, value in carried["parts"].items()}
        self._wholes = {name: self._tensor(value) for name, value in carried["wholes"].items()}
        self._num_steps = int(carried["num_steps"])
        self._num_samples = 0

    def add(self, result: StepResult, gradient_norm: Tensor, num_samples: int) -> None:
        """Count a step of `num_samples` rows on all processes."""
        for name, value in {"loss": result.loss, **result.terms, **result.cosines}.items():
            self._parts[name] = self._parts.get(name, 0) + value.detach()
        self._wholes["gradient_norm"] = self._wholes.get("gradient_norm", 0) + gradient_norm.detach()
        self._num_steps += 1
        self._num_samples += num_samples

    def line(self) -> dict[str, float]:
        """Means, speed and shares of time since the last line; begins anew. Every process must call it."""
        means = {name: value / self._num_steps for name, value in {**self._summed(), **self._whole_sums()}.items()}
        elapsed, shares = self.stopwatch.read()
        values = {
            **means,
            "samples_per_second": round(self._num_samples / elapsed, 1),
            **{f"{part}_share": round(share, 4) for part, share in shares.items()},
        }
        self._parts, self._wholes, self._num_steps, self._num_samples = {}, {}, 0, 0
        return values

    def state(self) -> dict[str, Any]:
        """The sums, exact in JSON. Every process must call it."""
        return {"parts": self._summed(), "wholes": self._whole_sums(), "num_steps": self._num_steps}

    def _summed(self) -> dict[str, float]:
        if not self._parts:
            return {}
        summed = distributed.reduce_(torch.stack(list(self._parts.values()))).tolist()
        return dict(zip(self._parts, summed, strict=True))

    def _whole_sums(self) -> dict[str, float]:
        return {name: float(value) for name, value in self._wholes.items()}

    def _tensor(self, value: float) -> Tensor:
        return torch.tensor(value, device=self._device)
