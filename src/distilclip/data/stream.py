"""The training stream: global batches as a pure function of (seed, step), decoded and joined in loader processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int64

from distilclip import files
from distilclip.data.bad_samples import ErrorPolicy, OnError
from distilclip.data.decode import Augmentation
from distilclip.data.loader import Batch as Batch
from distilclip.data.loader import PairLoader, Tokenize
from distilclip.data.pairs import index_pairs, join_stores
from distilclip.data.samples import MAX_PIXELS
from distilclip.data.store import Store
from distilclip.data.workers import map_tasks
from distilclip.errors import InputError


def open_stream(
    *,
    data: Sequence[str] = (),
    stores: Sequence[str] = (),
    groups: str | None = None,
    clusters: str | None = None,
    sizes: Sequence[int],
    tokenize: Tokenize,
    augmentation: Augmentation | None = None,
    num_views: int = 0,
    batch_size: int,
    seed: int,
    rank: int = 0,
    world: int = 1,
    on_error: OnError = "skip",
    max_bad_ratio: float = 0.05,
    max_pixels: int = MAX_PIXELS,
) -> PairStream:
    """The stream over shards (`data`, patterns), or over the rows of stores, which know their shards.

    Args:
        data: with a store only needed where the shards have moved; then in the order they were embedded.
        stores: folders of `embed` over the same shards, by one teacher each; rows that all of them could use.
        groups: a balance folder of the first store; only rows that it keeps.
        clusters: a cluster folder, for labels.
        sizes: pixels per side at which the crop is shown: the student's, then a live teacher's (`teacher_pixels`).
        augmentation: how crops are drawn from (seed, epoch, sample).
        num_views: show the stores' views instead, so many of them, with their own embeddings.
        batch_size: rows of the global batch, a multiple of `world`.
        on_error: what a sample does that fails while training. `skip` puts a row drawn by (seed, epoch, sample) in its
            place and counts it; `raise` stops.

    Raises:
        InputError: shards, stores, groups and clusters do not belong together, or hold fewer rows than a batch.
    """
    policy = ErrorPolicy(on_error, max_bad_ratio)
    uris = files.expand(list(data)) if data else []
    opened = [Store.open(store) for store in stores]
    if opened:
        _check_views(opened, num_views)
        table = join_stores(opened, data=uris, groups=groups, clusters=clusters)
    elif groups is not None or clusters is not None or num_views:
        raise InputError("groups, clusters and views refer to the rows of a store: name the store too.")
    else:
        table = index_pairs(uris, policy=policy)
        policy.check(final=True)
    loader = PairLoader(
        table,
        opened,
        sizes=sizes,
        tokenize=tokenize,
        augmentation=augmentation or Augmentation(),
        num_views=num_views,
        seed=seed,
        max_pixels=max_pixels,
    )
    return PairStream(loader, policy, batch_size=batch_size, rank=rank, world=world)


def _check_views(stores: Sequence[Store], num_views: int) -> None:
    """`InputError` where a store has no such views, or two stores have different ones."""
    if not num_views:
        return
    for store in stores:
        there = 0 if store.views is None else store.views.num
        if num_views > there:
            raise InputError(
                f"The store {store.path} has {there} views, not {num_views}: ask for that many, or embed with --views."
            )
        if store.views != stores[0].views:
            raise InputError(
                f"The views of {store.path} are not those of {stores[0].path}. Embed with the same --views, --seed, "
                "--min-crop and --flip."
            )


class PairStream:
    """An endless stream of batches; see `open_stream`. `policy` counts what could not be used.

    Each epoch is a fresh permutation, cut into global batches; the remainder that fills none is left out of it.
    """

    def __init__(
        self, loader: PairLoader, policy: ErrorPolicy, *, batch_size: int, rank: int = 0, world: int = 1
    ) -> None:
        if batch_size % world:
            raise InputError(f"batch_size {batch_size} does not divide among {world} processes; choose a multiple.")
        if len(loader.table) < batch_size:
            raise InputError(
                f"There are {len(loader.table)} usable pairs, fewer than one batch of {batch_size}. Lower batch_size."
            )
        if loader.seed < 0:
            raise InputError(f"seed is {loader.seed}; it must not be negative.")
        self.loader, self.policy = loader, policy
        self.batch_size, self.rank, self.world = batch_size, rank, world
        self._latest: tuple[int, Int64[np.ndarray, " rows"]] = -1, np.empty(0, np.int64)

    @property
    def num_rows(self) -> int:
        """Rows that are drawn from."""
        return len(self.loader.table)

    @property
    def steps_per_epoch(self) -> int:
        """Full global batches in an epoch."""
        return self.num_rows // self.batch_size

    def rows_at(self, step: int) -> tuple[int, Int64[np.ndarray, " n"]]:
        """The epoch of a step, and which rows of the table this rank has in its batch."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        local = self.batch_size // self.world
        start = batch * self.batch_size + self.rank * local
        return epoch, self._order(epoch)[start : start + local]

    def batches(self, *, start: int = 0, stop: int, num_workers: int = 0) -> Iterator[Batch]:
        """The batches of steps `start` to `stop`, the same whatever `num_workers` (0 decodes in this process).

        Raises:
            InputError: a shard is not the one that was embedded, or more samples fail than the policy allows.
        """
        tasks = (self.rows_at(step) for step in range(start, stop))
        for batch in map_tasks(self.loader, tasks, num_workers=num_workers):
            self.policy.seen(len(batch))
            for where, error in batch.bad:
                self.policy.bad(error, where=where)
            self.policy.check()
            yield batch

    def _order(self, epoch: int) -> Int64[np.ndarray, " rows"]:
        if self._latest[0] != epoch:
            generator = np.random.Generator(np.random.PCG64([self.loader.seed, epoch]))
            self._latest = epoch, generator.permutation(self.num_rows)
        return self._latest[1]
