"""Export kept data (tars, keys, DataComp's files, clip-retrieval's) or a model (open_clip, transformers, ONNX).

`--what` chooses; flags that have no meaning for it are refused.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

from distilclip import files, stage_folder
from distilclip.configs.export import Config
from distilclip.data.shards import find_shards
from distilclip.data.store import Store
from distilclip.engine import Engine, map_parts
from distilclip.errors import InputError
from distilclip.export.curated_tars import TarWriter, plan_tars
from distilclip.export.datacomp_metadata import MetadataWriter
from distilclip.export.row_lists import PartitionWriter, UidWriter, join_uids, write_keys
from distilclip.export.selection import Selection, open_selection
from distilclip.progress import progress, say

Part = TypeVar("Part")
Result = TypeVar("Result")


def main(config: Config) -> dict[str, Any]:
    """Write the export, or what is missing of it; the folder's result."""
    folder = stage_folder.open_folder(config.out, stage="export", config=config, inputs=config.inputs())
    if folder.finished:
        result = folder.result()
    else:
        write = _write_data if config.rows.store else _write_model
        result = folder.finish({"what": config.what, **write(config, folder.path)})
    if config.hub.push_to:
        _push(files.join(folder.path, result["model"]), config.hub.push_to, dry_run=config.hub.push_dry_run)
    return result


def _push(model: str, repo: str, *, dry_run: bool) -> None:
    from distilclip.export.hub import list_push, push_folder, show_push

    say(show_push(list_push(model, repo)) if dry_run else f"export: pushed to {push_folder(model, repo)}")


def _write_data(config: Config, folder: str) -> dict[str, Any]:
    assert config.rows.store is not None  # `_check_fields` asked for it
    if config.rows.groups:
        stage_folder.require(config.rows.groups, stage="balance", store=config.rows.store)
    if config.rows.subset:
        digest = {"sha256": files.sha256(config.rows.subset)}
        place = f"{folder}, whose rows {os.path.basename(config.rows.subset)} chooses,"
        stage_folder.write_made_from(files.join(folder, "subset.json"), place, digest)
    selection = open_selection(
        config.rows.store,
        groups=config.rows.groups,
        subset=config.rows.subset,
        uid=config.rows.uid,
        data=find_shards(list(config.rows.data)) if config.rows.data else (),
    )
    engine = config.execution
    shards = range(selection.store.num_shards)
    if config.what == "tars":
        found = _write_tars(selection, folder, samples_per_tar=config.rows.samples_per_tar, engine=engine)
    elif config.what == "keys":
        found = dataclasses.asdict(write_keys(selection, folder))
    elif config.what == "subset":
        num_samples = sum(_map_parts(UidWriter(selection, folder), shards, engine=engine))
        found = {"num_samples": num_samples, "num_uids": join_uids(folder, len(shards))}
    elif config.what == "datacomp":
        metadata = MetadataWriter(selection, folder, config.network.name or "teacher", _sides(selection.store))
        found = {"num_samples": sum(_map_parts(metadata, shards, engine=engine))}
    else:
        partitions = PartitionWriter(selection, folder, _sides(selection.store))
        found = {"num_samples": sum(_map_parts(partitions, shards, engine=engine))}
    return {"num_rows": selection.store.num_rows, **found}


def _sides(store: Store) -> tuple[str, ...]:
    """Return the sides of which any row of a store has an embedding."""
    shards = range(store.num_shards)
    return tuple(
        side
        for side in ("image", "text")
        if any(store.columns(shard, f"has_{side}").column(0).to_numpy().any() for shard in shards)
    )


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
    from distilclip.train.parallel import non_finite_values

    assert config.network.model is not None  # `_check_fields` asked for it
    clip = load_clip(config.network.model, weights=config.network.weights)
    if bad := non_finite_values(clip.model.state_dict()):
        raise InputError(
            f"{config.network.model} has weights that are not finite ({', '.join(bad[:3])}). Export an earlier "
            "checkpoint."
        )
    clip = dataclasses.replace(clip, name=config.network.name or config.network.model.rstrip("/").split("/")[-1])
    target, digest = files.join(folder, "model"), clip.digest
    records = find_records(config.network.model, digest=digest, evaluation=config.network.evaluation)
    exported: dict[str, Any] = {}
    if config.what == "open_clip":
        clip.save(target)
    elif config.what == "huggingface":
        from distilclip.export.huggingface import write_huggingface

        exported = write_huggingface(clip, target)
    elif config.what == "sentence-transformers":
        from distilclip.export.sentence_transformers_folder import write_sentence_transformers

        exported = write_sentence_transformers(clip, target)
    elif config.what == "timm":
        from distilclip.export.timm_folder import write_timm

        exported = write_timm(clip, target)
    else:
        from distilclip.export.onnx_files import write_onnx

        exported = write_onnx(clip, target)
        if config.int8.quantize == "int8":
            from distilclip.export.int8 import measure_int8, write_int8

            sizes = write_int8(target)
            data = find_shards(list(config.rows.data))
            lost = measure_int8(target, data, num_samples=config.int8.num_samples, batch_size=config.int8.batch_size)
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
