"""Train a student: plain CLIP, CLIP-CID, CLIP-KD, or any weighted mix of their terms."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from distilclip import run
from distilclip.data import files
from distilclip.data.augment import random_resized_crop
from distilclip.data.groups import read_centers
from distilclip.data.samples import MAX_PIXELS
from distilclip.data.store import Store
from distilclip.data.stream import PairStream, open_stream
from distilclip.devices import resolve_device
from distilclip.errors import InputError
from distilclip.models.clip import Clip, create_clip, load_clip
from distilclip.models.heads import Heads
from distilclip.models.teacher import Teacher, live_teacher, stored_teacher
from distilclip.train.checkpoint import (
    complete_checkpoints,
    folder_name,
    load_checkpoint,
    remove_incomplete_checkpoints,
)
from distilclip.train.loop import fit
from distilclip.train.objective import Objective, objective
from distilclip.train.optimizer import build_optimizer
from distilclip.train.step import Student

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of `distilclip train`."""

    out: str
    """folder to write: checkpoints, metrics.jsonl, result.json"""
    student: str
    """architecture: an open_clip name, a JSON file with an open_clip model config, or that JSON itself"""
    data: tuple[str, ...] = ()
    """pairs to train on (tars, Parquet, CSV; braces and globs); with --store only where they have moved since"""
    store: str | None = None
    """folder of `embed`: the teacher's embeddings of the pairs; the pairs are read from where it found them"""
    groups: str | None = None
    """folder of `balance`: train on kept rows only"""
    clusters: str | None = None
    """folder of `cluster`: centers and labels for the cluster term"""
    live_teacher: str | None = None
    """a live teacher instead of a store's: a folder, hf-hub:ORG/NAME, or ARCHITECTURE=WEIGHTS for an open_clip name"""
    objective: Literal["clip", "clip-cid", "clip-kd"] = "clip"
    """the method: a named set of term weights"""
    terms: dict[str, float] = field(default_factory=dict)
    """replacements in the objective: weights and constants, such as `feature 1000 alpha 0.9`"""
    batch_size: int = 256
    """pairs per step"""
    micro_batch: int | None = None
    """pairs whose activations are held at once (default: the batch); the gradients are the same"""
    num_steps: int = 1000
    """optimisation steps"""
    learning_rate: float = 1e-3
    """peak learning rate of AdamW"""
    centers_learning_rate: float = 1e-6
    """peak learning rate of the class centers (CLIP-CID: more makes training collapse)"""
    weight_decay: float = 0.2
    """of matrices; biases, norms, scales, positions and centers have none"""
    warmup_steps: int = 100
    """steps of linear warm-up before the cosine"""
    gradient_clip: float = 1.0
    """largest norm of the gradient; 0 leaves it as it is"""
    min_crop: float = 0.9
    """smallest share of a picture's area that a training crop shows"""
    seed: int = 0
    """of initial weights, order, crops, sampled classes and masks"""
    max_bad_ratio: float = 0.05
    """share of samples that may fail; a row drawn by the seed stands in, and is counted. 0 stops at the first"""
    precision: Literal["fp32", "bf16"] = "bf16"
    """of the towers (autocast); losses are always float32"""
    checkpoint_every: int = 500
    """steps between checkpoints"""
    keep_checkpoints: int = run.execution(2)
    """how many of the last checkpoints stay on disk"""
    device: str = run.execution("auto")
    """auto (CUDA, then MPS, then CPU), or a torch device"""
    num_workers: int = run.execution(1)
    """processes that read and decode; 0 reads in the training process"""

    def __post_init__(self) -> None:
        method = objective(self.objective, self.terms)
        if not self.data and not self.store:
            raise InputError("train needs pairs: give --data, or --store, which knows its own.")
        if method.needs_teacher and not (self.store or self.live_teacher):
            raise InputError(f"The objective {self.objective!r} needs a teacher: give --store or --live-teacher.")
        if method.cluster and not self.clusters:
            raise InputError("The cluster term needs --clusters, a folder of `distilclip cluster`.")
        if method.cluster and self.live_teacher:
            raise InputError("The cluster term's centers are the store's teacher's: leave out --live-teacher.")
        if (self.groups or self.clusters) and not self.store:
            raise InputError("--groups and --clusters refer to the rows of a store: give --store too.")
        for name in ("batch_size", "num_steps", "checkpoint_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.micro_batch is not None and not 1 <= self.micro_batch <= self.batch_size:
            raise InputError(f"micro_batch is {self.micro_batch}; it must be from 1 to batch_size, {self.batch_size}.")
        if not 0 < self.min_crop <= 1:
            raise InputError(f"min_crop is {self.min_crop}; it is a share of the area, over 0 and up to 1.")
        if not 0 <= self.warmup_steps <= self.num_steps:
            raise InputError(f"warmup_steps is {self.warmup_steps}; it must be from 0 to num_steps, {self.num_steps}.")
        if self.learning_rate <= 0 or self.gradient_clip < 0 or self.num_workers < 0 or self.seed < 0:
            raise InputError("learning_rate must be positive; gradient_clip, num_workers and seed at least 0.")


def main(config: Config) -> dict[str, Any]:
    """Train, or go on from the last complete checkpoint; the folder's result."""
    inputs = [
        (path, stage)
        for path, stage in ((config.store, "embed"), (config.groups, "balance"), (config.clusters, "cluster"))
        if path is not None
    ]
    folder = run.open_folder(config.out, stage="train", config=config, inputs=inputs)
    if folder.finished:
        return folder.result()
    device = resolve_device(config.device)
    method = objective(config.objective, config.terms)
    clip = create_clip(config.student, seed=config.seed, device=device)
    store = _open_store(config)
    live = _load_live(config.live_teacher, device) if config.live_teacher and method.needs_teacher else None
    heads = _heads(clip, method, store=store, live=live, clusters=config.clusters, seed=config.seed).to(device)
    student = Student(clip=clip, heads=heads, precision=PRECISIONS[config.precision])
    if (config.micro_batch or config.batch_size) < config.batch_size:
        student.require_exact_accumulation()
    optimizer = build_optimizer(
        clip.model,
        heads,
        learning_rate=config.learning_rate,
        centers_learning_rate=config.centers_learning_rate,
        weight_decay=config.weight_decay,
    )
    stream = _open_stream(config, clip, live)
    remove_incomplete_checkpoints(config.out)
    done = complete_checkpoints(config.out)
    start = 0
    if done:
        start = load_checkpoint(folder.child(folder_name(done[-1])), student, optimizer, policy=stream.policy)
    fit(
        folder,
        stream.batches(start=start, stop=config.num_steps, num_workers=config.num_workers),
        policy=stream.policy,
        student=student,
        teacher=_teacher(method, store, live, device),
        objective=method,
        optimizer=optimizer,
        start=start,
        num_steps=config.num_steps,
        warmup_steps=config.warmup_steps,
        batch_size=config.batch_size,
        micro_batch=config.micro_batch or config.batch_size,
        gradient_clip=config.gradient_clip,
        checkpoint_every=config.checkpoint_every,
        keep_checkpoints=config.keep_checkpoints,
        seed=config.seed,
    )
    return folder.finish(
        {
            "checkpoint": folder_name(config.num_steps),
            "objective": dataclasses.asdict(method),
            "num_parameters": clip.num_parameters,
            "num_rows": stream.num_rows,
            "num_samples_seen": config.num_steps * config.batch_size,
            "num_unusable": stream.policy.num_bad,
            "reasons": dict(sorted(stream.policy.reasons.items())),
            "digest": clip.digest,
        }
    )


def _open_store(config: Config) -> Store | None:
    if config.store is None:
        return None
    for path, stage in ((config.groups, "balance"), (config.clusters, "cluster")):
        if path is not None:
            run.require(path, stage=stage, store=config.store)
    return Store.open(config.store)


def _load_live(spec: str, device: torch.device) -> Clip:
    architecture, _, weights = spec.partition("=")
    return load_clip(architecture, weights=weights or None, device=device)


def _open_stream(config: Config, clip: Clip, live: Clip | None) -> PairStream:
    models = [c for c in (clip, live) if c is not None]
    transforms = [random_resized_crop(c.image_size, min_scale=config.min_crop) for c in models]
    needed = math.ceil(2 * max(c.image_size for c in models) / math.sqrt(config.min_crop))
    max_pixels = run.read_json(files.join(config.store, "config.json"))["max_pixels"] if config.store else MAX_PIXELS
    return open_stream(
        data=config.data,
        store=config.store,
        groups=config.groups,
        clusters=config.clusters,
        transforms=transforms,
        tokenize=clip.tokenizer,
        batch_size=config.batch_size,
        seed=config.seed,
        on_error="skip" if config.max_bad_ratio else "raise",
        max_bad_ratio=config.max_bad_ratio,
        max_pixels=max_pixels,
        draft=(needed, needed),  # JPEGs decode at the nearest eighth that leaves twice the pixels of the smallest crop
    )


def _heads(
    clip: Clip, method: Objective, *, store: Store | None, live: Clip | None, clusters: str | None, seed: int
) -> Heads:
    teacher_dim = live.dim if live is not None else store.dim if store is not None else clip.dim
    centers = torch.tensor(read_centers(clusters)) if method.cluster and clusters else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Heads(clip.dim, teacher_dim, augmented=method.augmented > 0, centers=centers)


def _teacher(method: Objective, store: Store | None, live: Clip | None, device: torch.device) -> Teacher | None:
    if not method.needs_teacher:
        return None
    if live is not None:
        return live_teacher(live)
    assert store is not None
    return stored_teacher(float(store.teacher["scale"]), device=device)
