"""Measure how much a zero-shot score depends on the wording of its prompts, and how unlike captions they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from distilclip.evaluate.embedders import Embedder
from distilclip.evaluate.zero_shot import classify
from distilclip.sets.classes import DEFAULT_TEMPLATES

NUM_COMPARED = 1000  # prompts, and captions: the standard error of `unlikeness` is then about 0.01
MOST_ALONE = 20
PLAIN_TEMPLATES = ("{}", *DEFAULT_TEMPLATES)
"""Templates that are tried alone beside those of a set."""


def measure_spread(
    model: Embedder,
    names: Sequence[str],
    image: Float[Tensor, "n dim"],
    labels: Int[Tensor, " n"],
    *,
    templates: Sequence[str],
) -> dict[str, float]:
    """Return the top-1 accuracy with each template alone: the plain ones, and the first `MOST_ALONE` of `templates`.

    `image` are the unit embeddings of the test images: only prompts are encoded.
    """
    alone = dict.fromkeys([*templates[:MOST_ALONE], *PLAIN_TEMPLATES])
    return {template: classify(image, labels, model.classifier(names, (template,))).top1 for template in alone}


def describe_spread(top1: dict[str, float]) -> dict[str, Any]:
    """Return what a score's details say of a spread: the least and the largest top-1, their templates, and all."""
    worst, best = min(top1, key=top1.__getitem__), max(top1, key=top1.__getitem__)
    return {
        "min": top1[worst],
        "min_template": worst,
        "max": top1[best],
        "max_template": best,
        "top1": top1,
    }


def measure_unlikeness(
    model: Embedder, names: Sequence[str], *, templates: Sequence[str], captions: Sequence[str]
) -> float:
    """Return the `unlikeness` to a model of the prompts of some classes and of captions.

    Of more than `NUM_COMPARED` prompts or different captions, as many that lie evenly among them are compared.
    """
    prompts = _some([template.replace("{}", name) for name in names for template in templates])
    compared = _some(list(dict.fromkeys(captions)))
    return unlikeness(model.text_features(prompts), model.text_features(compared))


def unlikeness(prompts: Float[Tensor, "p dim"], captions: Float[Tensor, "m dim"]) -> float:
    """Return the probability that a prompt is farther from the captions than a caption is from the others.

    Both are unit embeddings. A prompt is as near as its largest cosine with a caption; a caption is as near as its
    largest cosine with another one. All pairs of a prompt and a caption are compared, and a tie counts half. So prompts
    that are worded as captions have 0.5, and 1 says that every prompt is farther off than every caption.
    """
    if len(captions) < 2:
        return 0.5  # nothing says how near captions are to each other
    of_prompts = (prompts @ captions.T).amax(dim=1).numpy()
    of_captions = np.sort((captions @ captions.T).fill_diagonal_(-torch.inf).amax(dim=1).numpy())
    # Of each prompt, the captions that are less near than it, and those that are not nearer.
    less, not_more = (np.searchsorted(of_captions, of_prompts, side=side) for side in ("left", "right"))
    return float(1 - (less + not_more).mean() / (2 * len(of_captions)))


def _some(texts: Sequence[str]) -> list[str]:
    count = min(NUM_COMPARED, len(texts))
    return [texts[i * len(texts) // count] for i in range(count)]
