"""What `distilclip evaluate --list` says of every published set."""

from __future__ import annotations

from distilclip.evaluate.catalogue import CATALOGUE
from distilclip.evaluate.folders import check_data_root
from distilclip.evaluate.known_set import KnownSet
from distilclip.evaluate.known_sets import locate, places_looked_at


def describe_catalogue(data_root: str | None) -> str:
    """A paragraph for each set: found or not and where, what it holds, how to get it, its size and its terms.

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
    rule = f", {known.rule}" if known.rule else ""
    return f"{known.num_classes} classes, {train}{known.num_test:,} to test, {metric}{rule}"
