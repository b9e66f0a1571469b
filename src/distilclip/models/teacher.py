"""Teachers: callables from a batch to `Features`. They are never trained and never checkpointed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from distilclip.data.stream import Batch
from distilclip.models.clip import Clip, normalise_pixels
from distilclip.ops.features import Features

Teacher = Callable[[Batch], Features]


def stored_teacher(scale: float, *, device: torch.device, place: int = 0) -> Teacher:
    """The teacher whose embeddings the stream has joined from its store in this `place`, with that store's scale."""
    factor = torch.tensor(scale, device=device)

    def features(batch: Batch) -> Features:
        return Features(
            image=torch.nn.functional.normalize(batch.teacher_image[place].to(device).float(), dim=-1),
            text=torch.nn.functional.normalize(batch.teacher_text[place].to(device).float(), dim=-1),
            scale=factor,
        )

    return features


def live_teacher(clip: Clip) -> Teacher:
    """A teacher run on every batch, on its own view of each picture and with its own tokenizer.

    The stream must show crops at the teacher's size too.
    """

    @torch.no_grad()
    def features(batch: Batch) -> Features:
        assert batch.teacher_pixels is not None
        pixels: Tensor = normalise_pixels(batch.teacher_pixels.to(clip.device), clip.preprocess_cfg)
        tokens = clip.tokenizer(batch.captions).to(clip.device)
        return Features(image=clip.encode_image(pixels), text=clip.encode_text(tokens), scale=clip.scale)

    return features
