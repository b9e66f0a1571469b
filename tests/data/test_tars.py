from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

from distilclip.data.samples import BadSample, decode_image
from distilclip.data.shards import open_shard
from distilclip.data.tars import TarShard
from distilclip.errors import InputError
from tests.conftest import encoded, picture, write_tar

JPEG = encoded(picture(0))


def pair(key: str, caption: str = "a picture") -> list[tuple[str, bytes]]:
    return [(f"{key}.jpg", JPEG), (f"{key}.txt", caption.encode())]


def indexed(path: str) -> tuple[TarShard, list[tuple[str, str]]]:
    shard = TarShard(path)
    return shard, [(entry.key, entry.error) for entry in shard.index()]


def tar_bytes(members: list[tuple[str, bytes]], format: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def test_samples_as_img2dataset_writes_them(tmp_path: Path) -> None:
    meta = {"caption": "from json", "url": "https://example.org/a.jpg", "width": 40}
    members = [
        *pair("000000000", "  a red circle\n"),
        ("000000000.json", json.dumps(meta).encode()),
        ("000000001.PNG", encoded(picture(1), "PNG")),
        ("000000001.json", json.dumps(meta).encode()),
        ("000000002.webp", encoded(picture(2), "WEBP")),
        ("000000002.cls", b"17\n"),
    ]
    shard = open_shard(write_tar(tmp_path / "00000.tar", members))
    samples = [shard.read(entry.offset, entry.size) for entry in shard.index()]
    assert [s.key for s in samples] == ["000000000", "000000001", "000000002"]
    assert [s.caption for s in samples] == ["a red circle", "from json", None]
    assert [s.label for s in samples] == [None, None, "17"]
    assert samples[0].meta == meta
    assert samples[0].image == JPEG
    assert [decode_image(s.image or b"").size for s in samples] == [(40, 32)] * 3
    assert not shard.truncated


def test_one_range_read_gives_the_whole_sample(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [*pair("0"), *pair("1"), *pair("2")])
    first, second, _ = TarShard(path).index()
    assert first.offset == 0
    assert second.offset == first.offset + first.size
    assert second.size == 2 * 512 + -(-len(JPEG) // 512) * 512 + 512
    span = Path(path).read_bytes()[second.offset : second.offset + second.size]
    with tarfile.open(fileobj=io.BytesIO(span)) as tar:
        assert tar.getnames() == ["1.jpg", "1.txt"]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names_as_every_tar_writes_them(tmp_path: Path, format: int) -> None:
    folder = "x" * 80 + "/" + ("y" * 60 if format == tarfile.USTAR_FORMAT else "y" * 200 + "/фото")
    keys = [f"{folder}/first", "short", f"{folder}/last"]
    path = tmp_path / "long.tar"
    path.write_bytes(tar_bytes([member for key in keys for member in pair(key, key)], format))
    shard, found = indexed(str(path))
    assert found == [(key, "") for key in keys]
    for entry in shard.index():
        sample = shard.read(entry.offset, entry.size)
        assert (sample.key, sample.caption, sample.image) == (entry.key, entry.key, JPEG)


def test_reads_like_tarfile_on_random_tars(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for trial in range(20):
        members = []
        for row in range(int(random.integers(1, 8))):
            key = f"{trial}/" + "k" * int(random.integers(1, 150)) + str(row)
            members.append((f"{key}.jpg", random.bytes(int(random.integers(0, 2000)))))
            members.append((f"{key}.txt", b"t" * int(random.integers(1, 600))))
        format = (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)[trial % 2]
        path = tmp_path / f"{trial}.tar"
        path.write_bytes(tar_bytes(members, format))
        shard = TarShard(str(path))
        found = [shard.read(entry.offset, entry.size) for entry in shard.index()]
        with tarfile.open(path) as tar:
            contents = {name: tar.extractfile(name).read() for name in tar.getnames()}  # type: ignore[union-attr]
        assert [(f"{s.key}.jpg", s.image) for s in found] == [m for m in contents.items() if m[0].endswith("jpg")]
        assert [(s.caption or "").encode() for s in found] == [v for k, v in contents.items() if k.endswith("txt")]


def test_every_cut_keeps_the_rows_before_it(tmp_path: Path) -> None:
    whole = tar_bytes([*pair("0"), *pair("1"), *pair("2")])
    (tmp_path / "whole.tar").write_bytes(whole)
    ends = [entry.offset + entry.size for entry in TarShard(str(tmp_path / "whole.tar")).index()]
    for cut in range(600, ends[-1], 97):
        path = tmp_path / "cut.tar"
        path.write_bytes(whole[:cut])
        shard, found = indexed(str(path))
        assert shard.truncated, cut
        num_whole = sum(end <= cut for end in ends)
        assert found[:num_whole] == [(str(i), "") for i in range(num_whole)], cut
        assert len(found) <= num_whole + 2, cut
        for (_, error), entry in zip(found, shard.index(), strict=True):
            if not error and entry.offset + entry.size <= cut:
                assert shard.read(entry.offset, entry.size).image == JPEG


def test_a_cut_image_is_an_error_row_and_a_missing_end_mark_is_reported(tmp_path: Path) -> None:
    whole = tar_bytes([*pair("0"), *pair("1")])
    path = tmp_path / "cut.tar"
    second = -(-len(JPEG) // 512) * 512 + 3 * 512
    path.write_bytes(whole[: second + 700])
    shard, found = indexed(str(path))
    assert found == [("0", ""), ("1", "tar cut")]
    path.write_bytes(whole[:second])
    shard, found = indexed(str(path))
    assert found == [("0", "")]
    assert shard.truncated


def test_a_damaged_header_ends_the_tar_there(tmp_path: Path) -> None:
    data = bytearray(tar_bytes([*pair("0"), *pair("1"), *pair("2")]))
    third = 2 * (-(-len(JPEG) // 512) * 512 + 3 * 512)
    data[third + 10] ^= 0xFF
    path = tmp_path / "damaged.tar"
    path.write_bytes(data)
    shard, found = indexed(str(path))
    assert found[0] == ("0", "")
    assert found[1] == ("1", "")
    assert found[2] == ("", f"tar damaged: wrong checksum at byte {third}")
    assert shard.truncated


@pytest.mark.parametrize("content", [b"", b"\0" * 10240])
def test_an_empty_tar_is_an_error_with_a_remedy(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "empty.tar"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"empty\.tar holds no sample.*remove the file"):
        TarShard(str(path)).index()


def test_a_tar_of_other_files_is_an_error(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "other.tar", [("README", b"hello"), (".hidden", b""), ("folder/._0.jpg", b"mac")])
    with pytest.raises(InputError, match="holds no sample"):
        TarShard(path).index()


def test_a_compressed_tar_says_to_decompress(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w:gz") as tar:
        info = tarfile.TarInfo("0.jpg")
        info.size = len(JPEG)
        tar.addfile(info, io.BytesIO(JPEG))
    with pytest.raises(InputError, match=r"a\.tar is no tar file.*decompress"):
        TarShard(str(tmp_path / "a.tar")).index()


def test_the_second_of_two_equal_keys_is_an_error_row(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [*pair("0", "first"), *pair("1"), *pair("0", "second"), *pair("1")])
    shard, found = indexed(path)
    assert found == [("0", ""), ("1", ""), ("0", "duplicate key"), ("1", "duplicate key")]
    entry = shard.index()[0]
    assert shard.read(entry.offset, entry.size).caption == "first"


def test_adjacent_equal_keys_do_not_merge(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [*pair("0", "first"), *pair("0", "second")])
    assert indexed(path)[1] == [("0", ""), ("0", "duplicate key")]


def test_names_that_leave_the_folder_are_error_rows(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [*pair("/etc/0"), *pair("../1"), *pair("a/../../2"), *pair("a..b/3")])
    assert [error for _, error in indexed(path)[1]] == ["unsafe member name"] * 3 + [""]


def test_a_name_that_is_no_utf8_is_an_error_row_with_a_printable_key(tmp_path: Path) -> None:
    data = tar_bytes([*pair("caf?")], tarfile.USTAR_FORMAT).replace(b"caf?", b"caf\xe9")
    patched = bytearray(data)
    for offset in range(0, len(patched), 512):  # write the checksums anew
        if patched[offset + 257 : offset + 262] == b"ustar":
            patched[offset + 148 : offset + 156] = b" " * 8
            patched[offset + 148 : offset + 156] = b"%06o\0 " % sum(patched[offset : offset + 512])
    path = tmp_path / "a.tar"
    path.write_bytes(patched)
    assert indexed(str(path))[1] == [("caf\\xe9", "member name is not UTF-8")]


def test_a_sample_without_image_is_an_error_row(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("0.txt", b"only words"), *pair("1")])
    assert indexed(path)[1] == [("0", "no image"), ("1", "")]


def test_bad_members_are_bad_samples_that_name_file_and_key(tmp_path: Path) -> None:
    members = [
        *[("0.jpg", JPEG), ("0.txt", b"\xff\xfe caption")],
        *[("1.jpg", JPEG), ("1.json", b"{")],
        *[("2.jpg", JPEG), ("2.json", b'{"caption": 5}')],
        *[("3.jpg", JPEG), ("3.txt", b"  ")],
    ]
    shard = TarShard(write_tar(tmp_path / "a.tar", members))
    reasons = []
    for entry in shard.index()[:3]:
        with pytest.raises(BadSample, match=rf"a\.tar: {entry.key}: ") as caught:
            shard.read(entry.offset, entry.size)
        reasons.append(caught.value.reason)
    assert reasons == ["caption is not UTF-8", "json does not parse", "caption is no text"]
    last = shard.index()[3]
    assert shard.read(last.offset, last.size).caption is None


def test_members_that_are_no_files_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", pax_headers={"comment": "a global header"}) as tar:
        for kind, name in ((tarfile.DIRTYPE, "a.d"), (tarfile.SYMTYPE, "0.jpg"), (tarfile.LNKTYPE, "0.png")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "elsewhere"
            tar.addfile(info)
        for name, content in pair("1"):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    shard, found = indexed(str(path))
    assert found == [("1", "")]
    entry = shard.index()[0]
    assert shard.read(entry.offset, entry.size).image == JPEG


def test_reading_where_nothing_was_indexed_says_that_the_file_changed(tmp_path: Path) -> None:
    shard = TarShard(write_tar(tmp_path / "a.tar", pair("0")))
    with pytest.raises(InputError, match=r"a\.tar has no sample at byte 512.*indexed"):
        shard.read(512, 512)


def test_a_remote_tar_reads_alike(tmp_path: Path) -> None:
    local = write_tar(tmp_path / "a.tar", [*pair("0", "zero"), *pair("1", "one")])
    fsspec.filesystem("memory").put(local, "/tars/a.tar")
    shard, here = TarShard("memory://tars/a.tar"), TarShard(local)
    assert shard.index() == here.index()
    assert not shard.truncated
    for entry in here.index():
        assert shard.read(entry.offset, entry.size) == here.read(entry.offset, entry.size)


def test_mixed_pictures_written_by_plain_tarfile(tmp_path: Path) -> None:
    """jpg, png and webp; EXIF rotation, CMYK, palette, grey: all decode to upright RGB of the size they show."""
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = io.BytesIO()
    picture(0).transpose(Image.Transpose.ROTATE_90).save(turned, "JPEG", exif=exif)
    members = [
        ("turned.jpg", turned.getvalue()),
        ("cmyk.jpg", encoded(picture(1).convert("CMYK"))),
        ("grey.jpg", encoded(picture(2).convert("L"))),
        ("palette.png", encoded(picture(3).convert("P"), "PNG")),
        ("alpha.png", encoded(picture(4).convert("RGBA"), "PNG")),
        ("small.webp", encoded(picture(5), "WEBP")),
    ]
    shard = TarShard(write_tar(tmp_path / "mixed.tar", members))
    images = [decode_image(shard.read(e.offset, e.size).image or b"") for e in shard.index()]
    assert [(image.mode, image.size) for image in images] == [("RGB", (40, 32))] * 6


def test_a_suffix_that_no_reader_has_is_an_error() -> None:
    with pytest.raises(InputError, match=r"not \.zip"):
        open_shard("a.zip")
