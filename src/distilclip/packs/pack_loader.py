"""Make batches of the rows of a pack. The order of an epoch is one of blocks, and inside a block one of packets."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from distilclip import files
from distilclip.data.bad_samples import ErrorPolicy
from distilclip.data.reader import OpenFiles, Reader
from distilclip.data.samples import BadSample
from distilclip.data.shards import MAX_OPEN_SHARDS
from distilclip.data.store import split_id
from distilclip.data.stream import MAX_REPLACEMENTS, Batch, Loader, PairStream, Presentation, Task, require_views
from distilclip.data.views import caption_in, view_in
from distilclip.errors import InputError
from distilclip.packs.pack import Pack, PackedRows, shard_name

MAX_BLOCK_ROWS = 2**22
"""Rows of a block: as many packets as are shuffled at once, in files that are read in one go and then left alone."""


@dataclass(frozen=True)
class BlockOrder:
    """The order of a pack's rows in every epoch, a function of (`seed`, epoch) that takes no memory for all rows.

    A block is a range of packets with at most `MAX_BLOCK_ROWS` rows, nearly: one that the pack is not larger than has
    all. An epoch has the blocks in random order, and each block's packets. The rows of a packet stay together.
    """

    pack: Pack
    seed: int
    block_rows: int = MAX_BLOCK_ROWS

    @functools.cached_property
    def _packets(self) -> Int64[np.ndarray, " blocks1"]:
        """The first packet of each block, and after the last one their number."""
        num_blocks = min(-(-self.pack.num_rows // self.block_rows), self.pack.num_packets)
        return np.arange(num_blocks + 1) * self.pack.num_packets // num_blocks

    def rows(self, epoch: int, start: int, stop: int) -> Int64[np.ndarray, " n"]:
        """Return the rows at places `start` to `stop` of an epoch."""
        blocks, ends = _blocks(self, epoch)
        found = []
        while start < stop:
            at = int(np.searchsorted(ends, start, side="right"))
            begin = int(ends[at - 1]) if at else 0
            last = min(stop, int(ends[at]))
            found.append(self._block_rows(epoch, int(blocks[at]), start - begin, last - begin))
            start = last
        return np.concatenate(found)

    def _block_rows(self, epoch: int, block: int, start: int, stop: int) -> Int64[np.ndarray, " n"]:
        packets, ends = _packets(self, epoch, block)
        places = np.arange(start, stop)
        at = np.searchsorted(ends, places, side="right")
        first = self.pack.first_rows(packets[at])
        length = self.pack.first_rows(packets[at] + 1) - first
        return first + places - (ends[at] - length)


Order = tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]


@functools.lru_cache(maxsize=2)
def _blocks(order: BlockOrder, epoch: int) -> Order:
    """Return the blocks in the order of an epoch, and the place at which each ends."""
    generator = np.random.Generator(np.random.PCG64([order.seed, epoch]))
    bounds = order.pack.first_rows(order._packets)
    blocks = generator.permutation(len(bounds) - 1)
    return blocks, np.cumsum(np.diff(bounds)[blocks])


@functools.lru_cache(maxsize=2)
def _packets(order: BlockOrder, epoch: int, block: int) -> Order:
    """Return the packets of a block in the order of an epoch, and the place in the block at which each ends."""
    generator = np.random.Generator(np.random.PCG64([order.seed, epoch, 1 + block]))
    first, after = order._packets[block : block + 2].tolist()
    lengths = np.diff(order.pack.first_rows(np.arange(first, after + 1)))
    shuffled = generator.permutation(after - first)
    return first + shuffled, np.cumsum(lengths[shuffled])


def open_pack_stream(
    pack: Pack,
    presentation: Presentation,
    *,
    batch_size: int,
    policy: ErrorPolicy | None = None,
    rank: int = 0,
    world: int = 1,
) -> PairStream:
    """Open the stream of a pack's pairs, as `open_stream` opens that of a store's.

    Raises:
        InputError: the pack has too few rows or views, or smaller pictures than are to be shown.
    """
    require_views([pack], presentation.num_views)
    largest, facts = max(presentation.sizes), pack.facts
    if facts.counts.num_resized and largest > facts.max_side:
        raise InputError(
            f"{pack.path} has pictures whose shorter side was made {facts.max_side} pixels, and {largest} are to be "
            f"shown. Pack the store again, into another folder, with --max-side {round(largest * 8 / 7)} or more."
        )
    loader = PackLoader(pack, presentation)
    return PairStream(loader, policy or ErrorPolicy("skip"), batch_size=batch_size, rank=rank, world=world)


@dataclass(frozen=True)
class _ShownRow:
    """A row as it stands in a batch: where it lies in the rows of its packet, its crops, its view and its caption."""

    rows: PackedRows
    at: int
    pixels: list[UInt8[Tensor, "3 _ _"]]
    view: int
    caption: int


class PackLoader(Loader):
    """Makes batches of the rows of a pack. Picklable; opens files in the process that reads them.

    A packet is read whole, by one request, ahead of its turn: while one task is decoded, the packets of the next come.
    """

    def __init__(self, pack: Pack, presentation: Presentation) -> None:
        self.pack, self.presentation = pack, presentation
        self.order = BlockOrder(pack, presentation.seed)
        self.views = pack.views if presentation.num_views else None
        has_images = pack.facts.counts.num_images > 0
        self._blank_sizes = presentation.sizes if has_images else [1] * len(presentation.sizes)
        self._files: OpenFiles[int, Reader] = OpenFiles(self._reader, limit=MAX_OPEN_SHARDS)
        self._fetched: set[int] = set()  # packets under way
        self._kept: dict[int, PackedRows] = {}  # those of the last task that the next one has, too

    def _reader(self, shard: int) -> Reader:
        return Reader(files.join(self.pack.path, shard_name(shard)))

    @property
    def num_rows(self) -> int:
        """Number of rows that are drawn."""
        return self.pack.num_rows

    @property
    def num_sides(self) -> dict[str, int]:
        """How many of the rows have both a picture and a caption, a picture, and a caption: as `Term.applies` asks."""
        counts = self.pack.facts.counts
        return {"num_pairs": counts.num_pairs, "num_images": counts.num_images, "num_texts": counts.num_texts}

    def draw(self, epoch: int, start: int, stop: int) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
        """Return the rows at places `start` to `stop` of an epoch, each of which it has once."""
        rows = self.order.rows(epoch, start, stop)
        return rows, np.zeros_like(rows)

    def load(self, task: Task) -> Batch:
        """Return the batch of a task. Raises `InputError`."""
        bad: list[tuple[str, str]] = []
        packets = self.pack.packets_of(task.rows)
        wanted, later = (np.unique(p).tolist() for p in (packets, self.pack.packets_of(task.next_rows)))
        self._prefetch([*wanted, *later])
        content = {packet: self._kept[packet] if packet in self._kept else self._read(packet) for packet in wanted}
        self._kept = {packet: content[packet] for packet in later if packet in content}
        offsets = (task.rows - self.pack.first_rows(packets)).tolist()
        drawn = [
            self._show_usable(task.epoch, content[packet], at, bad)
            for packet, at in zip(packets.tolist(), offsets, strict=True)
        ]
        return self._batch(drawn, bad)

    def _prefetch(self, packets: Sequence[int]) -> None:
        for packet in packets:
            if packet not in self._fetched and packet not in self._kept:
                shard, start, size = self.pack.place(packet)
                self._files[shard].prefetch(start, size)
                self._fetched.add(packet)

    def _read(self, packet: int) -> PackedRows:
        shard, start, size = self.pack.place(packet)
        self._fetched.discard(packet)
        try:
            return self.pack.decode(packet, self._files[shard].read(start, size))
        except FileNotFoundError as error:
            raise InputError(
                f"A file of the pack {self.pack.path} is missing ({error}). Pack the store again."
            ) from error

    def _show_usable(self, epoch: int, rows: PackedRows, at: int, bad: list[tuple[str, str]]) -> _ShownRow:
        """Return a row as it is shown, or, where it cannot be used, another row drawn by (seed, epoch, sample)."""
        for attempt in range(1, MAX_REPLACEMENTS + 1):
            try:
                return self._show(epoch, rows, at)
            except BadSample as error:
                bad.append((error.where, error.error))
                shard, row = (int(part) for part in split_id(rows.id[at]))
                other = self.presentation.generator(epoch, shard, row, attempt=attempt).integers(self.num_rows, size=1)
                packet = self.pack.packets_of(other)
                rows, at = self._read(int(packet[0])), int(other[0] - self.pack.first_rows(packet)[0])
        raise InputError(
            f"{MAX_REPLACEMENTS} samples drawn in a row cannot be used, the last {bad[-1][0]}: {bad[-1][1]}. "
            "Check the data with `distilclip embed`, and pack the store again."
        )

    def _show(self, epoch: int, rows: PackedRows, at: int) -> _ShownRow:
        shown, image, captions = self.presentation, rows.image[at], rows.captions[at]
        shard, row = (int(part) for part in split_id(rows.id[at]))
        view = number = 0
        if self.views is not None:
            view = view_in(epoch, shard, row, num_views=shown.num_views)
            number = caption_in(epoch, shard, row, num_views=shown.num_views, num_captions=max(1, len(captions)))
        where = f"{self.pack.path}: row {row} of shard {shard} of its store"
        if image is None:
            pixels = [torch.zeros(3, size, size, dtype=torch.uint8) for size in self._blank_sizes]
        else:
            pixels = shown.show(image, self.views, epoch=epoch, shard=shard, row=row, where=where)
        return _ShownRow(rows, at, pixels, view, number)

    def _batch(self, drawn: Sequence[_ShownRow], bad: list[tuple[str, str]]) -> Batch:
        captions = [(row.rows.captions[row.at] or [""])[row.caption] for row in drawn]
        sides = {
            "has_image": torch.tensor([row.rows.image[row.at] is not None for row in drawn]),
            "has_text": torch.tensor([bool(row.rows.captions[row.at]) for row in drawn]),
        }
        pixels = [torch.stack(of_one_size) for of_one_size in zip(*(row.pixels for row in drawn), strict=True)]
        is_whole = self.pack.facts.counts.num_pairs == self.num_rows
        return Batch(
            ids=torch.tensor([int(row.rows.id[row.at]) for row in drawn]),
            pixels=pixels[0],
            teacher_pixels=pixels[1] if len(pixels) > 1 else None,
            tokens=self.presentation.tokenize(captions),
            captions=captions,
            teacher_image=(_stack([self._image_embedding(row) for row in drawn]),),
            teacher_text=(_stack([_text_embedding(row) for row in drawn]),),
            labels=torch.tensor([int(row.rows.cluster[row.at]) for row in drawn])
            if self.pack.facts.has_clusters
            else None,
            **({} if is_whole else sides),
            bad=bad,
        )

    def _image_embedding(self, row: _ShownRow) -> np.ndarray:
        if self.views is None or row.rows.view_embeddings is None:
            return row.rows.image_embedding[row.at]
        return row.rows.view_embeddings[row.at, row.view]


def _text_embedding(row: _ShownRow) -> np.ndarray:
    if not row.caption or row.rows.other_embeddings is None or row.rows.other_first is None:
        return row.rows.text_embedding[row.at]
    return row.rows.other_embeddings[row.rows.other_first[row.at] + row.caption - 1]


def _stack(embeddings: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(embeddings).astype(np.float32))
