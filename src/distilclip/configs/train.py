"""State the options of `distilclip train`. Imports neither torch nor numpy."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from distilclip import files
from distilclip.csv_rows import CsvColumns
from distilclip.data.crops import Crops
from distilclip.errors import InputError, did_you_mean
from distilclip.methods import weights_of
from distilclip.mixture import Weighting, read_parts
from distilclip.options import changeable, check_at_least, extendable
from distilclip.sets.specs import HELD_OUT, VALIDATED, check_unique, expand_groups, parse_spec
from distilclip.stage_folder import NO_STAGE, folders_of, stage_of
from distilclip.train.settings import (
    MEASURES,
    Checkpoints,
    Execution,
    LearningCurve,
    Optimization,
    TowerTraining,
    Tracker,
    Validation,
    check_warmup,
    steps_of,
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of `distilclip train`."""

    out: str
    """folder to write: checkpoints, metrics.jsonl, result.json"""
    student: str
    """architecture: an open_clip name, a CLIP-KD student (ViT-T-16, MobileViT-S, ...), a JSON config or its file"""
    init: tuple[str, ...] = ()
    """what the student begins with: weights:FROM, inherit:TEACHER (also inherit-image:, inherit-text:), timm:FILE"""
    data: tuple[str, ...] = ()
    """pairs to train on: folders, tars, Parquet or CSV files, braces and globs; 'a/*.tar=0.7' 'b/*.tar=0.3' draws 70 %
    from the first part of a mixture. With --store only for a mixture of all its files, or where they have moved"""
    columns: CsvColumns = field(default_factory=CsvColumns)
    student_captions: tuple[str, ...] = ()
    """columns of a table, or fields of a sample's json, that the student reads in place of the caption, which only the
    teacher reads: the same sentence in other languages; of several a row shows the next one in every epoch"""
    weighting: Weighting = field(default_factory=Weighting)
    store: str | None = None
    """folder of `embed`: the teacher's embeddings of the pairs, and where the pairs are"""
    pack: str | None = None
    """folder of `pack`, in place of --store, --groups and --clusters: the pairs in files that are read in order"""
    other_stores: tuple[str, ...] = ()
    """stores of further teachers of the same pairs; FOLDER=0.5 gives one half the weight of the first"""
    groups: str | None = None
    """folder of `balance` or `select`: train on kept rows only"""
    captions: Literal["own", "of-group"] = "own"
    """own: each image with its own caption; of-group: with the captions of all images that it stands for in --groups,
    in turn, and with their stored text embeddings"""
    clusters: str | None = None
    """folder of `cluster`: centers and labels for the cluster term"""
    live_teacher: str | None = None
    """a live teacher instead of a store's: a folder, hf-hub:ORG/NAME, or ARCHITECTURE=WEIGHTS for an open_clip name"""
    objective: Literal["clip", "clip-cid", "clip-kd", "clip-cid-kd", "distil"] = "clip"
    """the method: a named set of term weights; distil is ours, clip-cid-kd both papers' terms in one sum"""
    terms: dict[str, float] = field(default_factory=dict)
    """weights and constants that replace the method's own, such as `feature 1000 alpha 0.9`"""
    batch_size: int = 256
    """pairs per step, of all processes together"""
    micro_batch: int | None = changeable(None)
    """pairs whose activations a process holds at once (default: all of its own); gradients stay the same, only dropout
    draws other numbers"""
    num_steps: int | None = extendable(None)
    """optimisation steps (default: 1000, or what --num-epochs says); a finished training goes on to a larger number"""
    num_epochs: float | None = extendable(None)
    """passes over the pairs that are trained on, instead of --num-steps: epochs x pairs / batch size, rounded up; with
    weights an epoch has as many draws as there are pairs of positive weight"""
    optimization: Optimization = field(default_factory=Optimization)
    learning_curve: LearningCurve = field(default_factory=LearningCurve)
    towers: TowerTraining = field(default_factory=TowerTraining)
    crops: Crops = field(default_factory=Crops)
    seed: int = 0
    """seed of the initial weights, the order, the crops, the sampled classes and the masks"""
    max_bad_ratio: float = 0.05
    """share of samples that may be unreadable; each is counted and replaced by another row. 0: stop at the first"""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """number format of the towers, and of a live teacher's (autocast); losses are always float32. fp16 is for GPUs
    without bf16, and scales gradients"""
    checkpoints: Checkpoints = field(default_factory=Checkpoints)
    validation: Validation = field(default_factory=Validation)
    execution: Execution = field(default_factory=Execution)
    centers_state: Literal["device", "host"] = changeable("device")
    """where AdamW's state of the class centers is kept: 8 of 12 bytes a value"""
    track: tuple[Tracker, ...] = changeable(())
    """also write the metrics to these"""
    device: str = changeable("auto")
    """a torch device, or auto: CUDA, else MPS, else CPU"""
    num_workers: int | None = changeable(None)
    """processes that read and decode (default: one per core but one, up to 16); 0 reads in the training process"""

    def __post_init__(self) -> None:
        method = weights_of(self.objective, self.terms)
        if self.pack:
            self._check_pack()
        elif not self.data and not self.store:
            raise InputError("train needs pairs: give --data, a --pack, or a --store, which knows where its pairs are.")
        if self.store and self.columns.is_given:
            raise InputError("The store knows the columns of its CSV files: leave out the --csv flags.")
        if method.needs_teacher and not (self.store or self.pack or self.live_teacher):
            raise InputError(f"The objective {self.objective!r} needs a teacher: give --store or --live-teacher.")
        if method.needs("centers") and not (self.clusters or self.pack):
            raise InputError("The cluster term needs --clusters, a folder of `distilclip cluster`.")
        if method.needs("centers") and self.live_teacher:
            raise InputError("The centers of the cluster term belong to the store's teacher: leave out --live-teacher.")
        if (self.groups or self.clusters) and not self.store:
            raise InputError("--groups and --clusters refer to the rows of a store: give --store too.")
        if self.captions == "of-group" and not self.groups:
            raise InputError("--captions of-group needs --groups, a folder of `balance`, and its --store.")
        check_at_least(self, 1, "batch_size")
        self._check_length()
        if self.micro_batch is not None and not 1 <= self.micro_batch <= self.batch_size:
            raise InputError(f"micro_batch is {self.micro_batch}; it must be from 1 to batch_size, {self.batch_size}.")
        if (self.other_stores or self.crops.views) and not (self.store or self.pack):
            raise InputError("--other-stores and --views need a --store.")
        if self.live_teacher and (self.other_stores or self.crops.views):
            raise InputError("--other-stores and --views work with stored teachers only: leave out --live-teacher.")
        _ = self.weight_of_store, read_parts(self.data)  # checks them
        self._check_towers()
        if (self.num_workers or 0) < 0 or self.seed < 0:
            raise InputError("num_workers and seed must be at least 0.")
        self._check_validation(needs_teacher=method.needs_teacher)

    def _check_pack(self) -> None:
        """Raise `InputError` for options that say what a pack has settled, or that need what it does not hold."""
        inside = {"store": self.store, "groups": self.groups, "clusters": self.clusters, "data": self.data}
        if given := [f"--{name}" for name, value in inside.items() if value]:
            raise InputError(
                f"--pack holds the pairs, embeddings and labels that were packed: leave out {', '.join(given)}, or "
                "make another pack (`distilclip pack`)."
            )
        outside = {
            "--row-weights": self.weighting.row_weights,
            "--other-stores": self.other_stores,
            "--student-captions": self.student_captions,
            "--captions of-group": self.captions != "own",
            "the --csv flags": self.columns.is_given,
        }
        if given := [name for name, value in outside.items() if value]:
            raise InputError(
                f"{', '.join(given)}: a pack does not hold what this needs. Leave it out, or train with the --store "
                "that was packed."
            )

    def _check_length(self) -> None:
        if self.num_steps is not None and self.num_epochs is not None:
            raise InputError(
                f"num_steps is {self.num_steps} and num_epochs is {self.num_epochs}: give one of them. "
                "`--num-steps None` takes back the number of a recipe."
            )
        if self.num_steps is None and self.num_epochs is None:
            object.__setattr__(self, "num_steps", 1000)
        check_at_least(self, 1, "num_steps")
        if self.num_epochs is not None and not 0 < self.num_epochs < math.inf:
            raise InputError(f"num_epochs is {self.num_epochs}; it must be positive.")
        warmup = self.learning_curve.warmup_steps
        if self.num_steps is not None and warmup is not None:
            check_warmup(warmup, num_steps=self.num_steps)

    def _check_validation(self, *, needs_teacher: bool) -> None:
        values, best = self.validation, self.checkpoints.keep_best
        parsed = [parse_spec(spec) for spec in expand_groups(values.validate)]
        names = [name for name, _, _ in parsed]
        check_unique(names, flag="--validate")
        published = [name for name, kind, _ in parsed if kind == "known"]
        if published and values.data_root is None:
            raise InputError(f"The set {published[0]} needs --data-root, the folder that published sets lie in.")
        first = self.store or self.pack
        stored = (first, *self.weight_of_store) if first else ()
        if values.held_out and stored and len(values.held_out) != len(stored):
            raise InputError(
                f"--held-out names {len(values.held_out)} folders; with {len(stored)} teachers' stores it needs as "
                "many: the held-out pairs embedded by each of them, in their order."
            )
        if best in MEASURES and best != "loss" and not needs_teacher:
            raise InputError(f"keep_best {best} compares with a teacher, and this run has none.")
        by_validation = best not in ("none", *MEASURES)
        if by_validation:
            known = [*names, *([HELD_OUT] if values.held_out else [])]
            name = best.removeprefix(VALIDATED).split("/")[0]
            if name not in known:
                raise InputError(
                    f"keep_best is {best!r}, and the set {name!r} is not validated: name it in --validate. "
                    + (did_you_mean(name, known) if known else "")
                )
        if values.stop_after and not by_validation:
            raise InputError("--stop-after needs --keep-best SET/METRIC: the value that has to become better.")

    def _check_towers(self) -> None:
        if self.towers.freeze != "none" and not self.init:
            raise InputError(
                f"--freeze {self.towers.freeze} keeps the weights that this tower begins with, and without --init "
                "they are random: give --init weights:FROM, or inherit:TEACHER."
            )

    def length(self, num_rows: int) -> tuple[int, int]:
        """Return the steps of the training and of its warm-up, where `num_rows` pairs are trained on.

        Raises `InputError` where the warm-up is longer than the training.
        """

        def steps(count: int | None, epochs: float | None) -> int:
            if count is not None:
                return count
            assert epochs is not None  # one of the two is always there
            return steps_of(epochs, num_rows=num_rows, batch_size=self.batch_size)

        curve = self.learning_curve
        num_steps, warmup = steps(self.num_steps, self.num_epochs), steps(curve.warmup_steps, curve.warmup_epochs)
        check_warmup(warmup, num_steps=num_steps)
        return num_steps, warmup

    @property
    def weight_of_store(self) -> dict[str, float]:
        """The folder and the weight of each further teacher's store."""
        found = {}
        for spec in self.other_stores:
            folder, separator, weight = spec.rpartition("=")
            try:
                found[folder if separator else spec] = float(weight) if separator else 1.0
            except ValueError as error:
                raise InputError(f"other_stores: {spec!r} does not end in a weight; write FOLDER=0.5.") from error
        if any(weight <= 0 for weight in found.values()):
            raise InputError(f"other_stores is {self.other_stores}; weights must be positive.")
        return found

    def inputs(self) -> list[tuple[str, str]]:
        """Return the finished folders that this stage reads, each with its stage."""
        named = ((self.store, "embed"), (self.pack, "pack"), (self.groups, "balance"), (self.clusters, "cluster"))
        found = [(path, stage) for path, stage in named if path is not None]
        found += [(path, "embed") for path in self.weight_of_store]
        if (weights := self.weighting.row_weights) is not None:
            stage = stage_of(weights)
            is_own_folder = stage == NO_STAGE and files.is_folder(weights)
            found.append((files.join(weights, "weights") if is_own_folder else weights, stage))
        models = [source.partition(":")[2] for source in self.init]
        found += folders_of("embed", self.validation.held_out)
        return found + folders_of("train", [*models, *([self.live_teacher] if self.live_teacher else [])])
