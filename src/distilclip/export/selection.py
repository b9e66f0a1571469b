"""Select the rows of a store to export: those that `balance` kept, those in a subset file, or every valid one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, UInt8, UInt32, UInt64

from distilclip.data.pairs import check_source
from distilclip.data.side_files import kept_rows, read_groups
from distilclip.data.store import Rows, Store
from distilclip.errors import InputError
from distilclip.export.uids import UidKind, in_subset, read_subset, read_uids


@dataclass(frozen=True)
class SelectedRows:
    """The n selected rows of one shard, ascending. `offset` and `size` are those of the shard's index."""

    uri: str
    row: UInt32[np.ndarray, " n"]
    key: list[str]
    offset: UInt64[np.ndarray, " n"]
    size: UInt32[np.ndarray, " n"]
    image_sha256: UInt8[np.ndarray, "n 32"]

    def __len__(self) -> int:
        return len(self.row)

    def part(self, start: int, stop: int | None) -> SelectedRows:
        """Return the rows from `start` to before `stop`."""
        here = slice(start, stop)
        return SelectedRows(
            self.uri, self.row[here], self.key[here], self.offset[here], self.size[here], self.image_sha256[here]
        )


@dataclass(frozen=True, kw_only=True)
class Selection:
    """A store, what chooses its rows, and where its shards lie now. Small and picklable: rows are read when needed.

    `groups` is a balance folder, `subset` a DataComp subset file; one of the two at most. `uid` says how samples are
    named in that file.
    """

    store: Store
    uris: tuple[str, ...]
    groups: str | None = None
    subset: str | None = None
    uid: UidKind = "json"

    def rows(self, shard: int) -> SelectedRows:
        """Return the selected rows of a shard, after a check that its file is the one that was embedded.

        Raises:
            InputError: it is not, or the groups were made for another store.
        """
        rows = self.store.rows(shard)
        check_source(self.store, shard, self.uris[shard], rows)
        selected = _take_rows(self.uris[shard], rows, kept_rows(self.store, shard, rows.valid, self.groups))
        if self.subset is None:
            return selected
        uids = read_uids(
            selected.uri,
            selected.key,
            selected.offset,
            selected.size,
            kind=self.uid,
            columns=self.store.csv_columns,
        )
        chosen = np.zeros(len(rows), bool)
        chosen[selected.row[in_subset(uids, read_subset(self.subset))]] = True
        return _take_rows(self.uris[shard], rows, chosen)

    def count(self, shard: int) -> int:
        """Return how many rows of a shard are selected."""
        if self.subset is not None:
            return len(self.rows(shard))
        if self.groups is not None:
            return int(read_groups(self.groups, shard).keep.sum())
        return int(self.store.rows(shard).valid.sum())


def open_selection(
    store: str, *, groups: str | None = None, subset: str | None = None, uid: UidKind = "json", data: Sequence[str] = ()
) -> Selection:
    """Open a selection of a finished store. `data` says where its shards lie now, in their order, if they have moved.

    Raises:
        InputError: there is no such store, the data are not as many files, or the subset file is none.
    """
    opened = Store.open(store)
    uris = tuple(data) or tuple(shard.uri for shard in opened.shards)
    if len(uris) != opened.num_shards:
        raise InputError(
            f"The data are {len(uris)} files, but the store {store} was made from {opened.num_shards}, "
            f"{opened.shards[0].uri} first. Give the same files in the same order."
        )
    if subset is not None:
        read_subset(subset)  # complain before any work
    return Selection(store=opened, uris=uris, groups=groups, subset=subset, uid=uid)


def _take_rows(uri: str, rows: Rows, keep: Bool[np.ndarray, " r"]) -> SelectedRows:
    row = np.flatnonzero(keep).astype(np.uint32)
    return SelectedRows(
        uri=uri,
        row=row,
        key=[rows.key[r] for r in row],
        offset=rows.offset[row],
        size=rows.size[row],
        image_sha256=rows.image_sha256[row],
    )
