"""Read a store's embeddings of any rows in float32, as the training stream needs them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from jaxtyping import Bool, Float, Float16, Float32, Int64, Integer, Shaped, UInt32
from torch import Tensor

from distilclip import files
from distilclip.data.reader import OpenFiles, Reader
from distilclip.data.store import Store, not_unit
from distilclip.data.tensors import HEADER_BYTES, Header, read_header
from distilclip.errors import InputError

MAX_OPEN_FILES = 64
"""Payloads, and as many files of views, that a process has open of each store."""


class Embeddings:
    """Maps rows to a teacher's image and text embeddings. Picklable; opens files in the process that reads them."""

    def __init__(self, store: Store) -> None:
        self.store = store
        known = {path: digest for path, digest, _ in store.list_embeddings()} if files.is_url(store.path) else {}
        self._payloads = _Rows(store.payload_path, store.check_payload, known)
        self._views = _Rows(store.views_path, store.check_views, known)

    def num_captions(self, shard: UInt32[np.ndarray, " n"], row: UInt32[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        """Return how many captions of each row have an embedding, in a store with views."""
        first, after = (self._views.read("text_first", shard, row + np.uint32(i))[:, 0] for i in range(2))
        return 1 + after - first

    def images(
        self,
        shard: UInt32[np.ndarray, " n"],
        row: UInt32[np.ndarray, " n"],
        view: Int64[np.ndarray, " n"] | None = None,
        *,
        there: Bool[np.ndarray, " n"] | None = None,
    ) -> Float[Tensor, "n dim"]:
        """Return the image embeddings of n rows; those of their views where these are given.

        `there` says which rows have one at all (None: all); the others are zeros.

        Raises:
            InputError: a file is not the store's, or an embedding is no finite unit vector.
        """
        if view is None:
            image = self._payloads.read("image", shard, row)
        else:
            views = self._views.read("image", shard, row).reshape(len(row), -1, self.store.dim)
            image = views[np.arange(len(row)), view]
        return self._checked(image, shard, row, there)

    def texts(
        self,
        shard: UInt32[np.ndarray, " n"],
        row: UInt32[np.ndarray, " n"],
        caption: Int64[np.ndarray, " n"] | None = None,
        *,
        there: Bool[np.ndarray, " n"] | None = None,
    ) -> Float[Tensor, "n dim"]:
        """Return the text embeddings of n rows: of their first captions, or those given. The rest as in `images`."""
        text = self._payloads.read("text", shard, row)
        if caption is not None and caption.any():
            later = np.flatnonzero(caption)  # a row's first caption is the canonical one
            first = self._views.read("text_first", shard[later], row[later])[:, 0]
            text[later] = self._views.read("text", shard[later], first + caption[later] - 1)
        return self._checked(text, shard, row, there)

    def _checked(
        self,
        embeddings: Float16[np.ndarray, "n dim"],
        shard: UInt32[np.ndarray, " n"],
        row: UInt32[np.ndarray, " n"],
        there: Bool[np.ndarray, " n"] | None,
    ) -> Float[Tensor, "n dim"]:
        whole = embeddings.astype(np.float32)
        if there is None:
            self._check_unit(whole, shard, row)
        else:
            self._check_unit(whole[there], shard[there], row[there])
        return torch.from_numpy(whole)

    def _check_unit(
        self, embeddings: Float32[np.ndarray, "n dim"], shard: UInt32[np.ndarray, " n"], row: UInt32[np.ndarray, " n"]
    ) -> None:
        wrong = not_unit(embeddings)
        if wrong.any():
            first = int(np.argmax(wrong))
            raise InputError(
                f"{self.store.path}: the embedding of shard {shard[first]}, row {row[first]} is "
                "not a finite unit vector. The store is damaged: embed the data again, into a new folder."
            )


class _Rows:
    """Rows of the tensors in one safetensors file per shard; each row is one read at its position.

    A batch has rows of any shard. So nothing is mapped (each map holds a file open), of remote files nothing else is
    fetched until copies of them are here, and headers are kept: a file that is opened again is not parsed again.
    """

    def __init__(
        self, path_of: Callable[[int], str], check: Callable[[int, Header], None], digests: Mapping[str, str]
    ) -> None:
        self.path_of, self.check, self.digests = path_of, check, digests
        self._open: OpenFiles[int, Reader] = OpenFiles(self._reader, limit=MAX_OPEN_FILES)
        self._headers: dict[int, Header] = {}

    def read(
        self, name: str, shard: UInt32[np.ndarray, " n"], row: Integer[np.ndarray, " n"]
    ) -> Shaped[np.ndarray, "n width"]:
        """Read rows of the tensor `name`, flattened. Raises `InputError` where a file is missing, cut or wrong."""
        found: list[bytes] = []
        for start in range(0, len(row), MAX_OPEN_FILES):  # more at once would close files before they are read
            here = slice(start, start + MAX_OPEN_FILES)
            found += self._read(name, shard[here].tolist(), row[here].tolist())
        dtype = self._headers[int(shard[0])].places[name].dtype
        return np.frombuffer(bytearray().join(found), dtype).reshape(len(row), -1)

    def _read(self, name: str, shards: list[int], rows: list[int]) -> list[bytes]:
        self._read_headers({shard for shard in shards if shard not in self._headers})
        wanted = []
        for shard, row in zip(shards, rows, strict=True):
            reader = self._open[shard]
            place = self._headers[shard].places[name]
            if row >= place.shape[0]:
                raise InputError(f"{reader.path} has {place.shape[0]} rows of {name}, not a row {row}. {_EMBED_AGAIN}")
            offset, length = place.row(row)
            reader.prefetch(offset, length)
            wanted.append((reader, offset, length))
        found = []
        for reader, offset, length in wanted:
            found.append(reader.read(offset, length))
            if len(found[-1]) < length:
                raise InputError(f"{reader.path} is cut: it ends before byte {offset + length}. {_EMBED_AGAIN}")
        return found

    def _read_headers(self, shards: set[int]) -> None:
        try:
            for shard in shards:  # all under way at the same time
                self._open[shard].prefetch(0, HEADER_BYTES)
            for shard in shards:
                header = read_header(self._open[shard])
                self.check(shard, header)
                self._headers[shard] = header
        except FileNotFoundError as error:
            raise InputError(f"A file of embeddings is missing ({error}). {_EMBED_AGAIN}") from error

    def _reader(self, shard: int) -> Reader:
        path = self.path_of(shard)
        return Reader(path, copied=True, digest=self.digests.get(path))


_EMBED_AGAIN = "Embed the data again, into a new folder."
