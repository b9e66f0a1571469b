"""Write the synthetic corpus: image-text pairs with known duplicates in tars, and labelled sets to evaluate on."""

from __future__ import annotations

import dataclasses
from typing import Any

from distilclip import files, stage_folder
from distilclip.configs.corpus import Config
from distilclip.corpus.composition import plan_corpus, write_shards, write_texts
from distilclip.progress import progress


def main(config: Config) -> dict[str, Any]:
    """Write the tars that are not there yet, then result.json with the counts of the corpus's truth."""
    corpus = plan_corpus(
        num_pairs=config.num_pairs,
        seed=config.seed,
        image_size=config.image_size,
        shard_size=config.shard_size,
        num_eval=config.num_eval,
        wrong_captions=config.wrong_captions,
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
