"""Run a teacher over pairs and keep its image and text embeddings: the store that all later stages read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float16

from distilclip import run
from distilclip.data import files
from distilclip.data.policy import ErrorPolicy
from distilclip.data.samples import MAX_PIXELS
from distilclip.data.scan import ScannedBatch, Source, scan
from distilclip.data.store import (
    Rows,
    finished_shard,
    not_unit,
    read_shard_rows,
    write_manifest,
    write_shard,
)
from distilclip.devices import resolve_device
from distilclip.errors import InputError
from distilclip.models.clip import Clip, load_clip
from distilclip.progress import progress

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of `distilclip embed`."""

    data: tuple[str, ...]
    """pairs: webdataset tars, Parquet with image bytes, or CSV/TSV (filepath, caption); braces and globs, URLs too"""
    out: str
    """folder to write: the store"""
    model: str
    """teacher: an open_clip architecture (with --weights), hf-hub:ORG/NAME, or a distilclip train folder"""
    weights: str | None = None
    """weights file of a teacher given as an open_clip architecture"""
    batch_size: int = 256
    """pairs per forward pass"""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """of the teacher's towers (autocast); embeddings are kept in half precision"""
    max_pixels: int = MAX_PIXELS
    """images of more pixels (width x height) are unusable: decompression bombs"""
    on_error: Literal["raise", "skip"] = run.execution("skip")
    """what an unusable sample does: `skip` keeps its row with the reason, `raise` stops"""
    max_bad_ratio: float = run.execution(0.05)
    """share of unusable samples at which `skip` stops too"""
    device: str = run.execution("auto")
    """auto (CUDA, then MPS, then CPU), or a torch device"""
    num_workers: int = run.execution(2)
    """processes that read and decode; 0 decodes in the main process"""

    def __post_init__(self) -> None:
        if not self.data:
            raise InputError("embed needs --data: tars, Parquet or CSV files of pairs.")
        if self.batch_size < 1:
            raise InputError(f"batch_size is {self.batch_size}; it must be at least 1.")
        if self.num_workers < 0:
            raise InputError(f"num_workers is {self.num_workers}; it must be 0 or more.")
        ErrorPolicy(self.on_error, self.max_bad_ratio)


def main(config: Config) -> dict[str, Any]:
    """Embed every shard, or those that an earlier run left; the folder's result."""
    folder = run.open_folder(config.out, stage="embed", config=config, inputs=run.folders_of("train", [config.model]))
    if folder.finished:
        return folder.result()
    uris = files.expand(config.data)
    policy = ErrorPolicy(config.on_error, config.max_bad_ratio)
    clip = load_clip(config.model, weights=config.weights, device=resolve_device(config.device))
    teacher = describe_teacher(clip, precision=config.precision)
    pending = [shard for shard, uri in enumerate(uris) if not _count_finished(folder.path, shard, uri, policy)]
    batches = scan(
        [(shard, uris[shard]) for shard in pending],
        preprocess=clip.preprocess,
        tokenize=clip.tokenizer,
        batch_size=config.batch_size,
        num_workers=config.num_workers,
        max_pixels=config.max_pixels,
    )
    dim = clip.dim
    _embed(batches, clip, folder.path, dim=dim, teacher=teacher, num_shards=len(pending), policy=policy)
    policy.check(final=True)
    shards = [line for shard in range(len(uris)) if (line := finished_shard(folder.path, shard))]
    write_manifest(folder.path, shards, dim=dim, teacher=teacher)
    return folder.finish(
        {
            "num_shards": len(shards),
            "num_rows": policy.num_seen,
            "num_valid": policy.num_seen - policy.num_bad,
            "num_invalid": policy.num_bad,
            "reasons": dict(sorted(policy.reasons.items())),
            "truncated": [line.uri for line in shards if line.status == "truncated"],
            "dim": dim,
            "teacher": teacher,
        }
    )


def describe_teacher(clip: Clip, *, precision: str) -> dict[str, Any]:
    """What decides the embeddings besides the pairs; a store carries it in every shard."""
    return {
        "name": clip.name,
        "digest": clip.digest,
        "preprocessing": json.dumps(clip.preprocess_cfg, sort_keys=True),
        "tokenizer": f"{type(clip.tokenizer).__name__}, context {clip.context_length}",
        "precision": precision,
        "scale": float(clip.scale.detach()),
    }


def _embed(
    batches: Iterator[ScannedBatch],
    clip: Clip,
    path: str,
    *,
    dim: int,
    teacher: dict[str, Any],
    num_shards: int,
    policy: ErrorPolicy,
) -> None:
    part: _Part | None = None
    precision = PRECISIONS[teacher["precision"]]
    with progress(f"embed {path}", num_shards) as advance:
        for batch in batches:
            if part is None:
                part = _Part(batch.source, dim)
            part.add(batch, *_forward(clip, batch, dim, precision), policy)
            advance(len(batch.errors) / len(batch.source.entries), len(batch.errors))
            if part.full:
                part.write(path, teacher)
                policy.check()
                part = None


@torch.inference_mode()
def _forward(
    clip: Clip, batch: ScannedBatch, dim: int, precision: torch.dtype
) -> tuple[Float16[np.ndarray, "n dim"], Float16[np.ndarray, "n dim"]]:
    if batch.pixels is None:
        empty = np.zeros((len(batch.errors), dim), np.float16)
        return empty, empty
    device = clip.device
    with torch.autocast(device.type, precision, enabled=precision != torch.float32):
        image = clip.encode_image(batch.pixels.to(device, non_blocking=True))
        text = clip.encode_text(batch.tokens.to(device, non_blocking=True))
    return image.half().cpu().numpy(), text.half().cpu().numpy()


class _Part:
    """The rows of one shard as they fill up."""

    def __init__(self, source: Source, dim: int) -> None:
        num_rows = len(source.entries)
        self.source = source
        self.image = np.zeros((num_rows, dim), np.float16)
        self.text = np.zeros((num_rows, dim), np.float16)
        self.image_sha256 = np.zeros((num_rows, 32), np.uint8)
        self.errors: list[str] = []

    @property
    def full(self) -> bool:
        return len(self.errors) == len(self.source.entries)

    def add(
        self,
        batch: ScannedBatch,
        image: Float16[np.ndarray, "n dim"],
        text: Float16[np.ndarray, "n dim"],
        policy: ErrorPolicy,
    ) -> None:
        """Add the rows that follow; unusable ones are counted by `policy` and keep zeros."""
        wrong = not_unit(image) | not_unit(text)
        errors = [
            error or ("embedding is no finite unit vector" if bad else "")
            for error, bad in zip(batch.errors, wrong, strict=True)
        ]
        policy.seen(len(errors))
        for row, error in enumerate(errors, start=batch.first):
            if error:
                policy.bad(error, where=f"{self.source.uri}: {self.source.entries[row].key}")
        rows = slice(batch.first, batch.first + len(errors))
        valid = np.array([not error for error in errors])[:, None]
        self.image[rows] = np.where(valid, image, 0)
        self.text[rows] = np.where(valid, text, 0)
        self.image_sha256[rows] = batch.image_sha256
        self.errors += errors

    def write(self, folder: str, teacher: dict[str, Any]) -> None:
        entries, source = self.source.entries, self.source
        rows = Rows(
            key=[entry.key for entry in entries],
            offset=np.array([entry.offset for entry in entries], np.uint64),
            size=np.array([entry.size for entry in entries], np.uint32),
            valid=np.array([not error for error in self.errors]),
            error=self.errors,
            image_sha256=self.image_sha256,
        )
        write_shard(
            folder,
            source.shard,
            rows,
            image=self.image,
            text=self.text,
            uri=source.uri,
            num_bytes=source.num_bytes,
            source_digest=source.sha256,
            truncated=source.truncated,
            teacher=teacher,
        )


def _count_finished(folder: str, shard: int, uri: str, policy: ErrorPolicy) -> bool:
    """Whether an earlier run finished this shard; then its rows are counted too.

    Raises `InputError` where the shard it finished was another file: the patterns match other files than they did.
    """
    line = finished_shard(folder, shard)
    if line is None:
        return False
    if (line.uri, line.num_bytes) != (uri, files.size(uri)):
        raise InputError(
            f"{folder}: shard {shard} was made from {line.uri} ({line.num_bytes} bytes), but is now {uri} "
            f"({files.size(uri)} bytes). The data changed since this folder was begun; choose another --out."
        )
    rows = read_shard_rows(folder, shard)
    policy.seen(len(rows))
    for key, error in zip(rows.key, rows.error, strict=True):
        if error:
            policy.bad(error, where=f"{uri}: {key}")
    return True
