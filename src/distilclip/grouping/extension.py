"""Take over what a balance found before its store grew, so that only pairs with a new row are searched.

The forest of a union of pairs is the forest of the union of their forests: the forest of the old rows, and that of all
pairs with a new row, merge to the one that a search of all rows would find.
"""

from __future__ import annotations

from dataclasses import dataclass

from distilclip import digests, files, stage_folder
from distilclip.data.images import ImageMatrix
from distilclip.errors import InputError
from distilclip.grouping.forest import Forest
from distilclip.grouping.rule import WHY_NO_LISTS, Rule
from distilclip.grouping.search_parts import load_forest


@dataclass(frozen=True, kw_only=True)
class FormerSearch:
    """The forest of the rows that a store had before it grew; the new rows come behind these `num_rows`."""

    forest: Forest
    num_rows: int


def read_former_search(folder: str, images: ImageMatrix, rule: Rule) -> FormerSearch:
    """Read what a finished balance found of the first rows of a store that has grown since.

    Raises `InputError` where that balance is not of this store, has found too little for the rule, or is of the store
    as it is now.
    """
    result = stage_folder.require(folder, stage="balance")
    record, store = stage_folder.read_record(folder), images.store.path
    assert record is not None
    if record.stage != "balance":
        raise InputError(f"{folder} was written by `distilclip {record.stage}`; --extend takes a folder of `balance`.")
    made_from = stage_folder.read_json(files.join(folder, "inputs.json")).get("embed")
    before = stage_folder.growth(store, made_from)
    if before is None:
        if made_from == stage_folder.result_digest(store):
            raise InputError(f"{folder} is of {store} as it is now: nothing was added since, so nothing is to extend.")
        raise InputError(
            f"{folder} was made from another store than {store}. --extend takes a balance of this store from before it "
            "grew (embed --append)."
        )
    values = record.config
    if values["metric"] != rule.metric:
        raise InputError(f"{folder} was searched with --metric {values['metric']}, not {rule.metric}.")
    if result["rule"] == "topk":
        raise InputError(f"{folder} was searched with --rule topk: {WHY_NO_LISTS}")
    if values.get("groups") is not None:
        raise InputError(f"{folder} searched the rows of --groups only: search those of the grown store from scratch.")
    if rule.farthest > result["max_threshold"]:
        raise InputError(
            f"{folder} was searched up to {rule.metric} {result['max_threshold']}, not {rule.farthest}: a larger "
            "threshold needs a search of all rows, without --extend."
        )
    remedy = digests.repair_with(folder, "balance")
    digests.check_file(folder, "forest.parquet", remedy=remedy)
    forest = load_forest(files.join(folder, "forest.parquet"), images).below(rule.farthest)
    return FormerSearch(forest=forest, num_rows=int(images.starts[before["num_shards"]]))
