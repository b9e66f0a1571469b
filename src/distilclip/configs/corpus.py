"""State the options of `distilclip corpus`. Imports neither torch nor numpy."""

from __future__ import annotations

from dataclasses import dataclass

from distilclip.errors import InputError
from distilclip.options import changeable


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of `distilclip corpus`."""

    out: str
    """folder to write: train/*.tar and eval/SET/*.tar"""
    num_pairs: int = 12_000
    """pairs to train on; about 41 % of them are copies of others"""
    seed: int = 0
    """seed of the corpus: the same seed gives the same bytes"""
    image_size: int = 64
    """width and height of the pictures, in pixels"""
    shard_size: int = 1000
    """pairs per tar"""
    num_eval: int = 1000
    """pictures of each evaluation set, and the same number again to train its linear probe"""
    wrong_captions: float = 0.05
    """share of the pairs whose caption describes another picture, from 0 to 0.99"""
    num_workers: int = changeable(2)
    """processes that draw pictures (0: draw in the main process)"""

    def __post_init__(self) -> None:
        if self.num_workers < 0:
            raise InputError(f"--num-workers is {self.num_workers}; 0 draws in the main process, n > 0 in n more.")
        if not 0 <= self.wrong_captions <= 0.99:
            raise InputError(f"--wrong-captions is {self.wrong_captions}; it is a share from 0 to 0.99.")

    def inputs(self) -> list[tuple[str, str]]:
        """Return the finished folders that this stage reads, each with its stage."""
        return []
