"""A contact sheet: pictures in rows, each with a line of text below."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

MARGIN, LINE = 8, 16


def contact_sheet(
    pictures: Sequence[Image.Image], lines: Sequence[str], *, heading: str, size: int, columns: int
) -> bytes:
    """A PNG of the pictures, each reduced to fit a square of `size` pixels, never enlarged, its line of text below.

    Text that does not fit is cut. `columns` pictures stand beside each other.
    """
    columns = min(columns, len(pictures))
    cell = (size + MARGIN, size + LINE + MARGIN)
    rows = math.ceil(len(pictures) / columns)
    width, height = MARGIN + columns * cell[0], 2 * MARGIN + LINE + rows * cell[1]
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=12)
    draw.text((MARGIN, MARGIN), _fit(heading, width - 2 * MARGIN, font), "black", font)
    for i, (picture, line) in enumerate(zip(pictures, lines, strict=True)):
        left, top = MARGIN + i % columns * cell[0], 2 * MARGIN + LINE + i // columns * cell[1]
        small = picture.copy()
        small.thumbnail((size, size), Image.Resampling.LANCZOS)
        sheet.paste(small, (left + (size - small.width) // 2, top + (size - small.height) // 2))
        draw.text((left, top + size + 1), _fit(line, size, font), "black", font)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _fit(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    text = " ".join(text.split())  # a file's name may hold line breaks
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text}..."
