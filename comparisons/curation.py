"""Compare ways to choose half of the pairs: students trained alike on each half, over several seeds, beside all pairs.

    python comparisons/curation.py corpus --out runs/curation-corpus
    python comparisons/curation.py icons --out runs/curation-icons --icons FOLDER

`corpus` makes pairs of which 41 % are copies and 30 % have the caption of another. `icons` takes a folder with
train-*.tar, val-*.tar and a labelled set zero-shot/. Finished steps are kept: the same command goes on, with more
--seeds or --methods, too. The table goes to OUT/table.md.
"""

from __future__ import annotations

import argparse
import glob
import json
import math
import re
import statistics
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from distilclip import cli, stage_folder
from distilclip.data.side_files import read_centers, read_labels
from distilclip.data.store import Store
from distilclip.sets.dataset import LabelledSet
from distilclip.sets.open import load_set
from distilclip.sets.score import Score

SHARE = 0.5  # of the pairs, in every half
WRONG = 0.3  # of the captions of the corpus
FIRST = 0.3  # what balance removes where the CLIP score then takes the rest
TOKENS = {"context_length": 24, "vocab_size": 49408}
IMAGE = {"timm_pool": "max", "timm_proj": "linear"}
STUDENT = {
    "embed_dim": 64,
    "vision_cfg": {**IMAGE, "timm_model_name": "cnn_w8", "image_size": 32},
    "text_cfg": {**TOKENS, "width": 64, "heads": 2, "layers": 1},
}
TEACHER = {
    "embed_dim": 128,
    "vision_cfg": {**IMAGE, "timm_model_name": "cnn_w12", "image_size": 64},
    "text_cfg": {**TOKENS, "width": 128, "heads": 4, "layers": 2},
}
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=["corpus", "icons"])
    parser.add_argument("--out", required=True)
    parser.add_argument("--icons", default="", help="folder of the icons")
    parser.add_argument("--teacher", default="", help="finished training to take as teacher (default: train one)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--num-steps", type=int, default=200)
    parser.add_argument("--num-centers", type=int, default=100)
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    given = parser.parse_args()
    if given.data == "icons":
        given.methods = [method for method in given.methods if method not in OF_CORPUS]
    out = Path(given.out)
    train = prepare(out, given)
    store = Store.open(str(out / "prepared/embed"))
    choose(out, store, given)
    for seed in range(given.seeds):
        students = [student(out, method, seed, given.num_steps) for method in given.methods]
        evaluate(out, [f"teacher={teacher_of(out, given)}", *students], seed, given)
        text = table(out, given, seeds=seed + 1, tails=find_tails(train, sets_of(out, given)))
        (out / "table.md").write_text(text)
        print(text, flush=True)
    return 0


def run(*words: object) -> None:
    """Run a command of distilclip; end with its message where it fails."""
    if code := cli.main([str(word) for word in words]):
        sys.exit(code)


def prepare(out: Path, given: argparse.Namespace) -> list[str]:
    """Make what all methods share: pairs, teacher, store, balances and clusters; return the tars."""
    place = out / "prepared"
    if given.data == "corpus":
        noisy, right, clean = (place / name for name in ("corpus", "right", "clean"))
        run("corpus", "--out", noisy, "--seed", 1, "--wrong-captions", WRONG)
        pattern = f"{noisy}/train/*.tar"
        run("corpus", "--out", right, "--seed", 1)
        if not given.teacher:
            run("corpus", "--out", clean)
    else:
        pattern = f"{given.icons}/train-0000[0-7].tar"
    if not given.teacher:
        data = f"{clean}/train/*.tar" if given.data == "corpus" else f"{given.icons}/train-*.tar"
        train(place / "teacher", TEACHER, 600, 0, "--data", data)
    run("embed", "--data", pattern, "--model", teacher_of(out, given), "--out", place / "embed")
    if given.data == "corpus":
        pairs = ("--data", f"{right}/train/*.tar", "--model", teacher_of(out, given))
        run("embed", *pairs, "--out", place / "embed-right")
    half, shared = place / "balance/half", ("--store", place / "embed", "--metric", "cosine")
    run("balance", *shared, "--target-removed", 1 - SHARE, "--max-threshold", 0.5, "--out", half)
    run("balance", *shared, "--target-removed", FIRST, "--from-folder", half, "--out", place / "balance/first")
    run("cluster", "--store", place / "embed", "--num-centers", given.num_centers, "--out", place / "cluster")
    return sorted(glob.glob(pattern))


def teacher_of(out: Path, given: argparse.Namespace) -> str:
    return given.teacher or str(out / "prepared/teacher")


def train(out: Path, model: dict[str, Any], num_steps: int, seed: int, *options: object) -> None:
    steps = ("--num-steps", num_steps, "--warmup-steps", num_steps // 10, "--batch-size", 256)
    rates = ("--learning-rate", 2e-3, "--weight-decay", 0.1, "--precision", "fp32", "--num-workers", 1)
    run("train", "--out", out, "--student", json.dumps(model), "--seed", seed, *steps, *rates, *options)


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


def student(out: Path, method: str, seed: int, num_steps: int) -> str:
    """Train a student; return it as evaluate takes it."""
    name = name_of(method)
    options: list[object] = []
    for option, value in ({"store": "prepared/embed"} | METHODS[method]).items():
        options += [f"--{option.replace('_', '-')}", value if option == "captions" else out / value]
    folder = out / "students" / f"{name}-{seed}"
    train(folder, STUDENT, num_steps, seed, *options)
    return f"{name}={folder}"


def name_of(method: str) -> str:
    """Return the name of a method's students."""
    return re.sub(r"\W+", "-", method).strip("-").lower()


def sets_of(out: Path, given: argparse.Namespace) -> list[str]:
    if given.data == "icons":
        return [f"concepts=tar:{given.icons}/zero-shot", f"names=pairs:{given.icons}/val-*.tar"]
    place = out / "prepared/corpus/eval"
    names = ("shape", "colour", "shape_colour_unseen", "sketch")
    return [*(f"{name}=tar:{place}/{name}" for name in names), f"retrieval=pairs:{place}/retrieval/*.tar"]


def evaluate(out: Path, models: list[str], seed: int, given: argparse.Namespace) -> None:
    tasks = ("--tasks", "zero-shot", "retrieval")
    place = out / f"scores-{seed}-{len(models)}"
    run("evaluate", "--models", *models, "--sets", *sets_of(out, given), *tasks, "--out", place)


def find_tails(tars: list[str], sets: list[str]) -> dict[str, np.ndarray]:
    """Return of every labelled set which test images are of the third of the classes that the fewest captions name."""
    captions = list(read_captions(tars))
    found = {}
    for spec in sets:
        loaded = load_set(spec)
        if isinstance(loaded, LabelledSet):
            words = [re.compile(rf"\b{re.escape(name)}\b", re.IGNORECASE) for name in loaded.classes.names]
            counts = np.array([sum(bool(word.search(text)) for text in captions) for word in words])
            rare = np.argsort(counts, kind="stable")[: len(counts) // 3]
            found[loaded.name] = np.isin(loaded.test.labels, rare)
    return found


def read_captions(tars: list[str]) -> Iterator[str]:
    for path in tars:
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".txt") and (file := tar.extractfile(member)) is not None:
                    yield file.read().decode()


def table(out: Path, given: argparse.Namespace, *, seeds: int, tails: dict[str, np.ndarray]) -> str:
    """Return a table in Markdown: mean and deviation over seeds, and the paired difference to the random half."""
    values: dict[tuple[str, str], list[float]] = {}
    for seed in range(seeds):
        result = stage_folder.read_json(str(out / f"scores-{seed}-{len(given.methods) + 1}/result.json"))
        for key, value in measure(result["rows"], tails).items():
            values.setdefault(key, []).append(value)
    measures = ("zero-shot", "rare classes", "R@10")
    lines = ["| pairs trained on | " + " | ".join(measures) + " |", "|---" * (len(measures) + 1) + "|"]
    for method in ("teacher", *given.methods):
        cells = []
        for name in measures:
            own, base = values[name_of(method), name], values["random-half", name]
            cell = f"{statistics.fmean(own):.1f}"
            if len(own) > 1 and method != "teacher":
                paired = [a - b for a, b in zip(own, base, strict=True)]
                error = statistics.stdev(paired) / math.sqrt(len(paired))
                cell += f" ± {statistics.stdev(own):.1f} ({statistics.fmean(paired):+.1f} ± {error:.1f})"
            cells.append(cell)
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def measure(rows: list[dict[str, Any]], tails: dict[str, np.ndarray]) -> dict[tuple[str, str], float]:
    """Return percent by model and measure, each the mean over sets or over both ways of retrieval."""
    found: dict[tuple[str, str], list[float]] = {}
    for score in map(Score.from_row, rows):
        if score.value is None:
            continue
        if score.task == "zero-shot" and score.metric == "top1":
            found.setdefault((score.model, "zero-shot"), []).append(100 * score.value)
            hits = score.hits
            assert hits is not None
            found.setdefault((score.model, "rare classes"), []).append(100 * float(hits[tails[score.set]].mean()))
        if score.metric in ("image_to_text_r10", "text_to_image_r10"):
            found.setdefault((score.model, "R@10"), []).append(100 * score.value)
    return {key: statistics.fmean(values) for key, values in found.items()}


if __name__ == "__main__":
    sys.exit(main())
