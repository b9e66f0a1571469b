"""Read a sample of the captions that a model was trained with, from a store or from the pairs themselves."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from distilclip import files
from distilclip.data.samples import BadSample
from distilclip.data.shards import TextReader, find_shards, open_shard, source_size
from distilclip.data.store import Store
from distilclip.data.tars import CutError
from distilclip.errors import InputError

MOST_SHARDS = 64
MOST_CAPTIONS = 50_000


def read_captions(sources: Sequence[str]) -> list[str]:
    """Return the captions of up to `MOST_CAPTIONS` samples, the same ones each time; unusable samples have none.

    They are the first samples of shards (at most `MOST_SHARDS`) that lie evenly among all, as many of each.

    Args:
        sources: folders of `embed`, or pairs as `train --data` names them.

    Raises:
        InputError: a source is not there, or no sample has a caption.
    """
    shards = _list_shards(sources)
    num_chosen = min(MOST_SHARDS, len(shards))
    chosen = [shards[i * len(shards) // num_chosen] for i in range(num_chosen)]
    most = -(-MOST_CAPTIONS // num_chosen)
    captions = [caption for shard in chosen for caption in shard.captions(most)]
    if not captions:
        raise InputError(f"No sample of {', '.join(sources)} has a caption: --training-captions needs some.")
    return captions


def captions_digest(sources: Sequence[str]) -> str:
    """Return a digest of the names and sizes of the files that `read_captions` chooses from."""
    digest = hashlib.sha256()
    for shard in _list_shards(sources):
        digest.update(f"{shard.uri}\0{shard.num_bytes}\n".encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class _CaptionShard:
    """A file of pairs; with `store`, the store that has it as its shard `number`."""

    uri: str
    store: Store | None = None
    number: int = 0

    @property
    def num_bytes(self) -> int:
        return source_size(self.uri) if self.store is None else self.store.shards[self.number].num_bytes

    def captions(self, most: int) -> Iterator[str]:
        """Yield the captions of the first `most` usable samples."""
        texts = TextReader(self.uri, None if self.store is None else self.store.csv_columns)
        try:
            for offset, size in self._places()[:most]:
                with contextlib.suppress(BadSample, CutError):
                    yield from texts.read(offset, size).captions
        except FileNotFoundError as error:
            made = f" (of {self.store.path})" if self.store is not None else ""
            raise InputError(
                f"{self.uri}{made} is not there: give --training-captions the pairs themselves."
            ) from error
        finally:
            texts.close()

    def _places(self) -> list[tuple[int, int]]:
        """Return offset and size of the usable samples."""
        if self.store is None:
            shard = open_shard(self.uri)
            entries = [(entry.offset, entry.size) for entry in shard.index() if not entry.error]
            shard.close()
            return entries
        rows = self.store.rows(self.number)
        return list(zip(rows.offset[rows.valid].tolist(), rows.size[rows.valid].tolist(), strict=True))


def _list_shards(sources: Sequence[str]) -> list[_CaptionShard]:
    shards: list[_CaptionShard] = []
    for source in sources:
        if files.exists(files.join(source, "manifest.parquet")):
            store = Store.open(source)
            shards += [_CaptionShard(shard.uri, store, shard.index) for shard in store.shards]
        else:
            shards += [_CaptionShard(uri) for uri in find_shards(source)]
    return shards
