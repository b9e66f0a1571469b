"""Tell which trainings are the same recipe with other seeds, through all stages that they were made from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from distilclip import files
from distilclip.stage_folder import StageRecord

# What may differ between two seeds of a recipe: places, the seed itself, and how the work was carried out.
LEFT_OUT = ("out", "seed", "device", "num_workers", "execution")


def recipe_digests(folders: Sequence[StageRecord]) -> dict[str, str]:
    """Return of every folder, by its path, a digest of its config and of the configs of the folders it was made from.

    Two trainings with one digest differ at most in seeds, their own or those of a store or corpus that they learn from.
    """
    places = {files.absolute(folder.config.get("out") or folder.path): folder for folder in folders}

    def describe(folder: StageRecord, above: tuple[str, ...]) -> dict[str, Any]:
        inner = (*above, folder.path)
        return {name: resolve(value, inner) for name, value in sorted(folder.config.items()) if name not in LEFT_OUT}

    def resolve(value: Any, above: tuple[str, ...]) -> Any:
        """Replace the path of a folder that is here, or of something in it, by the folder's own description."""
        if isinstance(value, list):
            return [resolve(item, above) for item in value]
        if not isinstance(value, str) or "/" not in value:
            return value
        path = files.absolute(value)
        for place, folder in places.items():
            if (path == place or path.startswith(f"{place}/")) and folder.path not in above:
                return [describe(folder, above), path[len(place) :]]
        return value

    return {folder.path: hashlib.sha256(json.dumps(describe(folder, ())).encode()).hexdigest() for folder in folders}


def common_name(names: Sequence[str]) -> str:
    """Return what the names of a recipe's seeds have in common.

    >>> common_name(["clip-kd-seed0", "clip-kd-seed1"]), common_name(["clip 1a2b3c4", "clip 9f8e7d6"])
    ('clip-kd', 'clip')
    >>> common_name(["seed-0/clip", "seed-1/clip"]), common_name(["a", "b"])
    ('clip', 'a')
    """
    begin = _shared(names)
    end = _shared([name[::-1] for name in names])[::-1]
    for shared in (begin.removesuffix("seed"), end):
        stripped = shared.strip(" -_/.=").removesuffix("-seed").removesuffix("_seed").strip(" -_/.=")
        if len(stripped) > 1 and stripped != "seed":
            return stripped
    return names[0]


def _shared(names: Sequence[str]) -> str:
    """Return the longest beginning that all names share."""
    first, last = min(names), max(names)
    place = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return first[:place]
