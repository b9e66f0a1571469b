"""State the options of `distilclip report`. Imports neither torch nor numpy."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Literal

from distilclip.errors import InputError
from distilclip.options import check_at_least
from distilclip.sets.published import Published


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of `distilclip report`."""

    folders: tuple[str, ...]
    """folders of a run or of single stages, searched for finished stages at any depth"""
    out: str
    """folder to write: index.html, figures/*.svg, result.json"""
    title: str = "Distillation report"
    """heading of the page"""
    published: tuple[Published, ...] = ()
    """also show numbers from these tables of the papers, marked as published and compared with nothing"""
    num_groups: int = 4
    """groups of each kind in the gallery: the largest, random ones, and those nearest to the threshold"""
    num_clusters: int = 6
    """number of largest clusters to show pictures of, and of smallest clusters"""
    num_pictures: int = 8
    """number of removed pictures to show of each group, and of pictures of each cluster"""
    num_pages: int = 4
    """pages of each gallery, in a browser that runs scripts; without scripts the first one shows. All folders of
    balance share them, as do all of cluster"""
    thumbnail_size: int = 112
    """longer side of a picture, in pixels"""
    num_mapped: int = 2000
    """pictures on the map of embeddings, at most 5000; 0 for no map"""
    map_method: Literal["auto", "t-sne", "pca"] = "auto"
    """how the map is laid out: t-SNE needs scikit-learn (pip install 'distilclip[map]'); auto uses it where it is"""
    seed: int = 0
    """seed for the choice of random groups, and for the map"""

    def __post_init__(self) -> None:
        for package in ("jinja2", "matplotlib"):
            if importlib.util.find_spec(package) is None:
                raise InputError(f"report needs {package}, which is not installed: pip install 'distilclip[report]'.")
        if not self.folders:
            raise InputError("report needs --folders: the folder of a run, or of its stages.")
        check_at_least(self, 1, "num_groups", "num_clusters", "num_pictures", "num_pages")
        if not 0 <= self.num_mapped <= 5000:
            raise InputError(f"num_mapped is {self.num_mapped}; it is a number of pictures from 0 to 5000.")
        if self.map_method == "t-sne" and importlib.util.find_spec("sklearn") is None:
            raise InputError("map_method is t-sne, which needs scikit-learn: pip install 'distilclip[map]'.")
        if not 16 <= self.thumbnail_size <= 1024:
            raise InputError(f"thumbnail_size is {self.thumbnail_size}; it is a side in pixels, from 16 to 1024.")

    def inputs(self) -> list[tuple[str, str]]:
        """Return the finished folders that this stage reads, each with its stage."""
        return []  # what it reads is found when it starts, and listed in result.json
