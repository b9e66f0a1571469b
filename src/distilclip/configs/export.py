"""State the options of `distilclip export`. Imports neither torch nor numpy."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from distilclip.engine import Engine
from distilclip.errors import InputError
from distilclip.options import changeable, check_at_least, option_fields, option_values
from distilclip.stage_folder import folders_of

What = Literal[
    "tars",
    "keys",
    "subset",
    "datacomp",
    "clip-retrieval",
    "open_clip",
    "huggingface",
    "sentence-transformers",
    "timm",
    "onnx",
]
MAX_SAMPLES = 20_000  # their similarities are one matrix


@dataclass(frozen=True, kw_only=True)
class RowOptions:
    """Choose the rows of a store, and how they are written."""

    store: str | None = None
    """folder of `embed` to export from"""
    groups: str | None = None
    """folder of `balance` or `select`: export only the rows that it keeps (default: every valid row)"""
    subset: str | None = None
    """DataComp subset file: export only the samples whose uid it lists"""
    uid: Literal["json", "md5", "key"] = "json"
    """source of uids: the field `uid` of a sample's json, the MD5 of url (or key) and caption, or the key: in
    a store imported from DataComp's files it is the uid, and nothing has to be read for it"""
    data: tuple[str, ...] = ()
    """where the store's files lie now, if they have moved; with onnx: pairs on which int8 is measured"""
    samples_per_tar: int | None = None
    """number of samples per tar (default: one tar for each source tar, with the same number in its name)"""


@dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    """Choose the model."""

    model: str | None = None
    """train folder, checkpoint, open_clip folder or name, hf-hub:ORG/NAME"""
    weights: str | None = None
    """weights of an open_clip architecture: a file, or one of open_clip's tags"""
    name: str | None = None
    """name of the model (default: the last part of --model); with datacomp, of the arrays: l14 for l14_img, l14_txt"""
    evaluation: str | None = None
    """folder of `evaluate` whose scores go into the model card"""


@dataclass(frozen=True, kw_only=True)
class Int8Options:
    """Choose whether int8 encoders are written too, and what they are measured on."""

    quantize: Literal["none", "int8"] = "none"
    """also write int8 encoders, and measure on --data what they lose"""
    num_samples: int = 1000
    """number of pairs of --data to measure int8 on (the first usable ones)"""
    batch_size: int = changeable(32)
    """number of pairs per forward pass while measuring"""


@dataclass(frozen=True, kw_only=True)
class HubOptions:
    """Choose whether a model is pushed to the Hugging Face hub."""

    push_to: str | None = changeable(None)
    """push the model to this repository of the Hugging Face hub, ORG/NAME, with the token of `hf auth login`; a new
    repository is private"""
    push_dry_run: bool = changeable(False)
    """only list what --push-to would push: the files, their sizes, and the model card"""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of `distilclip export`."""

    what: What
    """from a store: tars (a curated copy), keys (text), subset (DataComp's .npy), datacomp (embeddings
    as its .npz and .parquet), clip-retrieval (embeddings as npy and Parquet);
    from a model: open_clip, huggingface (transformers' CLIPModel), sentence-transformers, timm (the image tower alone),
    onnx (two encoders and a tokenizer)"""
    out: str
    """folder to write; a model goes into its subfolder `model`"""
    execution: Engine = field(default_factory=Engine)
    rows: RowOptions = field(default_factory=RowOptions)
    network: NetworkOptions = field(default_factory=NetworkOptions)
    int8: Int8Options = field(default_factory=Int8Options)
    hub: HubOptions = field(default_factory=HubOptions)

    def __post_init__(self) -> None:
        _check_fields(self)
        _check_packages(self.what)
        if self.rows.groups and self.rows.subset:
            raise InputError("--groups and --subset both choose the rows: give one of them.")
        if self.rows.uid != "json" and self.what not in ("subset", "datacomp") and not self.rows.subset:
            raise InputError(
                "--uid says how samples are named in DataComp's files: it needs --what subset or --subset, or --what "
                "datacomp."
            )
        if self.what == "datacomp" and self.network.name is not None and not self.network.name.isidentifier():
            raise InputError(
                f"--name {self.network.name!r} is part of the names of arrays: letters, digits and _ only."
            )
        if self.int8.quantize == "int8" and not self.rows.data:
            raise InputError("--quantize int8 needs --data: what it loses is measured on real pairs, a few hundred do.")
        if self.int8.quantize == "none" and self.what == "onnx" and self.rows.data:
            raise InputError("--data is what int8 is measured on: give --quantize int8 too, or leave it out.")
        check_at_least(self.rows, 1, "samples_per_tar")
        check_at_least(self.int8, 1, "num_samples", "batch_size")
        if self.hub.push_dry_run and not self.hub.push_to:
            raise InputError("--push-dry-run lists what --push-to would push: give --push-to ORG/NAME, too.")
        if self.hub.push_to is not None and (self.hub.push_to.count("/") != 1 or not all(self.hub.push_to.split("/"))):
            raise InputError(f"--push-to {self.hub.push_to}: a repository is named ORG/NAME.")
        if self.int8.num_samples > MAX_SAMPLES:
            raise InputError(
                f"num_samples is {self.int8.num_samples}; every two are compared, so at most {MAX_SAMPLES}."
            )

    def inputs(self) -> list[tuple[str, str]]:
        """Return the finished folders that this stage reads, each with its stage."""
        found = [(path, stage) for path, stage in ((self.rows.store, "embed"), (self.rows.groups, "balance")) if path]
        found += folders_of("train", [self.network.model] if self.network.model else [])
        return found + ([(self.network.evaluation, "evaluate")] if self.network.evaluation else [])


_ENGINE = {"engine", "engine_address", "engine_workers"}
_ROWS = {"store", "groups", "data", "uid"}
_MODEL = {"model", "weights", "name", "evaluation", "push_to", "push_dry_run"}
MEANINGFUL: dict[What, set[str]] = {
    "tars": _ROWS | _ENGINE | {"subset", "samples_per_tar"},
    "keys": _ROWS | {"subset"},
    "subset": _ROWS | _ENGINE,
    "datacomp": _ROWS | _ENGINE | {"subset", "name"},
    "clip-retrieval": _ROWS | _ENGINE | {"subset"},
    "open_clip": _MODEL,
    "huggingface": _MODEL,
    "sentence-transformers": _MODEL,
    "timm": _MODEL,
    "onnx": _MODEL | {"quantize", "data", "num_samples", "batch_size"},
}
"""Which flags each `what` reads, besides `what` and `out`."""
_PACKAGES: dict[What, Sequence[str]] = {
    "huggingface": ("transformers",),
    "sentence-transformers": ("transformers",),
    "onnx": ("onnx", "onnxscript", "onnxruntime", "tokenizers"),
}


def _check_fields(config: Config) -> None:
    """Raise `InputError` for a flag that `what` does not read, and for the one that it cannot do without."""
    meaningful = MEANINGFUL[config.what] | {"what", "out"}
    values = option_values(config)
    for option in option_fields(Config):
        if option.name not in meaningful and values[option.name] != option.default:
            raise InputError(
                f"--{option.name.replace('_', '-')} has no meaning with --what {config.what}: leave it out."
            )
    needed = "store" if "store" in meaningful else "model"
    if not values[needed]:
        raise InputError(f"--what {config.what} needs --{needed}.")


def _check_packages(what: What) -> None:
    for package in _PACKAGES.get(what, ()):
        if importlib.util.find_spec(package) is None:
            extra = "onnx" if what == "onnx" else "huggingface"
            raise InputError(f"{package} is not installed: pip install 'distilclip[{extra}]'.")
