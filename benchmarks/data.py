"""Images decoded, augmented, tokenised and collated from tars with 2 workers, against open_clip's own pipeline.

Both sides read the same tars of 512 x 384 JPEGs (52 KB each, photograph-like: gradients, blobs and noise), crop 0.9
to 1 of the area to 224 pixels, bicubic, tokenise, and give batches of normalised float32 pixels (the peer's workers
normalise; ours is done where the batch arrives, as in training). Ours joins the teacher's embeddings as well; the peer
is `open_clip_train.data.get_wds_dataset`. Where balance dropped 44 % of the rows, ours reads the kept ones; the peer
reads all and drops, before it decodes, through its own filter for samples without a caption.

Two notes are about packs: what one loader process reads from storage that waits 50 ms before it answers a request, from
a pack and from the store that it was made from; and what the index of 100 million rows costs.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import open_clip
import open_clip_train.data
from _harness import Case, compare, is_quick
from fsspec.implementations.local import LocalFileSystem
from PIL import Image

from distilclip import digests, files, stage_folder
from distilclip.data.shards import open_shard
from distilclip.data.side_files import Groups, write_groups
from distilclip.data.store import Rows, SourceFile, Store, finished_shard, sample_id, write_manifest, write_shard
from distilclip.data.stream import PairSource, PairStream, Presentation, open_stream
from distilclip.models.clip import normalise_pixels
from distilclip.packs.pack import INDEX_FILE, Pack, PackFacts, RowCounts, ShardPackets, write_index
from distilclip.packs.pack_loader import BlockOrder, open_pack_stream
from distilclip.stages import pack

SIZE = (512, 384)
NUM_PICTURES = 192
NUM_TARS = 8
BATCH = 64
SMALL = (32, 32)
WAIT = 0.05  # seconds
DIM = 768
DROPPED = 0.44
NORMALISATION = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
TEACHER = {"name": "t", "digest": "d", "preprocessing": "", "tokenizer": "", "precision": "fp32", "scale": 100.0}

# webdataset 1.0 ends each tar with an empty mark, which open_clip 3.3 does not know.
open_clip_train.data.tar_file_expander = partial(open_clip_train.data.tar_file_expander, eof_value=None)

_FOLDER = tempfile.TemporaryDirectory(prefix="distilclip-bench-")


@dataclass(frozen=True)
class Inputs:
    """Tars of pairs, a store of them, and which keys are kept (None: all)."""

    tars: list[str]
    store: str
    groups: str | None
    kept: frozenset[str] | None
    num_images: int


def picture(random: np.random.Generator, size: tuple[int, int]) -> bytes:
    """A JPEG with the spectrum of a photograph: large gradients, smaller blobs, sensor noise."""
    levels = np.zeros((size[1], size[0], 3))
    for cell, strength in ((64, 1.0), (16, 0.3), (4, 0.15)):
        coarse = random.integers(0, 256, (max(1, size[1] // cell), max(1, size[0] // cell), 3), dtype=np.uint8)
        levels += strength * (np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)) - 127.5)
    levels += 127.5 + random.normal(0, 4, levels.shape)
    buffer = io.BytesIO()
    Image.fromarray(levels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


@cache
def write_tars(num_images: int, size: tuple[int, int]) -> list[str]:
    """The tars, once; a few hundred different pictures take turns."""
    random = np.random.default_rng(0)
    pictures = [picture(random, size) for _ in range(NUM_PICTURES)]
    paths = []
    for shard in range(NUM_TARS):
        paths.append(str(Path(_FOLDER.name) / f"{num_images}-{size[0]}-{shard:05d}.tar"))
        with tarfile.open(paths[-1], "w") as tar:
            for row in range(num_images // NUM_TARS):
                key = f"{shard:05d}{row:04d}"
                caption = f"a photograph of number {row}, taken on a sunny day in place {shard} near the sea".encode()
                for name, content in ((f"{key}.jpg", pictures[row % NUM_PICTURES]), (f"{key}.txt", caption)):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return paths


def make_inputs(num_images: int, dropped: float, size: tuple[int, int] = SIZE) -> Inputs:
    tars = write_tars(num_images, size)
    folder = str(Path(_FOLDER.name) / f"{num_images}-{size[0]}-{dropped}")
    store, groups = f"{folder}-store", f"{folder}-groups"
    random = np.random.default_rng(1)
    kept: set[str] = set()
    lines = []
    for shard, uri in enumerate(tars):
        opened = open_shard(uri)
        entries = opened.index()
        pictures = (opened.read(entry.offset, entry.size).image or b"" for entry in entries)
        image_sha256 = np.array([list(hashlib.sha256(picture).digest()) for picture in pictures], np.uint8)
        n = len(entries)
        image = random.standard_normal((n, DIM), np.float32)
        image = (image / np.linalg.norm(image, axis=1, keepdims=True)).astype(np.float16)
        rows = Rows(
            key=[entry.key for entry in entries],
            offset=np.array([entry.offset for entry in entries], np.uint64),
            size=np.array([entry.size for entry in entries], np.uint32),
            valid=np.ones(n, bool),
            error=[""] * n,
            image_sha256=image_sha256,
        )
        source = SourceFile(uri=uri, num_bytes=files.size(uri), sha256="")
        write_shard(store, shard, rows, image=image, text=image, source=source, teacher=TEACHER)
        line = finished_shard(store, shard)
        assert line is not None
        lines.append(line)
        keep = np.ones(n, bool)
        keep[random.permutation(n)[: round(dropped * n)]] = False
        row = np.arange(n, dtype=np.uint32)
        ids = sample_id(shard, row)
        write_groups(groups, shard, Groups(row, ids, ids, np.zeros(n, np.float32), keep))
        kept |= {entry.key for entry, chosen in zip(entries, keep, strict=True) if chosen}
    write_manifest(store, lines, dim=DIM, teacher=TEACHER)
    # Whole batches for both of the peer's workers, which share the tars out between them.
    usable = len(kept) // (2 * BATCH) * 2 * BATCH
    if not dropped:
        return Inputs(tars, store, None, None, usable)
    return Inputs(tars, store, groups, frozenset(kept), usable)


def ours(inputs: Inputs) -> int:
    stream = open_stream(
        PairSource(stores=[inputs.store], groups=inputs.groups),
        Presentation(sizes=[224], tokenize=open_clip.get_tokenizer("ViT-B-32"), seed=0),
        batch_size=BATCH,
    )
    batches = stream.batches(stop=inputs.num_images // BATCH, num_workers=2)
    return sum(len(normalise_pixels(batch.pixels, NORMALISATION)) for batch in batches)


def peer(inputs: Inputs) -> int:
    arguments = argparse.Namespace(
        train_data="::".join(inputs.tars),
        train_num_samples=inputs.num_images,
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        seed=0,
        batch_size=BATCH,
        workers=2,
        world_size=1,
    )
    own = open_clip_train.data.filter_no_caption_or_no_image
    open_clip_train.data.filter_no_caption_or_no_image = filter_of(inputs.kept, own)
    try:
        data = open_clip_train.data.get_wds_dataset(
            arguments,
            open_clip.image_transform(224, is_train=True),
            is_train=True,
            tokenizer=open_clip.get_tokenizer("ViT-B-32"),
        )
    finally:
        open_clip_train.data.filter_no_caption_or_no_image = own
    return sum(len(pixels) for pixels, _ in data.dataloader)


def filter_of(kept: frozenset[str] | None, own: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """The peer's filter, which also drops what balance dropped."""
    return own if kept is None else lambda sample: sample["__key__"].rsplit("/", 1)[-1] in kept and own(sample)


class WaitingFileSystem(LocalFileSystem):
    """Local files that answer each request after 50 ms, as an object store far away does."""

    protocol = "waiting"

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        time.sleep(WAIT)
        return super().cat_file(path, start=start, end=end, **options)

    def open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        time.sleep(WAIT)
        return super().open(path, mode, **options)

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.removeprefix("waiting://"))


def measure_latency(quick: bool) -> list[str]:
    """Samples a second of one loader process, from a pack and from its store."""
    fsspec.register_implementation("waiting", WaitingFileSystem, clobber=True)
    os.environ["DISTILCLIP_COPIES"] = "0"  # else embeddings are copied here, which a store of terabytes has no room for
    num_images = 4096 if quick else 65536
    inputs = make_inputs(num_images, 0.0, SMALL)
    for name in ("config", "result"):
        stage_folder.write_json(f"{inputs.store}/{name}.json", {"stage": "embed"})
    packed = f"{inputs.store}-pack"
    started = time.process_time()
    pack.main(pack.Config(store=inputs.store, out=packed))
    packing = num_images / (time.process_time() - started)
    shown = Presentation(sizes=[32], tokenize=open_clip.get_tokenizer("ViT-B-32"), seed=0)
    from_pack = open_pack_stream(Pack.open(f"waiting://{packed}"), shown, batch_size=256)
    tars = [f"waiting://{tar}" for tar in inputs.tars]
    from_store = open_stream(PairSource(data=tars, stores=[f"waiting://{inputs.store}"]), shown, batch_size=64)
    rates = [
        measure_rate(stream, num_batches)
        for stream, num_batches in ((from_pack, 14 if quick else 200), (from_store, 6 if quick else 20))
    ]
    said = [f"{rate:,.0f} samples/s ({1e6 * cpu:,.0f} us of CPU a sample)" for rate, cpu in rates]
    return [
        f"One loader process, {num_images:,} JPEGs of 32x32, embeddings of {DIM}, storage that waits 50 ms a request: "
        f"{said[0]} from a pack, {said[1]} from its store without copies. "
        f"Packing took {packing:,.0f} pairs per CPU second."
    ]


def measure_rate(stream: PairStream, num_batches: int) -> tuple[float, float]:
    """Samples a second of this process as a loader process, and its CPU seconds a sample, after four batches."""
    batches = stream.batches(stop=num_batches)
    for _ in range(4):
        next(batches)
    started, cpu = time.perf_counter(), time.process_time()
    num_rows = sum(len(batch) for batch in batches)
    return num_rows / (time.perf_counter() - started), (time.process_time() - cpu) / num_rows


def measure_index(num_rows: int) -> list[str]:
    """What the index of a large pack costs: bytes a row, the time to open it and to draw rows."""
    folder = str(Path(_FOLDER.name) / f"index-{num_rows}")
    packets = np.arange(65536 // 16)
    counts = RowCounts(num_images=65536, num_texts=65536, num_pairs=65536, num_resized=0)
    places = {"start": packets, "size": packets.astype(np.int32), "digest": packets.astype(np.uint64)}
    shard = ShardPackets(num_rows=65536, counts=counts, sha256="", **places)
    num_shards = -(-num_rows // 65536)
    facts = PackFacts(packet_rows=16, max_side=256, has_clusters=False, counts=counts)
    write_index(folder, [shard] * num_shards, facts, teacher=Store("", [], DIM, TEACHER))
    found = digests.digest_files(folder, [INDEX_FILE])
    stage_folder.write_json(f"{folder}/result.json", {"stage": "pack", "digests": found})
    started, cpu = time.perf_counter(), time.process_time()
    opened = Pack.open(folder)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    order, started = BlockOrder(opened, 0), time.perf_counter()
    order.rows(0, num_rows // 2, num_rows // 2 + 4096)
    drawn = time.perf_counter() - started
    size = files.size(f"{folder}/{INDEX_FILE}")
    return [
        f"The index of a pack of {opened.num_rows:,} rows: {size / opened.num_rows:.2f} bytes a row, mapped; opened in "
        f"{seconds:.2f} s ({cpu:.2f} s of CPU, its digest checked); the first 4,096 rows of a block in {drawn:.3f} s."
    ]


def case(num_images: int, dropped: float) -> Case:
    name = f"{num_images:,} JPEGs of 512x384" + (f", {dropped:.0%} dropped by balance" if dropped else "")
    return Case(
        name=f"{name}: ours / open_clip's webdataset pipeline",
        setup=lambda: make_inputs(num_images, dropped),
        ours=ours,
        peer=peer,
        equal=lambda left, right: left == right,
    )


def main() -> None:
    quick = is_quick(__doc__ or "")
    num_images = 512 if quick else 6144
    notes = {"latency": lambda: measure_latency(quick), "index": lambda: measure_index(10**6 if quick else 10**8)}
    compare("data", [case(num_images, 0.0), case(num_images, DROPPED)], notes)


if __name__ == "__main__":
    main()
