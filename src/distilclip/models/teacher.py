"""Teachers: callables from a batch to `Features`. They are never trained and never checkpointed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from distilclip.data.stream import Batch
from distilclip.models.clip import Clip, normalise_pixels
from distilclip.ops.features import Features

Teacher = Callable[[Batch], Features]


def stored_teacher(scale: float, *, device: torch.device) -> Teacher:
    """The teacher whose embeddings the stream has joined from a store; `scale` is the one the store records."""
    factor = torch.tensor(scale, device=device)

    def features(batch: Batch) -> Features:
        assert batch.teacher_image is not None
        assert batch.teacher_text is not None
        return Features(
            image=torch.nn.functional.normalize(batch.teacher_image.to(device).float(), dim=-1),
            text=torch.nn.functional.normalize(batch.teacher_text.to(device).float(), dim=-1),
            scale=factor,
        )

    return features


def live_teacher(clip: Clip) -> Teacher:
    """A teacher run on every batch, on its own view of each picture and with its own tokenizer.

    The stream must have been opened with the teacher's transform (`views`), since sizes and means differ.
    """

    @torch.no_grad()
    def features(batch: Batch) -> Features:
        assert batch.teacher_pixels is not None
        pixels: Tensor = normalise_pixels(batch.teacher_pixels.to(clip.device), clip.preprocess_cfg)
        tokens = clip.tokenizer(batch.captions).to(clip.device)
        return Features(image=clip.encode_image(pixels), text=clip.encode_text(tokens), scale=clip.scale)

    return features
