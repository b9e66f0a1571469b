"""Score the pairs of a store and keep the best of them: a folder that later stages read as they read a balance.

The scores of each shard are a file, so a run that was killed goes on; the cut needs the scores of all. Masks combine
in the order of the commands: `--groups` names the balance, or the selection, whose kept pairs are scored. Shares of the
same pairs are combined by several `--groups`: what all of them keep is scored, or without a score kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float32, Int

from distilclip import digests, files, stage_folder
from distilclip.configs.select import Config
from distilclip.data.side_files import (
    Groups,
    Scores,
    groups_name,
    groups_path,
    read_groups,
    read_scores,
    rows_kept_by_all,
    scores_name,
    write_groups,
    write_scores,
)
from distilclip.data.store import Store, sample_id, split_id
from distilclip.devices import resolve_device
from distilclip.engine import map_parts
from distilclip.errors import InputError
from distilclip.messages import say
from distilclip.progress import progress
from distilclip.row_weights import RowPlaces, read_row_values
from distilclip.scoring.cut import Cut, cut_share, cut_value, score_histogram, share_curve
from distilclip.scoring.pair_scores import clip_score, neg_clip_loss, norm_similarity
from distilclip.scoring.parts import list_folders, number_parts, split_by_shard
from distilclip.stages._targets import Targets

NUM_EXAMPLES = 12  # pairs on either side of the cut, in the result
MOST_FOLDERS = 100  # whose pairs are counted in the result


def main(config: Config) -> dict[str, Any]:
    """Score the pairs, cut, write which are kept, and return the folder's result."""
    folder = stage_folder.open_folder(config.out, stage="select", config=config, inputs=config.inputs())
    if folder.finished:
        return folder.result()
    store = Store.open(config.store)
    named = [(config.clusters, "cluster")] if config.clusters else []
    for path, stage in [*((path, "balance") for path in config.groups), *named]:
        stage_folder.require(path, stage=stage, store=config.store)
    _check_sides(config, store)
    shards = range(store.num_shards)
    if config.score is None:
        return _combine(config, folder, store)
    targets = Targets.of(config.targets, folder.path)
    targets.prepare(store, data_root=config.data_root, device=config.device, num_workers=config.num_workers)
    scorer = Scorer(config=config, folder=folder.path)
    with progress(f"score {folder.path}", len(shards)) as advance:
        for _, num_rows in map_parts(scorer.prepare, shards, engine=config.execution, device=config.device):
            advance(1, num_rows)
    tables = [read_scores(folder.path, shard) for shard in shards]
    scores = np.concatenate([table.score for table in tables])
    if not len(scores):
        raise InputError(f"{config.store}: no pair is valid and kept, so there is nothing to select from.")
    rows = [table.row for table in tables]
    part = number_parts(store, rows, within=config.within, clusters=config.clusters)
    cut = _cut(config, scores, part)
    keeps = split_by_shard(cut.keep, rows)
    _write_kept(config, folder.path, store, [own[keep] for own, keep in zip(rows, keeps, strict=True)])
    names, copies = _names(shards, groups_name, scores_name), {}
    if config.targets and cut.side == "below":
        removed = {shard: own[~keep] for shard, (own, keep) in enumerate(zip(rows, keeps, strict=True))}
        copies = targets.report(store, removed, threshold=float(cut.threshold[0]), device=config.device)
        names += targets.names
        _say_copies(copies["targets"], cut)
    targets.remove()
    thresholds = np.sort(cut.threshold[np.isfinite(cut.threshold)])
    several = {"smallest": thresholds[0], "median": thresholds[len(thresholds) // 2], "largest": thresholds[-1]}
    return folder.finish(
        {
            "score": config.score,
            "within": config.within,
            "threshold": float(thresholds[0]) if config.within == "all" else None,
            "side": cut.side,
            "thresholds": {name: float(value) for name, value in several.items()},
            "description": _describe(config, cut),
            **_count(store, rows, cut.keep),
            "curve": share_curve(scores),
            "histogram": score_histogram(scores, cut.keep),
            "borderline": _borderline(rows, scores, cut, part),
            **copies,
            "digests": digests.digest_files(folder.path, names),
        }
    )


_COMPARED = {"clip-score": ("image", "text"), "neg-clip-loss": ("image", "text"), "norm-sim": ("image",)}


def _check_sides(config: Config, store: Store) -> None:
    """Raise `InputError` where a row that is to be scored lacks what the score compares."""
    lacking = dict.fromkeys(_COMPARED.get(config.score or "", ()), 0)
    for shard in range(store.num_shards if lacking else 0):
        kept = rows_kept_by_all(store, shard, config.groups)
        for side in lacking:
            there = store.columns(shard, f"has_{side}").column(0).to_numpy()
            lacking[side] += int((kept & ~there).sum())
    words = {"image": "picture", "text": "caption"}
    for side, count in lacking.items():
        if count:
            usable = "norm-sim or column" if side == "text" else "column"
            raise InputError(
                f"{store.path}: {count:,} rows have no {words[side]}, and {config.score} compares "
                f"{' and '.join(f'{words[each]}s' for each in lacking)}. Choose --score {usable}, or embed the pairs "
                "into a store of their own."
            )


def _combine(config: Config, folder: stage_folder.Folder, store: Store) -> dict[str, Any]:
    """Keep what all of `--groups` keep, of the pairs that the first of them keeps; return the folder's result."""
    shards = range(store.num_shards)
    rows = [np.flatnonzero(rows_kept_by_all(store, shard, config.groups[:1])).astype(np.uint32) for shard in shards]
    keeps = [rows_kept_by_all(store, shard, config.groups)[own] for shard, own in enumerate(rows)]
    keep = np.concatenate(keeps)
    if not keep.any():
        raise InputError(f"No pair is kept by all of {', '.join(config.groups)}. Keep more by one of them.")
    _write_kept(config, folder.path, store, [own[kept] for own, kept in zip(rows, keeps, strict=True)])
    return folder.finish(
        {
            "score": None,
            "description": f"those that all of {len(config.groups)} folders keep",
            **_count(store, rows, keep),
            "digests": digests.digest_files(folder.path, _names(shards, groups_name)),
        }
    )


def _names(shards: range, *names: Callable[[int], str]) -> list[str]:
    return [name(shard) for shard in shards for name in names]


def _describe(config: Config, cut: Cut) -> str:
    """Say in words which pairs are kept."""
    name = config.column if config.score == "column" else config.score
    if config.within != "all":
        return f"the best {config.top:.3g} of each {config.within} by {name}"
    side = "below" if cut.side == "below" else "of at least"
    return f"those with a {name} {side} {cut.threshold[0]:.4g}"


def _count(store: Store, rows: Sequence[np.ndarray], keep: Bool[np.ndarray, " n"]) -> dict[str, Any]:
    """Count the pairs and those that are kept, in all and in the folders of most pairs."""
    names, number = list_folders(store)
    folder = np.repeat(number, [len(own) for own in rows])
    scored, kept = (np.bincount(folder[which], minlength=len(names)) for which in (slice(None), keep))
    most = np.sort(np.argsort(-scored, kind="stable")[:MOST_FOLDERS])
    return {
        "num_scored": len(keep),
        "num_kept": int(keep.sum()),
        "removed_ratio": 1 - int(keep.sum()) / len(keep),
        "folders": [
            {"folder": names[at], "num_scored": int(scored[at]), "num_kept": int(kept[at])} for at in most.tolist()
        ],
    }


def _cut(config: Config, scores: Float32[np.ndarray, " n"], part: Int[np.ndarray, " n"] | None) -> Cut:
    if config.top is not None:
        return cut_share(scores, share=config.top, part=part)
    if config.at_least is not None:
        return cut_value(scores, threshold=config.at_least, side="at-least")
    assert config.below is not None
    return cut_value(scores, threshold=config.below, side="below")


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """What scores a shard; travels to workers, which open the store themselves."""

    config: Config
    folder: str

    def prepare(self) -> Callable[[int], int]:
        """Read what all shards are compared with, and return what scores one and counts its rows."""
        store = Store.open(self.config.store)
        return partial(self._score_shard, store, self._scores(store))

    def _score_shard(self, store: Store, score: Callable[[int, np.ndarray], np.ndarray], shard: int) -> int:
        if not files.exists(files.join(self.folder, scores_name(shard))):
            rows = np.flatnonzero(rows_kept_by_all(store, shard, self.config.groups))
            write_scores(self.folder, shard, Scores(rows.astype(np.uint32), score(shard, rows).astype(np.float32)))
        return store.shards[shard].num_rows

    def _scores(self, store: Store) -> Callable[[int, np.ndarray], np.ndarray]:
        """Return what gives the scores of some rows of a shard."""
        config, device = self.config, resolve_device(self.config.device)
        if config.score == "clip-score":
            return lambda shard, rows: clip_score(store.image(shard)[rows], store.text(shard)[rows])
        if config.score == "norm-sim":
            targets = Targets.of(config.targets, self.folder).all_embeddings(store)
            return lambda shard, rows: norm_similarity(store.image(shard)[rows], targets, device=device)
        if config.score == "column":
            return partial(_own_values, config, store)
        ids = _draw_pairs(store, config)
        shard_of, row_of = split_id(ids)
        places = [(shard, row_of[shard_of == shard]) for shard in np.unique(shard_of).tolist()]
        others = [np.concatenate([read(shard)[rows] for shard, rows in places]) for read in (store.image, store.text)]

        def against_others(shard: int, rows: np.ndarray) -> np.ndarray:
            own = sample_id(shard, rows.astype(np.uint32))
            place = np.minimum(np.searchsorted(ids, own), len(ids) - 1)
            return neg_clip_loss(
                store.image(shard)[rows],
                store.text(shard)[rows],
                others=(others[0], others[1]),
                scale=store.scale,
                same=np.where(ids[place] == own, place, -1),
                device=device,
            )

        return against_others


def _draw_pairs(store: Store, config: Config) -> np.ndarray:
    """Draw the sample ids of the pairs that every pair is compared with, ascending: the same in every worker."""
    kept = [np.flatnonzero(rows_kept_by_all(store, shard, config.groups)) for shard in range(store.num_shards)]
    ids = np.concatenate([sample_id(shard, rows.astype(np.uint32)) for shard, rows in enumerate(kept)])
    if len(ids) < 2:
        raise InputError(f"{store.path}: neg-clip-loss compares pairs with others, and {len(ids)} is kept.")
    chosen = np.random.default_rng(config.seed).choice(len(ids), min(config.num_others, len(ids)), replace=False)
    return ids[np.sort(chosen)]


def _own_values(config: Config, store: Store, shard: int, rows: np.ndarray) -> Float32[np.ndarray, " n"]:
    assert config.values is not None
    keys = store.columns(shard, "key")["key"].combine_chunks().cast(pa.large_string())
    places = RowPlaces(
        shard=np.full(len(rows), shard, np.uint32),
        row=rows.astype(np.uint32),
        key=keys.take(pa.array(rows)),
        num_rows=np.array([line.num_rows for line in store.shards]),
    )
    values = read_row_values(config.values, places, column=config.column)
    if not np.isfinite(values).all():
        at = int(np.argmin(np.isfinite(values)))
        raise InputError(f"{config.values}: {places.describe(at)} has no score. Give every row a finite one.")
    return values.astype(np.float32)


def _write_kept(config: Config, folder: str, store: Store, kept: Sequence[np.ndarray]) -> None:
    """Write the groups of every shard, those of the first of `--groups` or each row its own, with what is kept now."""
    for shard, rows in enumerate(kept):
        if files.exists(groups_path(folder, shard)):
            continue
        if config.groups:
            before = read_groups(config.groups[0], shard)
            table = Groups(**{**vars(before), "keep": np.isin(before.row, rows)})
        else:
            row = np.flatnonzero(rows_kept_by_all(store, shard, ())).astype(np.uint32)
            ids, distance = sample_id(shard, row), np.zeros(len(row), np.float32)
            table = Groups(row=row, group=ids, representative=ids, distance=distance, keep=np.isin(row, rows))
        write_groups(folder, shard, table)


def _say_copies(targets: list[dict[str, Any]], cut: Cut) -> None:
    """Say of each target how many of its pictures have a copy in the data, and how many rows are such copies."""
    for found in targets:
        share, num_bad = found["num_near"] / max(found["num_pictures"], 1), found["num_unreadable"]
        unreadable = f"; {num_bad:,} further pictures could not be read" if num_bad else ""
        say(
            f"select: {found['name']}: {found['num_near']:,} of {found['num_pictures']:,} pictures ({share:.2%}) have "
            f"a copy in the data (cosine of {cut.threshold[0]:g} or more); {found['num_rows']:,} rows are copies"
            f"{unreadable}"
        )


def _borderline(
    rows: Sequence[np.ndarray], scores: Float32[np.ndarray, " n"], cut: Cut, part: Int[np.ndarray, " n"] | None
) -> dict[str, Any]:
    """List the pairs nearest to the cut of their part on either side: what to look at before trusting it."""
    ids = np.concatenate([sample_id(shard, own) for shard, own in enumerate(rows)])
    threshold = cut.threshold[np.zeros(len(ids), np.int64) if part is None else part]
    found = {}
    for name, chosen in (("kept", np.flatnonzero(cut.keep)), ("removed", np.flatnonzero(~cut.keep))):
        nearest = chosen[np.argsort(np.abs(scores[chosen] - threshold[chosen]), kind="stable")[:NUM_EXAMPLES]]
        found[name] = [
            {"id": int(ids[at]), "score": float(scores[at]), "threshold": float(threshold[at])} for at in nearest
        ]
    return found
