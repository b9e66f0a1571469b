"""Every sample of a list of shards in order, decoded in loader processes, in batches that never cross shards."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int, UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from distilclip.data import files
from distilclip.data.loader import OpenShards, Tokenize
from distilclip.data.samples import MAX_PIXELS, BadSample, Entry, decode_image
from distilclip.data.shards import open_shard
from distilclip.data.workers import map_tasks
from distilclip.errors import InputError

Preprocess = Callable[[Image.Image], Tensor]


@dataclass(frozen=True, kw_only=True)
class Source:
    """A shard with its index. `sha256` is that of its file, `num_bytes` its size."""

    shard: int
    uri: str
    num_bytes: int
    sha256: str
    truncated: bool
    entries: list[Entry]


@dataclass(frozen=True, kw_only=True)
class ScannedBatch:
    """The n rows of a shard from `first` on.

    An unusable row has its reason in `errors`, zeros in `pixels` and an empty caption in `tokens`, so that a batch has
    one shape whatever its rows are like. `pixels` is None where all are unusable.
    """

    source: Source
    first: int
    pixels: Tensor | None
    tokens: Int[Tensor, "n context"]
    errors: list[str]
    image_sha256: UInt8[np.ndarray, "n 32"]


def scan(
    shards: Sequence[tuple[int, str]],
    *,
    preprocess: Preprocess,
    tokenize: Tokenize,
    batch_size: int,
    num_workers: int,
    max_pixels: int = MAX_PIXELS,
) -> Iterator[ScannedBatch]:
    """Read shards given as (number, URI). A remote tar is fetched whole, once, and removed when its last batch is out.

    Raises:
        InputError: a shard cannot be read at all.
    """
    opened = _Sources(shards, batch_size)
    decoder = _Decoder(preprocess, tokenize, max_pixels)
    with contextlib.closing(opened):
        for decoded in map_tasks(decoder, opened, num_workers=num_workers):
            yield opened.finish(decoded)


@dataclass(frozen=True, kw_only=True)
class _Task:
    shard: int
    path: str
    first: int
    entries: list[Entry]


@dataclass(frozen=True, kw_only=True)
class _Decoded:
    task: _Task
    pixels: Tensor | None
    tokens: Tensor
    errors: list[str]
    image_sha256: np.ndarray


class _Sources:
    """Yields tasks shard by shard while the loader asks for them, and holds what their results need."""

    def __init__(self, shards: Sequence[tuple[int, str]], batch_size: int) -> None:
        self.shards, self.batch_size = shards, batch_size
        self._sources: dict[int, tuple[Source, contextlib.ExitStack]] = {}

    def __iter__(self) -> Iterator[_Task]:
        for shard, uri in self.shards:
            copy = contextlib.ExitStack()
            # Each sample will be read: one download costs less than a request per sample. Tables name other files.
            path = uri if uri.lower().endswith((".csv", ".tsv")) else copy.enter_context(files.local_copy(uri))
            opened = open_shard(path)
            entries = opened.index()
            opened.close()
            source = Source(
                shard=shard,
                uri=uri,
                num_bytes=files.size(path),
                sha256=files.sha256(path),
                truncated=opened.truncated,
                entries=entries,
            )
            self._sources[shard] = source, copy
            for first in range(0, len(entries), self.batch_size):
                part = entries[first : first + self.batch_size]
                yield _Task(shard=shard, path=path, first=first, entries=part)

    def finish(self, decoded: _Decoded) -> ScannedBatch:
        """The batch with its source; after the last one of a shard its download is removed."""
        task = decoded.task
        source, copy = self._sources[task.shard]
        if task.first + len(task.entries) == len(source.entries):
            copy.close()
            del self._sources[task.shard]
        return ScannedBatch(
            source=source,
            first=task.first,
            pixels=decoded.pixels,
            tokens=decoded.tokens,
            errors=decoded.errors,
            image_sha256=decoded.image_sha256,
        )

    def close(self) -> None:
        """Remove the downloads that are left after a failure."""
        for _, copy in self._sources.values():
            copy.close()


class _Decoder(Dataset):
    def __init__(self, preprocess: Preprocess, tokenize: Tokenize, max_pixels: int) -> None:
        self.preprocess, self.tokenize, self.max_pixels = preprocess, tokenize, max_pixels
        self._shards = OpenShards(limit=2)

    def __getitem__(self, task: _Task) -> _Decoded | InputError:
        """The decoded rows of a task. An `InputError` is returned: raised here, it would lose its type."""
        digests = np.zeros((len(task.entries), 32), np.uint8)
        errors, captions = [], []
        pixels: list[Tensor | None] = []
        try:
            for entry, digest in zip(task.entries, digests, strict=True):
                error, caption, image = self._row(task, entry, digest)
                errors.append(error)
                captions.append(caption)
                pixels.append(image)
        except InputError as error:
            return error
        blank = next((torch.zeros_like(image) for image in pixels if image is not None), None)
        return _Decoded(
            task=task,
            pixels=None if blank is None else torch.stack([blank if image is None else image for image in pixels]),
            tokens=self.tokenize(captions),
            errors=errors,
            image_sha256=digests,
        )

    def _row(self, task: _Task, entry: Entry, digest: np.ndarray) -> tuple[str, str, Tensor | None]:
        """Error, caption and pixels of a sample; fills in the digest of its image file."""
        if entry.error:
            return entry.error, "", None
        try:
            sample = self._shards[task.path].read(entry.offset, entry.size)
            if sample.image is None:
                raise BadSample("no image")
            digest[:] = np.frombuffer(hashlib.sha256(sample.image).digest(), np.uint8)
            if sample.caption is None:
                raise BadSample("no caption")
            return "", sample.caption, self.preprocess(decode_image(sample.image, max_pixels=self.max_pixels))
        except BadSample as error:
            return error.error, "", None
