"""Pack the kept pairs of a store for training: shuffled once, with smaller pictures, in files read in order."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from distilclip import digests, files, stage_folder
from distilclip.clustering.fit_parts import shard_ranges
from distilclip.configs.pack import Config
from distilclip.data.limits import MAX_PIXELS
from distilclip.data.pairs import source_uris
from distilclip.data.shards import find_shards
from distilclip.data.side_files import CENTERS_FILE, read_centers, write_centers
from distilclip.data.store import Store
from distilclip.engine import Workers, connected
from distilclip.errors import InputError
from distilclip.packs.pack import INDEX_FILE, PackFacts, RowCounts, ShardPackets, shard_name, write_index
from distilclip.packs.packing import PARTS, Packing, Part
from distilclip.progress import progress

P = TypeVar("P")
R = TypeVar("R")


def main(config: Config) -> dict[str, Any]:
    """Write the shards of the pack and their index, and return the folder's result."""
    folder = stage_folder.open_folder(config.out, stage="pack", config=config, inputs=config.inputs())
    if folder.finished:
        return folder.result()
    for path, stage in ((config.groups, "balance"), (config.clusters, "cluster")):
        if path is not None:
            stage_folder.require(path, stage=stage, store=config.store)
    store = Store.open(config.store)
    store.require_pictures()
    packing = _packing(config, folder.path, store)
    num_rows = packing.count(store)
    if not num_rows.sum():
        raise InputError(f"{config.store}: no row is valid and kept, so there is nothing to pack.")
    packing = dataclasses.replace(packing, num_shards=-(-int(num_rows.sum()) // config.shard_rows))
    ranges = shard_ranges(num_rows.tolist(), num_parts=packing.num_shards)
    parts = [(number, each.first, each.last) for number, each in enumerate(ranges)]
    with connected(config.execution) as workers:
        shards = _write_shards(packing, parts, workers)
    names = [INDEX_FILE, *([CENTERS_FILE] if config.clusters else [])]
    if config.clusters is not None and not files.exists(folder.child(CENTERS_FILE)):  # else a run goes on at its end
        described = {f"teacher_{name}": str(store.teacher[name]) for name in ("name", "digest")}
        write_centers(folder.path, read_centers(config.clusters), described)
    facts = PackFacts(
        packet_rows=config.packet_rows,
        max_side=config.max_side,
        has_clusters=config.clusters is not None,
        counts=RowCounts.total([shard.counts for shard in shards]),
    )
    write_index(folder.path, shards, facts, teacher=store)
    files.remove_folder(folder.child(PARTS))
    return folder.finish(
        {
            "num_shards": len(shards),
            "num_rows": int(num_rows.sum()),
            **vars(facts.counts),
            "dim": store.dim,
            "teacher": store.teacher,
            "digests": {
                **digests.digest_files(folder.path, names),
                **{shard_name(number): shard.sha256 for number, shard in enumerate(shards)},
            },
        }
    )


def _packing(config: Config, folder: str, store: Store) -> Packing:
    made = stage_folder.read_json(files.join(config.store, "config.json"))
    return Packing(
        folder=folder,
        store=config.store,
        uris=source_uris(store, find_shards(list(config.data)) if config.data else ()),
        groups=config.groups,
        clusters=config.clusters,
        seed=config.seed,
        max_side=config.max_side,
        quality=config.quality,
        max_pixels=made.get("max_pixels", MAX_PIXELS),  # a store that was imported has none
        packet_rows=config.packet_rows,
    )


def _write_shards(packing: Packing, parts: Sequence[Part], workers: Workers) -> list[ShardPackets]:
    """Write the shards that are not there, and say what is where in all of them."""
    shards = range(packing.num_shards)
    if not all(files.exists(files.join(packing.folder, shard_name(shard))) for shard in shards):
        _map(workers, partial(_gatherer, packing), parts, f"pack {packing.folder}: read")
    found = _map(workers, partial(_scatterer, packing, len(parts)), shards, f"pack {packing.folder}: write")
    return [found[shard] for shard in shards]


def _gatherer(packing: Packing) -> Callable[[Part], None]:
    return packing.gather


def _scatterer(packing: Packing, num_parts: int) -> Callable[[int], ShardPackets]:
    return partial(packing.scatter, num_parts)


def _map(workers: Workers, prepare: Callable[[], Callable[[P], R]], parts: Sequence[P], description: str) -> dict[P, R]:
    found = {}
    with progress(description, len(parts)) as advance:
        for part, result in workers.map_parts(prepare, parts):
            found[part] = result
            advance(1, 0)
    return found
