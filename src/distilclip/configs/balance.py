"""State the options of `distilclip balance`. Imports neither torch nor numpy."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from distilclip.engine import Engine
from distilclip.errors import InputError
from distilclip.grouping.rule import WHY_NO_LISTS, Rule, RuleName
from distilclip.options import changeable, check_at_least
from distilclip.vectors.metric import Metric


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of `distilclip balance`."""

    store: str
    """folder that `embed` wrote"""
    out: str
    """folder to write: the groups, the spanning forest, and result.json with the threshold curve"""
    metric: Metric
    """unit of all distances here. The paper's 0.07 means three things: euclidean (cos > 0.9976), sqeuclidean
    (cos > 0.965, what faiss calls L2) or cosine distance (cos > 0.93)"""
    threshold: float | None = None
    """join images with distance < threshold (or give --target-removed)"""
    target_removed: float | None = None
    """choose the threshold that removes this share of the images; needs --max-threshold (of 100,000 images or more, a
    sample tells before the search if that is too small)"""
    max_threshold: float | None = None
    """search up to this distance, so that the curve shows thresholds up to it (default: the threshold)"""
    rule: RuleName = "union-find"
    """union-find joins images by every pair below the threshold, over chains too, and keeps one of each group, as
    CLIP-CID does; topk joins each image with its --top-k nearest only, as the paper's text says; cover keeps as many
    as it takes that every image removed is below the threshold from the image kept for it; complete joins groups only
    while all their images are below the threshold from each other, where chains join at most 10,000 images"""
    top_k: int | None = None
    """number of nearest images that each image is compared with by --rule topk"""
    groups: str | None = None
    """folder of `select` or of another `balance`: search, group and keep only images that it keeps (default: all valid
    ones)"""
    from_folder: str | None = None
    """folder of an earlier balance of this store: cut its forest at another threshold, without a search"""
    extend: str | None = None
    """folder of a balance of this store from before it grew (embed --append): search only pairs with a new image; the
    result is that of a search of all"""
    memory_gb: float = changeable(1.0)
    """working memory in GB of each worker's search, without the embeddings that it reads in half precision"""
    block_rows: int | None = changeable(None)
    """number of rows whose neighbours a part of the search looks for (default: what --memory-gb allows)"""
    device: str = changeable("auto")
    """auto (CUDA, then MPS, then CPU) or a torch device; each worker of --engine gets a GPU of its own"""
    execution: Engine = field(default_factory=Engine)

    def __post_init__(self) -> None:
        if self.from_folder is None:
            _ = self.grouping  # checks it
        else:
            self._check_cut()
        if self.extend is not None:
            self._check_extension()
        check_at_least(self, 1, "block_rows")
        if self.top_k is not None and self.execution.engine != "local":
            raise InputError("--rule topk compares every list with all rows: --engine local only.")

    def _check_cut(self) -> None:
        """Raise `InputError` for options that a cut of another folder's forest cannot have."""
        for name in ("max_threshold", "top_k"):
            if getattr(self, name) is not None:
                raise InputError(f"--from-folder has its own --{name.replace('_', '-')}: leave it out.")
        if self.rule == "topk":
            raise InputError("--rule topk needs a search of its own, without --from-folder.")
        reach = 1.0 if self.threshold is None else None
        Rule(metric=self.metric, threshold=self.threshold, target_removed=self.target_removed, max_threshold=reach)

    def _check_extension(self) -> None:
        """Raise `InputError` for options that an extension of another folder's search cannot have."""
        if self.from_folder is not None:
            raise InputError("--extend searches and --from-folder does not: give one of them.")
        if self.groups is not None:
            raise InputError("--extend searches all valid rows, and --groups only some: give one of them.")
        if self.rule == "topk":
            raise InputError(f"--rule topk cannot be extended: {WHY_NO_LISTS}")

    @property
    def grouping(self) -> Rule:
        """Which images are joined and which are kept."""
        return Rule(**{option.name: getattr(self, option.name) for option in fields(Rule)})

    def inputs(self) -> list[tuple[str, str]]:
        """Return the finished folders that this stage reads, each with its stage."""
        return [(self.store, "embed")] + ([(self.groups, "balance")] if self.groups else [])
