"""Run a teacher over pairs and store its image and text embeddings, which all later stages read."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float16
from torch import Tensor

from distilclip import digests, files, folder_lock, stage_folder
from distilclip.configs.embed import Config
from distilclip.csv_rows import CsvColumns
from distilclip.data.bad_samples import ErrorPolicy, OnError
from distilclip.data.limits import Side
from distilclip.data.scan import ScannedBatch, ShardEmbeddings, ShardList, scan
from distilclip.data.shards import find_shards, source_size
from distilclip.data.store import (
    Store,
    StoreShard,
    check_unchanged,
    finished_shard,
    read_payload_metadata,
    read_shard_rows,
    store_files,
    write_manifest,
)
from distilclip.data.tabular import PictureFolder
from distilclip.data.views import Views
from distilclip.devices import PRECISIONS, resolve_device
from distilclip.engine import map_parts
from distilclip.errors import InputError
from distilclip.messages import say, warn
from distilclip.models.clip import Clip, load_clip, normalise_pixels
from distilclip.progress import progress


def main(config: Config) -> dict[str, Any]:
    """Embed every shard, or those that an earlier run left or that came since, and return the folder's result."""
    if config.append and files.exists(files.join(config.out, "manifest.parquet")):
        return _append(config)
    config = dataclasses.replace(config, append=False)  # there is nothing to add to
    folder = stage_folder.open_folder(config.out, stage="embed", config=config, inputs=config.inputs())
    if folder.finished:
        _compare_data(folder.path, config.data)
        return folder.result()
    uris = find_shards(config.data)
    if stage_folder.former_values(folder.path):
        uris = _in_their_places(folder.path, uris)
    _say_captionless(uris)
    policy = ErrorPolicy(config.on_error, config.max_bad_ratio)
    pending = [(shard, u) for shard, u in enumerate(uris) if not _count_finished(folder.path, shard, u, policy)]
    teacher = _embed(config, folder.path, pending, policy, finished=_first_finished(len(uris), pending))
    return _finish(config, folder, len(uris), policy, teacher)


def _append(config: Config) -> dict[str, Any]:
    """Embed what a finished store does not have yet, behind its shards; until all is there, the store stays as it was.

    The store then has the bytes of one that was embedded from all its data at once.
    """
    record = stage_folder.read_record(config.out)
    former = tuple(record.config["data"]) if record is not None else ()
    before = dataclasses.replace(config, data=former, append=False)
    folder = stage_folder.open_folder(config.out, stage="embed", config=before, inputs=config.inputs())
    folder_lock.hold(folder.path)
    lines = Store.open(folder.path).shards
    known = {line.uri: line for line in lines}
    found = find_shards(config.data)
    for uri in found:
        if uri in known:
            _check_source(folder.path, known[uri], uri)
    new = [uri for uri in found if uri not in known]
    if folder.finished and not new:
        say(f"embed {folder.path}: it has all {len(found)} files of --data already")
        folder_lock.release(folder.path)
        return folder.result()
    _say_captionless(new)
    policy = ErrorPolicy(config.on_error, config.max_bad_ratio)
    for line in lines:  # whose files may have gone
        _count_rows(folder.path, line, policy)
    behind = list(enumerate(new, start=len(lines)))
    _check_begun(folder.path, behind)
    pending = [(shard, uri) for shard, uri in behind if not _count_finished(folder.path, shard, uri, policy)]
    teacher = _embed(config, folder.path, pending, policy, finished=0)
    policy.check(final=True)
    patterns = tuple(pattern for pattern in config.data if pattern not in former)
    config = dataclasses.replace(before, data=(*former, *patterns))
    stage_folder.extend_folder(folder, config, num_shards=len(lines))
    return _finish(config, folder, len(lines) + len(new), policy, teacher)


def _finish(
    config: Config, folder: stage_folder.Folder, num_shards: int, policy: ErrorPolicy, teacher: dict[str, Any] | None
) -> dict[str, Any]:
    """Write the manifest and the result of a store whose shards are all there."""
    if teacher is None:  # only the manifest is missing
        clip = load_clip(config.model, weights=config.weights)
        teacher = describe_teacher(clip, precision=config.precision)
        _check_teacher(folder.path, 0, teacher)
        teacher["dim"] = clip.dim
    policy.check(final=True)
    shards = [line for shard in range(num_shards) if (line := finished_shard(folder.path, shard))]
    dim = teacher.pop("dim")
    views = _views(config)
    write_manifest(folder.path, shards, dim=dim, teacher=teacher, views=views, csv_columns=config.columns)
    return folder.finish(
        {
            "num_shards": len(shards),
            "num_rows": policy.num_seen,
            "num_valid": policy.num_seen - policy.num_bad,
            "num_invalid": policy.num_bad,
            "reasons": dict(sorted(policy.reasons.items())),
            "truncated": [line.uri for line in shards if line.status == "truncated"],
            **_count_lacking(folder.path, len(shards), config.may_lack),
            "dim": dim,
            "teacher": teacher,
            "digests": digests.digest_files(folder.path, store_files(len(shards), views=views)),
        }
    )


def _first_finished(num_shards: int, pending: Sequence[tuple[int, str]]) -> int | None:
    missing = {shard for shard, _ in pending}
    return next((shard for shard in range(num_shards) if shard not in missing), None)


def _in_their_places(path: str, uris: Sequence[str]) -> list[str]:
    """Return the files of a store that has grown in the order of its shards, which is not that of its patterns."""
    placed = {line.uri: shard for shard in range(len(uris)) if (line := finished_shard(path, shard)) is not None}
    others = iter([uri for uri in uris if uri not in placed])
    at = {shard: uri for uri, shard in placed.items() if uri in uris}
    ordered = [at.get(shard) or next(others, None) for shard in range(len(uris))]
    return [uri for uri in ordered if uri is not None] if None not in ordered else list(uris)


def _check_begun(path: str, behind: Sequence[tuple[int, str]]) -> None:
    """Raise `InputError` where another --append was begun here, with other files than these."""
    for shard, uri in behind:
        line = finished_shard(path, shard)
        if line is not None and line.uri != uri:
            raise InputError(
                f"{path}: an --append was begun and not finished, whose shard {shard} is {line.uri} and not {uri}. Run "
                f"it again first, with the --data that it had; or remove the files of the shards from {shard} on."
            )


def _compare_data(path: str, patterns: Sequence[str]) -> None:
    """Compare what patterns match now with the files of a finished store. Files may have gone, since it holds all.

    Raises `InputError` where one came or changed.
    """
    store = Store.open(path)
    try:
        now = dict.fromkeys(find_shards(patterns))
    except (InputError, FileNotFoundError):  # nothing is left
        now = {}
    made_from = {line.uri: line for line in store.shards}
    if came := [uri for uri in now if uri not in made_from]:
        raise InputError(
            f"{path} is finished. It was made from {store.num_shards} files, and the data now has {len(came)} more: "
            f"{came[0]} first. Add them to it with --append, embed them into another --out, or give the patterns of "
            "the first files."
        )
    for uri in now:
        _check_source(path, made_from[uri], uri)
    if gone := [uri for uri in made_from if uri not in now]:
        warn(
            f"embed {path}: {len(gone)} of the {store.num_shards} files that this store was made from are no longer "
            f"there ({gone[0]} first). The store is whole; training and export need them."
        )


def _check_teacher(path: str, finished: int, teacher: Mapping[str, Any]) -> None:
    """Raise `InputError` where a finished shard was embedded by another teacher than this one."""
    known = read_payload_metadata(path, finished)
    if differs := [name for name, value in teacher.items() if known.get(f"teacher_{name}") != str(value)]:
        raise InputError(
            f"{path}: shard {finished} was embedded by another teacher, {known.get('teacher_name')}: "
            f"{', '.join(differs)} differ from those of {teacher['name']} now. A store has one teacher. Choose another "
            "--out, or restore the weights that it was begun with."
        )


def _say_captionless(uris: Sequence[str]) -> None:
    """Say of how many pictures the folders hold no captions."""
    folders = [PictureFolder(uri) for uri in uris if uri.endswith("/")]
    num_pictures = sum(len(folder.index()) for folder in folders if not folder.has_captions)
    if num_pictures:
        say(
            f"{num_pictures:,} pictures have no caption (a .txt of the same name), and are stored without a text "
            "embedding: balance and cluster need none, and train teaches with what compares pictures."
        )


Shards = tuple[tuple[int, str], ...]  # numbers and URIs


def _embed(
    config: Config, path: str, pending: list[tuple[int, str]], policy: ErrorPolicy, *, finished: int | None
) -> dict[str, Any] | None:
    """Embed what is pending; what a worker says of the teacher, None where nothing was.

    `finished` is a shard of an earlier run, whose teacher this one must be.
    """
    embedder = Embedder(
        folder=path,
        model=config.model,
        weights=config.weights,
        batch_size=config.batch_size,
        precision=config.precision,
        max_pixels=config.max_pixels,
        views=_views(config),
        columns=config.columns,
        may_lack=config.may_lack,
        device=config.device,
        num_workers=config.num_workers,
        finished=finished,
    )
    teacher = None
    if config.execution.engine == "local":  # one teacher takes all shards, so that the next is read while one ends
        return embedder.embed(embedder.load(), tuple(pending), policy) if pending else None
    with progress(f"embed {path}", len(pending)) as advance:
        prepare = partial(embedder.prepare, policy.on_error)
        for part, said in map_parts(prepare, pending, engine=config.execution, device=config.device):
            teacher = said
            _count_finished(path, *part, policy)
            policy.check()
            advance(1, 0)
    return teacher


@dataclass(frozen=True, kw_only=True)
class Embedder:
    """A teacher and what it does with shards; travels to workers without its weights."""

    folder: str
    model: str
    weights: str | None
    batch_size: int
    precision: str
    max_pixels: int
    views: Views | None
    columns: CsvColumns
    may_lack: tuple[Side, ...]
    device: str
    num_workers: int
    finished: int | None = None

    def prepare(self, on_error: OnError) -> Callable[[tuple[int, str]], dict[str, Any]]:
        """In a worker: load the teacher. How many samples may fail is for the driver to judge, over all shards."""
        clip = self.load()
        return lambda part: self.embed(clip, (part,), ErrorPolicy(on_error, max_bad_ratio=1.0))

    def load(self) -> Clip:
        """The teacher on its device, once it is the one of the shards that are finished."""
        clip = load_clip(self.model, weights=self.weights, device=resolve_device(self.device))
        if self.finished is not None:
            _check_teacher(self.folder, self.finished, describe_teacher(clip, precision=self.precision))
        return clip

    def embed(self, clip: Clip, shards: Shards, policy: ErrorPolicy) -> dict[str, Any]:
        """Write the shards of a store, each with its row table last; the teacher's description and width."""
        teacher = describe_teacher(clip, precision=self.precision)
        batches = scan(
            ShardList(shards=shards, columns=self.columns, may_lack=self.may_lack),
            preprocess=clip.preprocess,
            tokenize=clip.tokenizer,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            max_pixels=self.max_pixels,
            views=self.views,
            view_size=clip.image_size,
        )
        num_views = self.views.num if self.views else 0
        part: ShardEmbeddings | None = None
        with progress(f"embed {self.folder}", len(shards)) as advance:
            for batch in batches:
                if part is None:
                    part = ShardEmbeddings(batch.source, dim=clip.dim, num_views=num_views)
                part.add(batch, **_forward(clip, batch, clip.dim, PRECISIONS[self.precision]), policy=policy)
                advance(len(batch.errors) / len(batch.source.entries), len(batch.errors))
                if part.full:
                    part.write(self.folder, teacher)
                    policy.check()
                    part = None
        return {**teacher, "dim": clip.dim}


def describe_teacher(clip: Clip, *, precision: str) -> dict[str, Any]:
    """What decides the embeddings besides the pairs; a store carries it in every shard."""
    return {
        "name": clip.name,
        "digest": clip.digest,
        "preprocessing": json.dumps(clip.preprocess_cfg, sort_keys=True),
        "tokenizer": f"{type(clip.tokenizer).__name__}, context {clip.context_length}",
        "precision": precision,
        "scale": float(clip.scale.detach()),
        **({} if clip.bias is None else {"bias": float(clip.bias.detach())}),
    }


def _count_lacking(path: str, num_shards: int, may_lack: Sequence[Side]) -> dict[str, int]:
    """Count the usable rows without a picture, and those without a caption; nothing where rows may lack neither."""
    if not may_lack:
        return {}
    tables = [read_shard_rows(path, shard) for shard in range(num_shards)]
    num_pictureless = sum(int((rows.valid & ~rows.has_image).sum()) for rows in tables)
    num_captionless = sum(int((rows.valid & ~rows.has_text).sum()) for rows in tables)
    say(f"embed {path}: {num_captionless:,} rows have no caption, {num_pictureless:,} have no picture.")
    return {"num_captionless": num_captionless, "num_pictureless": num_pictureless}


def _views(config: Config) -> Views | None:
    if not config.views:
        return None
    return Views(num=config.views, seed=config.seed, augmentation=config.augmentation)


@torch.inference_mode()
def _forward(
    clip: Clip, batch: ScannedBatch, dim: int, precision: torch.dtype
) -> dict[str, Float16[np.ndarray, "*rows dim"]]:
    """Embeddings of a batch's rows, of their views [n, m, dim] and of their other captions."""
    num_rows, num_views = len(batch.errors), len(batch.view_pixels)
    found = {name: np.zeros((num_rows, dim), np.float16) for name in ("image", "text")}
    found["views"] = np.zeros((num_rows, num_views, dim), np.float16)
    found["other_text"] = np.zeros((len(batch.other_tokens), dim), np.float16)
    device, embedded = clip.device, {}
    with torch.autocast(device.type, precision, enabled=precision != torch.float32):
        if batch.pixels is not None:
            embedded["image"] = clip.encode_image(batch.pixels.to(device, non_blocking=True))
        if batch.has_text.any():
            embedded["text"] = clip.encode_text(batch.tokens.to(device, non_blocking=True))
        for name, embeddings in embedded.items():  # waits for both towers
            found[name][:] = _to_numpy(embeddings)
        for view, pixels in enumerate(batch.view_pixels if batch.pixels is not None else ()):
            shown = normalise_pixels(pixels.to(device, non_blocking=True), clip.preprocess_cfg)
            found["views"][:, view] = _to_numpy(clip.encode_image(shown))
        for first in range(0, len(batch.other_tokens), num_rows):
            tokens = batch.other_tokens[first : first + num_rows].to(device, non_blocking=True)
            found["other_text"][first : first + num_rows] = _to_numpy(clip.encode_text(tokens))
    return found


def _to_numpy(embeddings: Tensor) -> Float16[np.ndarray, "n dim"]:
    return embeddings.half().cpu().numpy()


def _count_finished(folder: str, shard: int, uri: str, policy: ErrorPolicy) -> bool:
    """Whether an earlier run finished this shard; then its rows are counted too.

    Raises `InputError` where the shard it finished was another file: the patterns match other files than they did.
    """
    line = finished_shard(folder, shard)
    if line is None:
        return False
    _check_source(folder, line, uri)
    _count_rows(folder, line, policy)
    return True


def _count_rows(folder: str, line: StoreShard, policy: ErrorPolicy) -> None:
    rows = read_shard_rows(folder, line.index)
    policy.count_rows(rows.key, rows.error, uri=line.uri)


def _check_source(folder: str, line: StoreShard, uri: str) -> None:
    """Raise `InputError` where a file is not the one that a shard was made from."""
    if (line.uri, line.num_bytes) != (uri, source_size(uri)):
        raise InputError(
            f"{folder}: shard {line.index} was made from {line.uri} ({line.num_bytes} bytes), but is now {uri} "
            f"({source_size(uri)} bytes). The data changed since this folder was begun; choose another --out."
        )
    check_unchanged(folder, line, uri)
