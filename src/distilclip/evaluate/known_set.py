"""What is known of a published evaluation set before it is read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from distilclip.evaluate.dataset import Metric

Group = Literal["paper", "robustness", "retrieval", "variant"]


@dataclass(frozen=True, kw_only=True)
class KnownSet:
    """One set of the papers.

    `folders` are the names that its folder under the data root may have. Its original layout shows by any of `archive`,
    in that folder or right in the data root, or of `inner`, in that folder only. `webdataset` are CLIP_benchmark's
    names. `prompts` is its section in openai/CLIP's prompts.md, `benchmark` its key in clip-benchmark. `aliases` give
    the prompt's class name for labels that share no words with it; labels that are names themselves are written with
    blanks for any of `blanks`. A set whose classes `may_be_empty` has dead links.
    `border` pixels are cut off each side of its images. A `variant` measures another set by another rule, and takes
    part in no average; `rule` says how it chooses. `size` and `licence` are empty where they are not known for sure.
    """

    name: str
    group: Group
    folders: tuple[str, ...]
    archive: tuple[str, ...] = ()
    inner: tuple[str, ...] = ()
    webdataset: tuple[str, ...] = ()
    num_test: int
    source: str
    size: str = ""
    licence: str = ""
    num_classes: int = 0
    num_train: int = 0
    metric: Metric = "top1"
    rule: str = ""
    prompts: str = ""
    benchmark: str = ""
    aliases: dict[str, str] = field(default_factory=dict)
    blanks: str = "_"
    may_be_empty: bool = False
    border: int = 0
