"""State the options of `distilclip embed`. Imports neither torch nor numpy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from distilclip.csv_rows import CsvColumns
from distilclip.data.crops import Augmentation
from distilclip.data.limits import MAX_PIXELS, Side, check_bad_ratio
from distilclip.engine import Engine
from distilclip.errors import InputError
from distilclip.options import changeable, check_at_least
from distilclip.stage_folder import folders_of


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of `distilclip embed`."""

    data: tuple[str, ...]
    """folders, or files of pairs: tars, Parquet with image bytes, CSV/TSV (filepath, caption); braces, globs, URLs"""
    out: str
    """folder to write: the store"""
    model: str
    """teacher: an open_clip architecture (with --weights), hf-hub:ORG/NAME, or a distilclip train folder; perceptual is
    a built-in embedding of how pictures look, with which balance finds copies without a teacher"""
    columns: CsvColumns = field(default_factory=CsvColumns)
    may_lack: tuple[Side, ...] = ()
    """what a sample may lack without being unusable: caption (pictures alone), image (sentences alone), or both, so
    that it has one of them; what each row has is written down, and train teaches with it"""
    weights: str | None = None
    """weights of an open_clip architecture: a file, or one of open_clip's tags"""
    batch_size: int = 256
    """number of pairs per forward pass"""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """precision in which the teacher computes (autocast); embeddings are stored in half precision"""
    max_pixels: int = MAX_PIXELS
    """largest allowed width x height of an image; larger ones are skipped as possible decompression bombs"""
    views: int = 0
    """number of random crops of each image to embed as well, with all captions of a sample (0: none)"""
    augmentation: Augmentation = field(default_factory=Augmentation)
    seed: int = 0
    """random seed of the crops"""
    append: bool = changeable(False)
    """add to a finished store the files of --data that it does not have yet, as further shards"""
    on_error: Literal["raise", "skip"] = changeable("skip")
    """what to do with an unusable sample: skip it and write down the reason, or stop with an error (raise)"""
    max_bad_ratio: float = changeable(0.05)
    """stop when more than this share of the samples is unusable"""
    device: str = changeable("auto")
    """auto (CUDA, then MPS, then CPU), or a torch device; each worker of --engine gets a GPU of its own"""
    num_workers: int = changeable(2)
    """number of processes that read and decode for a teacher (0: decode in the main process)"""
    execution: Engine = field(default_factory=Engine)

    def __post_init__(self) -> None:
        if not self.data:
            raise InputError("embed needs --data: a folder, or tars, Parquet or CSV files of pairs.")
        check_at_least(self, 1, "batch_size")
        if self.num_workers < 0:
            raise InputError(f"num_workers is {self.num_workers}; it must be 0 or more.")
        if self.views < 0:
            raise InputError(f"views is {self.views}; it must be 0 or more.")
        if self.views and self.seed < 0:
            raise InputError(f"seed is {self.seed}; it must be 0 or more.")
        check_bad_ratio(self.max_bad_ratio)

    def inputs(self) -> list[tuple[str, str]]:
        """Return the finished folders that this stage reads, each with its stage."""
        return folders_of("train", [self.model])
