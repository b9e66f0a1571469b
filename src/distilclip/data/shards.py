"""Find and open shards of samples, whole or only their texts: tars, Parquet, a CSV, or a folder of pictures."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt32, UInt64

from distilclip import files
from distilclip.csv_rows import CsvColumns
from distilclip.data.limits import Side
from distilclip.data.reader import OpenFiles, Reader
from distilclip.data.samples import IMAGE_EXTENSIONS, LABEL_EXTENSIONS, BadSample, Entry, Sample
from distilclip.data.tabular import CsvShard, ParquetShard, PictureFolder, is_picture
from distilclip.data.tars import CutError, TarShard, sample_of, walk
from distilclip.errors import InputError

MAX_OPEN_SHARDS = 128
TEXT_EXTENSIONS = LABEL_EXTENSIONS | {"txt", "json"}


@runtime_checkable
class Shard(Protocol):
    """A file of samples with random access."""

    uri: str
    truncated: bool

    def index(self, may_lack: Collection[Side] = ()) -> list[Entry]:
        """Return every sample in file order, unusable ones included.

        Raises `InputError` for a table without a column of images or captions, unless its samples may lack these.
        """

    def prefetch(self, offset: int, size: int) -> None:
        """Begin to fetch an entry that `read` will ask for soon, where that helps."""

    def read(self, offset: int, size: int) -> Sample:
        """Return the sample of an entry. Raises `BadSample` where it cannot be understood."""

    def close(self) -> None:
        """Close open files; reading opens them again."""


def open_shard(uri: str, columns: CsvColumns | None = None) -> Shard:
    """Return the shard in a file, by its suffix: .tar, .parquet, .csv or .tsv; `/` for a folder. Nothing is read yet.

    `columns` says of a CSV what its first line does not tell.
    """
    if uri.endswith("/"):
        return PictureFolder(uri)
    if uri.lower().endswith(COMPRESSED):
        raise InputError(f"{uri} is compressed, and samples are read by their place in the tar. {unpack_advice(uri)}")
    suffix = uri.rsplit(".", 1)[-1].lower()
    if suffix == "tar":
        return TarShard(uri)
    if suffix == "parquet":
        return ParquetShard(uri)
    if suffix in ("csv", "tsv"):
        return CsvShard(uri, columns)
    if uri.lower().endswith(EMBEDDING_SUFFIXES):
        raise InputError(
            f"{uri} holds embeddings, and neither pictures nor captions. Give the pairs that they were made from, "
            "to `distilclip import` as --data."
        )
    raise InputError(
        f"{uri}: data is read from .tar (webdataset), .parquet (with image bytes) and .csv or .tsv "
        f"(columns filepath, caption), not .{suffix}. Name such files, or a pattern as in 'data/{{00000..00012}}.tar'."
    )


@contextlib.contextmanager
def opened_whole(uri: str, columns: CsvColumns | None = None) -> Iterator[Shard]:
    """Yield a shard of which most samples will be read; `columns` as in `open_shard`.

    A remote file is downloaded for it, since that costs less than a request for each sample. Tables that name image
    files are read where they lie, and so are the images.
    """
    with contextlib.ExitStack() as stack:
        names_files = uri.lower().endswith((".csv", ".tsv", "/"))
        shard = open_shard(uri if names_files else stack.enter_context(files.local_copy(uri)), columns)
        if shard.uri != uri and isinstance(shard, ParquetShard) and shard.names_files:
            shard.close()
            shard = open_shard(uri, columns)
        stack.callback(shard.close)
        yield shard


class OpenShards(OpenFiles[str, Shard]):
    """The shards that a process has open, by URI; `columns` as in `open_shard`."""

    def __init__(self, limit: int = MAX_OPEN_SHARDS, columns: CsvColumns | None = None) -> None:
        super().__init__(functools.partial(open_shard, columns=columns), limit=limit)


def find_shards(patterns: str | Sequence[str]) -> list[str]:
    """Return the shards that patterns of files and folders name, each once, in the order given.

    Of a folder these are all its tars, or else all its Parquet files with images, with those of its subfolders; or
    else the folder and every subfolder in which pictures lie, each with a slash at its end; or else its CSV files.
    What img2dataset writes beside the shards (Parquet without images, JSON) is passed over.

    Raises:
        InputError: a pattern matches nothing, or a folder holds nothing that can be read, or shards of two kinds.
    """
    found: dict[str, None] = {}
    for path in files.expand(patterns):
        is_file = path.lower().endswith(SUFFIXES) or not files.is_folder(path)
        found.update(dict.fromkeys([path] if is_file else _shards_below(path)))
    return list(found)


def source_size(uri: str) -> int:
    """Return the bytes of a shard's file, or of all files of a folder of pictures."""
    return PictureFolder(uri).num_bytes if uri.endswith("/") else files.size(uri)


def unpack_advice(path: str) -> str:
    """Say how to unpack compressed tars so that they can be read."""
    suffix = next(suffix for suffix in COMPRESSED if path.lower().endswith(suffix))
    program = {"gz": "gzip", "bz2": "bzip2", "xz": "xz", "zst": "zstd"}.get(suffix.rpartition(".")[2], "gzip")
    if suffix == ".tgz":
        return 'Unpack it: `for f in *.tgz; do gzip -dc "$f" > "${f%.tgz}.tar"; done`.'
    return f'Unpack it: `for f in *{suffix}; do {program} -dk "$f"; done`, which leaves a .tar beside each.'


EMBEDDING_SUFFIXES = (".npy", ".npz", ".lance")
"""Files of embeddings, of which `distilclip import` makes stores: they have no samples."""
SUFFIXES = (".tar", ".parquet", ".csv", ".tsv")
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


def _shards_below(folder: str) -> list[str]:
    tars, parquet, tables, pictures, compressed = [], [], [], [], []
    for at, names in files.walk(folder):
        paths = [files.join(at, name) for name in names]
        tars += [path for path in paths if path.lower().endswith(".tar")]
        parquet += [path for path in paths if path.lower().endswith(".parquet")]
        tables += [path for path in paths if path.lower().endswith((".csv", ".tsv"))]
        compressed += [path for path in paths if path.lower().endswith(COMPRESSED)]
        pictures += [f"{at}/"] if any(map(is_picture, names)) else []
    named = {path.rpartition(".")[0] for path in tars} | {path.rstrip("/") for path in pictures}
    others = [path for path in parquet if path.rpartition(".")[0] not in named]  # the rest is img2dataset's metadata
    kinds = {"tars": tars, "folders of pictures": pictures, "Parquet files with images": parquet}
    if tars or pictures:
        kinds["Parquet files with images"] = [path for path in others if ParquetShard(path).holds_images]
    if pictures and not tars:
        kinds["tables of captions"] = [path for path in tables if CsvShard(path).names_columns]
    there = {kind: paths for kind, paths in kinds.items() if paths}
    if len(there) > 1:
        raise InputError(
            f"{folder} holds {' and '.join(f'{kind} ({paths[0]})' for kind, paths in there.items())}. Say which are "
            f"meant, by a pattern such as '{folder.rstrip('/')}/*.tar', or move the others away."
        )
    if there:
        return next(iter(there.values()))
    if compressed:
        raise InputError(f"{folder} holds compressed tars ({compressed[0]}). {unpack_advice(compressed[0])}")
    if tables:
        return tables
    raise InputError(
        f"{folder} holds no tar, no Parquet file, no CSV and no picture ({', '.join(sorted(IMAGE_EXTENSIONS))}), nor "
        "do its subfolders. Check the path."
    )


def key_digest(keys: Sequence[str]) -> str:
    """Return the SHA-256 of the keys in order, each followed by a zero byte: it ties a store to its shards."""
    return hashlib.sha256(b"".join(key.encode() + b"\0" for key in keys)).hexdigest()


def assert_key(found: str, expected: str, *, uri: str, row: int) -> None:
    """Raise `InputError` where a shard holds another key than the store says."""
    if found != expected:
        raise InputError(
            f"{uri}, row {row}: the key is {found!r} where the store has {expected!r}. It is not the file that "
            "was embedded: embed it again, or give the files that were."
        )


class TextReader:
    """Reads everything of a shard's samples but the image, which is None in all of them.

    Of a tar only headers and members with text are read; a row of a table is read whole.
    """

    def __init__(self, uri: str, columns: CsvColumns | None = None) -> None:
        self._table = None if uri.lower().endswith(".tar") else open_shard(uri, columns)
        self._reader = Reader(uri, sequential=True)

    def close(self) -> None:
        """Close open files; reading opens them again."""
        self._reader.close()
        if self._table is not None:
            self._table.close()

    def read(self, offset: int, size: int) -> Sample:
        """Return the sample that the shard's index found at `offset`.

        Raises:
            BadSample: a member cannot be understood.
            CutError: there is no sample of `size` bytes, so the tar is not the one that was indexed.
        """
        if self._table is not None:
            return dataclasses.replace(self._table.read(offset, size), image=None)
        members = [m for m in walk(lambda start, length: self._reader.read(offset + start, length), size) if m.key]
        texts = [member for member in members if member.extension in TEXT_EXTENSIONS]
        key = members[0].key if members else ""
        return sample_of(key, texts, lambda m: self._reader.read(offset + m.data, m.size), uri=self._reader.path)


@dataclass(frozen=True)
class Text:
    """What a sample says in words: its caption, and the object in its `json` (or its row of a table)."""

    caption: str | None
    meta: dict[str, Any]


def read_texts(
    uri: str,
    key: Sequence[str],
    offset: UInt64[np.ndarray, " n"],
    size: UInt32[np.ndarray, " n"],
    *,
    columns: CsvColumns | None = None,
) -> Iterator[Text]:
    """Yield the texts of n samples of a shard, in order; `columns` as in `open_shard`. Files of embeddings have none.

    Raises:
        InputError: a sample is not the one that was embedded: another key, or members that cannot be read.
    """
    if uri.lower().endswith(EMBEDDING_SUFFIXES):
        yield from (Text(None, {}) for _ in key)
        return
    texts = TextReader(uri, columns)
    for name, start, length in zip(key, offset.tolist(), size.tolist(), strict=True):
        try:
            sample = texts.read(start, length)
        except (BadSample, CutError) as error:
            raise InputError(
                f"{uri}: {name} could be read when it was embedded, and now cannot ({error}). "
                "Embed the data again, or give the files that were embedded."
            ) from error
        assert_key(sample.key, name, uri=uri, row=start)
        yield Text(sample.caption, sample.meta)
    texts.close()
