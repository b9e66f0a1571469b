"""Compare ways to teach a student: the task alone, CLIP-KD, CLIP-CID, and the preset `distil`, over several seeds.

    python comparisons/teaching.py corpus --out runs/teaching-corpus
    python comparisons/teaching.py icons --out runs/teaching-icons --icons FOLDER

All students see equally many pairs in equally many steps. Finished steps are kept. The table goes to OUT/table.md.
"""

from __future__ import annotations

import argparse
import glob
import sys
from pathlib import Path

from _students import STUDENT, TEACHER, compare, parse, prepare_teacher, run, sets_of, train_student

FAST = 8e-3  # four times the rate of the others, which the task alone does not bear (docs/log.md)
METHODS: dict[str, tuple[object, ...]] = {
    "alone": (),
    "CLIP-KD, as published": ("--objective", "clip-kd"),
    "CLIP-CID, as published": ("--objective", "clip-cid", "--clusters", "@cluster"),
    "CLIP-KD, FD 200, 4 x rate": ("--objective", "clip-kd", "--terms", "feature", 200, "--learning-rate", FAST),
    "CLIP-CID, 4 x rate": ("--objective", "clip-cid", "--clusters", "@cluster", "--learning-rate", FAST),
    "distil": ("--objective", "distil", "--learning-rate", FAST),
    "distil, best half by CLIP score": ("--objective", "distil", "--learning-rate", FAST, "--groups", "@select"),
}
"""The options of train; `@` stands for the folder of what was prepared."""


def main() -> int:
    given = parse(__doc__ or "", list(METHODS), num_steps=200)
    out = Path(given.out)
    teacher = prepare_teacher(out, given)
    tars = prepare(out, given, teacher)
    sets = sets_of(out / "prepared/clean", given)
    compare(given, student, teacher=teacher, tars=tars, sets=sets, base="alone", head="taught by")
    return 0


def prepare(out: Path, given: argparse.Namespace, teacher: str) -> list[str]:
    """Make what all methods share: pairs, store and clusters; return the tars."""
    place = out / "prepared"
    pattern = f"{given.icons}/train-0000[0-7].tar"
    if given.data == "corpus":
        run("corpus", "--out", place / "clean")
        pattern = f"{place}/clean/train/*.tar"
    run("embed", "--data", pattern, "--model", teacher, "--out", place / "embed")
    run("cluster", "--store", place / "embed", "--num-centers", given.num_centers, "--out", place / "cluster")
    run("select", "--store", place / "embed", "--score", "clip-score", "--top", 0.5, "--out", place / "select")
    return sorted(glob.glob(pattern))


def student(out: Path, method: str, seed: int, given: argparse.Namespace) -> str:
    """Train a student; return it as evaluate takes it."""
    place = out / "prepared"
    options = [place / str(word)[1:] if str(word).startswith("@") else word for word in METHODS[method]]
    options += ["--store", place / "embed"]
    model = {**STUDENT, "embed_dim": TEACHER["embed_dim"]} if method.startswith("distil") else STUDENT
    return train_student(out, method, seed, given.num_steps, *options, model=model)


if __name__ == "__main__":
    sys.exit(main())
