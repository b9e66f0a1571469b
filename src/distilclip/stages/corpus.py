"""Write the synthetic corpus: image-text pairs with known duplicates in tars, and labelled sets to evaluate on."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from distilclip import files, stage_folder
from distilclip.corpus.composition import plan_corpus, write_shards, write_texts
from distilclip.errors import InputError
from distilclip.progress import progress


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of `distilclip corpus`."""

    out: str
    """folder to write: train/*.tar and eval/SET/*.tar"""
    num_pairs: int = 12_000
    """pairs to train on; about 41 % of them are copies of others"""
    seed: int = 0
    """seed of the corpus: the same seed gives the same bytes"""
    image_size: int = 64
    """width and height of the pictures, in pixels"""
    shard_size: int = 1000
    """pairs per tar"""
    num_eval: int = 1000
    """pictures of each evaluation set, and the same number again to train its linear probe"""
    num_workers: int = stage_folder.execution(2)
    """processes that draw pictures (0: draw in the main process)"""

    def __post_init__(self) -> None:
        if self.num_workers < 0:
            raise InputError(f"--num-workers is {self.num_workers}; 0 draws in the main process, n > 0 in n more.")


def main(config: Config) -> dict[str, Any]:
    """Write the tars that are not there yet, then result.json with the counts of the corpus's truth."""
    corpus = plan_corpus(
        num_pairs=config.num_pairs,
        seed=config.seed,
        image_size=config.image_size,
        shard_size=config.shard_size,
        num_eval=config.num_eval,
    )
    folder = stage_folder.open_folder(config.out, stage="corpus", config=config)
    if folder.finished:
        return folder.result()
    write_texts(folder.path, corpus.texts)
    missing = [shard for shard in corpus.shards if not files.exists(folder.child(shard.path))]
    with progress(f"corpus {folder.path}", len(missing)) as advance:
        for _ in write_shards(folder.path, missing, num_workers=config.num_workers):
            advance(1, 0)
    summary = dataclasses.asdict(corpus.summary)
    return folder.finish({**summary, "removable_ratio": corpus.summary.removable_ratio})
