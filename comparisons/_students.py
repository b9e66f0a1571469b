"""What the comparisons share: students trained alike, evaluated together, and a table of paired differences."""

from __future__ import annotations

import argparse
import csv
import glob
import io
import json
import math
import re
import statistics
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distilclip import cli, stage_folder
from distilclip.sets.dataset import LabelledSet
from distilclip.sets.open import load_set
from distilclip.sets.score import Score

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
MEASURES = ("zero-shot", "rare classes", "R@1", "R@10")


def parse(description: str, methods: Sequence[str], *, num_steps: int) -> argparse.Namespace:
    """Read the options that every comparison has."""
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=shape)
    parser.add_argument("data", choices=["corpus", "icons"])
    parser.add_argument("--out", required=True)
    parser.add_argument("--icons", default="", help="folder of the icons")
    parser.add_argument("--teacher", default="", help="finished training to take as teacher (default: train one)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--num-steps", type=int, default=num_steps)
    parser.add_argument("--num-centers", type=int, default=100)
    parser.add_argument("--methods", nargs="*", default=list(methods), choices=list(methods))
    return parser.parse_args()


def compare(
    given: argparse.Namespace,
    student: Callable[[Path, str, int, argparse.Namespace], str],
    *,
    teacher: str,
    tars: list[str],
    sets: list[str],
    base: str,
    head: str,
) -> None:
    """Train and measure a student of every method and seed; write the table anew after each seed."""
    out = Path(given.out)
    tails = find_tails(tars, sets)
    for seed in range(given.seeds):
        students = [student(out, method, seed, given) for method in given.methods]
        evaluate(out, [f"teacher={teacher}", *students], seed, sets)
        text = table(out, given.methods, seeds=seed + 1, tails=tails, base=base, head=head)
        (out / "table.md").write_text(text)
        print(text, flush=True)


def run(*words: object) -> None:
    """Run a command of distilclip; end with its message where it fails."""
    if code := cli.main([str(word) for word in words]):
        sys.exit(code)


def prepare_teacher(out: Path, given: argparse.Namespace) -> str:
    """Return the teacher of a comparison; without --teacher, train one on clean pairs."""
    if given.teacher:
        return str(given.teacher)
    place = out / "prepared"
    if given.data == "corpus":
        run("corpus", "--out", place / "clean")
    data = f"{place}/clean/train/*.tar" if given.data == "corpus" else f"{given.icons}/train-*.tar"
    train(place / "teacher", TEACHER, 600, 0, "--data", data)
    return str(place / "teacher")


def train(out: Path, model: dict[str, Any], num_steps: int, seed: int, *options: object) -> None:
    """Train with the batch and the rates that all models of the comparisons have."""
    steps = ("--num-steps", num_steps, "--warmup-steps", num_steps // 10, "--batch-size", 256)
    rates = ("--learning-rate", 2e-3, "--weight-decay", 0.1, "--precision", "fp32", "--num-workers", 1)
    run("train", "--out", out, "--student", json.dumps(model), "--seed", seed, *steps, *rates, *options)


def name_of(method: str) -> str:
    """Return the name of a method's students."""
    return re.sub(r"\W+", "-", method).strip("-").lower()


def train_student(
    out: Path, method: str, seed: int, num_steps: int, *options: object, model: dict[str, Any] = STUDENT
) -> str:
    """Train a student of a method; return it as evaluate takes it."""
    name = name_of(method)
    folder = out / "students" / f"{name}-{seed}"
    train(folder, model, num_steps, seed, *options)
    return f"{name}={folder}"


def sets_of(corpus: Path, given: argparse.Namespace) -> list[str]:
    """Return the sets to evaluate on, none of which was trained on; `corpus` is the folder of a corpus."""
    if given.data == "icons":
        concepts = Path(given.out) / "prepared/zero-shot"
        write_concepts(concepts, given.icons)
        return [f"concepts=tar:{concepts}", f"names=pairs:{given.icons}/val-*.tar"]
    place = corpus / "eval"
    names = ("shape", "colour", "shape_colour_unseen", "sketch")
    return [*(f"{name}=tar:{place}/{name}" for name in names), f"retrieval=pairs:{place}/retrieval/*.tar"]


def write_concepts(out: Path, icons: str) -> None:
    """Make a labelled set of the validation icons: its classes are the concepts that 25 training sets or more draw."""
    with open(f"{icons}/concepts.tsv") as file:
        table = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    names = sorted(row["concept"] for row in table if int(row["train_sets"]) >= 25 and int(row["val_icons"]) > 0)
    label = {name: str(number).encode() for number, name in enumerate(names)}
    out.mkdir(parents=True, exist_ok=True)
    with tarfile.open(out / "test-00000.tar", "w") as made:
        for path in sorted(glob.glob(f"{icons}/val-*.tar")):
            with tarfile.open(path) as tar:
                contents = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
            for name, content in contents.items():
                key = name.removesuffix(".json")
                if key != name and (concept := json.loads(content)["concept"]) in label:
                    for ending, data in (("png", contents[f"{key}.png"]), ("cls", label[concept])):
                        member = tarfile.TarInfo(f"{key}.{ending}")
                        member.size = len(data)
                        made.addfile(member, io.BytesIO(data))
    (out / "classnames.txt").write_text("\n".join(names) + "\n")
    templates = ("{}", "{} outline", "{} filled", "{} solid", "{} line")  # the captions' words
    (out / "templates.txt").write_text("\n".join(templates) + "\n")


def evaluate(out: Path, models: list[str], seed: int, sets: list[str]) -> None:
    """Measure the students of one seed, and their teacher."""
    tasks = ("--tasks", "zero-shot", "retrieval")
    run("evaluate", "--models", *models, "--sets", *sets, *tasks, "--out", out / f"scores-{seed}-{len(models)}")


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
    """Yield the captions of tars."""
    for path in tars:
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".txt") and (file := tar.extractfile(member)) is not None:
                    yield file.read().decode()


def table(out: Path, methods: Sequence[str], *, seeds: int, tails: dict[str, np.ndarray], base: str, head: str) -> str:
    """Return a table in Markdown: mean and deviation over seeds, and the paired difference to a base method."""
    values: dict[tuple[str, str], list[float]] = {}
    for seed in range(seeds):
        result = stage_folder.read_json(str(out / f"scores-{seed}-{len(methods) + 1}/result.json"))
        for key, value in measure(result["rows"], tails).items():
            values.setdefault(key, []).append(value)
    lines = [f"| {head} | " + " | ".join(MEASURES) + " |", "|---" * (len(MEASURES) + 1) + "|"]
    for method in ("teacher", *methods):
        cells = [_cell(values[name_of(method), name], values[name_of(base), name], method, base) for name in MEASURES]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(own: list[float], base: list[float], method: str, base_method: str) -> str:
    cell = f"{statistics.fmean(own):.1f}"
    if len(own) > 1 and method != "teacher":
        cell += f" ± {statistics.stdev(own):.1f}"
        if method != base_method:
            paired = [a - b for a, b in zip(own, base, strict=True)]
            error = statistics.stdev(paired) / math.sqrt(len(paired))
            cell += f" ({statistics.fmean(paired):+.1f} ± {error:.1f})"
    return cell


def measure(rows: list[dict[str, Any]], tails: dict[str, np.ndarray]) -> dict[tuple[str, str], float]:
    """Return percent by model and measure, each the mean over sets or over both ways of retrieval."""
    found: dict[tuple[str, str], list[float]] = {}
    retrieval = {f"{way}_r{k}": f"R@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 10)}
    for score in map(Score.from_row, rows):
        if score.value is None:
            continue
        if score.task == "zero-shot" and score.metric == "top1":
            found.setdefault((score.model, "zero-shot"), []).append(100 * score.value)
            hits = score.hits
            assert hits is not None
            found.setdefault((score.model, "rare classes"), []).append(100 * float(hits[tails[score.set]].mean()))
        if score.metric in retrieval:
            found.setdefault((score.model, retrieval[score.metric]), []).append(100 * score.value)
    return {key: statistics.fmean(values) for key, values in found.items()}
