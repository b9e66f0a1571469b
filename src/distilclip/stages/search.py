"""Find the pictures of a folder that fit some words best, with an exported ONNX model and without torch."""

from __future__ import annotations

import contextlib
import io
import math
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.table import Table

from distilclip import files, stage_folder
from distilclip.configs.search import Config
from distilclip.data.samples import IMAGE_EXTENSIONS, BadSample, Entry, decode_image
from distilclip.data.shards import Shard, find_shards, open_shard
from distilclip.errors import InputError

MARGIN, LINE = 8, 16  # of the sheet, in pixels


def main(config: Config) -> dict[str, Any]:
    """Embed the pictures and the words; list the best matches, and draw them on a sheet where there is an `out`."""
    from distilclip.export.onnx_runtime import batched, open_onnx  # of the extra `onnx`, which Config has asked for

    folder = None
    if config.out:
        folder = stage_folder.open_folder(config.out, stage="search", config=config, inputs=config.inputs())
    if folder is not None and folder.finished:
        _print(folder.result())
        return folder.result()
    model = open_onnx(config.model, precision=config.precision)
    unreadable: list[dict[str, str]] = []
    best: list[tuple[float, str, Image.Image]] = []
    num_pictures = 0
    words = model.encode_texts([config.query])[0]
    for batch in batched(_pictures(config.pictures, unreadable), config.batch_size):
        names, pictures = zip(*batch, strict=True)
        similarity = model.encode_images(pictures) @ words
        num_pictures += len(batch)
        for i in np.argsort(-similarity, kind="stable")[: config.num_matches]:
            small = pictures[i].copy()
            small.thumbnail((config.thumbnail_size, config.thumbnail_size))
            best.append((float(similarity[i]), names[i], small))
        best = sorted(best, key=lambda match: (-match[0], match[1]))[: config.num_matches]
    if not best:
        raise InputError(f"{config.pictures} holds no readable picture ({len(unreadable)} unreadable ones).")
    matches = [{"picture": name, "similarity": round(similarity, 6)} for similarity, name, _ in best]
    result = {"query": config.query, "num_pictures": num_pictures, "unreadable": unreadable, "matches": matches}
    _print(result)
    if folder is None:
        return {"stage": "search", **result}
    lines = [f"{similarity:.3f} {os.path.basename(name)}" for similarity, name, _ in best]
    sheet = contact_sheet(
        [picture for _, _, picture in best],
        lines,
        heading=f"{model.name}: {config.query}",
        size=config.thumbnail_size,
        columns=config.columns,
    )
    files.write_bytes(folder.child("matches.png"), sheet)
    return folder.finish(result)


def _pictures(source: str, unreadable: list[dict[str, str]]) -> Iterator[tuple[str, Image.Image]]:
    """Yield name and picture of every file, in the order of names; files that fail are added to `unreadable`.

    A folder without pictures is one of shards.
    """
    is_folder = not files.is_url(source) and os.path.isdir(source)
    for name, read in _files(source) if is_folder and any(_files(source)) else _samples(source):
        try:
            yield name, decode_image(read(), where=name)
        except BadSample as error:
            unreadable.append({"picture": name, "reason": error.error})


def _files(folder: str) -> Iterator[tuple[str, Callable[[], bytes]]]:
    for parent, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            if name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS:
                path = os.path.join(parent, name)
                # A name that is not UTF-8 can be neither printed nor written.
                name = os.fsencode(os.path.relpath(path, folder)).decode(errors="backslashreplace")
                yield name, partial(files.read_bytes, path)


def _samples(pattern: str) -> Iterator[tuple[str, Callable[[], bytes]]]:
    for uri in find_shards(pattern):
        name = os.path.basename(uri.rstrip("/"))
        with contextlib.closing(open_shard(uri)) as shard:
            for entry in shard.index():
                yield f"{name}/{entry.key}", partial(_image, shard, entry)


def _image(shard: Shard, entry: Entry) -> bytes:
    if entry.error:
        raise BadSample(entry.error)
    image = shard.read(entry.offset, entry.size).image
    if image is None:
        raise BadSample("no image")
    return image


def _print(result: dict[str, Any]) -> None:
    table = Table("similarity", "picture", title=f"{result['query']} in {result['num_pictures']} pictures")
    for match in result["matches"]:
        table.add_row(f"{match['similarity']:.3f}", match["picture"])
    console = Console(highlight=False, markup=False, emoji=False)
    console.print(table)
    if result["unreadable"]:
        console.print(f"{len(result['unreadable'])} pictures could not be read.")


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
