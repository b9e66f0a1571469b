"""Find the published sets under a data root, and say how to get those that are not there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from distilclip import files
from distilclip.sets.catalogue import CATALOGUE, KnownSet
from distilclip.sets.layouts import check_data_root, is_folder, list_folder, split_of

Layout = Literal["archive", "webdataset", "folder"]


@dataclass(frozen=True)
class SetPlace:
    """Hold where a set lies: the folder that its reader takes, and in which layout."""

    layout: Layout
    path: str


def locate(known: KnownSet, data_root: str) -> SetPlace | None:
    """Return the first place that holds the set: the original archive, then a webdataset, then folders of images."""
    for place, marker in _archives(known, data_root):
        if files.exists(marker):
            return place
    for path in _webdatasets(known, data_root):
        if _has_shards(path):
            return SetPlace("webdataset", path)
    for path in _own_folders(known, data_root):
        if _has_splits(path):
            return SetPlace("folder", path)
    return None


def describe_catalogue(data_root: str | None) -> str:
    """Write a paragraph for each set: where it is or was looked for, what it holds, how to get it, size and terms.

    Raises `InputError` for a data root that is no folder.
    """
    if data_root is not None:
        check_data_root(data_root)
    return "\n\n".join(_paragraph(known, data_root) for known in CATALOGUE.values())


def _paragraph(known: KnownSet, data_root: str | None) -> str:
    facts = (_contents(known), known.size, known.licence or "terms: ask its publisher")
    lines = [f"{known.name:22} {'; '.join(fact for fact in facts if fact)}"]
    place = locate(known, data_root) if data_root else None
    if place is not None:
        lines.append(f"    found: {place.path} ({place.layout})")
        return "\n".join(lines)
    if data_root:
        lines.append(f"    not found; looked for {', '.join(places_looked_at(known, data_root))}")
    shards = f"; or the webdataset wds_{known.webdataset[-1]} of clip-benchmark" if known.webdataset else ""
    lines.append(f"    get it: {known.source}{shards}")
    return "\n".join(lines)


def _contents(known: KnownSet) -> str:
    if known.group == "retrieval":
        return f"{known.num_test:,} images with captions"
    train = f"{known.num_train:,} to train, " if known.num_train else ""
    metric = {"top1": "top-1", "mean_per_class": "mean per class"}[known.metric]
    return f"{known.num_classes} classes, {train}{known.num_test:,} to test, {metric}"


def places_looked_at(known: KnownSet, data_root: str) -> list[str]:
    """List every path whose presence would have shown the set."""
    archive = [marker for _, marker in _archives(known, data_root)]
    shards = [files.join(path, "test", "*.tar") for path in _webdatasets(known, data_root)]
    return [*archive, *shards, *(files.join(path, "test", "CLASS") for path in _own_folders(known, data_root))]


def _archives(known: KnownSet, data_root: str) -> Iterator[tuple[SetPlace, str]]:
    """List places of the original layout, each with the path that shows it."""
    for marker in known.archive:
        yield SetPlace("archive", data_root), files.join(data_root, marker)
    for folder in known.folders:
        base = files.join(data_root, folder)
        for marker in (*known.archive, *known.inner):
            yield SetPlace("archive", base), files.join(base, marker)


def _webdatasets(known: KnownSet, data_root: str) -> Iterator[str]:
    for name in known.webdataset:
        yield from (files.join(data_root, form) for form in (f"wds/{name}", f"wds_{name}", f"wds/wds_{name}", name))


def _own_folders(known: KnownSet, data_root: str) -> Iterator[str]:
    if known.group == "retrieval":  # folders of images have no captions
        return iter(())
    return (files.join(data_root, folder) for folder in dict.fromkeys((known.name, *known.folders)))


def _has_shards(path: str) -> bool:
    folder = next((f for f in (files.join(path, "test"), path) if is_folder(f)), None)
    return folder is not None and any(name.endswith(".tar") for name in list_folder(folder)[1])


def _has_splits(path: str) -> bool:
    return is_folder(path) and any(split_of(folder) for folder in list_folder(path)[0])
