"""Make a store of embeddings that other programs computed, which later stages read as one that `embed` wrote."""

from __future__ import annotations

import math
from typing import Any

from distilclip import digests, files, stage_folder
from distilclip.configs.import_ import Config
from distilclip.data.bad_samples import ErrorPolicy
from distilclip.data.shards import find_shards, source_size
from distilclip.data.store import (
    NOT_KNOWN,
    StoreShard,
    finished_shard,
    read_payload_metadata,
    read_shard_rows,
    store_files,
    write_manifest,
)
from distilclip.engine import map_parts
from distilclip.errors import InputError
from distilclip.intake.embedding_files import EmbeddingPart, FileChoice, find_parts
from distilclip.intake.picture_places import NOT_FOUND
from distilclip.intake.row_names import holds_pictures
from distilclip.intake.shard_intake import PartSizes, ShardIntake, check_parts
from distilclip.messages import say, warn
from distilclip.progress import progress

SOURCES = "sources.json"
"""Name and size of every file that the store is made from."""


def main(config: Config) -> dict[str, Any]:
    """Import every shard, or those that an earlier run left; the folder's result."""
    folder = stage_folder.open_folder(config.out, stage="import", config=config, inputs=config.inputs())
    if folder.finished:
        _compare_sources(folder)
        return folder.result()
    parts = find_parts(
        FileChoice(
            embeddings=config.embeddings,
            texts=config.texts,
            tables=config.tables,
            image_column=config.image_column,
            text_column=config.text_column,
        )
    )
    data = tuple(find_shards(config.data)) if config.data else ()
    sizes = check_parts(parts)
    _write_sources(folder, parts, data)
    intake = ShardIntake(
        folder=folder.path,
        parts=tuple(parts),
        data=data,
        teacher=describe_teacher(config),
        dim=sizes.dim,
        may_lack=config.may_lack,
    )
    has_pictures = bool(data) or all(map(holds_pictures, parts))
    _say_first(intake, sizes, has_pictures=has_pictures)
    policy = ErrorPolicy(config.on_error, config.max_bad_ratio)
    shards = range(intake.num_shards)
    pending = [shard for shard in shards if not _count_finished(folder.path, shard, policy)]
    with progress(f"import {folder.path}", len(pending)) as advance:
        for shard, num_rows in map_parts(intake.prepare, pending, engine=config.execution):
            _count_finished(folder.path, shard, policy)
            policy.check()
            advance(1, num_rows)
    _check_any_found(intake, policy)
    policy.check(final=True)
    lines = [line for shard in shards if (line := finished_shard(folder.path, shard))]
    write_manifest(folder.path, lines, dim=sizes.dim, teacher=intake.teacher, has_pictures=has_pictures)
    result = _summarise(intake, lines, sizes, policy)
    names = [*store_files(len(lines)), SOURCES]
    found = {"has_pictures": has_pictures, "digests": digests.digest_files(folder.path, names)}
    return folder.finish({**result, **found})


def describe_teacher(config: Config) -> dict[str, Any]:
    """What is known of the model, in the words of a store; NaN for a scale that was not given."""
    return {
        "name": config.teacher_name,
        "digest": config.teacher_digest,
        **dict.fromkeys(("preprocessing", "tokenizer", "precision"), NOT_KNOWN),
        "scale": math.nan if config.teacher_scale is None else config.teacher_scale,
    }


def _write_sources(folder: stage_folder.Folder, parts: list[EmbeddingPart], data: tuple[str, ...]) -> None:
    """Write down what the store is made from; `InputError` where an earlier run began with other files."""
    names = dict.fromkeys([*(path for part in parts for path in part.list_files()), *data])
    known = {name: f"{source_size(name)} bytes" for name in names}
    stage_folder.write_made_from(folder.child(SOURCES), folder.path, known)


def _compare_sources(folder: stage_folder.Folder) -> None:
    """Raise `InputError` where a file that a finished store was made from has changed; it may be gone."""
    for name, size in stage_folder.read_json(folder.child(SOURCES)).items():
        if files.exists(name) and f"{source_size(name)} bytes" != size:
            raise InputError(
                f"{folder.path} is finished, and was made from {name} when it had {size}; now it has "
                f"{source_size(name)}. Import it into another --out."
            )


def _say_first(intake: ShardIntake, sizes: PartSizes, *, has_pictures: bool) -> None:
    """Say what was found, and what the store cannot be used for."""
    first = intake.parts[0]
    texts = f" and texts ({first.text.name or first.text.path})" if first.text else ""
    say(
        f"import: {sizes.num_rows:,} embeddings of images ({first.image.name or first.image.path}){texts}, "
        f"{sizes.dim} numbers each, in {len(intake.parts)} files"
    )
    if sizes.is_rounded:
        say("They are rounded to half precision, in which stores hold embeddings.")
    if not intake.has_texts:
        say("There are no text embeddings: balance and cluster need none, scores of pairs do.")
    if not has_pictures:
        say("Without --data the pictures are not known: train, export --what tars and galleries of report need them.")


def _count_finished(folder: str, shard: int, policy: ErrorPolicy) -> bool:
    """Whether a shard is finished; then its rows are counted."""
    line = finished_shard(folder, shard)
    if line is None:
        return False
    rows = read_shard_rows(folder, shard)
    policy.count_rows(rows.key, rows.error, uri=line.uri)
    return True


def _check_any_found(intake: ShardIntake, policy: ErrorPolicy) -> None:
    """Raise `InputError` where the pictures and the embeddings have nothing in common."""
    if intake.data and policy.reasons[NOT_FOUND] == policy.num_seen:
        raise InputError(
            f"None of the {policy.num_seen:,} samples of --data has an embedding: no key of {intake.data[0]} is in "
            f"{intake.parts[0].uri}. Are these the pairs that were embedded?"
        )


def _summarise(intake: ShardIntake, lines: list[StoreShard], sizes: PartSizes, policy: ErrorPolicy) -> dict[str, Any]:
    """Return the numbers of the result, and say what was changed or left out."""
    notes = [read_payload_metadata(intake.folder, line.index) for line in lines]
    num_normalised = sum(int(note["num_normalised"]) for note in notes)
    if num_normalised:
        say(f"{num_normalised:,} vectors were not of unit length and are scaled to it.")
    found: dict[str, Any] = {}
    if intake.data:
        num_without = sizes.num_rows - sum(int(note["num_found"]) for note in notes)
        found["num_without_picture"] = num_without
        if num_without > 0:
            warn(f"{num_without:,} of {sizes.num_rows:,} embeddings have no sample in --data, and are left out.")
    scale = intake.teacher["scale"]
    return {
        "num_shards": len(lines),
        "num_rows": policy.num_seen,
        "num_valid": policy.num_seen - policy.num_bad,
        "num_invalid": policy.num_bad,
        "reasons": dict(sorted(policy.reasons.items())),
        "truncated": [line.uri for line in lines if line.status == "truncated"],
        "dim": sizes.dim,
        "num_normalised": num_normalised,
        "rounded": sizes.is_rounded,
        **found,
        "teacher": {**intake.teacher, "scale": None if math.isnan(scale) else scale},
    }
