"""State the options of `distilclip evaluate`. Imports neither torch nor numpy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from distilclip.data.limits import MAX_PIXELS, OnError, check_bad_ratio
from distilclip.errors import InputError
from distilclip.evaluate.model_specs import split_model, weights_by_name
from distilclip.options import changeable
from distilclip.sets.published import Published
from distilclip.sets.specs import ALL_TASKS, Task, check_unique, expand_groups, parse_spec
from distilclip.stage_folder import folders_of, stage_of

HOLD_ROWS = ("embed", "balance", "select")
"""Stages whose folders say which images were trained on."""
LEARNED = "learned"
"""The value of --templates that stands for templates learned from captions."""


@dataclass(frozen=True, kw_only=True)
class Words:
    """Choose the words that images are compared with."""

    prompts: str | None = None
    """openai/CLIP's data/prompts.md, for class names and templates of the published sets"""
    templates: str | None = None
    """prompt templates to use instead of the sets' own: a text file, one a line; openai/CLIP's prompts.md#SET; or
    learned, for your own sets those learned from --training-captions"""
    training_captions: tuple[str, ...] = ()
    """folder of `embed`, or pairs as for training: evaluate says where the prompts of your own sets are unlike these
    captions, and writes templates learned from them (OUT/templates/SET.txt)"""
    captions: Literal["all", "first"] = "all"
    """captions of each image for retrieval: all, or only the first, which is easier and what CLIP-KD's code does"""
    caption_prefix: str = ""
    """text to write before every caption, such as "a photo of "; recorded with the scores"""


@dataclass(frozen=True, kw_only=True)
class ProbeOptions:
    """Choose how the linear probe is fitted."""

    probe_features: Literal["backbone", "projected"] = "backbone"
    """features of the linear probe: before the projection, as in CLIP's protocol, or the unit embeddings"""
    probe_l2: float | None = None
    """penalty of the linear probe (1 / C of scikit-learn; default: CLIP's sweep from 1e-6 to 1e6)"""
    seed: int = 0
    """seed for the rows that the probe holds out"""


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """Name the data that the models were trained on, to tell which test images it has copies of."""

    training_store: str | None = None
    """folder of `embed` with the training images, or of `balance` or `select` (then what it keeps): a table says which
    share of each set's test images has a near copy there, as the teacher of the store sees them"""
    near_copy: float | None = None
    """cosine from which on a training image counts as a near copy of a test image"""


@dataclass(frozen=True, kw_only=True)
class ReadingOptions:
    """Choose how images are read, and what happens to those that cannot be."""

    on_error: OnError = "raise"
    """an image that cannot be read stops the run (raise), or is left out and counted (skip)"""
    max_bad_ratio: float = 0.01
    """largest share of a split's images that may be left out"""
    max_pixels: int = MAX_PIXELS
    """larger images count as unreadable"""
    num_workers: int = changeable(2)
    """number of processes that read and decode (0: the main process does it)"""
    cache: str | None = changeable(None)
    """folder of image features and text classifiers, which evaluations can share (default: OUT/cache)"""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Hold the flags of `distilclip evaluate`."""

    out: str = ""
    """folder to write: result.json, table.md, table.csv, clip_benchmark/*.json (required unless --list)"""
    models: tuple[str, ...] = ()
    """models to evaluate: train folders, checkpoints, open_clip names or folders, hf-hub:ORG/NAME; NAME=MODEL gives
    a model its name in the table"""
    sets: tuple[str, ...] = ()
    """published sets by name, the groups paper, robustness and retrieval, or your own sets as folder:PATH, tar:PATH
    or pairs:PATH; NAME=KIND:PATH gives a set its name in the table"""
    data_root: str | None = None
    """folder of the published sets, in torchvision's layout, as folders of images, or as webdatasets"""
    list: bool = False
    """show where each published set is, or how to get it, and do nothing else"""
    weights: tuple[str, ...] = ()
    """weights of models given as open_clip names: NAME=FILE (one model: FILE), or open_clip's tag for them; OpenAI's
    weights need the architecture that ends in -quickgelu"""
    tasks: tuple[Task, ...] = ALL_TASKS
    """what to measure, where possible: agreement needs --teacher, linear-probe a set with training images"""
    teacher: str | None = None
    """model to compare the others with: the name of one of --models, or another model"""
    teacher_weights: str | None = None
    """weights file of a teacher given as an open_clip name"""
    published: tuple[Published, ...] = changeable(())
    """also print numbers from these tables of the papers, marked as published and in no mean; a finished evaluation
    prints them too"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """precision of the towers (autocast); similarities are always float32"""
    batch_size: int = 64
    """number of images or texts at once"""
    device: str = changeable("auto")
    """auto (CUDA, then MPS, then CPU), or a torch device"""
    words: Words = field(default_factory=Words)
    probe: ProbeOptions = field(default_factory=ProbeOptions)
    training_data: TrainingData = field(default_factory=TrainingData)
    reading: ReadingOptions = field(default_factory=ReadingOptions)

    def __post_init__(self) -> None:
        if self.list:
            return
        for flag, values in (("--out", self.out), ("--models", self.models), ("--sets", self.sets)):
            if not values:
                raise InputError(f"{flag} is missing.")
        if not self.tasks:
            raise InputError("--tasks is empty; name at least one.")
        check_unique([name for name, _ in map(split_model, self.models)], flag="--models")
        parsed = [parse_spec(spec) for spec in expand_groups(self.sets)]
        check_unique([name for name, _, _ in parsed], flag="--sets")
        known = [name for name, kind, _ in parsed if kind == "known"]
        if known and self.data_root is None:
            raise InputError(f"The set {known[0]} needs --data-root, the folder that published sets lie in.")
        weights_by_name(self.weights, [split_model(spec)[0] for spec in self.models])
        self._check_words([kind for _, kind, _ in parsed])
        if self.teacher_weights and not self.teacher:
            raise InputError("--teacher-weights needs --teacher.")
        if self.tasks == ("agreement",) and not self.teacher:
            raise InputError("The task agreement needs --teacher.")
        if self.probe.probe_l2 is not None and not self.probe.probe_l2 > 0:
            raise InputError(f"--probe-l2 is {self.probe.probe_l2}; it must be positive.")
        if (self.training_data.training_store is None) != (self.training_data.near_copy is None):
            raise InputError("--training-store and --near-copy (a cosine, such as 0.95) go together: give both.")
        if self.training_data.near_copy is not None and not -1 < self.training_data.near_copy <= 1:
            raise InputError(f"--near-copy is {self.training_data.near_copy}; it is a cosine above -1 and at most 1.")
        if self.batch_size < 1 or self.reading.num_workers < 0 or self.probe.seed < 0:
            raise InputError("--batch-size must be at least 1, --num-workers and --seed at least 0.")
        check_bad_ratio(self.reading.max_bad_ratio)

    def _check_words(self, kinds: Sequence[str]) -> None:
        """Raise `InputError` for options about captions that would do nothing."""
        learned, captions = self.words.templates == LEARNED, self.words.training_captions
        if learned and not captions:
            raise InputError("--templates learned needs --training-captions: what to learn them from.")
        if captions and not {"folder", "tar"} & set(kinds):
            raise InputError(
                "--training-captions is for your own labelled sets (folder: or tar: in --sets), and there is none."
            )

    def inputs(self) -> Sequence[tuple[str, str]]:
        """Return the finished folders that this stage reads, each with its stage."""
        specs = [split_model(spec)[1] for spec in self.models]
        if self.teacher:
            specs.append(dict(map(split_model, self.models)).get(self.teacher, split_model(self.teacher)[1]))
        models = [found for stage in ("train", "export") for found in folders_of(stage, list(dict.fromkeys(specs)))]
        store = self.training_data.training_store
        training = [] if store is None else [(store, stage_of(store) if stage_of(store) in HOLD_ROWS else "embed")]
        return models + folders_of("embed", self.words.training_captions) + training
