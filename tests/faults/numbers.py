"""Drill: numbers that are not finite, in weights, gradients, the optimizer's memory, embeddings and teachers."""

from __future__ import annotations

import importlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distilclip import digests
from distilclip.data.tensors import FileDigests, read_metadata, read_tensors, write_tensors
from tests.conftest import TINY_CLIP, encoded, picture, write_tar
from tests.faults.children import differences, run_child, run_stage, snapshot
from tests.faults.outcome import Outcome, Size

BAD = {"NaN": float("nan"), "Inf": float("inf"), "-Inf": float("-inf")}
STEPS, EVERY = 6, 2
NUM_PAIRS = 24


@dataclass(frozen=True)
class World:
    """A folder with pairs, a teacher, a store, and a training that nothing disturbed."""

    folder: Path

    def train_argv(self, out: Path) -> list[str]:
        """The command of a short training that keeps all its checkpoints."""
        argv = ["train", "--data", self.folder / "pairs", "--out", out, "--student", json.dumps(TINY_CLIP)]
        argv += ["--batch-size", 8, "--num-steps", STEPS, "--warmup-steps", 1, "--checkpoint-every", EVERY]
        argv += ["--keep-checkpoints", 9, "--num-workers", 0, "--precision", "fp32", "--device", "cpu"]
        return [str(word) for word in argv]


def make(folder: Path) -> World:
    """Write the inputs."""
    from distilclip.cli import STAGES
    from distilclip.models.clip import create_clip
    from distilclip.stage_calls import module_of

    torch.set_num_threads(1)
    for name in STAGES:
        importlib.import_module(f"distilclip.stages.{module_of(name)}")
    members = []
    for number in range(NUM_PAIRS):
        word = b"zebra" if number % 6 == 5 else b"horse"
        members += [(f"{number:05d}.jpg", encoded(picture(number))), (f"{number:05d}.txt", b"%s %d" % (word, number))]
    write_tar(folder / "pairs" / "0.tar", members)
    create_clip(json.dumps(TINY_CLIP), seed=7).save(str(folder / "teacher"))
    world = World(folder)
    _must(embed_argv(world, folder / "teacher", folder / "store"), folder)
    _must(world.train_argv(folder / "undisturbed"), folder)
    return world


def embed_argv(world: World, model: Path, out: Path) -> list[str]:
    """The command that embeds the pairs."""
    argv = ["embed", "--data", world.folder / "pairs", "--model", model, "--out", out, "--num-workers", "0"]
    return [*map(str, argv), "--device", "cpu"]


def _must(argv: list[str], folder: Path) -> None:
    ended = run_stage(argv, folder)
    if ended.code:
        raise AssertionError(f"{argv} gave {ended.code}: {ended.said}")


def drill(folder: Path, *, size: Size) -> list[Outcome]:
    """Disturb a training at each step, a store in each stage that reads it, and a teacher."""
    world = make(folder)
    steps = range(1, STEPS + 1) if size == "full" else (3,)
    bad = BAD if size == "full" else {"NaN": BAD["NaN"]}
    places = tuple(POISON) if size == "full" else ("a gradient", "a weight")
    training = [
        partial(disturb_training, world, place, step, value, f"{word} in {place} at step {step}")
        for place in places
        for step in steps
        for word, value in bad.items()
        if step > 1 or place != "the optimizer's memory"  # it has none yet
    ]
    kinds = ("NaN", "Inf", "zeros", "twice as long") if size == "full" else ("NaN",)
    stages = ("train", "balance", "cluster") if size == "full" else ("balance",)
    stores = [
        partial(disturb_store, world, kind, stage)
        for kind in kinds
        for stage in stages
        if kind != "twice as long" or stage == "train"  # balance warns of it, and cluster compares directions
    ]
    models = [partial(disturb_teacher, world, word, value) for word, value in bad.items()]
    models += [
        partial(use_bad_model, world, stage, value) for stage in ("evaluate", "export") for value in bad.values()
    ]
    return [
        _count(
            training,
            promise="A NaN or an infinity in a training stops it with a name; every checkpoint is finite, and the same "
            "command then gives the bytes of a training that nothing disturbed.",
            how=f"{', '.join(places)} are set to it at steps {steps[0]} to {steps[-1]}; then the run is begun again",
        ),
        _count(
            stores,
            promise="An embedding that is no finite unit vector is an error that names its shard and row.",
            how=f"one row of a store is exchanged, digests and all ({', '.join(kinds)}); {', '.join(stages)} read it",
        ),
        _count(
            models,
            promise="What a model makes of a sample is skipped and counted, or refused, where it is not finite.",
            how="one token's embedding, or a weight of all, is set to it; embed, evaluate and export use the model",
        ),
    ]


def _count(cases: Sequence[Callable[[], str]], *, promise: str, how: str) -> Outcome:
    started = time.monotonic()
    faults = [fault for case in cases if (fault := case())]
    return Outcome(
        promise=promise,
        how=how,
        num_cases=len(cases),
        num_survived=len(cases) - len(faults),
        seconds=time.monotonic() - started,
        notes="; ".join(faults),
    )


def _poison_gradient(training: Any, value: float) -> None:
    next(iter(training.student.named_parameters().values())).grad.view(-1)[0] = value


def _poison_weight(training: Any, value: float) -> None:
    list(training.student.named_parameters().values())[-1].data.view(-1)[0] = value


def _poison_memory(training: Any, value: float) -> None:
    for state in training.optimizer.state.values():
        state["exp_avg"].view(-1)[0] = value
        return


POISON: dict[str, Callable[[Any, float], None]] = {
    "a gradient": _poison_gradient,
    "a weight": _poison_weight,
    "the optimizer's memory": _poison_memory,
}
"""What happens after the gradients of a step are there: as a flipped bit of the memory would."""


def disturb_training(world: World, place: str, step: int, value: float, words: str) -> str:
    """Train with one number exchanged at a step, then again; what is wrong, or nothing."""
    from distilclip import cli, folder_lock
    from distilclip.train import loop

    out = world.folder / "out"
    shutil.rmtree(out, ignore_errors=True)

    def work() -> int:
        gradients = loop._Steps.gradients

        def poisoned(self: Any, at: int, batch: Any, *, diagnosing: bool) -> Any:
            found = gradients(self, at, batch, diagnosing=diagnosing)
            if at + 1 == step:
                POISON[place](self.training, value)
                parameters = self.training.student.parameters()
                return found[0], loop.clip_gradients_(parameters, sharded=[], max_norm=None)
            return found

        loop._Steps.gradients = poisoned  # type: ignore[method-assign]
        code = cli.main(world.train_argv(out))
        folder_lock.release_all()
        return code

    ended = run_child(work, world.folder)
    found = [str(path) for path in _not_finite(out)]
    if ended.code != 2 or "not finite" not in ended.said or "Traceback" in ended.said or found:
        return f"{words}: exit code {ended.code}, {len(found)} checkpoints are not finite, said {ended.said[-200:]!r}"
    again = run_stage(world.train_argv(out), world.folder)
    other = (
        differences(snapshot(world.folder / "undisturbed"), snapshot(out)) if not again.code else [again.said[-200:]]
    )
    other = [name for name in other if not name.startswith("config.json")]  # has the name of its folder
    return f"{words}: begun again, {'; '.join(other[:3])}" if other else ""


def _not_finite(out: Path) -> list[Path]:
    """The checkpoints' files of tensors that hold a number that is not finite."""
    import safetensors.torch

    files = sorted(out.rglob("checkpoints/**/*.safetensors"))
    return [f for f in files if any(not torch.isfinite(t).all() for t in safetensors.torch.load_file(f).values())]


def disturb_store(world: World, kind: str, stage: str) -> str:
    """Exchange one embedding, with all digests that would show it, and let a stage read the store."""
    store, out, row = world.folder / "bad-store", world.folder / "out", 5
    shutil.rmtree(store, ignore_errors=True)
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(world.folder / "store", store)
    payload = store / "000000.safetensors"
    arrays = {name: np.array(array) for name, array in read_tensors(str(payload)).items()}
    values = {"NaN": np.nan, "Inf": np.inf}
    if kind in values:
        arrays["image"][row, 0] = values[kind]
    else:
        arrays["image"][row] *= {"zeros": 0, "twice as long": 2}[kind]
    _put_digests(store, write_tensors(str(payload), arrays, read_metadata(str(payload))))
    argv = {
        "train": [*world.train_argv(out), "--store", str(store), "--objective", "clip-kd"],
        "balance": ["balance", "--store", str(store), "--out", str(out), "--metric", "cosine", "--threshold", "0.1"],
        "cluster": ["cluster", "--store", str(store), "--out", str(out), "--num-centers", "3"],
    }[stage]
    if stage == "train":
        place = argv.index("--data")
        del argv[place : place + 2]
    ended = run_stage(argv, world.folder)
    is_named = "row 5" in ended.said and "unit" in ended.said and "Traceback" not in ended.said
    return "" if ended.code == 2 and is_named else f"{kind} in {stage}: {ended.code}, {ended.said[-300:]!r}"


def _put_digests(store: Path, found: FileDigests) -> None:
    """Let the manifest and result.json of a store of one shard say that these are the digests of its payload."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(store / "manifest.parquet")
    for name, digest in found._asdict().items():
        place = table.schema.get_field_index(name)
        table = table.set_column(place, table.schema.field(place), pa.array([digest]))
    pq.write_table(table, store / "manifest.parquet")
    result = json.loads((store / "result.json").read_text())
    result["digests"] = digests.digest_files(str(store), list(result["digests"]))
    (store / "result.json").write_text(json.dumps(result))


def disturb_teacher(world: World, word: str, value: float) -> str:
    """Embed with a teacher that gives no numbers for one word; its rows are counted, all others are as ever."""
    from distilclip.data.store import Store
    from distilclip.models.clip import load_clip

    model, out = world.folder / "bad-teacher", world.folder / "out"
    for folder in (model, out):
        shutil.rmtree(folder, ignore_errors=True)
    clip = load_clip(str(world.folder / "teacher"))
    with torch.no_grad():
        clip.model.token_embedding.weight[int(clip.tokenizer(["zebra"])[0, 1]), 0] = value
    clip.save(str(model))
    ended = run_stage([*embed_argv(world, model, out), "--max-bad-ratio", "0.5"], world.folder)
    if ended.code:
        return f"{word} in a teacher: exit code {ended.code}, {ended.said[-200:]!r}"
    reasons, num_zebras = json.loads((out / "result.json").read_text())["reasons"], NUM_PAIRS // 6
    before, now = Store.open(str(world.folder / "store")), Store.open(str(out))
    valid = now.rows(0).valid
    is_same = np.array_equal(before.text(0)[valid], now.text(0)[valid]) and not now.text(0)[~valid].any()
    is_counted = reasons == {"embedding is no finite unit vector": num_zebras} and (~valid).sum() == num_zebras
    return "" if is_same and is_counted else f"{word} in a teacher: {reasons}, other rows the same: {is_same}"


def use_bad_model(world: World, stage: str, value: float) -> str:
    """Evaluate or export a model with a weight that is not finite."""
    from distilclip.models.clip import load_clip

    model, out = world.folder / "bad-model", world.folder / "out"
    for folder in (model, out):
        shutil.rmtree(folder, ignore_errors=True)
    for label in ("cat", "dog"):
        for seed in range(2):
            path = world.folder / "set" / label / f"{seed}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(picture(seed)))
    clip = load_clip(str(world.folder / "teacher"))
    with torch.no_grad():
        clip.model.visual.proj[0, 0] = value
    clip.save(str(model))
    argv = {
        "evaluate": ["evaluate", "--models", str(model), "--sets", f"folder:{world.folder / 'set'}"],
        "export": ["export", "--what", "open_clip", "--model", str(model)],
    }[stage]
    ended = run_stage([*argv, "--out", str(out)], world.folder)
    is_named = "finite" in ended.said and "Traceback" not in ended.said
    is_refused = ended.code == 2 and is_named and not (out / "result.json").exists()
    return "" if is_refused else f"{stage} of a model with {value}: {ended.code}, {ended.said[-300:]!r}"
