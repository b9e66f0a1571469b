"""Train a student: plain CLIP, CLIP-CID, CLIP-KD, or any weighted mix of their terms."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32

from distilclip import digests, distributed, files, stage_folder
from distilclip.configs.train import Config
from distilclip.data.bad_samples import ErrorPolicy
from distilclip.data.limits import MAX_PIXELS
from distilclip.data.side_files import read_centers
from distilclip.data.store import Store, StoredTeacher
from distilclip.data.stream import Batch, PairSource, PairStream, Presentation, open_stream
from distilclip.data.workers import default_workers
from distilclip.devices import PRECISIONS
from distilclip.errors import InputError
from distilclip.losses.features import Features
from distilclip.messages import say, warn
from distilclip.methods import TERMS
from distilclip.models.batch_norm import batch_norms, require_exact_accumulation
from distilclip.models.clip import Clip, create_clip, load_clip, load_named
from distilclip.models.freezing import freeze_tower
from distilclip.models.heads import Heads
from distilclip.models.initial import initialise
from distilclip.models.patch_dropout import set_patch_dropout
from distilclip.models.teacher import Teacher, live_teacher, stored_teachers
from distilclip.packs.pack import Pack
from distilclip.packs.pack_loader import open_pack_stream
from distilclip.stages._validation import open_validator
from distilclip.train.checkpoint import Progress, Training, count_unusable, load_checkpoint
from distilclip.train.checkpoint_files import (
    best_checkpoint,
    folder_name,
    last_whole_checkpoint,
    refuse_other_version,
)
from distilclip.train.class_head import ClassHead
from distilclip.train.gradient_scale import GradientScale
from distilclip.train.loop import TrainingPlan, fit
from distilclip.train.objective import Objective, objective
from distilclip.train.optimizer import Average, Schedule, build_optimizer
from distilclip.train.parallel import build_towers
from distilclip.train.step import Student
from distilclip.train.trackers import open_trackers, require_packages
from distilclip.train.validation import HeldOut, Validator

CUDA_GRAPHS = ("reduce-overhead", "max-autotune")  # what compiles to them


def main(config: Config) -> dict[str, Any]:
    """Train, or go on from the last complete checkpoint; return the result. With torchrun, every process calls it."""
    with distributed.job(config.device) as device:
        return _train(config, device)


def _train(config: Config, device: torch.device) -> dict[str, Any]:
    require_packages(config.track)
    if config.precision == "fp16" and device.type != "cuda":
        raise InputError(f"precision fp16 is for CUDA GPUs, and this runs on {device.type}. Use bf16 or fp32.")
    folder = distributed.on_first(lambda: _open_folder(config))
    if distributed.on_first(lambda: folder.finished):
        return folder.result()
    method = objective(config.objective, config.terms)
    clip = create_clip(config.student, seed=config.seed, device=device)
    facts: dict[str, Any] = {"num_parameters": clip.num_parameters}
    fresh = initialise(clip, config.init)
    if config.init:
        facts["fresh"] = fresh
    if config.towers.freeze != "none":
        freeze_tower(clip, config.towers.freeze, fresh=fresh)
    if config.towers.patch_dropout:
        set_patch_dropout(clip, config.towers.patch_dropout)
    facts |= _describe_batch_norm(config, clip)
    stores = _open_stores(config)
    live = load_named(config.live_teacher, device=device) if config.live_teacher and method.needs_teacher else None
    if live is not None:
        known = {"live teacher": live.digest}
        distributed.on_first(lambda: stage_folder.write_made_from(folder.child("teacher.json"), folder.path, known))
    shown = dataclasses.replace(clip, model=copy.deepcopy(clip.model)) if config.validation.is_on else None
    stream = _open_stream(config, clip, stores, live)
    method, runs = _fit_to_rows(config, method, clip, stream)
    mixture = _describe_mixture(config, stream) | _describe_captions(config, stream)
    student = dataclasses.replace(_student(config, method, clip, stores=stores, live=live), runs=runs)
    training = _training(config, student, stream)
    schedule = _schedule(config, stream.num_rows)
    validator = None
    if shown is not None:
        held_out = _open_held_out(config, method, shown, live, stores) if config.validation.held_out else None
        validator = open_validator(config, shown, held_out=held_out, num_rows=stream.num_rows)
    teacher = _teacher(config, method, stores, live, device)
    num_steps = _fit(config, folder, method, stream, training, teacher, schedule, validator)
    unusable = count_unusable(stream.policy)
    facts |= {"num_rows": stream.num_rows, "num_steps": num_steps, **mixture}
    return distributed.on_first(lambda: _finish(config, folder, method, facts, unusable))


def _open_folder(config: Config) -> stage_folder.Folder:
    if stage_folder.is_outgrown(config.out, config):  # before the folder is opened to be gone on with
        refuse_other_version(config.out)
    return stage_folder.open_folder(config.out, stage="train", config=config, inputs=config.inputs())


def _fit(
    config: Config,
    folder: stage_folder.Folder,
    method: Objective,
    stream: PairStream,
    training: Training,
    teacher: Teacher | None,
    schedule: Schedule,
    validator: Validator | None,
) -> int:
    """Train from the last complete checkpoint on, or from the start; return the steps done."""
    start = distributed.on_first(lambda: last_whole_checkpoint(config.out))
    progress = load_checkpoint(folder.child(folder_name(start)), training) if start else Progress()
    if start and (former := stage_folder.former_values(folder.path)):
        said = ", ".join(f"{name} {value:g}" for name, value in former[-1].items())
        say(
            f"train {folder.path}: made with {said} before, goes on from step {start} to {schedule.num_steps}; from "
            "here the learning rate follows the longer schedule, so the result is not that of one long training."
        )
    num_workers = default_workers() if config.num_workers is None else config.num_workers
    names, values = config.track if distributed.rank() == 0 else (), stage_folder.config_values(config)
    return fit(
        folder,
        stream.batches(start=progress.step, stop=schedule.num_steps, num_workers=num_workers),
        training,
        progress,
        plan=TrainingPlan(
            objective=method,
            optimization=config.optimization,
            checkpoints=config.checkpoints,
            schedule=schedule,
            batch_size=config.batch_size,
            micro_batch=config.micro_batch or config.batch_size,
            seed=config.seed,
        ),
        teacher=teacher,
        trackers=open_trackers(names, folder.path, config=values, start=start),
        validator=validator,
    )


def _open_held_out(
    config: Config, method: Objective, shown: Clip, live: Clip | None, stores: Sequence[StoredTeacher]
) -> HeldOut:
    """The pairs kept aside, in batches as large as those of the training, or as there are pairs."""
    paths, world = config.validation.held_out, distributed.world()
    held_out = [Store.open(path) for path in paths] if stores else []
    for store, other in zip(stores, held_out, strict=True):
        if store.teacher["digest"] != other.teacher["digest"]:
            raise InputError(
                f"The held-out store {other.path} was embedded by another teacher ({other.teacher['name']}) than "
                f"{store.path} ({store.teacher['name']}). Embed the held-out pairs with the same model."
            )
    source = PairSource(data=() if stores else paths, stores=[store.path for store in held_out], columns=config.columns)
    policy = ErrorPolicy("skip" if config.max_bad_ratio else "raise", config.max_bad_ratio)
    loader = open_stream(source, _presentation(config, shown, live, num_views=0), batch_size=1, policy=policy).loader
    batch_size = max(1, min(config.batch_size, loader.num_rows) // world) * world
    return HeldOut(
        stream=PairStream(loader, policy, batch_size=batch_size, rank=distributed.rank(), world=world),
        objective=method,
        teacher=_teacher(config, method, held_out, live, shown.device),
        micro_batch=config.micro_batch or config.batch_size,
        seed=config.seed,
        centers=torch.tensor(_read_centers(config)) if method.needs("centers") else None,
    )


def _finish(
    config: Config, folder: stage_folder.Folder, method: Objective, facts: dict[str, Any], unusable: dict[str, Any]
) -> dict[str, Any]:
    """Write result.json."""
    checkpoint = folder_name(facts["num_steps"])
    if former := stage_folder.former_values(folder.path):
        facts = {**facts, "extended_from": former}
    if (best := best_checkpoint(folder.path, config.checkpoints)) is not None:
        step, value = best
        facts |= {"best": {"metric": config.checkpoints.best_by, "value": value, "checkpoint": folder_name(step)}}
    return folder.finish(
        {
            "checkpoint": checkpoint,
            "objective": method.values,
            "terms": {name: TERMS[name].words for name in method.weights},
            **facts,
            "num_samples_seen": facts["num_steps"] * config.batch_size,
            "num_unusable": sum(unusable["reasons"].values()),
            "reasons": unusable["reasons"],
            "digest": load_clip(folder.child(checkpoint)).digest,
        }
    )


def _schedule(config: Config, num_rows: int) -> Schedule:
    """The learning rate of every step, now that the rows to train on are counted."""
    num_steps, warmup_steps = config.length(num_rows)
    curve = config.learning_curve
    return Schedule(
        num_steps=num_steps,
        warmup_steps=warmup_steps,
        shape=curve.schedule,
        final_ratio=curve.final_learning_rate_ratio,
        cooldown_steps=round(curve.cooldown * num_steps),
    )


def _fit_to_rows(
    config: Config, method: Objective, clip: Clip, stream: PairStream
) -> tuple[Objective, tuple[str, ...]]:
    """Return the method without the terms that no row teaches, and the towers that are run.

    A tower that no row has anything for keeps its weights. Raises `InputError` where no term is left, and for batch
    norms, whose statistics the black pictures of rows without any would spoil.
    """
    sides = stream.loader.num_sides
    if sides["num_pairs"] == stream.num_rows:
        return method, ("image", "text")
    idle = [name for name, weight in method.weights.items() if weight and not TERMS[name].applies(**sides)]
    counts = {"image": sides["num_images"], "text": sides["num_texts"]}
    said = (
        f"train {config.out}: of {stream.num_rows:,} rows {sides['num_pairs']:,} have a picture and a caption, "
        f"{stream.num_rows - counts['text']:,} a picture alone, {stream.num_rows - counts['image']:,} a caption alone."
    )
    if idle:
        said += f" No row has what these terms compare, which are left out: {', '.join(idle)}."
    if all(name in idle for name, weight in method.weights.items() if weight):
        usable = sorted(name for name, term in TERMS.items() if term.applies(**sides) and "centers" not in term.needs)
        raise InputError(
            f"{said} None is left: give one of {', '.join(usable)} a weight, as in `--terms feature 2000`."
        )
    runs = tuple(tower for tower, count in counts.items() if count)
    for tower in ("image", "text"):
        if tower not in runs:
            freeze_tower(clip, tower)
            said += f" The {tower} tower keeps the weights that it begins with."
    if "image" in runs and counts["image"] < stream.num_rows and batch_norms(clip.model):
        raise InputError(
            f"{said} Batch norms of {config.student} would count the rows without a picture: train on those with one "
            "alone, or choose a student without batch norms."
        )
    if distributed.rank() == 0:
        say(said)
    return objective(config.objective, {**config.terms, **dict.fromkeys(idle, 0.0)}), runs


def _describe_batch_norm(config: Config, clip: Clip) -> dict[str, str]:
    """What result.json says of batch norms that see less than the whole batch."""
    kind = config.towers.batch_norm
    if kind == "whole-batch" or not batch_norms(clip.model):
        return {}
    return {"batch_norm": f"{kind}: inexact, another model than with the statistics of the whole batch"}


def _describe_mixture(config: Config, stream: PairStream) -> dict[str, Any]:
    """What result.json says of rows that are drawn by weight; also said now, before hours are spent on it."""
    mixture = stream.loader.mixture
    if not mixture:
        return {}
    if distributed.rank() == 0:
        parts = [f"; {part['share']:.1%} {part['data']} ({part['num_rows']:,})" for part in mixture.get("parts", ())]
        say(
            f"train {config.out}: {stream.num_rows:,} pairs are drawn by weight{''.join(parts)}. They vary as "
            f"{mixture['effective_rows']:,.0f} of equal weight do; the heaviest is drawn {mixture['most_often']:,.1f} "
            "times in an epoch."
        )
        if mixture["most_often"] > stream.steps_per_epoch:
            warn(
                f"The pair of the largest weight is drawn {mixture['most_often']:,.0f} times in an epoch of "
                f"{stream.steps_per_epoch:,} batches: it stands more than once in a batch, where it counts as its own "
                "negative. Give smaller weights, or smaller batches."
            )
    return {"mixture": mixture}


def _describe_captions(config: Config, stream: PairStream) -> dict[str, Any]:
    """What result.json says of pictures that are shown with captions of others; also said now."""
    captions = stream.loader.group_captions
    if captions and distributed.rank() == 0:
        say(
            f"train {config.out}: {stream.num_rows:,} pictures are taught with {captions['num_captions']:,} captions, "
            f"one of them with {captions['most_for_a_picture']:,}."
        )
    return {"captions": captions} if captions else {}


def _student(
    config: Config, method: Objective, clip: Clip, *, stores: Sequence[StoredTeacher], live: Clip | None
) -> Student:
    """The student with its heads, wrapped for the processes there are; built alike on every one of them."""
    heads = _heads(config, method, clip, stores=stores, live=live).to(clip.device)
    if (config.micro_batch or config.batch_size) * distributed.world() < config.batch_size:
        if config.towers.batch_norm != "per-micro-batch":
            require_exact_accumulation(clip)
        if config.towers.patch_dropout:
            raise InputError(
                "--patch-dropout draws its patches for each micro-batch, so the result would depend on --micro-batch: "
                "leave out one of them (--activations recompute saves memory, too)."
            )
        if config.execution.compile in CUDA_GRAPHS:
            raise InputError(
                f"--compile {config.execution.compile} replays one CUDA graph for all micro-batches, over the "
                "gradients of those before. Use --compile default, or a --micro-batch of a process's whole share."
            )
    towers = build_towers(
        clip,
        precision=PRECISIONS[config.precision],
        execution=config.execution,
        synchronising=config.towers.batch_norm == "whole-batch",
    )
    if not method.needs("centers"):
        return Student(clip=clip, heads=heads, towers=towers)
    centers = _read_centers(config)
    state_device = clip.device if config.centers_state == "device" else "cpu"
    class_head = ClassHead.of_this_rank(centers, config.optimization, device=clip.device, state_device=state_device)
    return Student(clip=clip, heads=heads, towers=towers, class_head=class_head)


def _read_centers(config: Config) -> Float32[np.ndarray, "k dim"]:
    """The first class centers. Raises `InputError` where a pack has none."""
    if config.pack is not None and not Pack.open(config.pack).facts.has_clusters:
        raise InputError(
            f"{config.pack} was packed without --clusters, which the cluster term needs. Pack the store again, into "
            "another folder, with --clusters."
        )
    return read_centers(config.pack or config.clusters or "")


def _training(config: Config, student: Student, stream: PairStream) -> Training:
    """What a checkpoint holds, as it is before the first step."""
    optimization = config.optimization
    if distributed.rank() > 0:
        stream.policy.forget()  # what failed while indexing failed once, not once a process
    return Training(
        student=student,
        optimizer=build_optimizer(student.named_parameters(), optimization, config.towers),
        policy=stream.policy,
        average=Average(student.clip.model, decay=optimization.average_decay) if optimization.average_decay else None,
        scale=GradientScale() if config.precision == "fp16" else None,
    )


def _open_stores(config: Config) -> Sequence[StoredTeacher]:
    """The stores of all teachers; the first must be the one that groups, clusters and weights were made from.

    A pack stands for the store that it was made from.
    """
    if config.pack is not None:
        return [Pack.open(config.pack)]
    if config.store is None:
        return []
    for path, stage in ((config.groups, "balance"), (config.clusters, "cluster")):
        if path is not None:
            stage_folder.require(path, stage=stage, store=config.store)
    weights = config.weighting.row_weights
    if weights is not None and (stage := stage_folder.stage_of(weights)) != stage_folder.NO_STAGE:
        stage_folder.require(weights, stage=stage, store=config.store)
    stores = [Store.open(path) for path in (config.store, *config.weight_of_store)]
    for store in stores:
        store.require_pictures()
    return stores


def _presentation(config: Config, clip: Clip, live: Clip | None, *, num_views: int) -> Presentation:
    """How student and teachers need a pair."""
    made = stage_folder.read_json(files.join(config.store, "config.json")) if config.store else {}
    max_pixels = made.get("max_pixels", MAX_PIXELS)  # a store that was imported has none
    return Presentation(
        sizes=[c.image_size for c in (clip, live) if c is not None],
        tokenize=clip.tokenizer,
        seed=config.seed,
        augmentation=config.crops,
        num_views=num_views,
        max_pixels=max_pixels,
        student_columns=config.student_captions,
    )


def _open_stream(config: Config, clip: Clip, stores: Sequence[StoredTeacher], live: Clip | None) -> PairStream:
    """The batches of this process."""
    shown = _presentation(config, clip, live, num_views=config.crops.views)
    place = {"batch_size": config.batch_size, "rank": distributed.rank(), "world": distributed.world()}
    policy = ErrorPolicy("skip" if config.max_bad_ratio else "raise", config.max_bad_ratio)
    first = stores[0] if stores else None
    if isinstance(first, Pack):
        return open_pack_stream(first, shown, policy=policy, **place)
    return open_stream(
        PairSource(
            data=config.data,
            stores=[store.path for store in stores],
            groups=config.groups,
            clusters=config.clusters,
            columns=config.columns,
            weighting=config.weighting,
            captions=config.captions,
        ),
        shown,
        policy=policy,
        **place,
    )


def _heads(
    config: Config, method: Objective, clip: Clip, *, stores: Sequence[StoredTeacher], live: Clip | None
) -> Heads:
    """The heads for every teacher's width; their first weights follow from the seed alone."""
    dims = [live.dim] if live is not None else [store.dim for store in stores] or [clip.dim]
    weights = [1.0, *config.weight_of_store.values()]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return Heads(
            clip.dim,
            dims[0],
            augmented=method.needs("fusion"),
            queue_length=int(method.constants.queue_length) if method.needs("queue") else 0,
            other_dims=dims[1:],
            weights=weights,
        )


def _teacher(
    config: Config, method: Objective, stores: Sequence[StoredTeacher], live: Clip | None, device: torch.device
) -> Teacher | None:
    """Every teacher as one callable; None where no term compares with one."""
    if not method.needs_teacher:
        return None
    if live is None:
        teacher = stored_teachers(stores, device=device)
        return _checked(teacher, [store for store in stores if isinstance(store, Store)])  # a pack checks what it reads
    precision, micro_batch = PRECISIONS[config.precision], config.micro_batch or config.batch_size
    return live_teacher(live, precision=precision, micro_batch=micro_batch)


def _checked(teacher: Teacher, stores: Sequence[Store]) -> Teacher:
    """A teacher that ends the training where a local file of its embeddings has changed since it was written.

    The processes share the files. Remote ones would have to be fetched whole for it.
    """
    wanted = [file for store in stores if not files.is_url(store.path) for file in store.list_embeddings()]
    check = digests.BackgroundCheck(wanted[distributed.rank() :: distributed.world()])

    def features(batch: Batch) -> tuple[Features, ...]:
        check.raise_found()
        return teacher(batch)

    return features
