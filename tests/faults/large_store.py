"""Take a made-up store of a million rows through every stage, and five thousand tars through embed, and measure memory.

The tars are real: each row has a picture and a caption of its own in its tar, but there are only 16 different pictures.
The embeddings are made up: points around 2,000 centers, of which every fourth is near an earlier one.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int, UInt8

from tests.conftest import TINY_CLIP, encoded, picture
from tests.faults.crash_points import outcome
from tests.faults.outcome import Outcome, Size
from tests.faults.stage_cases import warm_up

DIM = 64
BLOCK = 512
DIGITS = 9
LONG_CAPTION = 100_000
TEACHER = {
    "name": "made up",
    "digest": "d",
    "preprocessing": "{}",
    "tokenizer": "t",
    "precision": "fp32",
    "scale": 100.0,
}
MOST_MEGABYTES = {"balance": 3000, "cluster": 3000, "train": 3000, "verify": 3000, "embed": 1500}
"""What a stage may take at most, imports included; the sizes seen are in the outcome."""


def drill(folder: Path, *, size: Size) -> list[Outcome]:
    """A million rows in 100 shards, and 5,000 tars; small: 2,000 rows in 4 shards through balance, and 20 tars."""
    warm_up()
    if size == "small":
        return [run_stages(folder / "rows", shards=4, rows=500, stages=("balance",)), run_shards(folder / "tars", 20)]
    stages = ("balance", "cluster", "train", "verify")
    return [run_stages(folder / "rows", shards=100, rows=10_000, stages=stages), run_shards(folder / "tars", 5000)]


def run_stages(folder: Path, *, shards: int, rows: int, stages: Sequence[str]) -> Outcome:
    """Write a store and its tars, and run the stages, each in a child whose largest memory is taken."""
    started = time.monotonic()
    store = write_store(folder, shards=shards, rows=rows)
    kept = ("--store", store, "--groups", folder / "groups")
    train = ("--batch-size", 32, "--num-steps", 200, "--warmup-steps", 10, "--num-workers", 1, "--precision", "fp32")
    train = (*train, "--clusters", folder / "clusters", "--objective", "clip-cid", "--student", json.dumps(TINY_CLIP))
    argv = {
        "balance": (
            "--store",
            store,
            "--metric",
            "sqeuclidean",
            "--threshold",
            0.07,
            "--max-threshold",
            0.1,
            "--out",
            folder / "groups",
        ),
        "cluster": (*kept, "--num-centers", 2000, "--num-iterations", 3, "--out", folder / "clusters"),
        "train": (*kept, *train, "--out", folder / "student"),
        "verify": (folder,),
    }
    problems, sizes = run_measured({name: argv[name] for name in stages}, folder)
    if (done := folder / "groups" / "result.json").exists():
        result = json.loads(done.read_text())
        expected = shards * rows * 3 // 4 + rows // 4  # of a quarter of the points only copies are there
        if result["num_kept"] != expected:
            problems.append(f"balance kept {result['num_kept']:,} rows, not {expected:,}")
    return outcome(
        f"A store of {shards * rows:,} rows goes through {', '.join(stages)}, none of which takes more than "
        f"{max(MOST_MEGABYTES[name] for name in stages):,} MB.",
        f"Made-up embeddings of {DIM} numbers, a quarter near copies, over real tars with {shards * rows:,} pairs of "
        f"16 different pictures; training is 200 steps of CLIP-CID. Peak memory and time: {sizes}.",
        [(len(stages), problems)],
        started,
    )


def run_shards(folder: Path, shards: int) -> Outcome:
    """Embed tars of two pairs each, every tenth with a caption of 100 kB, and train on them."""
    from distilclip.models.clip import create_clip

    started = time.monotonic()
    (folder / "pairs").mkdir(parents=True)
    for shard in range(shards):
        numbers = np.arange(2 * shard, 2 * shard + 2)
        (folder / "pairs" / f"{shard:06d}.tar").write_bytes(make_tar(numbers, LONG_CAPTION if shard % 10 == 0 else 32))
    create_clip(json.dumps(TINY_CLIP), seed=7).save(str(folder / "teacher"))
    pairs, store = folder / "pairs", folder / "store"
    train = ("--store", store, "--batch-size", 32 if shards > 32 else 8, "--num-steps", 20, "--warmup-steps", 1)
    train = (*train, "--num-workers", 0, "--precision", "fp32", "--student", json.dumps(TINY_CLIP))
    argv = {
        "embed": (
            "--data",
            pairs,
            "--model",
            folder / "teacher",
            "--num-workers",
            0,
            "--precision",
            "fp32",
            "--out",
            store,
        ),
        "train": (*train, "--out", folder / "student"),
    }
    problems, sizes = run_measured(argv, folder)
    result = json.loads((store / "result.json").read_text()) if not problems else {}
    if not problems and (result["num_rows"], result["num_valid"]) != (2 * shards, 2 * shards):
        problems.append(f"embed counts {result['num_valid']} usable of {result['num_rows']} rows, not {2 * shards}")
    return outcome(
        f"{shards:,} shards, some with captions of 100 kB, go through embed and train with every row.",
        f"Tars of two pairs each, every tenth with captions of {LONG_CAPTION:,} bytes; a two-layer teacher, 20 steps. "
        f"Peak memory and time: {sizes}.",
        [(2, problems)],
        started,
    )


def run_measured(argv: dict[str, tuple[object, ...]], folder: Path) -> tuple[list[str], str]:
    """Run commands in children; what went wrong, and the largest memory and the time of each in words."""
    problems, sizes = [], []
    for name, words in argv.items():
        code, megabytes, seconds = measure_child(
            lambda name=name, words=words: _run(name, words), folder / f"{name}.txt"
        )
        sizes.append(f"{name} {megabytes:,.0f} MB, {seconds:.0f} s")
        if code:
            problems.append(f"{name} gave {code}: {(folder / f'{name}.txt').read_text()[-400:]}")
        elif megabytes > MOST_MEGABYTES[name]:
            problems.append(f"{name} took {megabytes:,.0f} MB")
    return problems, "; ".join(sizes).replace("; ", " / ")


def _run(name: str, words: Sequence[object]) -> int:
    from distilclip import cli

    return cli.main([name, *map(str, words)])


def measure_child(work: Callable[[], int], said: Path) -> tuple[int, float, float]:
    """Run a function in a forked child; its exit code, its largest resident memory in megabytes, and seconds."""
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            code = work()
        finally:
            os._exit(code)
    _, status, usage = os.wait4(pid, 0)
    return os.waitstatus_to_exitcode(status), usage.ru_maxrss / 1024, time.monotonic() - started


def write_store(folder: Path, *, shards: int, rows: int) -> str:
    """Write tars and a finished store of them with this package's own writer; the folder of the store."""
    from distilclip import digests, stage_folder
    from distilclip.configs.embed import Config
    from distilclip.data.store import (
        Rows,
        SourceFile,
        StoreShard,
        finished_shard,
        store_files,
        write_manifest,
        write_shard,
    )

    random, store = np.random.default_rng(0), str(folder / "store")
    (folder / "pairs").mkdir(parents=True)
    config = Config(data=(str(folder / "pairs"),), model="made-up", out=store)
    opened = stage_folder.open_folder(store, stage="embed", config=config)
    lines: list[StoreShard] = []
    scenes = _directions(random, 2000)
    pool = np.empty((0, DIM))
    for shard in range(shards):
        numbers = np.arange(shard * rows, (shard + 1) * rows)
        content = make_tar(numbers, 32)
        uri = folder / "pairs" / f"{shard:06d}.tar"
        uri.write_bytes(content)
        points = scenes[random.integers(0, len(scenes), rows)] + 0.6 * _directions(random, rows)
        pool = points / np.linalg.norm(points, axis=1, keepdims=True) if shard == 0 else pool
        near = numbers % 4 == 3
        points[near] = pool[numbers[near] // 4 % rows] + 0.01 * random.standard_normal((near.sum(), DIM))
        points = (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float16)
        size = sample_bytes(32)
        table = Rows(
            key=[f"{number:09d}" for number in numbers],
            offset=np.arange(rows, dtype=np.uint64) * np.uint64(size),
            size=np.full(rows, size, np.uint32),
            valid=np.ones(rows, bool),
            error=[""] * rows,
            image_sha256=np.array(
                [list(hashlib.sha256(file).digest()) for file in files_of_pictures(numbers)], np.uint8
            ),
        )
        source = SourceFile(uri=str(uri), num_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
        write_shard(store, shard, table, image=points, text=points, source=source, teacher=TEACHER)
        line = finished_shard(store, shard)
        assert line is not None
        lines.append(line)
    write_manifest(store, lines, dim=DIM, teacher=TEACHER)
    found = digests.digest_files(store, store_files(shards))
    opened.finish({"num_rows": shards * rows, "num_valid": shards * rows, "digests": found})
    return store


def _directions(random: np.random.Generator, num: int) -> Float[np.ndarray, "n dim"]:
    points = random.standard_normal((num, DIM))
    return points / np.linalg.norm(points, axis=1, keepdims=True)


def pictures() -> np.ndarray:
    """Sixteen small pictures, as rows of bytes of one length: nothing reads what follows the end of a JPEG file."""
    found = [encoded(picture(seed, (32, 32))) for seed in range(16)]
    longest = max(map(len, found)) + DIGITS
    return np.array([list(content.ljust(longest, b"\0")) for content in found], np.uint8)


def sample_bytes(caption: int) -> int:
    """The bytes of a sample in a tar: two headers, and the contents in whole blocks."""
    return 2 * BLOCK + _padded(pictures().shape[1]) + _padded(caption)


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def files_of_pictures(numbers: Int[np.ndarray, " n"]) -> UInt8[np.ndarray, "n size"]:
    """Return a picture file for each number. All differ: balance takes the rows of one file as one."""
    found = pictures()[numbers % 16]
    found[:, -DIGITS:] = _digits(numbers)
    return found


def make_tar(numbers: Int[np.ndarray, " n"], caption: int) -> bytes:
    """Return a tar with a picture and a caption of so many bytes for each number."""
    words = (b"a picture of a number, " * (caption // 23 + 1))[: caption - DIGITS]
    texts = np.tile(np.frombuffer(words + bytes(DIGITS), np.uint8), (len(numbers), 1))
    texts[:, -DIGITS:] = _digits(numbers)
    members = []
    for suffix, content in ((".jpg", files_of_pictures(numbers)), (".txt", texts)):
        size = content.shape[1]
        padding = np.zeros((len(numbers), _padded(size) - size), np.uint8)
        members += [_headers(numbers, suffix, size), content, padding]
    return np.concatenate(members, axis=1).tobytes() + bytes(2 * BLOCK)


def _headers(numbers: Int[np.ndarray, " n"], suffix: str, size: int) -> UInt8[np.ndarray, "n 512"]:
    """Return the headers of members named by their numbers."""
    member = tarfile.TarInfo("0" * DIGITS + suffix)
    member.size = size
    found = np.tile(np.frombuffer(member.tobuf(tarfile.USTAR_FORMAT), np.uint8), (len(numbers), 1))
    found[:, :DIGITS] = _digits(numbers)
    found[:, 148:156] = ord(" ")
    sums = found.sum(axis=1, dtype=np.int64)
    found[:, 148:154] = [list(b"%06o" % total) for total in sums]
    found[:, 154] = 0
    return found


def _digits(numbers: Int[np.ndarray, " n"]) -> UInt8[np.ndarray, "n 9"]:
    powers = 10 ** np.arange(DIGITS - 1, -1, -1)
    return (numbers[:, None] // powers % 10 + ord("0")).astype(np.uint8)
