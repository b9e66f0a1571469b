"""The rows of one shard of a store as they fill up, batch by batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float16

from distilclip.data.policy import ErrorPolicy
from distilclip.data.rows import Rows
from distilclip.data.scan import ScannedBatch, Source
from distilclip.data.store import write_shard
from distilclip.data.unit import not_unit
from distilclip.data.views import ViewEmbeddings


class Part:
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
        """Add the rows that follow; unusable ones are counted by `policy` and keep zeros.

        `views` are the embeddings of the batch's view_pixels, `other_text` those of its other captions.
        """
        num_other = np.array([len(captions) for captions in batch.other_captions])
        owner = np.repeat(np.arange(len(num_other)), num_other)
        wrong = not_unit(image) | not_unit(text)
        for view in range(views.shape[1]):
            wrong |= not_unit(views[:, view])
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
        self.image[rows] = np.where(valid[:, None], image, 0)
        self.text[rows] = np.where(valid[:, None], text, 0)
        self.views[rows] = np.where(valid[:, None, None], views, 0)
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
            uri=source.uri,
            num_bytes=source.num_bytes,
            source_digest=source.sha256,
            truncated=source.truncated,
            teacher=teacher,
            views=views,
        )
