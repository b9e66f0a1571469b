"""List the scores of OpenAI's ViT-B/32, in percent, to compare other scores with.

They are measured with its weights, where that is known, not copied from the CLIP paper: nobody reproduces its 91.3 on
CIFAR-10 or 21.2 on FGVC Aircraft.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

REFERENCE_MODEL = "OpenAI ViT-B/32 (reference)"

ZERO_SHOT = {
    "food101": 84.0,
    "cifar10": 89.8,
    "cifar100": 64.2,
    "birdsnap": 37.8,
    "sun397": 62.5,
    "cars": 59.6,
    "aircraft": 19.5,
    "dtd": 44.4,
    "pets": 87.0,
    "caltech101": 87.6,
    "flowers102": 66.7,
    "stl10": 97.1,
    "eurosat": 50.4,
    "imagenet": 63.3,
    "imagenet-v2": 55.9,
    "imagenet-a": 31.6,
    "imagenet-r": 69.3,
    "imagenet-sketch": 42.3,
    "objectnet": 44.3,
}
LINEAR_PROBE = {
    "food101": 88.8,
    "cifar10": 95.1,
    "cifar100": 80.5,
    "birdsnap": 58.5,
    "sun397": 76.6,
    "cars": 81.8,
    "aircraft": 52.0,
    "dtd": 76.5,
    "pets": 90.0,
    "caltech101": 93.0,
    "flowers102": 96.9,
    "stl10": 98.3,
    "eurosat": 97.0,
    "imagenet": 76.1,
}
IMAGE_TO_TEXT = {"coco": 50.1, "flickr30k": 78.9}
TEXT_TO_IMAGE = {"coco": 30.4, "flickr30k": 58.8}

PAPER_ONLY = {"zero-shot": frozenset({"birdsnap"}), "linear-probe": frozenset(LINEAR_PROBE)}
"""By task, the sets whose number is the CLIP paper's."""


def reference(task: str, set_name: str, metric: str) -> float | None:
    """Return the reference's number in percent, None where there is none."""
    if task == "zero-shot":
        return ZERO_SHOT.get(set_name)
    if task == "linear-probe":
        return LINEAR_PROBE.get(set_name)
    if task == "retrieval":
        return {"image_to_text_r1": IMAGE_TO_TEXT, "text_to_image_r1": TEXT_TO_IMAGE}.get(metric, {}).get(set_name)
    return None


def is_comparable(task: str, details: Mapping[str, Any]) -> bool:
    """Return whether a score with these details was measured as the reference was.

    That means: with CLIP's prompts, or those of the set's own folder, which as a rule are; features before the
    projection and the swept penalty; every caption, without a prefix.
    """
    if task == "zero-shot":
        return details.get("clips_prompts") is not False and not details.get("own_templates")
    if task == "linear-probe":
        return details.get("features") == "backbone" and bool(details.get("sweep"))
    return details.get("captions") == "all" and not details.get("caption_prefix")
