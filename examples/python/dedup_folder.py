"""Find the copies in a folder of pictures, and write which picture of each group to keep. No teacher, no captions.

    python examples/python/dedup_folder.py PICTURES --out copies.csv

The table has a line for each picture: the picture that is kept in its place (itself, if it is kept), and their
distance. Nothing is removed; the folder `OUT.work` beside the table can be removed
afterwards.
"""

from __future__ import annotations

import argparse
import csv

import numpy as np

import distilclip as dc


def main() -> None:
    """Embed what the pictures look like, group near ones, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", help="folder, searched with its subfolders")
    parser.add_argument("--out", required=True, help="CSV file to write")
    parser.add_argument("--threshold", type=float, default=0.1, help="cosine distance below which two are copies")
    parser.add_argument("--num-workers", type=int, default=2, help="processes that read pictures")
    given = parser.parse_args()
    store_folder = f"{given.out}.work/store"
    dc.stages.embed(
        data=given.pictures,
        model="perceptual",
        may_lack="caption",
        num_workers=given.num_workers,
        out=store_folder,
    )
    store = dc.Store.open(store_folder)
    tables = [store.rows(shard) for shard in range(store.num_shards)]
    names = [f"{line.uri}{key}" for line, rows in zip(store.shards, tables, strict=True) for key in rows.key]
    embeddings = np.concatenate([store.image(shard) for shard in range(store.num_shards)])
    valid = np.concatenate([rows.has_image for rows in tables])
    # `cover`: every picture that is removed is near the one that is kept for it.
    found = dc.balance(embeddings, threshold=given.threshold, metric="cosine", rule="cover", valid=valid)
    with open(given.out, "w", newline="", encoding="utf-8") as file:
        lines = csv.writer(file)
        lines.writerow(["picture", "kept", "distance"])
        for row in np.flatnonzero(valid):
            lines.writerow([names[row], names[found.representative[row]], f"{found.distance[row]:.4f}"])
    print(f"{found.num_valid} pictures, {found.num_valid - int(found.keep.sum())} of them copies: {given.out}")


if __name__ == "__main__":
    main()
