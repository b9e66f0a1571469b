"""Count the arithmetic of a model's towers, on a model without weights."""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

from distilclip.errors import InputError, did_you_mean
from distilclip.plan.architecture_costs import KNOWN, Cost


def cost_of(architecture: str) -> Cost:
    """Return what an open_clip architecture costs; one that is not listed here is counted, which needs torch.

    Raises:
        InputError: open_clip does not know the architecture, or is not installed and it is not listed.
    """
    if architecture in KNOWN:
        image_flops, text_flops, num_parameters, dim = KNOWN[architecture]
        return Cost(
            image_flops=float(image_flops), text_flops=float(text_flops), num_parameters=num_parameters, dim=dim
        )
    if importlib.util.find_spec("open_clip") is None:
        raise InputError(
            f"The costs of {architecture!r} are not listed, and counting them needs open_clip: "
            f"pip install 'distilclip[train]'. {did_you_mean(architecture, KNOWN)}"
        )
    return count_cost(architecture)


def count_cost(architecture: str) -> Cost:
    """Count an open_clip architecture's forward pass for one image and one text.

    Raises:
        InputError: open_clip does not know the architecture.
    """
    import open_clip  # here: a plan of a listed architecture needs neither of them
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    known = open_clip.list_models()
    if architecture not in known:
        raise InputError(f"open_clip knows no architecture {architecture!r}. {did_you_mean(architecture, known)}")
    logging.disable(logging.WARNING)  # open_clip warns that there are no weights
    try:
        model = _without_weights(architecture)
    finally:
        logging.disable(logging.NOTSET)
    with torch.device("meta"):
        size = model.visual.image_size
        height, width = size if isinstance(size, tuple) else (size, size)
        length = getattr(model, "context_length", None) or model.text.context_length
        image, text = torch.zeros(1, 3, height, width), torch.zeros(1, length, dtype=torch.long)
    counts = []
    with torch.inference_mode():
        for encode, given in ((model.encode_image, image), (model.encode_text, text)):
            with FlopCounterMode(display=False) as counter:
                embedding = encode(given)
            counts.append(float(counter.get_total_flops()))
    return Cost(
        image_flops=counts[0],
        text_flops=counts[1],
        num_parameters=sum(p.numel() for p in model.parameters()),
        dim=embedding.shape[-1],
    )


def _without_weights(architecture: str) -> Any:
    import open_clip
    import torch

    with torch.device("meta"):
        model = open_clip.create_model(architecture, device="meta").eval()
    return model.requires_grad_(False)  # else the counter asks for gradients of parameters that are given as inputs
