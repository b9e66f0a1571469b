"""When checkpoints are written, and which of them stay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from distilclip import run
from distilclip.data import files
from distilclip.errors import InputError
from distilclip.train.checkpoint import complete_checkpoints, folder_name, remove_checkpoint

MEASURES = ("loss", "cosine_image", "cosine_text", "agreement")
"""Metrics by which checkpoints may be compared."""


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """When to write checkpoints, and which of them to keep."""

    checkpoint_every: int = 500
    """steps between checkpoints"""
    checkpoint_minutes: float = run.execution(0.0)
    """further checkpoints so many minutes after the last, each until the next is there; 0: none"""
    keep_checkpoints: int = run.execution(2)
    """how many of the last checkpoints stay on disk"""
    keep_best: Literal["none", "loss", "cosine_image", "cosine_text", "agreement"] = run.execution("none")
    """metric of the last training batches whose best checkpoint stays as well: lowest loss, highest of the others"""

    def __post_init__(self) -> None:
        for name in ("checkpoint_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.checkpoint_minutes < 0:
            raise InputError(f"checkpoint_minutes is {self.checkpoint_minutes}; it must be at least 0.")

    def scheduled(self, done: int, *, num_steps: int) -> bool:
        """Whether there is a checkpoint after `done` steps in every run."""
        return done % self.checkpoint_every == 0 or done == num_steps

    def due(self, seconds: float) -> bool:
        """Whether the clock asks for a checkpoint, `seconds` after the last."""
        return 0 < self.checkpoint_minutes * 60 <= seconds

    @staticmethod
    def measures(line: Mapping[str, float]) -> dict[str, float]:
        """What of a line of metrics.jsonl a checkpoint remembers: nothing that depends on the clock."""
        return {name: line[name] for name in MEASURES if name in line}

    def prune(self, train_folder: str) -> None:
        """Remove every complete checkpoint but the last ones, the best one, and the newest."""
        states = {s: self._state(train_folder, s) for s in complete_checkpoints(train_folder)}
        scheduled = [step for step, state in states.items() if state["scheduled"]]
        kept = {*scheduled[-self.keep_checkpoints :], *list(states)[-1:]}
        values = {s: states[s]["metrics"][self.keep_best] for s in scheduled if self.keep_best in states[s]["metrics"]}
        if values:
            best = min if self.keep_best == "loss" else max
            kept.add(best(values, key=lambda step: (values[step], step if best is max else -step)))
        for step in set(states) - kept:
            remove_checkpoint(train_folder, step)

    @staticmethod
    def _state(train_folder: str, step: int) -> dict[str, Any]:
        return run.read_json(files.join(train_folder, folder_name(step), "state.json"))
