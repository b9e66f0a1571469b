"""Made-up tars: layouts, names, encodings, orders and sizes, and damaged ones."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from distilclip.data.samples import BadSample, decode_image
from distilclip.data.shards import open_shard
from distilclip.data.tars import _NAME
from tests.conftest import encoded, picture
from tests.faults.fuzz_runner import FLIPS, Door, Lost, command, damaged, flipped

PICTURES = [encoded(picture(0)), encoded(picture(1), "PNG"), encoded(picture(2), "WEBP")]

_STEMS = st.one_of(
    st.integers(0, 9).map(lambda number: f"{number:05d}"),
    st.sampled_from(
        ["../x", "/etc/x", "a/b/c", "a/../../b", ".hidden", "ключ", "鍵", "x" * 120, "x/" * 60 + "y", "a b", "a.b"]
    ),
    st.text(min_size=1, max_size=12),
)
_EXTENSIONS = st.sampled_from(["jpg", "jpg", "png", "webp", "txt", "txt", "json", "JPG", "cls", "seg.png", "npy", ""])
_JSON = st.one_of(
    st.fixed_dictionaries({"caption": st.one_of(st.text(), st.none(), st.integers(), st.lists(st.text(), max_size=3))}),
    st.fixed_dictionaries(
        {"captions": st.one_of(st.text(), st.lists(st.one_of(st.text(), st.integers()), max_size=3))}
    ),
    st.lists(st.integers(), max_size=2),
).map(lambda value: json.dumps(value).encode())
_TEXTS = st.one_of(
    st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.sampled_from(
        [
            b"",
            b" ",
            b"a red square",
            b"&amp;" * 4000,
            "ё".encode() * 50_000,
            b"\xff\xfe",
            b"a\0b",
            b'{"caption": "\\ud800"}',
        ]
    ),
)


@st.composite
def members(draw: Callable[..., Any]) -> tuple[str, bytes, bytes, dict[str, str]]:
    """One member: name, content, type and pax records."""
    stem, extension = draw(_STEMS), draw(_EXTENSIONS)
    name = f"{stem}.{extension}" if extension else stem
    if extension.lower() in ("jpg", "png", "webp"):
        content = draw(st.sampled_from(PICTURES))
        content = flipped(content, draw(FLIPS)) if draw(st.integers(0, 4)) == 0 else content
    else:
        content = draw(_JSON if extension == "json" else _TEXTS)
    kind = draw(
        st.sampled_from(
            [tarfile.REGTYPE] * 12
            + [tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, b"S", b"Z"]
        )
    )
    pax = draw(
        st.sampled_from(
            [{}] * 12
            + [{"comment": "x"}, {"size": "99999999999"}, {"path": "other.jpg"}, {"size": "-1"}, {"path": "../up.jpg"}]
        )
    )
    return name, content, kind, pax


@st.composite
def tars(draw: Callable[..., Any]) -> tuple[bytes, bool]:
    """A tar, and whether it is undamaged and holds nothing but regular files."""
    found = draw(st.lists(members(), max_size=8))
    if draw(st.booleans()):
        found = sorted(found, key=lambda member: member[0])
    kind = draw(st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
    is_plain = True
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind, errors="surrogateescape") as tar:
        for name, content, member_kind, pax in found:
            info = tarfile.TarInfo(name)
            info.size, info.type = len(content), member_kind
            if member_kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
                info.linkname, info.size = "/etc/passwd", 0
            if kind == tarfile.PAX_FORMAT:
                info.pax_headers = dict(pax)
            try:
                tar.addfile(info, io.BytesIO(content))
            except (ValueError, UnicodeError):  # a name that ustar cannot hold
                continue
            is_plain &= member_kind == tarfile.REGTYPE and not (kind == tarfile.PAX_FORMAT and pax) and "\0" not in name
    content = buffer.getvalue()
    if draw(st.integers(0, 2)) == 0:
        changed = draw(damaged(st.just(content)))
        return changed, is_plain and changed == content
    return content, is_plain


def count_samples(content: bytes) -> int:
    """Count the samples of a plain tar, as webdataset groups them: side by side, of one key, no extension twice."""
    count, key, seen = 0, None, set[str]()
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        for member in tar:
            match = _NAME.fullmatch(member.name)
            if match is None:
                continue
            extension = match[2].lower()
            if match[1] != key or extension in seen:
                count, key, seen = count + 1, match[1], set()
            seen.add(extension)
    return count


def read_tar(case: tuple[bytes, bool], folder: Path) -> bool:
    """Read every sample of a tar through the reader of `embed` and `train`, and count what came of each."""
    content, is_plain = case
    path = folder / "case.tar"
    path.write_bytes(content)
    shard = open_shard(str(path))
    entries = shard.index()
    num_read = num_skipped = 0
    for entry in entries:
        if entry.error:
            num_skipped += 1
            continue
        try:
            sample = shard.read(entry.offset, entry.size)
            if sample.image is not None:
                decode_image(sample.image)
            assert sample.key == entry.key
            _ = sample.captions
            num_read += 1
        except BadSample as bad:
            num_skipped += 1
            if not bad.reason:
                raise Lost("a sample without a reason") from bad
    shard.close()
    if num_read + num_skipped != len(entries):
        raise Lost(f"{len(entries)} entries, {num_read} read, {num_skipped} skipped")
    if is_plain and len(entries) != count_samples(content):
        raise Lost(f"{len(entries)} entries where tarfile has {count_samples(content)} samples")
    return True


def embed_tar(case: tuple[bytes, bool], folder: Path) -> bool:
    """Run `distilclip embed` over a tar; the rows of its result are those of the index."""
    path, out = folder / "case.tar", folder / "store"
    path.write_bytes(case[0])
    for old in sorted(out.rglob("*"), reverse=True):
        old.unlink() if old.is_file() else old.rmdir()
    argv = ["embed", "--data", str(path), "--model", str(folder.parent / "teacher"), "--out", str(out)]
    code, _ = command([*argv, "--num-workers", "0", "--device", "cpu", "--max-bad-ratio", "1"])
    if code:
        return False
    result = json.loads((out / "result.json").read_text())
    expected = len(open_shard(str(path)).index())
    counted = result["num_valid"] + result["num_invalid"], sum(result["reasons"].values())
    if (result["num_rows"], *counted) != (expected, expected, result["num_invalid"]):
        raise Lost(f"{expected} entries, {result['num_rows']} rows, {counted[0]} counted, {counted[1]} with a reason")
    return True


DOORS = (
    Door(name="tars, reader", cases=tars(), enter=read_tar, share=0.30),
    Door(name="tars, embed", cases=tars(), enter=embed_tar, share=0.02),
)
