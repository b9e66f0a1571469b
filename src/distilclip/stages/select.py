"""Score the pairs of a store and keep the best of them: a folder that later stages read as they read a balance.

The scores of each shard are a file, so a run that was killed goes on; the cut needs the scores of all. Masks combine
in the order of the commands: `--groups` names the balance, or the selection, whose kept pairs are scored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float32

from distilclip import digests, files, stage_folder
from distilclip.configs.select import Config
from distilclip.data.side_files import (
    Groups,
    Scores,
    groups_name,
    groups_path,
    kept_rows,
    read_groups,
    read_scores,
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
from distilclip.scoring.cut import Cut, cut_share, cut_value, on_side, share_curve
from distilclip.scoring.pair_scores import clip_score, neg_clip_loss, norm_similarity
from distilclip.stages._targets import Targets

NUM_EXAMPLES = 12  # pairs on either side of the cut, in the result


def main(config: Config) -> dict[str, Any]:
    """Score the pairs, cut, write which are kept, and return the folder's result."""
    folder = stage_folder.open_folder(config.out, stage="select", config=config, inputs=config.inputs())
    if folder.finished:
        return folder.result()
    store = Store.open(config.store)
    if config.groups is not None:
        stage_folder.require(config.groups, stage="balance", store=config.store)
    _check_sides(config, store)
    shards = range(store.num_shards)
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
    cut = _cut(config, scores)
    removed = {}
    for shard, table in enumerate(tables):
        keep = on_side(table.score, threshold=cut.threshold, side=cut.side)
        _write_kept(folder.path, store, shard, config.groups, table.row[keep])
        removed[shard] = table.row[~keep]
    names = [name(shard) for shard in shards for name in (groups_name, scores_name)]
    copies: dict[str, Any] = {}
    if config.targets and cut.side == "below":
        copies = targets.report(store, removed, threshold=cut.threshold, device=config.device)
        names += targets.names
        _say_copies(copies["targets"], cut)
    targets.remove()
    return folder.finish(
        {
            "score": config.score,
            "threshold": cut.threshold,
            "side": cut.side,
            "num_scored": len(scores),
            "num_kept": cut.num_kept,
            "removed_ratio": 1 - cut.num_kept / len(scores),
            "curve": share_curve(scores),
            "borderline": _borderline(tables, cut),
            **copies,
            "digests": digests.digest_files(folder.path, names),
        }
    )


_COMPARED = {"clip-score": ("image", "text"), "neg-clip-loss": ("image", "text"), "norm-sim": ("image",)}


def _check_sides(config: Config, store: Store) -> None:
    """Raise `InputError` where a row that is to be scored lacks what the score compares."""
    lacking = dict.fromkeys(_COMPARED.get(config.score, ()), 0)
    for shard in range(store.num_shards if lacking else 0):
        kept = _kept(store, shard, config.groups)
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


def _cut(config: Config, scores: Float32[np.ndarray, " n"]) -> Cut:
    if config.top is not None:
        return cut_share(scores, share=config.top)
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
            rows = np.flatnonzero(_kept(store, shard, self.config.groups))
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


def _kept(store: Store, shard: int, groups: str | None) -> Bool[np.ndarray, " r"]:
    valid = store.columns(shard, "valid")["valid"].to_numpy()
    return kept_rows(store, shard, valid, groups)


def _draw_pairs(store: Store, config: Config) -> np.ndarray:
    """Draw the sample ids of the pairs that every pair is compared with, ascending: the same in every worker."""
    kept = [np.flatnonzero(_kept(store, shard, config.groups)) for shard in range(store.num_shards)]
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


def _write_kept(folder: str, store: Store, shard: int, groups: str | None, kept: np.ndarray) -> None:
    """Write the groups of a shard, those of the balance or each row its own, with what is kept now."""
    if files.exists(groups_path(folder, shard)):
        return
    if groups is None:
        row = np.flatnonzero(_kept(store, shard, None)).astype(np.uint32)
        ids, distance = sample_id(shard, row), np.zeros(len(row), np.float32)
        table = Groups(row=row, group=ids, representative=ids, distance=distance, keep=np.isin(row, kept))
    else:
        before = read_groups(groups, shard)
        table = Groups(**{**vars(before), "keep": before.keep & np.isin(before.row, kept)})
    write_groups(folder, shard, table)


def _say_copies(targets: list[dict[str, Any]], cut: Cut) -> None:
    """Say of each target how many of its pictures have a copy in the data, and how many rows are such copies."""
    for found in targets:
        share, num_bad = found["num_near"] / max(found["num_pictures"], 1), found["num_unreadable"]
        unreadable = f"; {num_bad:,} further pictures could not be read" if num_bad else ""
        say(
            f"select: {found['name']}: {found['num_near']:,} of {found['num_pictures']:,} pictures ({share:.2%}) have "
            f"a copy in the data (cosine of {cut.threshold:g} or more); {found['num_rows']:,} rows are copies"
            f"{unreadable}"
        )


def _borderline(tables: list[Scores], cut: Cut) -> dict[str, Any]:
    """List the pairs nearest to the cut on either side: what to look at before trusting it."""
    ids = np.concatenate([sample_id(shard, table.row) for shard, table in enumerate(tables)])
    scores = np.concatenate([table.score for table in tables])
    kept = on_side(scores, threshold=cut.threshold, side=cut.side)
    found = {}
    for name, rows in (("kept", np.flatnonzero(kept)), ("removed", np.flatnonzero(~kept))):
        nearest = rows[np.argsort(np.abs(scores[rows] - cut.threshold), kind="stable")[:NUM_EXAMPLES]]
        found[name] = [{"id": int(ids[at]), "score": float(scores[at])} for at in nearest]
    return found
