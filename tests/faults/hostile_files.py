"""Drill: tars that point outside themselves, pictures that would be huge, and a tar of very many members."""

from __future__ import annotations

import importlib
import io
import json
import os
import resource
import shutil
import tarfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

from distilclip.data.samples import BadSample, decode_image
from distilclip.data.shards import open_shard
from distilclip.models.clip import create_clip
from tests.conftest import TINY_CLIP, encoded, picture
from tests.faults.children import run_stage
from tests.faults.outcome import Outcome, Size

MOST_SECONDS, MOST_BYTES = 20.0, 1536 << 20
"""What one hostile picture may take of the processor and of memory; the index of a tar may take ten times as long."""
SECRET = "hunter2-do-not-tell"


def drill(folder: Path, *, size: Size) -> list[Outcome]:
    """Reach out of tars, and send bombs."""
    torch.set_num_threads(1)
    num_members = 1_000_000 if size == "full" else 20_000
    return [reach_outside(folder / "outside"), send_bombs(folder / "bombs", num_members=num_members)]


def _hostile_members(outside: Path) -> dict[str, list[tuple[str, bytes, bytes, str]]]:
    """Tars by what they try: name, content, type and link of each member."""
    good, file = encoded(picture(1)), tarfile.REGTYPE
    up = "../" * 20 + str(outside)[1:]
    tries = {
        "absolute": [(f"{outside}/new.jpg", good, file, ""), (f"{outside}/new.txt", b"x", file, "")],
        "dots": [(f"{up}/new.jpg", good, file, ""), (f"{up}/new.txt", b"x", file, "")],
        "inner dots": [(f"a/{up}/new.jpg", good, file, ""), (f"a/{up}/new.txt", b"x", file, "")],
    }
    for word, kind in (("symbolic link", tarfile.SYMTYPE), ("hard link", tarfile.LNKTYPE)):
        for extension in ("jpg", "txt", "json"):
            members = [(f"5.{extension}", b"", kind, f"{outside}/secret.{extension}")]
            members += [("5.jpg", good, file, ""), ("5.txt", b"x", file, "")]
            tries[f"{word} {extension}"] = members
    tries["through a linked folder"] = [
        ("d", b"", tarfile.SYMTYPE, str(outside)),
        ("d/new.jpg", good, file, ""),
        ("d/new.txt", b"x", file, ""),
    ]
    return tries


def reach_outside(folder: Path) -> Outcome:
    """Embed and copy tars whose members point elsewhere; nothing there is written, and nothing of it is read."""
    started = time.monotonic()
    outside = folder / "outside"
    outside.mkdir(parents=True)
    create_clip(json.dumps(TINY_CLIP), seed=7).save(str(folder / "teacher"))
    for name, content in (
        ("secret.jpg", encoded(picture(77))),
        ("secret.txt", SECRET.encode()),
        ("secret.json", b'{"caption": "%s"}' % SECRET.encode()),
    ):
        (outside / name).write_bytes(content)
    importlib.import_module("distilclip.stages.embed")
    importlib.import_module("distilclip.stages.export")
    before, faults = _listing(outside), []
    tries = _hostile_members(outside)
    for name, members in tries.items():
        path = folder / "tars" / "0.tar"
        path.parent.mkdir(exist_ok=True)
        plain = [("0.jpg", encoded(picture(0)), tarfile.REGTYPE, ""), ("0.txt", b"fine", tarfile.REGTYPE, "")]
        with tarfile.open(path, "w") as tar:
            for member, content, kind, link in [*plain, *members, ("x.txt", b"", tarfile.REGTYPE, ""), *plain]:
                info = tarfile.TarInfo(member)
                info.type, info.size, info.linkname = kind, len(content), link
                tar.addfile(info, io.BytesIO(content))
        for out in ("store", "copied"):
            shutil.rmtree(folder / out, ignore_errors=True)
        argv = ["embed", "--data", str(path), "--model", str(folder / "teacher"), "--out", str(folder / "store")]
        ended = run_stage([*argv, "--num-workers", "0", "--max-bad-ratio", "1"], folder)
        argv = ["export", "--what", "tars", "--store", str(folder / "store"), "--out", str(folder / "copied")]
        copied = run_stage(argv, folder)
        written = b"".join(
            p.read_bytes() for out in ("store", "copied") for p in sorted((folder / out).rglob("*")) if p.is_file()
        )
        faults += [f"{name}: {end.said[-200:]}" for end in (ended, copied) if end.code]
        faults += [f"{name}: something was written outside"] if _listing(outside) != before else []
        faults += [f"{name}: a file outside was read"] if SECRET.encode() in written else []
        for tar_path in (folder / "copied").rglob("*.tar"):
            with tarfile.open(tar_path) as tar:
                faults += [
                    f"{name}: copied {m.name}" for m in tar if m.name.startswith(("/", "..")) or "/../" in m.name
                ]
    return Outcome(
        promise="A tar's members read and write nothing outside it.",
        how="names that are absolute or go up, links to files and folders; embed, then export --what tars",
        num_cases=len(tries),
        num_survived=len(tries) - len({fault.partition(":")[0] for fault in faults}),
        seconds=time.monotonic() - started,
        notes="; ".join(faults),
    )


def _listing(folder: Path) -> list[tuple[str, bytes]]:
    return [(str(path), path.read_bytes() if path.is_file() else b"") for path in sorted(folder.rglob("*"))]


def _png(width: int, height: int, *chunks: tuple[bytes, bytes], says_width: int | None = None) -> bytes:
    """A black picture of one bit a pixel, with chunks of one's own before the pixels, or another width than its own."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    packer, row = zlib.compressobj(9), bytes(1 + -(-width // 8)) * 256
    pixels = b"".join(packer.compress(row) for _ in range(-(-height // 256))) + packer.flush()
    head = (says_width or width).to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([1, 0, 0, 0, 0])
    parts = [(b"IHDR", head), *chunks, (b"IDAT", pixels), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def bombs() -> dict[str, bytes]:
    """Small files that would be large pictures, or long ones."""
    zeros = zlib.compress(bytes(200 << 20), 9)
    jpeg = bytearray(encoded(picture(0)))
    place = jpeg.index(b"\xff\xc0") + 5
    jpeg[place : place + 4] = b"\xff\xdc\xff\xdc"  # 65,500 pixels a side
    buffer = io.BytesIO()
    frames = [Image.new("L", (64, 64), n % 256) for n in range(1000)]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    gif = bytearray(buffer.getvalue())
    huge = bytearray(gif)
    huge[6:10] = b"\xff\xff\xff\xff"
    return {
        "PNG of 30,000 x 30,000": _png(30_000, 30_000),
        "PNG of 9,400 x 9,400, under the limit": _png(9_400, 9_400),
        "PNG that says 2^31 x 1": _png(64, 1, says_width=2**31 - 1),
        "PNG with 200 MB of text": _png(64, 64, (b"zTXt", b"a\0\0" + zeros)),
        "PNG with a profile of 200 MB": _png(64, 64, (b"iCCP", b"a\0\0" + zeros)),
        "JPEG that says 65,500 x 65,500": bytes(jpeg),
        "GIF of 1,000 frames": bytes(gif),
        "GIF that says 65,535 x 65,535": bytes(huge),
        "1 x 20,000": encoded(Image.new("L", (1, 20_000)), "PNG"),
    }


def send_bombs(folder: Path, *, num_members: int) -> Outcome:
    """Decode bombs and index a tar of very many members, each in a child whose time and memory are measured."""
    started = time.monotonic()
    folder.mkdir(parents=True)
    cases: dict[str, Callable[[], object]] = {
        name: lambda content=content: _decode(content)
        for name, content in bombs().items()  # type: ignore[misc]
    }
    path = folder / "many.tar"
    write_many_members(path, num_members)
    cases[f"tar of {num_members:,} members"] = lambda: len(open_shard(str(path)).index())
    notes, num_survived = [], 0
    limits = {f"tar of {num_members:,} members": MOST_SECONDS * 10}
    for name, work in cases.items():
        seconds, peak, code = _measure(work)
        num_survived += code == 0 and seconds <= limits.get(name, MOST_SECONDS) and peak <= MOST_BYTES
        notes.append(f"{name}: {seconds:.1f} s, {peak >> 20} MiB{f', exit code {code}' if code else ''}")
    return Outcome(
        promise="A hostile picture, or a tar of very many members, takes bounded time and memory.",
        how=f"each in a child; {MOST_SECONDS:.0f} s of the processor (the tar: ten times that), {MOST_BYTES >> 20} MiB",
        num_cases=len(cases),
        num_survived=num_survived,
        seconds=time.monotonic() - started,
        notes="; ".join(notes),
    )


def _decode(content: bytes) -> None:
    try:
        decode_image(content)
    except BadSample:
        return


def _measure(work: Callable[[], object]) -> tuple[float, int, int]:
    """Seconds of the processor, bytes above those of this process, and the exit code of a child that does it."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            resource.setrlimit(resource.RLIMIT_CPU, (600, 600))
            work()
            code = 0
        finally:
            os._exit(code)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    _, status, used = os.wait4(pid, 0)
    peak = max(0, used.ru_maxrss * 1024 - before)
    return used.ru_utime + used.ru_stime, peak, os.waitstatus_to_exitcode(status)


def write_many_members(path: Path, num_members: int) -> None:
    """A tar of empty members, two to a sample."""
    header = bytearray(tarfile.TarInfo("000000000.jpg").tobuf(tarfile.USTAR_FORMAT)[:512])
    header[148:156] = b" " * 8
    base = sum(header)
    plain = sum(b"000000000.jpg")
    with open(path, "wb") as file:
        for number in range(num_members):
            name = b"%09d.%s" % (number // 2, b"jpg" if number % 2 == 0 else b"txt")
            header[:13] = name
            header[148:156] = b"%06o\0 " % (base - plain + sum(name))
            file.write(header)
        file.write(bytes(1024))
