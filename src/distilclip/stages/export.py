"""Export kept data (tars, keys, a DataComp subset, clip-retrieval) or a model (open_clip, transformers, ONNX).

`--what` chooses; flags that have no meaning for it are refused.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast

from distilclip import files, stage_folder
from distilclip.engine import Engine, map_parts
from distilclip.errors import InputError
from distilclip.export.curated_tars import TarWriter, plan_tars
from distilclip.export.row_lists import PartitionWriter, UidWriter, join_uids, write_keys
from distilclip.export.selection import Selection, open_selection
from distilclip.export.uids import UidKind
from distilclip.options import option_fields, option_values
from distilclip.progress import progress

What = Literal["tars", "keys", "subset", "clip-retrieval", "open_clip", "huggingface", "onnx"]
MAX_SAMPLES = 20_000  # their similarities are one matrix
Part = TypeVar("Part")
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of `distilclip export`."""

    what: What
    """from a store: tars (a curated copy), keys (text), subset (DataComp's .npy), clip-retrieval (npy and Parquet);
    from a model: open_clip, huggingface (transformers' CLIPModel), onnx (two encoders and a tokenizer)"""
    out: str
    """folder to write; a model goes into its subfolder `model`"""
    store: str | None = None
    """folder of `embed` to export from"""
    groups: str | None = None
    """folder of `balance`: export only the rows that it keeps (default: every valid row)"""
    subset: str | None = None
    """DataComp subset file: export only the samples whose uid it lists"""
    uid: UidKind = "json"
    """source of uids: the field `uid` of a sample's json, or the MD5 of url (or key) and caption"""
    data: tuple[str, ...] = ()
    """where the store's files lie now, if they have moved; with onnx: pairs on which int8 is measured"""
    samples_per_tar: int | None = None
    """number of samples per tar (default: one tar for each source tar, with the same number in its name)"""
    model: str | None = None
    """train folder, checkpoint, open_clip folder or name, hf-hub:ORG/NAME"""
    weights: str | None = None
    """weights of an open_clip architecture: a file, or one of open_clip's tags"""
    name: str | None = None
    """name of the model (default: the last part of --model)"""
    evaluation: str | None = None
    """folder of `evaluate` whose scores go into the model card"""
    quantize: Literal["none", "int8"] = "none"
    """also write int8 encoders, and measure on --data what they lose"""
    num_samples: int = 1000
    """number of pairs of --data to measure int8 on (the first usable ones)"""
    batch_size: int = stage_folder.execution(32)
    """number of pairs per forward pass while measuring"""
    execution: Engine = dataclasses.field(default_factory=Engine)

    def __post_init__(self) -> None:
        _check_fields(self)
        _check_packages(self.what)
        if self.groups and self.subset:
            raise InputError("--groups and --subset both choose the rows: give one of them.")
        if self.uid != "json" and self.what != "subset" and not self.subset:
            raise InputError("--uid says how samples are named in a subset file: it needs --what subset or --subset.")
        if self.quantize == "int8" and not self.data:
            raise InputError("--quantize int8 needs --data: what it loses is measured on real pairs, a few hundred do.")
        if self.quantize == "none" and self.what == "onnx" and self.data:
            raise InputError("--data is what int8 is measured on: give --quantize int8 too, or leave it out.")
        for field in ("samples_per_tar", "num_samples", "batch_size"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise InputError(f"{field} is {value}; it must be at least 1.")
        if self.num_samples > MAX_SAMPLES:
            raise InputError(f"num_samples is {self.num_samples}; every two are compared, so at most {MAX_SAMPLES}.")


_ENGINE = {"engine", "engine_address", "engine_workers"}
_ROWS = {"store", "groups", "data", "uid"}
_MODEL = {"model", "weights", "name", "evaluation"}
MEANINGFUL: dict[What, set[str]] = {
    "tars": _ROWS | _ENGINE | {"subset", "samples_per_tar"},
    "keys": _ROWS | {"subset"},
    "subset": _ROWS | _ENGINE,
    "clip-retrieval": _ROWS | _ENGINE | {"subset"},
    "open_clip": _MODEL,
    "huggingface": _MODEL,
    "onnx": _MODEL | {"quantize", "data", "num_samples", "batch_size"},
}
"""Which flags each `what` reads, besides `what` and `out`."""

_PACKAGES: dict[What, Sequence[str]] = {
    "huggingface": ("transformers",),
    "onnx": ("onnx", "onnxscript", "onnxruntime", "tokenizers"),
}


def main(config: Config) -> dict[str, Any]:
    """Write the export, or what is missing of it; the folder's result."""
    inputs = [(path, stage) for path, stage in ((config.store, "embed"), (config.groups, "balance")) if path]
    if config.model:
        inputs += stage_folder.folders_of("train", [config.model])
    if config.evaluation:
        inputs.append((config.evaluation, "evaluate"))
    folder = stage_folder.open_folder(config.out, stage="export", config=config, inputs=inputs)
    if folder.finished:
        return folder.result()
    write = _write_data if config.store else _write_model
    return folder.finish({"what": config.what, **write(config, folder.path)})


def _write_data(config: Config, folder: str) -> dict[str, Any]:
    assert config.store is not None  # `_check_fields` asked for it
    if config.groups:
        stage_folder.require(config.groups, stage="balance", store=config.store)
    if config.subset:
        digest = {"sha256": files.sha256(config.subset)}
        place = f"{folder}, whose rows {os.path.basename(config.subset)} chooses,"
        stage_folder.write_made_from(files.join(folder, "subset.json"), place, digest)
    selection = open_selection(
        config.store,
        groups=config.groups,
        subset=config.subset,
        uid=config.uid,
        data=files.expand(list(config.data)) if config.data else (),
    )
    engine = config.execution
    shards = range(selection.store.num_shards)
    if config.what == "tars":
        found = _write_tars(selection, folder, samples_per_tar=config.samples_per_tar, engine=engine)
    elif config.what == "keys":
        found = dataclasses.asdict(write_keys(selection, folder))
    elif config.what == "subset":
        num_samples = sum(_map_parts(UidWriter(selection, folder), shards, engine=engine))
        found = {"num_samples": num_samples, "num_uids": join_uids(folder, len(shards))}
    else:
        found = {"num_samples": sum(_map_parts(PartitionWriter(selection, folder), shards, engine=engine))}
    return {"num_rows": selection.store.num_rows, **found}


def _write_tars(selection: Selection, folder: str, *, samples_per_tar: int | None, engine: Engine) -> dict[str, Any]:
    parts = plan_tars(selection, samples_per_tar=samples_per_tar)
    written = _map_parts(TarWriter(selection, folder), parts, engine=engine)
    return {
        "num_tars": sum(tar.num_samples > 0 for tar in written),
        "num_samples": sum(tar.num_samples for tar in written),
        "num_bytes": sum(tar.num_bytes for tar in written),
        "num_renamed": sum(tar.num_renamed for tar in written),
    }


def _map_parts(function: Callable[[Part], Result], parts: Sequence[Part], *, engine: Engine) -> list[Result]:
    """The results of all parts, in no order."""
    found = map_parts(functools.partial(_keep_function, function), parts, engine=engine)
    results = []
    with progress("export", len(parts)) as advance:
        for _, result in found:
            results.append(result)
            advance(1, 0)
    return results


def _keep_function(function: Callable[[Part], Result]) -> Callable[[Part], Result]:
    return function


def _write_model(config: Config, folder: str) -> dict[str, Any]:
    from distilclip.export.card import Form, find_records, model_card
    from distilclip.models.clip import load_clip

    assert config.model is not None  # `_check_fields` asked for it
    clip = load_clip(config.model, weights=config.weights)
    clip = dataclasses.replace(clip, name=config.name or config.model.rstrip("/").split("/")[-1])
    target, digest = files.join(folder, "model"), clip.digest
    records = find_records(config.model, digest=digest, evaluation=config.evaluation)
    exported: dict[str, Any] = {}
    if config.what == "open_clip":
        clip.save(target)
    elif config.what == "huggingface":
        from distilclip.export.huggingface import write_huggingface

        exported = write_huggingface(clip, target)
    else:
        from distilclip.export.onnx_files import write_onnx

        exported = write_onnx(clip, target)
        if config.quantize == "int8":
            from distilclip.export.int8 import measure_int8, write_int8

            sizes = write_int8(target)
            data = files.expand(list(config.data))
            lost = measure_int8(target, data, num_samples=config.num_samples, batch_size=config.batch_size)
            exported |= {"bytes": sizes, "int8": lost}
    card = model_card(
        clip.name,
        cast(Form, config.what),
        digest=digest,
        num_parameters=clip.num_parameters,
        model_cfg=clip.model_cfg,
        preprocess_cfg=clip.preprocess_cfg,
        exported=exported,
        records=records,
    )
    files.write_bytes(files.join(target, "README.md"), card.encode())
    return {"name": clip.name, "digest": digest, "model": "model", **exported}


def _check_fields(config: Config) -> None:
    """Raise `InputError` for a flag that `what` does not read, and for the one that it cannot do without."""
    meaningful = MEANINGFUL[config.what] | {"what", "out"}
    values = option_values(config)
    for field in option_fields(Config):
        if field.name not in meaningful and values[field.name] != field.default:
            raise InputError(
                f"--{field.name.replace('_', '-')} has no meaning with --what {config.what}: leave it out."
            )
    needed = "store" if "store" in meaningful else "model"
    if not getattr(config, needed):
        raise InputError(f"--what {config.what} needs --{needed}.")


def _check_packages(what: What) -> None:
    for package in _PACKAGES.get(what, ()):
        if importlib.util.find_spec(package) is None:
            extra = "onnx" if what == "onnx" else "huggingface"
            raise InputError(f"{package} is not installed: pip install 'distilclip[{extra}]'.")
