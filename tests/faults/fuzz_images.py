"""Damaged pictures of every format."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from PIL import Image, features

from distilclip.data.crops import Crop
from distilclip.data.decode import decode_crop
from distilclip.data.samples import BadSample, decode_image, judge_memory
from tests.conftest import picture
from tests.faults.fuzz_runner import Door, Lost, damaged

MAX_PIXELS = 1 << 20


def _encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pictures() -> list[bytes]:
    """Small pictures in every format and mode that web data has."""
    base = picture(3, (48, 40))
    turned = Image.Exif()
    turned[0x0112] = 6
    found = [_encode(base, "JPEG", quality=q, progressive=p) for q, p in ((30, False), (90, True))]
    found += [_encode(base.convert(mode), "JPEG") for mode in ("L", "CMYK")]
    found += [_encode(base, "JPEG", exif=turned)]
    found += [_encode(base.convert(mode), "PNG") for mode in ("RGB", "RGBA", "P", "L", "1", "I;16")]
    found += [_encode(base, "WEBP"), _encode(base, "WEBP", lossless=True), _encode(base.convert("RGBA"), "WEBP")]
    found += [
        _encode(base.convert("P"), "GIF"),
        _encode(base, "GIF", save_all=True, append_images=[picture(4, (48, 40))]),
    ]
    found += [_encode(base, "BMP"), _encode(base.convert("1"), "BMP")]
    found += [_encode(base, "TIFF", compression=c) for c in (None, "tiff_lzw", "tiff_deflate", "jpeg", "packbits")]
    found += [_encode(base.convert("F"), "TIFF")]
    found += [_encode(base, "JPEG2000")] if features.check("jpg_2000") else []
    found += [_encode(base, "AVIF")] if features.check("avif") else []
    return found


def decode(case: bytes, folder: Path) -> bool:
    """Decode a picture whole, as `embed` does, and as a crop, as `train` does; both agree on whether it can be used."""
    taken: list[bool] = []
    for read in (_decode_whole, _decode_crop):
        try:
            with judge_memory():
                read(case)
            taken.append(True)
        except BadSample as bad:
            if not bad.reason:
                raise Lost("a picture is skipped without a reason") from bad
            taken.append(False)
    return any(taken)


def _decode_whole(data: bytes) -> None:
    image = decode_image(data, max_pixels=MAX_PIXELS)
    if image.mode != "RGB" or not 0 < image.width * image.height <= MAX_PIXELS:
        raise Lost(f"a picture of mode {image.mode} and size {image.size}")


def _decode_crop(data: bytes) -> None:
    def draw(width: int, height: int) -> Crop:
        return Crop(left=0.1, top=0.2, right=0.8, bottom=0.9, flip=width > height)

    (pixels,) = decode_crop(data, [16], draw=draw, max_pixels=MAX_PIXELS)
    if tuple(pixels.shape) != (3, 16, 16):
        raise Lost(f"a crop of shape {tuple(pixels.shape)}")


def _splice(parts: tuple[bytes, bytes, float]) -> bytes:
    first, second, share = parts
    return first[: int(share * len(first))] + second[int(share * len(second)) :]


_WHOLE: st.SearchStrategy[bytes] = st.sampled_from(pictures())
_CASES: st.SearchStrategy[bytes] = st.one_of(
    damaged(_WHOLE), damaged(damaged(_WHOLE)), st.tuples(_WHOLE, _WHOLE, st.floats(0, 1)).map(_splice)
)
DOORS = (Door(name="pictures", cases=_CASES, enter=decode, share=0.25),)
