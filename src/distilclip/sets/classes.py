"""Read class names and prompt templates of a set, and map the set's own labels to class numbers by name."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from distilclip import files
from distilclip.errors import InputError, did_you_mean

DEFAULT_TEMPLATES = ("a photo of a {}.",)
CLASSNAMES_FILE = "classnames.txt"


@dataclass(frozen=True)
class Classes:
    """Hold the classes of a set: what its folders or `.cls` files call them, and the names that prompts use.

    `source` is the file or folder they come from, for messages. `named` is False where nothing but numbers is known, so
    that no prompt can be written.
    """

    labels: tuple[str, ...]
    names: tuple[str, ...]
    source: str
    named: bool = True

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def _by_label(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for index, label in enumerate(self.labels):
            found.setdefault(_plain(label), []).append(index)
        return found

    def index(self, label: str, *, where: str) -> int:
        """Return the class that `label` means: by name (ignoring case, `_` and `-`), else by its number from 0.

        Raises `InputError` for an unknown name, a number out of range, or a name that several classes have.
        """
        found = self._by_label.get(_plain(label), [])
        if len(found) == 1:
            return found[0]
        if found:
            raise InputError(
                f"{where}: {len(found)} classes in {self.source} are called {label!r}. "
                "Write each line there as label, tab, name."
            )
        if not label.isdecimal():
            raise InputError(
                f"{where}: the label {label!r} is no class in {self.source}. {did_you_mean(label, self.labels)}"
            )
        if int(label) >= len(self):
            raise InputError(
                f"{where}: the label {label} is out of range: {self.source} has {len(self)} classes, numbered from 0."
            )
        return int(label)


def read_classes(folder: str, observed: Iterable[str]) -> Classes:
    """Read the classes from `folder/classnames.txt`, one name a line (or label, tab, name); else take those observed.

    Observed labels are sorted (numbers as numbers), and their names are the labels with blanks for `_`.
    """
    path = files.join(folder, CLASSNAMES_FILE)
    if not files.exists(path):
        labels = sorted(
            set(observed), key=lambda label: (not label.isdecimal(), int(label) if label.isdecimal() else 0, label)
        )
        names = tuple(label.replace("_", " ") for label in labels)
        return Classes(tuple(labels), names, folder, named=not all(label.isdecimal() for label in labels))
    lines = [line.partition("\t") for line in read_lines(path)]
    if not lines:
        raise InputError(f"{path} is empty; it should name one class a line.")
    return Classes(tuple(label for label, _, _ in lines), tuple(name or label for label, _, name in lines), path)


def read_templates(path: str) -> tuple[str, ...]:
    """Read prompt templates, one a line, each with `{}` (or `{c}`, as CLIP_benchmark writes it) where the name goes."""
    templates = tuple(line.replace("{c}", "{}") for line in read_lines(path))
    check_templates(templates, source=path)
    return templates


def check_templates(templates: Sequence[str], *, source: str) -> None:
    """Raise `InputError` for no templates at all, or one without a place for the name."""
    if not templates:
        raise InputError(f"{source} holds no prompt template. Write one a line, such as 'a photo of a {{}}.'")
    for template in templates:
        if "{}" not in template:
            raise InputError(f"{source}: the template {template!r} has no {{}} where the class name goes.")


def templates_digest(templates: Sequence[str]) -> str:
    """Return the SHA-256 of the templates, one a line. Scores with equal digests can be compared."""
    return hashlib.sha256("".join(f"{template}\n" for template in templates).encode()).hexdigest()


def classes_digest(classes: Classes) -> str:
    """Return the SHA-256 of the names that prompts are written with, a line each: class number, tab, name."""
    lines = (f"{number}\t{name}\n" for number, name in enumerate(classes.names))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def read_lines(path: str) -> tuple[str, ...]:
    """Read the lines of a UTF-8 text file, stripped, without blank ones."""
    try:
        text = files.read_bytes(path).decode("utf-8-sig")
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error}). Save it as UTF-8.") from error
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def assert_every_class(classes: Classes, observed: Iterable[int], *, where: str) -> None:
    """Raise `InputError` for classes without a sample: a name nobody bears is nearly always a spelling mistake."""
    counts = Counter(observed)
    empty = [classes.names[i] for i in range(len(classes)) if not counts[i]]
    if empty:
        shown = ", ".join(repr(name) for name in empty[:5]) + (", ..." if len(empty) > 5 else "")
        raise InputError(
            f"{where}: {len(empty)} of {len(classes)} classes have no image: {shown}. "
            f"Add images, or take the names out of {classes.source}."
        )


def _plain(label: str) -> str:
    return " ".join(label.replace("_", " ").replace("-", " ").casefold().split())
