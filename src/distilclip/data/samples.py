"""Hold one image-text pair as it lies in a shard, and decode its image."""

from __future__ import annotations

import contextlib
import io
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from distilclip.data.limits import MAX_ASPECT, MAX_CAPTION, MAX_PIXELS

IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "jp2"})
NO_IMAGE = "no image"
"""The reason of a sample without a picture, where it needs one."""
LABEL_EXTENSIONS = frozenset({"cls", "cls.txt"})

# Formats that decode in this process; Pillow's others (EPS calls Ghostscript) have no place in web data.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000")

# How each EXIF orientation is undone (EXIF 2.32, tag 0x0112).
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadSample(Exception):  # noqa: N818  (a verdict on a sample, not a fault of the program)
    """One sample cannot be used. Never fatal by itself.

    `reason` is one of a small fixed set of phrases, so that reasons can be counted; `detail` is what this sample adds
    to it; `where` names the file and the member.
    """

    def __init__(self, reason: str, *, detail: str = "", where: str = "") -> None:
        self.reason, self.detail, self.where = reason, detail, where
        super().__init__(f"{where}: {self.error}" if where else self.error)

    @property
    def error(self) -> str:
        """`reason: detail`, as in the column `error` of a store."""
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


def reason_of(error: str) -> str:
    """Return the countable reason in a value of the column `error`."""
    return error.partition(": ")[0]


@dataclass(frozen=True)
class Sample:
    """What a shard holds of one sample. `caption` is stripped, and None where there is none or it is blank."""

    key: str
    image: bytes | None
    caption: str | None
    meta: dict[str, Any] = field(default_factory=dict)
    label: str | None = None

    @property
    def captions(self) -> list[str]:
        """`caption`, then the others of the lists `captions` and `caption` in the sample's `json` or row, each once.

        Raises `BadSample` where one of them is no text.
        """
        lists = (self.meta.get(name) for name in ("captions", "caption"))
        several = [caption for found in lists if isinstance(found, list) for caption in found]
        found = (clean_caption(caption) for caption in (self.caption, *several))
        return list(dict.fromkeys(text for text in found if text is not None))


@dataclass(frozen=True)
class Entry:
    """Where a sample lies in its shard. `error` says why the index already knows that it is unusable."""

    key: str
    offset: int
    size: int
    error: str = ""


def decode_text(data: bytes, *, name: str, where: str = "") -> str:
    """Decode UTF-8 text and strip it. Raises `BadSample` on bytes that are none."""
    try:
        return data.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise BadSample(f"{name} is not UTF-8", detail=f"byte {error.start}", where=where) from error


def decode_meta(data: bytes, *, where: str = "") -> dict[str, Any]:
    """Parse the object of a `.json` member. Raises `BadSample` where it is none."""
    try:
        meta = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadSample("json does not parse", where=where) from error
    if not isinstance(meta, dict):
        raise BadSample("json is no object", where=where)
    return meta


def clean_caption(caption: object, *, where: str = "") -> str | None:
    """Return the first `MAX_CAPTION` characters of a caption, None where it is absent or blank.

    Raises `BadSample` on what no tokenizer could take.
    """
    if caption is None:
        return None
    if not isinstance(caption, str):
        raise BadSample("caption is no text", detail=type(caption).__name__, where=where)
    caption = caption.strip()[:MAX_CAPTION]  # before it is cleaned, which takes quadratic time
    try:
        caption.encode("utf-8")
    except UnicodeEncodeError as error:  # a lone surrogate, from "\\ud800" in JSON or a wrong encoding in a CSV
        raise BadSample("caption is not UTF-8", detail=f"character {error.start}", where=where) from error
    return caption.rstrip() or None


def first_caption(*candidates: object, where: str = "") -> str | None:
    """Return the first caption that is not blank; a list stands for the captions in it. `BadSample` as above."""
    for candidate in candidates:
        for caption in candidate if isinstance(candidate, list) else [candidate]:
            if (text := clean_caption(caption, where=where)) is not None:
                return text
    return None


@contextlib.contextmanager
def judge_memory(where: str = "") -> Iterator[None]:
    """Make a lack of memory for one sample a verdict on that sample, since it would come again each time.

    Raises `BadSample` for MemoryError, and for the OverflowError of sizes that no memory holds.
    """
    try:
        yield
    except (MemoryError, OverflowError) as error:
        raise BadSample("no memory for it", where=where) from error


def decode_image(
    data: bytes, *, max_pixels: int = MAX_PIXELS, draft: tuple[int, int] | None = None, where: str = ""
) -> Image.Image:
    """Decode an image file to upright 8-bit RGB.

    EXIF orientation is applied; transparency is composited on white; CMYK, palette, grey and 16-bit images are
    converted; of an animation the first frame is taken. ICC profiles are ignored, as CLIP's own pipelines do.

    Args:
        data: the bytes of the file.
        max_pixels: the largest width x height that is decoded at all; read from the header, before any pixel.
        draft: let the JPEG decoder skip detail while both sides stay at least this large (width, height).
        where: the file and member, for the message.

    Raises:
        BadSample: not an image, cut off, damaged, too many pixels, or more than `MAX_ASPECT` times as long as wide.
    """
    return load_image(open_image(data, max_pixels=max_pixels, where=where), draft=draft, where=where)


def open_image(data: bytes, *, max_pixels: int = MAX_PIXELS, where: str = "") -> Image.Image:
    """Open an image file and read only its header. Raises `BadSample` as `decode_image` does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of large images, decided below, and of odd metadata
        try:
            image = Image.open(io.BytesIO(data), formats=_formats())
        except Image.UnidentifiedImageError as error:
            raise BadSample("not an image", where=where) from error
        except Image.DecompressionBombError as error:
            raise BadSample("too many pixels", where=where) from error
        except Exception as error:  # on hostile bytes Pillow's plugins raise nearly anything
            raise _damaged(error, where) from error
    width, height = image.size
    if width * height > max_pixels:
        raise BadSample("too many pixels", detail=f"{width} x {height}", where=where)
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise BadSample("too elongated", detail=f"{width} x {height}", where=where)
    return image


def load_image(image: Image.Image, *, draft: tuple[int, int] | None = None, where: str = "") -> Image.Image:
    """Return the pixels of an opened image, upright, as 8-bit RGB. Raises `BadSample` as `decode_image` does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if draft is not None:
                image.draft("RGB", draft)
            image.load()
            transpose = how_to_turn(image)
            return _to_rgb(image if transpose is None else image.transpose(transpose))
        except BadSample as error:
            raise BadSample(error.reason, detail=error.detail, where=where) from error
        except MemoryError as error:
            raise BadSample("no memory for it", where=where) from error
        except Exception as error:  # as above
            raise _damaged(error, where) from error


def how_to_turn(image: Image.Image) -> Image.Transpose | None:
    """Return what makes an image upright, by its EXIF orientation; None where it is upright."""
    if "exif" not in image.info:  # TIFF is upright once loaded
        return None
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged EXIF is common in good photographs, and viewers ignore it
        return None
    return _TRANSPOSE.get(orientation)  # type: ignore[arg-type]


def _damaged(error: Exception, where: str) -> BadSample:
    return BadSample("truncated image" if "truncated" in str(error).lower() else "damaged image", where=where)


@lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion clips it to white
        levels = np.clip(np.asarray(image).astype(np.int64), 0, 65535) // 257
        return Image.fromarray(levels.astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise BadSample("unsupported pixel format", detail="32-bit float")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")
