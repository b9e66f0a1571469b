"""Group the images of a store that are closer than a threshold, and keep the central one of each group.

The computation is that of `dc.balance`, in parts: `grouping.balance.balance_parts`. Here are its files: what is
searched already is read back, so a run that was killed goes on.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import numpy as np

from distilclip import digests, files, stage_folder
from distilclip.configs.balance import Config
from distilclip.data.images import ImageMatrix
from distilclip.data.side_files import Groups, groups_name, groups_path, write_groups
from distilclip.data.store import Store
from distilclip.devices import resolve_device
from distilclip.engine import Workers, connected
from distilclip.errors import InputError
from distilclip.grouping.balance import Balance, balance_parts
from distilclip.grouping.extension import read_former_search
from distilclip.grouping.forecast import BYTES_PER_EDGE, calibrate
from distilclip.grouping.forest import NO_ROWS, Forest
from distilclip.grouping.reach import check_reach
from distilclip.grouping.representatives import Choose, choose_in_batches
from distilclip.grouping.rule import Rule
from distilclip.grouping.search_cpu import default_num_cells
from distilclip.grouping.search_forest import Finding
from distilclip.grouping.search_parts import (
    ROW_BYTES,
    EqualRows,
    StoreSearch,
    load_forest,
    remove_parts,
    rows_of_budget,
    save_forest,
)
from distilclip.grouping.sorted_rows import MOST_CELLS, SortedRows, cut, sorted_row_bytes
from distilclip.messages import say, warn
from distilclip.progress import duration, progress
from distilclip.vectors.points import Points
from distilclip.vectors.tolerance import equivalents

FORECAST_FROM = 100_000  # rows; fewer are searched in about the time that a forecast, or a look at a sample, takes
PARTS_PER_WORKER = 4  # at least, where parts are shared among workers, so that all end at about the same time
NUM_EXAMPLES = 12  # pairs on either side of the threshold, and largest groups, in the result


def main(config: Config) -> dict[str, Any]:
    """Group the images of a store and return the folder's result."""
    folder = stage_folder.open_folder(config.out, stage="balance", config=config, inputs=config.inputs())
    if folder.finished:
        return folder.result()
    if config.groups is not None:
        stage_folder.require(config.groups, stage="balance", store=config.store)
    images = ImageMatrix(Store.open(config.store), config.groups)
    num_pictureless = images.count_pictureless(stage="balance")
    forest_path, search_path = folder.child("forest.parquet"), folder.child("search.json")
    source = config.from_folder or folder.path
    rule = config.grouping if config.from_folder is None else _rule_of_cut(config, config.from_folder)

    def save(found: Finding) -> None:
        if not files.exists(forest_path):
            stage_folder.write_json(search_path, {"saturated": found.saturated})
            save_forest(forest_path, found.forest, images)

    # A forest that an earlier run saved, here or in the folder that is cut anew, is the one part of this run.
    if files.exists(files.join(source, "forest.parquet")):
        digests.check_file(source, "search.json", remedy=digests.repair_with(source, "balance"))
        saturated = stage_folder.read_json(files.join(source, "search.json"))["saturated"]
        parts = iter([Finding(forest=load_forest(files.join(source, "forest.parquet"), images), saturated=saturated)])
    else:
        parts = _search(config, rule, folder.path, images)

    def represent(choose: Choose, group: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return choose_in_batches(
            choose,
            lambda rows: Points.of(images.take(rows), metric=config.metric),
            group,
            batch_rows=int(config.memory_gb * 2**30) // (4 * images.store.dim) + 1,
        )

    try:
        balance = balance_parts(rule, images.valid(), parts=parts, represent=represent, save=save)
    except InputError as error:
        raise InputError(_with_ways_on(str(error), forest_path, folder.path)) from error
    remove_parts(folder.path)
    _write_groups(folder.path, images, balance)
    result = {**_result(balance), **_examples(balance, images)}
    if num_pictureless:
        result["num_pictureless"] = num_pictureless
    for warning in result["warnings"]:
        warn(f"balance: {warning}")
    names = ["forest.parquet", "search.json", *map(groups_name, range(images.store.num_shards))]
    return folder.finish({**result, "digests": digests.digest_files(folder.path, names)})


def _rule_of_cut(config: Config, source: str) -> Rule:
    """Return the rule of a cut: an earlier search, this config's threshold; `InputError` where they do not fit."""
    record = stage_folder.read_record(source)
    if record is None or record.stage != "balance" or not files.exists(files.join(source, "forest.parquet")):
        raise InputError(f"{source} is no balance folder whose search has ended: it has no forest.parquet.")
    made_from, before = stage_folder.read_json(files.join(source, "inputs.json")), record.config
    if made_from["embed"] != stage_folder.result_digest(config.store):
        raise InputError(f"{source} was made from another store than {config.store}.")
    if made_from.get("balance") != (stage_folder.result_digest(config.groups) if config.groups else None):
        raise InputError(
            f"{source} searched the rows of --groups {before.get('groups')}, not {config.groups}: give the same here."
        )
    if before["metric"] != config.metric:
        raise InputError(f"{source} was searched with --metric {before['metric']}, not {config.metric}.")
    reach = before["max_threshold"] or before["threshold"]
    if before["top_k"] is not None and config.rule != "union-find":
        raise InputError(
            f"{source} was searched with --rule topk: its lists know too few neighbours for --rule {config.rule}."
        )
    if config.threshold is not None and config.threshold > reach:
        raise InputError(
            f"{source} was searched up to {before['metric']} {reach}, not {config.threshold}: a larger threshold needs "
            "a search of its own, with --max-threshold and without --from-folder."
        )
    return Rule(
        metric=config.metric,
        threshold=config.threshold,
        rule=config.rule if before["top_k"] is None else "topk",
        top_k=before["top_k"],
        target_removed=config.target_removed,
        max_threshold=reach,
    )


def _with_ways_on(error: str, forest_path: str, path: str) -> str:
    """Add to an error after the search what can be done with the search."""
    if not files.exists(forest_path):
        return error
    return (
        f"{error} The search is kept: `distilclip balance --from-folder {path}` with another --out cuts it at any "
        "threshold up to there, without a search; a larger --max-threshold needs another --out and searches again."
    )


def _search(config: Config, rule: Rule, path: str, images: ImageMatrix) -> Iterator[Finding]:
    """Yield the copies of image files, and then what each part of the search finds."""
    former = None if config.extend is None else read_former_search(config.extend, images, rule)
    search = StoreSearch(
        store=config.store,
        folder=path,
        rule=rule,
        memory_gb=config.memory_gb,
        device=config.device,
        block_rows=_block_rows(config, len(images)),
        groups=config.groups,
        num_searched=0 if former is None else former.num_rows,
    )
    search.write_copies(images)
    copies = search.copies(images)
    if rule.target_removed is not None and len(images) >= FORECAST_FROM:
        _check_reach(config, rule, path, images, copies)
    yield Finding(forest=copies)
    if rule.top_k is not None:
        yield search.search_lists(images)
        return
    if former is not None:
        yield Finding(forest=former.forest)
        say(f"balance: {len(images) - former.num_rows:,} new rows are compared with {len(images):,}")
    elif len(images) >= FORECAST_FROM:
        say(_forecast(config, rule, images, search.block_rows))
    with connected(config.execution, device=config.device) as workers:
        for forest in _forests(search, images, path, workers):
            yield Finding(forest=forest)


def _forests(search: StoreSearch, images: ImageMatrix, path: str, workers: Workers) -> Iterator[Forest]:
    """Yield what each part of a search finds, of all rows or of sorted ones."""
    if search.block_rows >= len(images) or search.searched(images).sum() < 2:
        for _ in _show(f"search {path}", workers, search.prepare_all, ["all"]):
            yield search.forest_of_all(images)
        return
    # 1. Sort the rows, and choose what each part reads.
    search.fit(images)
    for _ in _show(f"sort {path}", workers, search.prepare_sort, search.sort.blocks):
        pass
    search.sort.join()
    for _ in _show(f"choose {path}", workers, search.prepare_choice, search.sort.blocks):
        pass
    # 2. Search the parts. What is equal to the byte is put together when all are known.
    equal = EqualRows(len(images))
    for pairs in search.sort.equal():
        equal.add(pairs, left=NO_ROWS, right=NO_ROWS)
    for part, _ in _show(f"search {path}", workers, search.prepare_search, SortedRows(search.sort).parts):
        found = search.result(part)
        near, same = found.distance > 0, found.distance == 0
        equal.add(found.equal, left=found.left[same], right=found.right[same])
        yield Forest(
            left=found.left[near], right=found.right[near], distance=found.distance[near], num_rows=len(images)
        )
    yield equal.forest()


def _show(
    name: str, workers: Workers, prepare: Callable[[], Callable[[Any], None]], parts: list[Any]
) -> Iterator[tuple[Any, None]]:
    """Compute parts, and show how far they are."""
    with progress(name, len(parts)) as advance:
        for part, result in workers.map_parts(prepare, parts) if parts else ():
            yield part, result
            advance(1, 0)


def _check_reach(config: Config, rule: Rule, path: str, images: ImageMatrix, copies: Forest) -> None:
    """Raise `InputError` for a target that is out of reach, and leave a folder that can be begun anew."""
    copied = np.concatenate([copies.left, copies.right])
    try:
        check_reach(images, images.valid(), rule, copied=copied, device=resolve_device(config.device))
    except InputError:
        remove_parts(path)
        raise


def _block_rows(config: Config, num_rows: int) -> int:
    if config.block_rows is not None:
        return config.block_rows
    fit = rows_of_budget(config.memory_gb)
    fit = max(1, num_rows) if num_rows <= fit else max(1, fit // 2)  # all together, or a part and what is near it
    return (
        fit if config.execution.engine == "local" else min(fit, num_rows // (PARTS_PER_WORKER * _workers(config)) + 1)
    )


def _workers(config: Config) -> int:
    return 1 if config.execution.engine == "local" else config.execution.engine_workers or os.cpu_count() or 1


def _forecast(config: Config, rule: Rule, images: ImageMatrix, block_rows: int) -> str:
    """Say what the search will need, measured on a sample of the rows."""
    device = resolve_device(config.device)
    searched = np.flatnonzero(images.valid())
    growth = calibrate(images.take, searched, rule=rule, memory_gb=config.memory_gb, device=device)
    seconds = growth.within(len(searched)) / _workers(config)
    num_parts = len(cut(0, len(images), block_rows))
    num_read = min(len(images), max(2 * block_rows, rows_of_budget(config.memory_gb)))
    sorted_bytes = 0
    if num_parts > 1:  # the rows, and in each block a table of cells
        num_cells = min(MOST_CELLS, default_num_cells(len(searched)))
        sorted_bytes = len(searched) * sorted_row_bytes(images.store.dim) + num_parts * 4 * num_cells**2
    return (
        f"balance: {len(searched):,} rows of {images.store.dim}, in {num_parts} parts. "
        f"Time: about {duration(seconds)} (grows as n^{growth.exponent:.2f} here). "
        f"Memory of each worker: {num_read * images.store.dim * 2 / 1e9:.2f} GB of rows and "
        f"{num_read * ROW_BYTES / 1e9:.2f} GB to search them. "
        f"Disk: at most {(sorted_bytes + 2 * len(images) * BYTES_PER_EDGE) / 1e9:.2f} GB."
    )


def _write_groups(path: str, images: ImageMatrix, balance: Balance) -> None:
    """Write one file for each shard, of its valid rows; a row without a picture is kept, as a group of its own.

    Finished files are left as they are: they would be the same.
    """
    for shard, start in enumerate(images.starts[:-1]):
        if files.exists(groups_path(path, shard)):
            continue
        rows = start + np.flatnonzero(images.usable(shard))
        grouped = balance.group[rows] >= 0
        part = Groups(
            row=(rows - start).astype(np.uint32),
            group=images.ids(np.where(grouped, balance.group[rows], rows)),
            representative=images.ids(np.where(grouped, balance.representative[rows], rows)),
            distance=np.where(grouped, balance.distance[rows], np.float32(0)),
            keep=balance.keep[rows] | ~grouped,
        )
        write_groups(path, shard, part)


def _result(balance: Balance) -> dict[str, Any]:
    columns = asdict(balance.curve)
    return {
        "threshold": balance.threshold,
        "metric": balance.metric,
        "rule": balance.rule,
        "equivalent_thresholds": equivalents(balance.threshold, balance.metric),
        "max_threshold": balance.max_threshold,
        "num_valid": balance.num_valid,
        "num_kept": int(balance.keep.sum()),
        "num_groups": balance.num_groups,
        "removed_ratio": balance.removed_ratio,
        "largest_group": balance.largest_group,
        "saturated": balance.saturated,
        "warnings": balance.warnings,
        "curve": [
            {**dict(zip(columns, values, strict=True)), "equivalents": equivalents(values[0], balance.metric)}
            for values in zip(*(c.tolist() for c in columns.values()), strict=True)
        ],
    }


def _examples(balance: Balance, images: ImageMatrix) -> dict[str, Any]:
    """List what to look at before trusting a threshold: pairs next to it, and the groups that chains made long."""

    def pairs(edges: Forest) -> list[dict[str, Any]]:
        ids = images.ids(edges.left).tolist(), images.ids(edges.right).tolist()
        return [
            {"left": left, "right": right, "distance": distance}
            for left, right, distance in zip(*ids, edges.distance.tolist(), strict=True)
        ]

    under, over = balance.borderline(NUM_EXAMPLES)
    return {
        "borderline": {"under": pairs(under), "over": pairs(over)},
        "chained": balance.num_chained,
        "largest_groups": [
            {"group": int(images.ids(np.array([group]))[0]), "num_images": size, "farthest": farthest}
            for group, size, farthest in balance.largest_groups(NUM_EXAMPLES)
        ],
    }
