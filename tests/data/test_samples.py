from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from distilclip.data.samples import (
    BadSample,
    Sample,
    clean_caption,
    decode_image,
    decode_meta,
    decode_text,
    first_caption,
    judge_memory,
    reason_of,
)
from tests.conftest import encoded, picture


def reason(data: bytes, **options: int) -> str:
    with pytest.raises(BadSample) as caught:
        decode_image(data, where="a.tar: 7", **options)
    assert str(caught.value).startswith("a.tar: 7: ")
    return caught.value.reason


def png_header_claiming(width: int, height: int) -> bytes:
    """A PNG whose header claims a size that its few bytes do not hold."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_every_format_decodes_to_rgb(format: str) -> None:
    image = decode_image(encoded(picture(3), format))
    assert image.mode == "RGB"
    assert image.size == (40, 32)
    if format in ("PNG", "BMP", "TIFF"):
        assert np.array_equal(np.asarray(image), np.asarray(picture(3)))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_rotation_is_undone(orientation: int, format: str) -> None:
    """A red corner at the top left of the upright picture, saved as a camera held in every way would."""
    upright = Image.new("RGB", (40, 24), "white")
    upright.paste("red", (0, 0, 16, 12))
    stored = {
        1: upright,
        2: upright.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: upright.transpose(Image.Transpose.ROTATE_180),
        4: upright.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: upright.transpose(Image.Transpose.TRANSPOSE),
        6: upright.transpose(Image.Transpose.ROTATE_90),  # shown by turning it 90 degrees clockwise
        7: upright.transpose(Image.Transpose.TRANSVERSE),
        8: upright.transpose(Image.Transpose.ROTATE_270),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    stored.save(buffer, format, exif=exif)
    decoded = decode_image(buffer.getvalue())
    assert decoded.size == (40, 24)
    assert decoded.getpixel((3, 3))[0] > 200
    assert decoded.getpixel((3, 3))[1] < 60
    assert min(decoded.getpixel((36, 20))) > 200


def test_damaged_exif_leaves_the_picture_as_it_is() -> None:
    jpeg = encoded(picture(1))
    exif = b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\xff" * 20
    data = jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + jpeg[2:]
    assert decode_image(data).size == (40, 32)


@pytest.mark.parametrize("mode", ["CMYK", "L", "1", "P", "YCbCr"])
def test_colour_spaces_are_converted(mode: str) -> None:
    format = "JPEG" if mode in ("CMYK", "YCbCr") else "PNG"
    grey = Image.new("RGB", (16, 16), (255, 255, 255)).convert(mode)
    image = decode_image(encoded(grey, format))
    assert image.mode == "RGB"
    assert min(image.getpixel((8, 8))) >= 250


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparency_shows_white(mode: str) -> None:
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0)).convert("LA" if mode == "LA" else "RGBA")
    if mode == "PA":
        clear = Image.new("P", (8, 8))
        clear.info["transparency"] = 0
    assert decode_image(encoded(clear, "PNG")).getpixel((4, 4)) == (255, 255, 255)


def test_half_transparent_red_on_white_is_pink() -> None:
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 128))
    assert decode_image(encoded(image, "PNG")).getpixel((1, 1)) == (255, 127, 127)


def test_sixteen_bit_grey_is_scaled_and_not_clipped() -> None:
    levels = np.array([[0, 257 * 100], [257 * 200, 65535]], np.uint16)
    image = decode_image(encoded(Image.fromarray(levels), "PNG"))
    assert [image.getpixel(at)[0] for at in ((0, 0), (1, 0), (0, 1), (1, 1))] == [0, 100, 200, 255]


def test_an_animation_gives_its_first_frame() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "GIF", save_all=True, append_images=[Image.new("RGB", (8, 8), "blue")])
    assert decode_image(buffer.getvalue()).getpixel((0, 0)) == (255, 0, 0)


def test_a_truncated_jpeg_is_named() -> None:
    data = encoded(picture(1, (160, 120)))
    assert reason(data[: len(data) // 2]) == "truncated image"


@pytest.mark.parametrize("data", [b"", b"<html>not found</html>", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n"])
def test_what_is_no_image_is_named(data: bytes) -> None:
    assert reason(data) == "not an image"


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF"])
def test_any_cut_or_changed_byte_gives_an_image_or_a_reason(format: str) -> None:
    def verdict(broken: bytes) -> str:
        try:
            return decode_image(broken).mode
        except BadSample as error:
            return error.reason

    data = encoded(picture(1), format)
    random = np.random.default_rng(0)
    for _ in range(60):
        broken = bytearray(data[: random.integers(1, len(data) + 1)])
        broken[random.integers(len(broken))] = random.integers(256)
        reasons = ("truncated image", "damaged image", "not an image", "too many pixels", "too elongated")
        assert verdict(bytes(broken)) in ("RGB", *reasons)


def test_a_bomb_is_refused_from_its_header() -> None:
    assert reason(png_header_claiming(20_000, 20_000)) == "too many pixels"
    assert reason(png_header_claiming(10_000, 9_000)) == "too many pixels"
    assert reason(encoded(picture(1)), max_pixels=40 * 32 - 1) == "too many pixels"
    assert decode_image(encoded(picture(1)), max_pixels=40 * 32).size == (40, 32)


def test_a_draft_keeps_at_least_the_asked_size() -> None:
    image = decode_image(encoded(picture(1, (400, 320))), draft=(100, 80))
    assert image.size == (100, 80)


def test_captions_in_any_script_survive_and_blank_ones_are_none() -> None:
    for caption in ("солнце", "太陽が昇る", "शुभ प्रभात", "👩🏽‍🦼 emoji", "a" * 10_000):
        assert clean_caption(decode_text(f" {caption}\n".encode(), name="caption")) == caption
    assert clean_caption("  \n") is None
    assert clean_caption(None) is None


def test_text_that_is_none_is_named() -> None:
    with pytest.raises(BadSample, match="caption is not UTF-8"):
        decode_text("naïve".encode("latin-1"), name="caption")
    with pytest.raises(BadSample, match="caption is not UTF-8"):
        clean_caption("\ud800")
    with pytest.raises(BadSample, match="caption is no text: list"):
        clean_caption(["a", "b"])


def test_json_that_is_no_object_is_named() -> None:
    assert decode_meta(b'{"caption": "a cat"}') == {"caption": "a cat"}
    for data in (b'{"caption"', b"\xff\xfe", b"[" * 100_000):
        with pytest.raises(BadSample, match="json does not parse"):
            decode_meta(data)
    with pytest.raises(BadSample, match="json is no object"):
        decode_meta(b"[1, 2]")


def test_the_reason_of_an_error_leaves_out_its_detail() -> None:
    error = BadSample("too many pixels", detail="9 x 9", where="a.tar: 1").error
    assert error == "too many pixels: 9 x 9"
    assert reason_of(error) == "too many pixels"


def test_a_thin_picture_is_refused_from_its_header() -> None:
    assert reason(encoded(Image.new("P", (1, 20_000)), "GIF")) == "too elongated"
    assert reason(encoded(Image.new("RGB", (101, 1)), "PNG")) == "too elongated"
    assert decode_image(encoded(Image.new("RGB", (100, 1)), "PNG")).size == (100, 1)


@pytest.mark.parametrize("error", [MemoryError(), OverflowError("size does not fit in an int")])
def test_a_lack_of_memory_is_a_verdict_on_the_sample(error: Exception) -> None:
    with pytest.raises(BadSample, match=r"a\.tar: 0: no memory for it"), judge_memory("a.tar: 0"):
        raise error


def test_long_captions_are_cut_before_anything_reads_them() -> None:
    assert clean_caption("  " + "&amp;" * 20_000) == "&amp;" * 2_000
    assert clean_caption("a" * 9_999 + " b") == "a" * 9_999  # no blank is left at the cut


def test_of_several_captions_the_first_that_says_something_counts() -> None:
    assert first_caption(None, ["", " two ", "three"]) == "two"
    assert first_caption("one", ["two"]) == "one"
    assert first_caption([], None, []) is None
    assert Sample("k", None, "one", {"captions": ["two", "one"], "caption": ["three"]}).captions == [
        "one",
        "two",
        "three",
    ]
    with pytest.raises(BadSample, match="caption is no text: int"):
        first_caption([5])
