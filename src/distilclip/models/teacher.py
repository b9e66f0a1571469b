"""Make teachers: callables from a batch to `Features`, which are never trained and never checkpointed.

From several teachers, each with its own width and scale, the student learns the weighted mean of the losses:

    L = sum_k w_k L(student, teacher k),     sum_k w_k = 1

where each teacher has its own projections. For divergences from the teacher's similarities (CLIP-KD's relational term)
its gradient is that of the divergence from the averaged distribution, for sum_k w_k KL(q_k || p) =
KL(sum_k w_k q_k || p) + a constant. Embeddings have no common space, so their average would mean nothing. Source:
the training loss of Vasu et al. 2024 (MobileCLIP), which sums the divergences of an ensemble's members, each at its own
scale.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from distilclip.data.store import StoredTeacher
from distilclip.data.stream import Batch
from distilclip.errors import InputError
from distilclip.losses.features import Features
from distilclip.models import perceptual
from distilclip.models.clip import Clip, normalise_pixels

Teacher = Callable[[Batch], tuple[Features, ...]]
"""The features of every teacher; the first is the one whose clusters and diagnostics are used."""


def stored_teachers(stores: Sequence[StoredTeacher], *, device: torch.device) -> Teacher:
    """Return the teachers whose embeddings the stream has joined from these stores, with the scales recorded there.

    Raises `InputError` for a store of `embed --model perceptual`, which knows nothing of texts.
    """
    for store in stores:
        if store.teacher["name"] == perceptual.NAME:
            raise InputError(
                f"{store.path} holds perceptual embeddings: they find copies and teach nothing. Balance with that "
                "store, and train with a store that a CLIP embedded."
            )
    scales = [torch.tensor(store.scale, device=device) for store in stores]
    biases = [
        torch.tensor(float(store.teacher["bias"]), device=device) if "bias" in store.teacher else None
        for store in stores
    ]

    def features(batch: Batch) -> tuple[Features, ...]:
        return tuple(
            Features(
                image=F.normalize(image.to(device, non_blocking=True).float(), dim=-1),
                text=F.normalize(text.to(device, non_blocking=True).float(), dim=-1),
                scale=scale,
                bias=bias,
            )
            for image, text, scale, bias in zip(batch.teacher_image, batch.teacher_text, scales, biases, strict=True)
        )

    return features


def live_teacher(clip: Clip, *, precision: torch.dtype, micro_batch: int) -> Teacher:
    """Return a teacher that runs on every batch, on its own crop of each picture and with its own tokenizer.

    The stream must show crops at the teacher's size too. `precision` is that of its towers (autocast), `micro_batch`
    how many pairs it takes at a time.
    """

    def encode(batch: Batch, part: slice) -> tuple[Tensor, Tensor]:
        assert batch.teacher_pixels is not None
        tokens = clip.tokenizer(batch.captions[part]).to(clip.device)
        text = clip.encode_text(tokens)
        if batch.has_image is not None and not batch.has_image[part].any():
            return torch.zeros_like(text), text
        pixels = batch.teacher_pixels[part].to(clip.device, non_blocking=True)
        return clip.encode_image(normalise_pixels(pixels, clip.preprocess_cfg)), text

    @torch.no_grad()
    def features(batch: Batch) -> tuple[Features, ...]:
        with torch.autocast(clip.device.type, precision, enabled=precision != torch.float32):
            parts = [encode(batch, slice(i, i + micro_batch)) for i in range(0, len(batch), micro_batch)]
        image, text = (torch.cat(column) for column in zip(*parts, strict=True))
        return (Features(image=image, text=text, scale=clip.scale, bias=clip.bias),)

    return features
