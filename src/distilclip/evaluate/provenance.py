"""Compute digests of what scores are made from, so that scores of other files are never reused.

Small files and weights count by their content, the files of a set by name and size.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence

from distilclip import files
from distilclip.models.clip import WEIGHTS_FILE
from distilclip.models.weights import CONFIG_FILE
from distilclip.sets.catalogue import CATALOGUE
from distilclip.sets.layouts import folder_of, is_folder, list_folder
from distilclip.sets.locate import locate
from distilclip.sets.specs import parse_spec

TEXT_SUFFIXES = (".txt", ".json", ".csv", ".tsv", ".md")
MOST_TEXT_BYTES = 1 << 20  # of a larger text, too, only the size counts
MODEL_SUFFIXES = (".json", ".safetensors", ".bin", ".pt", ".pth")


def part_digests(
    models: Mapping[str, str],
    sets: Sequence[str],
    *,
    weights: Mapping[str, str],
    teacher: tuple[str, str | None] | None,
    texts: Mapping[str, str | None],
    data_root: str | None,
) -> dict[tuple[str, str], dict[str, str]]:
    """Return for every model and set, by name and spec, what the scores of the model on the set are made from.

    `weights` are files by model; `teacher` is a model with its weights file; `texts` are files that hold for all.
    """
    shared = file_digests(texts)
    if teacher is not None:
        shared |= {f"teacher's {what}": digest for what, digest in model_digests(*teacher).items()}
    of_models = {name: model_digests(spec, weights.get(name)) for name, spec in models.items()}
    of_sets = {spec: set_digest(spec, data_root=data_root) for spec in sets}
    return {(m, s): {**shared, **of_models[m], "set": of_sets[s]} for m in of_models for s in of_sets}


def file_digests(paths: Mapping[str, str | None]) -> dict[str, str]:
    """Return the SHA-256 of each file, by what it is called; what is no file (a tag, say) is left out."""
    return {name: files.sha256(path) for name, path in paths.items() if path and files.exists(path)}


def model_digests(spec: str, weights: str | None = None) -> dict[str, str]:
    """Return digests of a model's folder or file, over what it is loaded from, and of its weights file.

    Folders of stages have none here: `inputs.json` has the digest of their result. Mere names have none.
    """
    found = file_digests({"model": spec if spec.endswith(".json") else None, "weights": weights})
    if files.exists(files.join(spec, CONFIG_FILE)):
        found["model"] = _model_folder_digest(spec)
    return found


def set_digest(spec: str, *, data_root: str | None) -> str:
    """Return a digest of a set's listing. Raises `InputError` for a set of one's own that is not there."""
    _, kind, path = parse_spec(spec)
    if kind == "known":
        return _digest(_listing_known(path, data_root))
    if kind == "folder":
        list_folder(path)  # says what is wrong with a path that is no folder
    return _digest(_listing_own(path))


def _model_folder_digest(path: str) -> str:
    names = [name for name in list_folder(path)[1] if name.endswith(MODEL_SUFFIXES)]
    if WEIGHTS_FILE in names:  # beside it, a checkpoint has what training goes on from
        names = [CONFIG_FILE, WEIGHTS_FILE]
    return _digest((name, files.sha256(files.join(path, name))) for name in names)


def _listing_own(path: str) -> Iterator[tuple[str, str]]:
    """List the files of a folder; of a pattern, those that it matches and the texts beside them."""
    if is_folder(path):
        yield from _listing(path)
        return
    for place in files.expand(path):
        yield place, _state(place, files.size(place))
    folder = folder_of(path)
    for name in list_folder(folder)[1]:
        if name.endswith(TEXT_SUFFIXES):
            place = files.join(folder, name)
            yield place, _state(place, files.size(place))


def _listing_known(name: str, data_root: str | None) -> Iterator[tuple[str, str]]:
    place = locate(CATALOGUE[name], data_root) if data_root else None
    if place is None or data_root is None:
        yield name, "missing"
        return
    yield place.layout, ""
    if place.path != data_root:
        yield from _listing(place.path)
        return
    for folder in sorted({marker.partition("/")[0] for marker in CATALOGUE[name].archive}):  # other sets lie beside it
        yield from _listing(files.join(data_root, folder))


def _listing(path: str) -> Iterator[tuple[str, str]]:
    """List the files below a folder, sorted, by their path in it."""
    if files.is_url(path):
        system, inner = files.filesystem(path)
        sizes = {place: int(entry["size"]) for place, entry in system.find(inner, detail=True).items()}
        places = {system.unstrip_protocol(place): num_bytes for place, num_bytes in sizes.items()}
    else:
        walk = os.walk(path, followlinks=True)
        places = {
            place: os.path.getsize(place)
            for parent, _, names in walk
            for name in names
            if os.path.exists(place := files.join(parent, name))
        }
    for place in sorted(places):
        yield place.removeprefix(path), _state(place, places[place])


def _state(place: str, num_bytes: int) -> str:
    is_text = place.lower().endswith(TEXT_SUFFIXES) and num_bytes <= MOST_TEXT_BYTES
    return files.sha256(place) if is_text else str(num_bytes)


def _digest(items: Iterable[tuple[str, str]]) -> str:
    digest = hashlib.sha256()
    for name, state in items:
        digest.update(f"{name}\0{state}\n".encode())
    return digest.hexdigest()
