"""Small runs of every stage, for drills that disturb them: inputs made once, and the command of each."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.conftest import TINY_CLIP, encoded, picture, write_tar
from tests.faults.children import import_as_children, run_stage
from tests.intake.made_embeddings import write_datacomp

PICTURES = 24
RECIPE = """
[corpus]
num_pairs = 60
shard_size = 30
num_eval = 8
image_size = 32
num_workers = 0
[train]
data = ["@corpus/train/*.tar"]
batch_size = 16
num_steps = 2
warmup_steps = 1
num_workers = 0
precision = "fp32"
student = '{student}'
[embed]
data = ["@corpus/train/*.tar"]
model = "@train"
num_workers = 0
[balance]
store = "@embed"
metric = "cosine"
threshold = 0.01
"""


@dataclass(frozen=True, kw_only=True)
class StageCase:
    """A stage's command; its folder is `out`."""

    name: str
    argv: tuple[str, ...]
    out: Path

    def clear(self) -> None:
        """Remove what an earlier run wrote."""
        shutil.rmtree(self.out, ignore_errors=True)


@dataclass(frozen=True)
class World:
    """A folder with inputs of all stages. `make` creates it."""

    folder: Path

    @property
    def out(self) -> Path:
        """Where the cases write."""
        return self.folder / "out"

    def case(self, name: str, *argv: object) -> StageCase:
        """A case that writes into `out`."""
        words = tuple(str(word) for word in argv)
        return StageCase(name=name, argv=(*words, "--out", str(self.out)), out=self.out)


def warm_up() -> None:
    """Import everything, and compute on one thread, so that children start at once and may be forked."""
    from distilclip.cli import STAGES
    from distilclip.stage_calls import module_of

    torch.set_num_threads(1)
    for name in STAGES:
        importlib.import_module(f"distilclip.stages.{module_of(name)}")
        importlib.import_module(f"distilclip.configs.{module_of(name)}")


KEPT = {"embed": "store", "balance": "groups", "cluster": "clusters", "train": "student", "export onnx": "onnx"}
"""Cases whose folders are inputs of others, and the names of these folders."""


def make(folder: Path, *, stages: Sequence[str] = tuple(KEPT), shards: int = 2, rows: int = 12) -> World:
    """Write pairs, a teacher, a set of labelled pictures, and what some stages make of them."""
    from distilclip.models.clip import create_clip

    warm_up()
    (folder / "tmp").mkdir(parents=True)
    tempfile.tempdir = os.environ["TMPDIR"] = str(folder / "tmp")
    for shard in range(shards):
        members = []
        for number in range(shard * rows, (shard + 1) * rows):
            seed = number if number % 4 else number // 8  # a quarter are copies
            members += [(f"{number:05d}.jpg", encoded(picture(seed))), (f"{number:05d}.txt", f"no. {number}".encode())]
        write_tar(folder / "pairs" / f"{shard:05d}.tar", members)
    for label in ("cat", "dog"):
        (folder / "set" / label).mkdir(parents=True)
        for seed in range(4):
            (folder / "set" / label / f"{seed}.jpg").write_bytes(encoded(picture(seed + 100 * len(label))))
    write_datacomp(folder / "embeddings", parts=shards, rows=rows)
    create_clip(json.dumps(TINY_CLIP), seed=7).save(str(folder / "teacher"))
    (folder / "recipe.toml").write_text(RECIPE.format(student=json.dumps(TINY_CLIP)))
    world = World(folder)
    for stage in stages:
        keep_output(world, stage, KEPT[stage])
    return world


def keep_output(world: World, case: str, name: str) -> None:
    """Run a case in a child and keep its folder under another name, as an input of others."""
    chosen = dataclasses.replace(cases(world)[case], out=world.folder / name)
    argv = [*chosen.argv[:-1], str(chosen.out)]
    ended = run_stage(argv, world.folder)
    if ended.code:
        raise AssertionError(f"{argv} gave {ended.code}: {ended.said}")
    import_as_children(world.folder)


def cases(world: World) -> dict[str, StageCase]:
    """The command of every stage, by what it is called."""
    at = world.folder
    store, groups, kept = at / "store", at / "groups", ("--store", at / "store", "--groups", at / "groups")
    train = ("--batch-size", 8, "--num-steps", 4, "--warmup-steps", 1, "--checkpoint-every", 2, "--num-workers", 0)
    train = (*train, "--precision", "fp32", "--student", json.dumps(TINY_CLIP))
    found = [
        world.case("embed", "embed", "--data", at / "pairs", "--model", at / "teacher", "--num-workers", 0),
        world.case("balance", "balance", "--store", store, "--metric", "cosine", "--threshold", 0.01),
        world.case("cluster", "cluster", *kept, "--num-centers", 5),
        world.case("pack", "pack", *kept, "--clusters", at / "clusters", "--shard-rows", 6, "--packet-rows", 2),
        world.case("train", "train", *train, *kept, "--clusters", at / "clusters", "--objective", "clip-cid"),
        world.case("evaluate", "evaluate", "--models", at / "teacher", "--sets", f"folder:{at / 'set'}"),
        world.case("report", "report", "--folders", store, groups, at / "clusters", at / "student"),
        world.case("run", "run", at / "recipe.toml"),
        world.case("corpus", "corpus", "--num-pairs", 60, "--shard-size", 30, "--num-eval", 8, "--num-workers", 0),
    ]
    teacher = ("--teacher-name", "ViT-L-14", "--teacher-digest", "made up", "--image-column", "l14_img")
    found += [world.case("import", "import", "--embeddings", at / "embeddings", *teacher)]
    found += [world.case("export datacomp", "export", "--what", "datacomp", "--uid", "md5", *kept)]
    found += [world.case("export subset", "export", "--what", "subset", "--uid", "md5", *kept)]
    found += [
        world.case(f"export {what}", "export", "--what", what, *kept) for what in ("tars", "keys", "clip-retrieval")
    ]
    found += [
        world.case(f"export {what}", "export", "--what", what, "--model", at / "student")
        for what in ("open_clip", "huggingface", "sentence-transformers", "onnx")
    ]
    found += [world.case("search", "search", at / "onnx", at / "set", "a cat")]
    return {case.name: case for case in found}
