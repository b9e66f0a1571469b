"""Compute the features of images and texts. Worker processes decode; batches come in a fixed order."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from distilclip import files
from distilclip.data.bad_samples import ErrorPolicy
from distilclip.data.limits import MAX_PIXELS
from distilclip.data.samples import BadSample, decode_image, judge_memory
from distilclip.data.shards import OpenShards
from distilclip.data.workers import map_tasks
from distilclip.errors import InputError
from distilclip.models.clip import Clip
from distilclip.progress import progress
from distilclip.sets.dataset import ImageRef

Output = Literal["embedding", "backbone"]


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """Hold the settings that features are computed with: `dtype` and `max_pixels` change them, the others the speed."""

    batch_size: int = 64
    dtype: torch.dtype = torch.float32
    max_pixels: int = MAX_PIXELS
    num_workers: int = 0

    def autocast(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        """Return the context that the towers run in."""
        return torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32)


@dataclass(frozen=True, kw_only=True)
class ImageFeatures:
    """Hold the features of the images that could be read, on the CPU. `rows` are their places among all images.

    `embedding` has unit rows; `backbone` is what the model's `backbone_kind` says, not normalised. `unreadable` are the
    rows of the other images, each with the reason.
    """

    rows: Int[Tensor, " n"]
    features: dict[Output, Float[Tensor, "n _"]]
    unreadable: tuple[tuple[int, str], ...] = ()

    @property
    def num_unreadable(self) -> int:
        """Count the images that could not be read."""
        return len(self.unreadable)

    @property
    def embedding(self) -> Float[Tensor, "n dim"]:
        """Return the unit embeddings, in the space shared with texts."""
        return self.features["embedding"]


def encode_images(
    clip: Clip,
    images: Sequence[ImageRef],
    *,
    outputs: Sequence[Output] = ("embedding",),
    encoding: Encoding | None = None,
    policy: ErrorPolicy | None = None,
    description: str = "images",
    kept: KeptPixels | None = None,
) -> ImageFeatures:
    """Encode images in order. `policy` decides what an unreadable one does; by default the first raises.

    What lies in `kept` is not read and decoded again; it belongs to these images and this model's preprocessing.

    Raises `InputError` for an unreadable image (or too many of them), and for a model whose features are not finite.
    """
    encoding = encoding or Encoding()
    policy = policy or ErrorPolicy()
    compute: dict[Output, Callable[[Tensor], Tensor]] = {
        "embedding": clip.encode_image,
        "backbone": clip.backbone_features,
    }
    decoder = _Images(images, clip.preprocess, encoding.max_pixels)
    batches = [
        range(first, min(first + encoding.batch_size, len(images)))
        for first in range(0, len(images), encoding.batch_size)
    ]
    buffers: dict[Output, Tensor] = {}
    rows: list[int] = []
    unreadable: list[tuple[int, str]] = []
    kept = KeptPixels(budget=0) if kept is None else kept
    with progress(description, len(images)) as advance, torch.no_grad():
        for pixels, read, bad in kept.batches(decoder, batches, num_workers=encoding.num_workers):
            policy.seen(len(read) + len(bad))
            for row, error in bad:
                policy.bad(error, where=images[row].where)
            policy.check()
            unreadable += bad
            advance(len(read) + len(bad), len(read))
            if not read:
                continue
            pixels = pixels.to(clip.device, non_blocking=True)
            for output in outputs:
                with encoding.autocast(clip.device):
                    features = compute[output](pixels).float().cpu()
                if output not in buffers:
                    buffers[output] = torch.empty(len(images), features.shape[1])
                buffers[output][len(rows) : len(rows) + len(read)] = features
            rows += read
    policy.check(final=True)
    if not rows:
        raise InputError(f"None of the {len(images)} images could be read; the first is {policy.first}.")
    found = {output: buffer[: len(rows)] for output, buffer in buffers.items()}
    for features in found.values():
        _check_finite(clip, features)
    return ImageFeatures(rows=torch.tensor(rows), features=found, unreadable=tuple(unreadable))


def encode_texts(clip: Clip, texts: Sequence[str], *, encoding: Encoding | None = None) -> Float[Tensor, "n dim"]:
    """Return unit text embeddings in order, on the CPU. Raises `InputError` for features that are not finite."""
    encoding = encoding or Encoding()
    parts = []
    with torch.no_grad(), encoding.autocast(clip.device):
        for start in range(0, len(texts), encoding.batch_size):
            tokens = clip.tokenizer(list(texts[start : start + encoding.batch_size])).to(clip.device)
            parts.append(clip.encode_text(tokens).float().cpu())
    features = torch.cat(parts)
    _check_finite(clip, features)
    return features


def _check_finite(clip: Clip, features: Tensor) -> None:
    if not torch.isfinite(features).all():
        raise InputError(f"{clip.name} gives NaN or infinite features: its weights are broken, or bf16 is too coarse.")


_Batch = tuple[Tensor, list[int], list[tuple[int, str]]]  # pixels; the rows they are of; unreadable rows and why


class KeptPixels:
    """Prepared batches of a set that is encoded again and again, as many as fit into `budget` bytes of host memory."""

    def __init__(self, *, budget: int = 1 << 30) -> None:
        self._budget = budget
        self._batches: dict[int, _Batch] = {}

    def batches(self, decoder: _Images, batches: Sequence[range], *, num_workers: int) -> Iterator[_Batch]:
        """Yield every batch, in order; those that are not kept are decoded, by loader processes where there are any."""
        missing = [batch for batch in batches if batch.start not in self._batches]
        decoded = map_tasks(decoder, missing, num_workers=num_workers) if missing else iter(())
        for batch in batches:
            if batch.start in self._batches:
                yield self._batches[batch.start]
                continue
            found = next(decoded)
            if found[0].nbytes <= self._budget:
                self._budget -= found[0].nbytes
                self._batches[batch.start] = found
            yield found


class _Images(Dataset):
    """Decode and preprocess batches of rows. Picklable; each process opens the files that it reads."""

    def __init__(self, images: Sequence[ImageRef], preprocess: Callable[..., Tensor], max_pixels: int) -> None:
        self.images, self.preprocess, self.max_pixels = images, preprocess, max_pixels
        self.shards = OpenShards()

    def __getitem__(self, rows: range) -> _Batch | InputError:
        """Return the rows' batch. An `InputError` is returned too: raised here, it would lose its type on the way."""
        pixels: list[Tensor] = []
        read: list[int] = []
        bad: list[tuple[int, str]] = []
        for row in rows:
            try:
                pixels.append(self._pixels(self.images[row]))
                read.append(row)
            except BadSample as error:
                bad.append((row, error.error))
            except InputError as error:
                return error
        return torch.stack(pixels) if pixels else torch.empty(0), read, bad

    def _pixels(self, image: ImageRef) -> Tensor:
        if image.error:
            reason, _, detail = image.error.partition(": ")
            raise BadSample(reason, detail=detail, where=image.where)
        if image.pixels is not None:
            return self.preprocess(Image.fromarray(image.pixels))
        with judge_memory(image.where):
            picture = decode_image(self._bytes(image), max_pixels=self.max_pixels, where=image.where)
            if image.border:
                width, height = picture.size
                picture = picture.crop((image.border, image.border, width - image.border, height - image.border))
            return self.preprocess(picture)

    def _bytes(self, image: ImageRef) -> bytes:
        if image.key:
            return self._sample(image)
        try:
            return files.read_bytes(image.uri)
        except FileNotFoundError as error:
            raise BadSample("missing image file", where=image.where) from error

    def _sample(self, image: ImageRef) -> bytes:
        sample = self.shards[image.uri].read(image.offset, image.size)
        if sample.key != image.key:
            raise InputError(f"{image.where}: found {sample.key!r} in its place; the file was changed during the run.")
        if sample.image is None:
            raise BadSample("no image", where=image.where)
        return sample.image
