"""Read every sample of a list of shards in order, and collect the embeddings of each shard.

Samples are decoded in loader processes, in batches that never cross shards.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float16, Int, UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from distilclip import files
from distilclip.csv_rows import CsvColumns
from distilclip.data.bad_samples import ErrorPolicy
from distilclip.data.decode import decode_crop
from distilclip.data.limits import MAX_PIXELS, Side
from distilclip.data.samples import NO_IMAGE, BadSample, Entry, decode_image, judge_memory
from distilclip.data.shards import OpenShards, open_shard, source_size
from distilclip.data.store import Rows, SourceFile, not_unit, write_shard
from distilclip.data.tabular import ParquetShard, PictureFolder
from distilclip.data.views import ViewEmbeddings, Views
from distilclip.data.workers import Tokenize, map_tasks
from distilclip.errors import InputError

Preprocess = Callable[[Image.Image], Tensor]


@dataclass(frozen=True, kw_only=True)
class Source(SourceFile):
    """A shard's file with its index."""

    shard: int
    entries: list[Entry]


@dataclass(frozen=True, kw_only=True)
class ScannedBatch:
    """The n rows of a shard from `first` on.

    An unusable row has its reason in `errors`, zeros in `pixels` and an empty caption in `tokens`, so that the shape of
    a batch does not depend on them; so has a row that lacks one of the two. `has_image` and `has_text` say what is
    there, neither in an unusable row. `pixels` is None where no row has any. `view_pixels` are the m views of each row,
    `other_captions` its captions after the first and `other_tokens` these one after another; none without views.
    """

    source: Source
    first: int
    pixels: Tensor | None
    tokens: Int[Tensor, "n context"]
    view_pixels: UInt8[Tensor, "m n 3 size size"]
    other_captions: list[list[str]]
    other_tokens: Int[Tensor, "t context"]
    errors: list[str]
    has_image: Bool[np.ndarray, " n"]
    has_text: Bool[np.ndarray, " n"]
    image_sha256: UInt8[np.ndarray, "n 32"]


@dataclass(frozen=True, kw_only=True)
class ShardList:
    """Shards by number and URI, and what the first lines of the CSV files among them do not tell.

    `may_lack` names what a sample may lack: its caption, its image, or one of the two. Without it the sample is
    unusable. A folder of pictures in which none has a caption is one of pictures alone, whatever is asked for.
    """

    shards: Sequence[tuple[int, str]]
    columns: CsvColumns | None = None
    may_lack: Sequence[Side] = ()


def scan(
    listed: ShardList,
    *,
    preprocess: Preprocess,
    tokenize: Tokenize,
    batch_size: int,
    num_workers: int,
    max_pixels: int = MAX_PIXELS,
    views: Views | None = None,
    view_size: int = 0,
) -> Iterator[ScannedBatch]:
    """Read shards. A remote tar is downloaded once, and removed after its last batch.

    `views` are shown at `view_size` pixels square.

    Raises:
        InputError: a shard cannot be read at all.
    """
    opened = _Sources(listed, batch_size)
    decoder = _Decoder(preprocess, tokenize, max_pixels, views, view_size)
    decoder.shards = OpenShards(limit=2, columns=listed.columns)
    with contextlib.closing(opened):
        for decoded in map_tasks(decoder, opened, num_workers=num_workers):
            yield opened.finish(decoded)


@dataclass(frozen=True, kw_only=True)
class _Task:
    shard: int
    path: str
    first: int
    entries: list[Entry]
    may_lack: Sequence[Side]


@dataclass(frozen=True, kw_only=True)
class _DecodedBatch:
    """A `ScannedBatch` without its source, which the loader process does not know."""

    task: _Task
    fields: dict[str, Any]

    def pin_memory(self) -> _DecodedBatch:
        """Return the rows in page-locked memory, from which a copy to a GPU keeps no process waiting."""
        pinned = {name: v.pin_memory() if isinstance(v, Tensor) else v for name, v in self.fields.items()}
        return dataclasses.replace(self, fields=pinned)


class _Sources:
    """Yields the tasks of one shard after another, and keeps each shard's source until its last batch is out.

    While one shard is decoded, a thread fetches and indexes the next.
    """

    def __init__(self, listed: ShardList, batch_size: int) -> None:
        self.shards, self.columns, self.batch_size = listed.shards, listed.columns, batch_size
        self.may_lack = listed.may_lack
        self._thread = ThreadPoolExecutor(1)
        self._sources: dict[int, Source] = {}
        self._copies: dict[int, contextlib.ExitStack] = {}

    def __iter__(self) -> Iterator[_Task]:
        for source, path in self._one_ahead():
            self._sources[source.shard] = source
            may_lack = self.may_lack
            if path.endswith("/") and not PictureFolder(path).has_captions:
                may_lack = ("caption",)
            for first in range(0, len(source.entries), self.batch_size):
                part = source.entries[first : first + self.batch_size]
                yield _Task(shard=source.shard, path=path, first=first, entries=part, may_lack=may_lack)

    def _one_ahead(self) -> Iterator[tuple[Source, str]]:
        """Yield every source and the path to read it from."""
        under_way: deque[Future[tuple[Source, str]]] = deque()
        for shard, uri in self.shards:
            under_way.append(self._thread.submit(self._open, shard, uri))
            if len(under_way) > 1:
                yield under_way.popleft().result()
        for last in under_way:
            yield last.result()

    def _open(self, shard: int, uri: str) -> tuple[Source, str]:
        copy = self._copies[shard] = contextlib.ExitStack()
        # Each sample will be read: one download costs less than a request per sample. Tables name other files.
        names_files = uri.lower().endswith((".csv", ".tsv", "/"))
        path = uri if names_files else copy.enter_context(files.local_copy(uri))
        opened = open_shard(path, self.columns)
        entries = opened.index(self.may_lack)
        if path != uri and isinstance(opened, ParquetShard) and opened.names_files:
            path = uri  # the paths start from where it lies
        opened.close()
        source = Source(
            shard=shard,
            uri=uri,
            num_bytes=source_size(path),
            sha256=opened.sha256 if isinstance(opened, PictureFolder) else files.sha256(path),
            truncated=opened.truncated,
            entries=entries,
        )
        return source, path

    def finish(self, decoded: _DecodedBatch) -> ScannedBatch:
        """Return the batch with its source. After a shard's last batch, remove its download."""
        task = decoded.task
        source = self._sources[task.shard]
        if task.first + len(task.entries) == len(source.entries):
            self._copies.pop(task.shard).close()
            del self._sources[task.shard]
        return ScannedBatch(source=source, first=task.first, **decoded.fields)

    def close(self) -> None:
        """Wait for the thread, and remove downloads that a failure left."""
        self._thread.shutdown(cancel_futures=True)
        for copy in self._copies.values():
            copy.close()


@dataclass(frozen=True, kw_only=True)
class _Row:
    """A decoded sample: the teacher's pixels, those of its views, and its captions; one of them may be missing."""

    captions: list[str]
    pixels: Tensor | None
    views: list[Tensor]


class _Decoder(Dataset):
    def __init__(
        self, preprocess: Preprocess, tokenize: Tokenize, max_pixels: int, views: Views | None, view_size: int
    ) -> None:
        self.preprocess, self.tokenize, self.max_pixels = preprocess, tokenize, max_pixels
        self.views, self.view_size = views, view_size
        self.shards = OpenShards(limit=2)

    def __getitem__(self, task: _Task) -> _DecodedBatch | InputError:
        """Return the decoded rows of a task, or an `InputError`: raised here, it would lose its type."""
        digests = np.zeros((len(task.entries), 32), np.uint8)
        rows: list[_Row | None] = []
        errors = []
        try:
            for row, (entry, digest) in enumerate(zip(task.entries, digests, strict=True), start=task.first):
                decoded, error = self._row(task, entry, row, digest)
                rows.append(decoded)
                errors.append(error)
        except InputError as error:
            return error
        captions = [[""] if row is None else row.captions or [""] for row in rows]
        others = [several[1:] for several in captions]
        tokens = self.tokenize([several[0] for several in captions])
        pixels = [None if row is None else row.pixels for row in rows]
        blank = next((torch.zeros_like(found) for found in pixels if found is not None), None)
        fields = {
            "pixels": None if blank is None else torch.stack([blank if p is None else p for p in pixels]),
            "tokens": tokens,
            "view_pixels": self._view_pixels(rows),
            "other_captions": others,
            "other_tokens": self.tokenize(list(itertools.chain(*others))) if any(others) else tokens[:0],
            "errors": errors,
            "has_image": np.array([found is not None for found in pixels]),
            "has_text": np.array([row is not None and bool(row.captions) for row in rows]),
            "image_sha256": digests,
        }
        return _DecodedBatch(task=task, fields=fields)

    def _view_pixels(self, rows: list[_Row | None]) -> UInt8[Tensor, "m n 3 size size"]:
        """Stack the first view of every row, then the second, and so on; zeros for rows that have none."""
        num_views = 0 if self.views is None else self.views.num
        pixels = torch.zeros(num_views, len(rows), 3, self.view_size, self.view_size, dtype=torch.uint8)
        for place, row in enumerate(rows):
            for view, shown in enumerate(row.views if row is not None else ()):
                pixels[view, place] = shown
        return pixels

    def _row(self, task: _Task, entry: Entry, row: int, digest: np.ndarray) -> tuple[_Row | None, str]:
        """Return the row, or None and the reason why there is none. Fills in the digest of its image file."""
        if entry.error and not (entry.error == NO_IMAGE and "image" in task.may_lack):
            return None, entry.error
        try:
            sample = self.shards[task.path].read(entry.offset, entry.size)
            if sample.image is not None:
                digest[:] = np.frombuffer(hashlib.sha256(sample.image).digest(), np.uint8)
            if sample.image is None and ("image" not in task.may_lack or sample.caption is None):
                raise BadSample("no image")
            if sample.caption is None and "caption" not in task.may_lack:
                raise BadSample("no caption")
            captions = [] if sample.caption is None else [sample.caption]
            if self.views is not None:
                captions = sample.captions or captions
            if sample.image is None:
                return _Row(captions=captions, pixels=None, views=[]), ""
            with judge_memory():
                pixels = self.preprocess(decode_image(sample.image, max_pixels=self.max_pixels))
                num_views = 0 if self.views is None else self.views.num
                views = [self._view(sample.image, task.shard, row, view) for view in range(num_views)]
            return _Row(captions=captions, pixels=pixels, views=views), ""
        except BadSample as error:
            return None, error.error

    def _view(self, image: bytes, shard: int, row: int, view: int) -> Tensor:
        """Return one view, decoded as the training stream decodes it."""
        assert self.views is not None
        draw = functools.partial(self.views.crop, shard=shard, row=row, view=view)
        return decode_crop(image, [self.view_size], draw=draw, max_pixels=self.max_pixels)[0]


class ShardEmbeddings:
    """Collects a shard's embeddings and writes its files once all its rows are there."""

    def __init__(self, source: Source, *, dim: int, num_views: int) -> None:
        num_rows = len(source.entries)
        self.source = source
        self.image = np.zeros((num_rows, dim), np.float16)
        self.text = np.zeros((num_rows, dim), np.float16)
        self.views = np.zeros((num_rows, num_views, dim), np.float16)
        self.other_text: list[np.ndarray] = [np.zeros((0, dim), np.float16)]
        self.num_other = np.zeros(num_rows, np.int64)
        self.image_sha256 = np.zeros((num_rows, 32), np.uint8)
        self.has_image, self.has_text = np.zeros(num_rows, bool), np.zeros(num_rows, bool)
        self.errors: list[str] = []

    @property
    def full(self) -> bool:
        """Whether every row of the shard is there."""
        return len(self.errors) == len(self.source.entries)

    def add(
        self,
        batch: ScannedBatch,
        *,
        image: Float16[np.ndarray, "n dim"],
        text: Float16[np.ndarray, "n dim"],
        views: Float16[np.ndarray, "n m dim"],
        other_text: Float16[np.ndarray, "t dim"],
        policy: ErrorPolicy,
    ) -> None:
        """Add the rows that follow; unusable ones are counted by `policy`. What a row does not have stays zero.

        `views` are the embeddings of the batch's view_pixels, `other_text` those of its other captions.
        """
        num_other = np.array([len(captions) for captions in batch.other_captions])
        owner = np.repeat(np.arange(len(num_other)), num_other)
        wrong = (not_unit(image) & batch.has_image) | (not_unit(text) & batch.has_text)
        for view in range(views.shape[1]):
            wrong |= not_unit(views[:, view]) & batch.has_image
        wrong[owner[not_unit(other_text)]] = True
        errors = [
            error or ("embedding is no finite unit vector" if bad else "")
            for error, bad in zip(batch.errors, wrong, strict=True)
        ]
        policy.seen(len(errors))
        for row, error in enumerate(errors, start=batch.first):
            if error:
                policy.bad(error, where=f"{self.source.uri}: {self.source.entries[row].key}")
        rows = slice(batch.first, batch.first + len(errors))
        valid = np.array([not error for error in errors])
        has_image, has_text = batch.has_image & valid, batch.has_text & valid
        self.has_image[rows], self.has_text[rows] = has_image, has_text
        self.image[rows] = np.where(has_image[:, None], image, 0)
        self.text[rows] = np.where(has_text[:, None], text, 0)
        self.views[rows] = np.where(has_image[:, None, None], views, 0)
        self.other_text.append(other_text[valid[owner]])
        self.num_other[rows] = np.where(valid, num_other, 0)
        self.image_sha256[rows] = batch.image_sha256
        self.errors += errors

    def write(self, folder: str, teacher: Mapping[str, Any]) -> None:
        """Write the shard's files into the store."""
        entries, source = self.source.entries, self.source
        rows = Rows(
            key=[entry.key for entry in entries],
            offset=np.array([entry.offset for entry in entries], np.uint64),
            size=np.array([entry.size for entry in entries], np.uint32),
            valid=np.array([not error for error in self.errors]),
            error=self.errors,
            image_sha256=self.image_sha256,
            has_image=self.has_image,
            has_text=self.has_text,
        )
        views = None
        if self.views.shape[1]:
            text_first = np.concatenate([[0], np.cumsum(self.num_other)])
            views = ViewEmbeddings(self.views, np.concatenate(self.other_text), text_first)
        write_shard(
            folder,
            source.shard,
            rows,
            image=self.image,
            text=self.text,
            source=source,
            teacher=teacher,
            views=views,
        )
