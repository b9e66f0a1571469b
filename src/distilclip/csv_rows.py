"""Read the rows of a CSV: find its separator and columns, and keep a stray quote to its own row. Imports no numpy."""

from __future__ import annotations

import csv
import itertools
from collections import deque
from collections.abc import Collection, Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Any

from distilclip.errors import InputError, did_you_mean

IMAGE_NAMES = ("filepath", "image", "image_path", "path", "file_name", "filename", "url")
CAPTION_NAMES = ("caption", "title", "text")
SEPARATORS = (",", "\t", ";", "|")


@dataclass(frozen=True, kw_only=True)
class CsvColumns:
    """What a CSV's first line does not tell. The flags are called as open_clip's are."""

    csv_img_key: str | None = None
    """column of a CSV with the image files (default: filepath, image, image_path, path, file_name, or url)"""
    csv_caption_key: str | None = None
    """column of a CSV with the captions (default: caption, title, or text)"""
    csv_separator: str | None = None
    """character between the columns of a CSV, \\t for a tab (default: the one that its first line shows)"""

    def __post_init__(self) -> None:
        if self.csv_separator is not None and len(_character(self.csv_separator)) != 1:
            raise InputError(f"csv_separator is {self.csv_separator!r}; it must be one character, or \\t for a tab.")

    @property
    def is_given(self) -> bool:
        """Whether anything is said at all."""
        return self != CsvColumns()


@dataclass(frozen=True)
class CsvLayout:
    """The separator of a CSV, the names of its columns, and those of the image file and the caption (empty: none)."""

    separator: str
    names: list[str]
    image: str
    caption: str

    def name_values(self, values: Sequence[str]) -> dict[Any, Any]:
        """Return a row by column: None for missing values, and those beyond the columns under the key None."""
        row: dict[Any, Any] = dict(itertools.zip_longest(self.names, values[: len(self.names)]))
        if len(values) > len(self.names):
            row[None] = values[len(self.names) :]
        return row


def find_layout(first_line: str, columns: CsvColumns, *, uri: str) -> CsvLayout:
    """Find separator and columns from the first line: of the separators, the one with which the most names are known.

    A column that is not there is empty in what is returned: `check_layout` says whether it has to be there.
    """
    if columns.csv_separator is not None:
        separators = [_character(columns.csv_separator)]
    else:
        separators = sorted(SEPARATORS, key=lambda s: uri.lower().endswith(".tsv") and s != "\t")
    found = []
    for separator in separators:
        names = [name.strip() for name in next(csv.reader([first_line], delimiter=separator), [])]
        image = _find_name(names, columns.csv_img_key, IMAGE_NAMES)
        caption = _find_name(names, columns.csv_caption_key, CAPTION_NAMES)
        found.append((bool(image) + bool(caption), len(names), CsvLayout(separator, names, image, caption)))
    return max(found, key=lambda tried: tried[:2])[2]  # the first of equals


def check_layout(layout: CsvLayout, columns: CsvColumns, *, uri: str, may_lack: Collection[str] = ()) -> None:
    """Raise `InputError` where there is no column of captions or none of images that there must be.

    `may_lack` (`caption`, `image`) names the one that need not be there, unless `columns` asks for it by name.
    """
    lacks_both = not (layout.caption or layout.image)
    asked = (
        ("caption", columns.csv_caption_key, "caption", layout.caption),
        ("image", columns.csv_img_key, "filepath", layout.image),
    )
    missing = [
        name or usual
        for side, name, usual, column in asked
        if not column and (name or lacks_both or side not in may_lack)
    ]
    if missing:
        hint = f" {did_you_mean(missing[0], layout.names)}" if columns.is_given else ""
        raise InputError(
            f"{uri} has no column {' and no column '.join(missing)}; its first line is {layout.names}.{hint} Name the "
            "columns `filepath` and `caption`, or say which they are: --csv-img-key, --csv-caption-key, "
            "--csv-separator."
        )


def _character(separator: str) -> str:
    return "\t" if separator in ("\\t", "tab") else separator


def _find_name(names: Sequence[str], asked: str | None, usual: Sequence[str]) -> str:
    if asked is not None:
        return asked if asked in names else ""
    lower = {name.lower(): name for name in reversed(names)}
    return next((lower[name] for name in usual if name in lower), "")


@dataclass(frozen=True)
class CsvRecord:
    """The values of a row, its bytes with the blank lines before it, and its lines without them.

    `is_unclosed` says that a quote opens in its first line and is not closed: then only that line is the row.
    """

    values: list[str]
    num_bytes: int
    num_lines: int
    is_unclosed: bool = False


def read_records(lines: Iterator[str], layout: CsvLayout, *, extensions: Set[str]) -> Iterator[CsvRecord]:
    """Yield the rows of a CSV after its first line.

    A quote that is not closed would take all rows up to the next quote into one value. Such a row ends with its own
    line here, and the lines after it are rows again. It shows where the file ends, where something stands behind a
    closing quote, or where the value holds a row: enough columns, and the name of a file with one of `extensions`.
    """
    again: deque[str] = deque()  # lines that a row had taken too many
    taken: list[str] = []

    def feed() -> Iterator[str]:
        while (line := again.popleft() if again else next(lines, None)) is not None:
            taken.append(line)
            yield line

    reader = csv.reader(feed(), delimiter=layout.separator, strict=True)
    while True:
        try:
            values = next(reader, None)
        except csv.Error:
            is_closed, values = False, []
        else:
            if values is None:
                return
            if not values:
                continue  # a blank line
            is_closed = not _holds_rows(taken, layout, extensions)
        blank = sum(1 for _ in itertools.takewhile(lambda line: not line.strip("\r\n"), taken))
        is_unclosed = False
        if not is_closed:
            again.extendleft(reversed(taken[blank + 1 :]))
            del taken[blank + 1 :]
            values = taken[blank].rstrip("\r\n").split(layout.separator)
            is_unclosed = '"' in taken[blank]  # else the line is longer than what the csv module takes
            reader = csv.reader(feed(), delimiter=layout.separator, strict=True)
        num_bytes = sum(len(line.encode("utf-8", "surrogateescape")) for line in taken)
        yield CsvRecord(values, num_bytes, len(taken) - blank, is_unclosed)
        taken.clear()


def _holds_rows(lines: Sequence[str], layout: CsvLayout, extensions: Set[str]) -> bool:
    """Return whether what stands after the first line of a row is another row, with an image file in its column."""
    if not layout.image:
        return False  # nothing tells a row from a line of a caption
    for number, line in enumerate(lines[1:], start=2):
        # The last line closes the quoted value; what stands before that belongs to it.
        inside = line.partition('"')[0] if number == len(lines) else line
        values = inside.split(layout.separator)
        if len(values) >= len(layout.names):
            path = values[layout.names.index(layout.image)].strip().strip('"')
            if path.rpartition(".")[2].lower() in extensions:
                return True
    return False
