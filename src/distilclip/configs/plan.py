"""State the options of `distilclip plan`. Imports neither torch nor numpy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from distilclip.errors import InputError
from distilclip.options import check_at_least


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of `distilclip plan`. The defaults are the paper's: CLIP-CID on LAION-400M."""

    gpu: Literal["a100", "h100", "h200"] = "h100"
    """kind of accelerator"""
    num_gpus: int = 8
    """how many of them"""
    price_per_gpu_hour: float | None = None
    """adds a column with the cost, in the same currency"""
    num_pairs: int = 400_000_000
    """image-text pairs"""
    bytes_per_pair: int = 25_000
    """mean size of a pair in the tars (LAION-400M at 256 pixels: 10 TB in all)"""
    teacher: str = "ViT-bigG-14"
    """open_clip architecture"""
    student: str = "ViT-B-32"
    """open_clip architecture"""
    groups: str | None = None
    """finished folder of `balance` or `select`: plan for the pairs of its store and those that it keeps, in place of
    --num-pairs, --bytes-per-pair and --removed-ratio"""
    removed_ratio: float = 0.437
    """share of the pairs that balance removes"""
    block_rows: int = 2_000_000
    """rows of a part of balance; a worker holds as many again that may be near them"""
    num_centers: int = 1_000_000
    """clusters"""
    num_iterations: int = 20
    """rounds of k-means"""
    points_per_center: int | None = 64
    """rows to fit on, for each center (None: all of them)"""
    epochs: float = 32.0
    """passes over the kept pairs"""
    global_batch: int = 32_768
    """pairs of a step, over all GPUs"""
    sample_rate: float = 0.1
    """share of the classes that the cluster term uses in a step"""
    centers_state: Literal["device", "host"] = "device"
    """where AdamW's moments of the class centers are kept"""
    out: str | None = None
    """JSON file to write the plan to, as well"""

    def __post_init__(self) -> None:
        check_at_least(
            self, 1, "num_gpus", "num_pairs", "bytes_per_pair", "block_rows", "num_centers", "num_iterations"
        )
        if not 0 <= self.removed_ratio < 1:
            raise InputError(f"removed_ratio is {self.removed_ratio}; it must lie in [0, 1).")
        if not 0 < self.sample_rate <= 1:
            raise InputError(f"sample_rate is {self.sample_rate}; it must lie in (0, 1].")
        if self.epochs <= 0:
            raise InputError(f"epochs is {self.epochs}; it must be positive.")
