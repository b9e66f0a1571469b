"""Compare a balance with the truth that the made-up corpus knows: which pictures show the same scene."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

from distilclip import files
from distilclip.data.shards import read_texts
from distilclip.data.side_files import read_groups
from distilclip.data.store import Store, sample_id
from distilclip.stage_folder import StageRecord


@dataclass(frozen=True, kw_only=True)
class Truth:
    """What a balance did to a corpus's true groups; a true group is all pictures of one scene."""

    num_removed: int
    num_right: int
    """removed pictures whose kept one shows the same scene"""
    num_groups: int
    num_lost: int
    """true groups of which no picture was kept"""

    @property
    def right_ratio(self) -> float:
        """Share of the removed pictures that were removed for a picture of the same scene."""
        return self.num_right / max(1, self.num_removed)

    @property
    def lost_ratio(self) -> float:
        """Share of the true groups that lost every picture."""
        return self.num_lost / max(1, self.num_groups)


def compare_with_truth(
    group: Int[np.ndarray, " n"], kept_for: Int[np.ndarray, " n"], keep: Bool[np.ndarray, " n"]
) -> Truth:
    """Count what a balance did right.

    Args:
        group: the true group of every picture.
        kept_for: the place of the picture that is kept on behalf of each one.
        keep: whether the picture itself is kept.

    >>> found = compare_with_truth(np.array([7, 7, 8, 9]), np.array([0, 0, 0, 3]), np.array([True, False, False, True]))
    >>> found.num_removed, found.num_right, found.num_groups, found.num_lost
    (2, 1, 3, 1)
    """
    removed = ~keep
    return Truth(
        num_removed=int(removed.sum()),
        num_right=int((group[removed] == group[kept_for[removed]]).sum()),
        num_groups=len(np.unique(group)),
        num_lost=len(np.setdiff1d(group, group[keep])),
    )


def read_truth(balance: StageRecord, store: Store, corpora: Sequence[StageRecord]) -> Truth | None:
    """Read the true groups of a store whose tars lie in a corpus folder; None for any other store.

    Raises:
        InputError: the tars are not those that were embedded.
    """
    roots = tuple(f"{files.absolute(corpus.path)}/" for corpus in corpora)
    if not roots or not all(files.absolute(shard.uri).startswith(roots) for shard in store.shards):
        return None
    samples, scenes, kept_for, keep = [], [], [], []
    for shard in store.shards:
        groups, rows = read_groups(balance.path, shard.index), store.rows(shard.index)
        chosen = groups.row.astype(np.int64)
        keys = [rows.key[row] for row in chosen]
        texts = read_texts(shard.uri, keys, rows.offset[chosen], rows.size[chosen], columns=store.csv_columns)
        scenes.append(np.array([text.meta["group"] for text in texts], np.int64))
        samples.append(sample_id(shard.index, groups.row))
        kept_for.append(groups.representative)
        keep.append(groups.keep)
    places = np.searchsorted(np.concatenate(samples), np.concatenate(kept_for))  # sample ids ascend
    return compare_with_truth(np.concatenate(scenes), places, np.concatenate(keep))
