"""Compare ways to choose half of the pairs: students trained alike on each half, over several seeds, beside all pairs.

    python comparisons/curation.py corpus --out runs/curation-corpus
    python comparisons/curation.py icons --out runs/curation-icons --icons FOLDER

`corpus` makes pairs of which 41 % are copies and 30 % have the caption of another. `icons` takes a folder with
train-*.tar, val-*.tar and concepts.tsv. Finished steps are kept: the same command goes on, with more
--seeds or --methods, too. The table goes to OUT/table.md.
"""

from __future__ import annotations

import argparse
import glob
import sys
from pathlib import Path

import numpy as np
from _students import compare, parse, prepare_teacher, run, sets_of, train_student

from distilclip.data.side_files import read_centers, read_labels
from distilclip.data.store import Store

SHARE = 0.5  # of the pairs, in every half
WRONG = 0.3  # of the captions of the corpus
FIRST = 0.3  # what balance removes where the CLIP score then takes the rest
BALANCE_HALF, BALANCE_SCORE = "prepared/balance/half", "chosen/select/balance-clip-score"
METHODS: dict[str, dict[str, str]] = {
    "all pairs": {},
    "random half": {"groups": "chosen/select/random"},
    "balance": {"groups": BALANCE_HALF},
    "within clusters (SemDeDup)": {"groups": "chosen/select/semdedup"},
    "CLIP score": {"groups": "chosen/select/clip-score"},
    "balance, then CLIP score": {"groups": BALANCE_SCORE},
    "density quota (DBP)": {"row_weights": "chosen/quota"},
    "balance, CLIP score, weights": {"groups": BALANCE_SCORE, "row_weights": "chosen/weights"},
    "balance, captions of group": {"groups": BALANCE_HALF, "captions": "of-group"},
    "balance, CLIP score, captions of group": {"groups": BALANCE_SCORE, "captions": "of-group"},
    "CLIP score, as many as are right": {"groups": "chosen/select/clip-score-right"},
    "all pairs, none of them wrong": {"store": "prepared/embed-right"},
}
OF_CORPUS = ("CLIP score, as many as are right", "all pairs, none of them wrong")


def main() -> int:
    given = parse(__doc__ or "", list(METHODS), num_steps=200)
    if given.data == "icons":
        given.methods = [method for method in given.methods if method not in OF_CORPUS]
    out = Path(given.out)
    teacher = prepare_teacher(out, given)
    tars = prepare(out, given, teacher)
    sets = sets_of(out / "prepared/corpus", given)
    choose(out, Store.open(str(out / "prepared/embed")), given)
    compare(given, student, teacher=teacher, tars=tars, sets=sets, base="random half", head="pairs trained on")
    return 0


def prepare(out: Path, given: argparse.Namespace, teacher: str) -> list[str]:
    """Make what all methods share: pairs, store, balances and clusters; return the tars."""
    place = out / "prepared"
    pattern = f"{given.icons}/train-0000[0-7].tar"
    if given.data == "corpus":
        noisy, right = place / "corpus", place / "right"
        run("corpus", "--out", noisy, "--seed", 1, "--wrong-captions", WRONG)
        run("corpus", "--out", right, "--seed", 1)
        pattern = f"{noisy}/train/*.tar"
        run("embed", "--data", f"{right}/train/*.tar", "--model", teacher, "--out", place / "embed-right")
    run("embed", "--data", pattern, "--model", teacher, "--out", place / "embed")
    half, shared = place / "balance/half", ("--store", place / "embed", "--metric", "cosine")
    run("balance", *shared, "--target-removed", 1 - SHARE, "--max-threshold", 0.5, "--out", half)
    run("balance", *shared, "--target-removed", FIRST, "--from-folder", half, "--out", place / "balance/first")
    run("cluster", "--store", place / "embed", "--num-centers", given.num_centers, "--out", place / "cluster")
    return sorted(glob.glob(pattern))


def choose(out: Path, store: Store, given: argparse.Namespace) -> None:
    """Choose half of the pairs in every way that is not a balance."""
    place = out / "chosen"
    place.mkdir(exist_ok=True)
    select = ("select", "--store", store.path)
    random = np.random.default_rng(0).random(store.num_rows)
    for name, values in (("random", random), ("semdedup", semdedup(store, str(out / "prepared/cluster")))):
        np.save(place / f"{name}.npy", values)
        column = ("--score", "column", "--values", place / f"{name}.npy", "--top", SHARE)
        run(*select, *column, "--out", place / f"select/{name}")
    run(*select, "--score", "clip-score", "--top", SHARE, "--out", place / "select/clip-score")
    if given.data == "corpus":
        run(*select, "--score", "clip-score", "--top", 1 - WRONG, "--out", place / "select/clip-score-right")
    weigh, clusters = ("weigh", "--store", store.path), ("--clusters", out / "prepared/cluster")
    run(*weigh, *clusters, "--quota", SHARE, "--quota-rows", "farthest", "--out", place / "quota")
    balanced = ("--groups", out / "prepared/balance/first", "--top", SHARE / (1 - FIRST))
    run(*select, "--score", "clip-score", *balanced, "--out", out / BALANCE_SCORE)
    grouped = ("--groups", out / BALANCE_SCORE, "--group-power", 0.5)
    run(*weigh, *grouped, *clusters, "--cluster-power", 0.5, "--out", place / "weights")


def semdedup(store: Store, clusters: str) -> np.ndarray:
    """Return of every row 1 less its largest similarity to a row of its cluster that lies farther from the center.

    What SemDeDup (Abbas et al. 2023) removes first has the smallest value; rows that are not valid have 0.
    """
    labels = [read_labels(clusters, shard) for shard in range(store.num_shards)]
    starts = np.cumsum([0, *(shard.num_rows for shard in store.shards)])
    row = np.concatenate([start + found.row for start, found in zip(starts, labels, strict=False)]).astype(np.int64)
    cluster = np.concatenate([found.cluster for found in labels])
    image = np.concatenate([store.image(shard) for shard in range(store.num_shards)]).astype(np.float32)
    values, centers = np.zeros(store.num_rows), read_centers(clusters)
    for number, center in enumerate(centers):
        rows = row[cluster == number]
        rows = rows[np.argsort(image[rows] @ center, kind="stable")]  # the farthest from the center first
        similar = np.tril(image[rows] @ image[rows].T, -1)
        values[rows] = 1 - np.where(np.arange(len(rows)) > 0, similar.max(axis=1, initial=-1), -1)
    return values


def student(out: Path, method: str, seed: int, given: argparse.Namespace) -> str:
    """Train a student; return it as evaluate takes it."""
    options: list[object] = []
    for option, value in ({"store": "prepared/embed"} | METHODS[method]).items():
        options += [f"--{option.replace('_', '-')}", value if option == "captions" else out / value]
    return train_student(out, method, seed, given.num_steps, *options)


if __name__ == "__main__":
    sys.exit(main())
