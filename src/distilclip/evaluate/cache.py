"""Cache image and text features on disk, keyed by model, settings and inputs."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distilclip import files
from distilclip.data.tensors import read_metadata, read_tensors, write_tensors
from distilclip.evaluate.encode import ImageFeatures, Output
from distilclip.sets.dataset import ImageRef

CACHE_FORMAT = "2"


@dataclass(frozen=True)
class FeatureCache:
    """Keep features in a folder of safetensors files. A file is used only if its metadata equals the whole key.

    While an object of this class lives, image files are assumed not to change: those of a tuple are looked at once
    for all models.
    """

    folder: str
    _digests: dict[int, tuple[tuple[ImageRef, ...], str]] = field(default_factory=dict, repr=False, compare=False)

    def images(
        self,
        images: Sequence[ImageRef],
        outputs: Sequence[Output],
        compute: Callable[[Sequence[Output]], ImageFeatures],
        *,
        key: dict[str, str],
    ) -> ImageFeatures:
        """Return features of some images: outputs on disk are read, the others are computed in one pass and kept.

        `key` says with what they are computed (model, precision); the images are identified by `images_digest`.
        """
        digest = self._digest(images)
        keys = {output: {**key, "images": digest, "output": output} for output in outputs}
        found = {output: self._read(keys[output]) for output in outputs}
        missing = [output for output in outputs if found[output] is None]
        if not missing:
            return _join({output: tensors for output, tensors in found.items() if tensors is not None})
        computed = compute(missing)
        rows, bad = computed.rows.numpy(), [list(pair) for pair in computed.unreadable]
        for output in missing:
            arrays = {"rows": rows, "features": computed.features[output].numpy()}
            self._write(keys[output], arrays, extra={"unreadable": json.dumps(bad)})
        kept = {output: tensors for output, tensors in found.items() if tensors is not None}
        return _join(kept, computed)

    def tensors(
        self, texts: Sequence[str], compute: Callable[[], dict[str, Tensor]], *, key: dict[str, str]
    ) -> dict[str, Tensor]:
        """Return tensors that are made of some texts: read from disk, or computed and kept."""
        key = {**key, "texts": hashlib.sha256("\0".join(texts).encode()).hexdigest()}
        found = self._read(key)
        if found is not None:
            return {tensor: torch.from_numpy(array) for tensor, array in found[0].items()}
        computed = compute()
        self._write(key, {tensor: value.numpy() for tensor, value in computed.items()}, extra={})
        return computed

    def _digest(self, images: Sequence[ImageRef]) -> str:
        if not isinstance(images, tuple):
            return images_digest(images)
        if id(images) not in self._digests:  # the tuple is kept, so that no other takes its id
            self._digests[id(images)] = images, images_digest(images)
        return self._digests[id(images)][1]

    def _path(self, key: dict[str, str]) -> str:
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        return files.join(self.folder, f"{digest[:32]}.safetensors")

    def _read(self, key: dict[str, str]) -> tuple[dict[str, np.ndarray], dict[str, str]] | None:
        path = self._path(key)
        if not files.exists(path):
            return None
        stored = read_metadata(path)
        if any(stored.get(part) != value for part, value in _metadata_of(key).items()):
            return None
        # Copied: a read-only memory map is no tensor that torch may hold.
        return {tensor: np.array(array) for tensor, array in read_tensors(path).items()}, stored

    def _write(self, key: dict[str, str], arrays: dict[str, np.ndarray], *, extra: dict[str, str]) -> None:
        write_tensors(self._path(key), arrays, {**_metadata_of(key), **extra})


def images_digest(images: Sequence[ImageRef]) -> str:
    """Return the SHA-256 of where images lie and of the state of those files; of images in memory, of their pixels.

    A file is known by its size and the time of its last change: one that was touched is encoded again.
    """
    digest = hashlib.sha256()
    states: dict[str, str] = {}
    for image in images:
        if image.pixels is not None:
            digest.update(image.pixels.tobytes())
            continue
        if image.uri not in states:
            states[image.uri] = _state(image.uri)
        place = (image.uri, states[image.uri], image.key, image.offset, image.size, image.error, image.border)
        digest.update(json.dumps(place).encode())
    return digest.hexdigest()


def _state(uri: str) -> str:
    if files.is_url(uri):
        return str(files.size(uri))
    try:
        found = os.stat(uri)
    except OSError:
        return "missing"
    return f"{os.path.abspath(uri)} {found.st_size} {found.st_mtime_ns}"


def _metadata_of(key: dict[str, str]) -> dict[str, str]:
    return {"format": CACHE_FORMAT, **key}


def _join(
    stored: dict[Output, tuple[dict[str, np.ndarray], dict[str, str]]], computed: ImageFeatures | None = None
) -> ImageFeatures:
    """Join several outputs of the same images. Which images can be read does not depend on the output."""
    features: dict[Output, Any] = {o: torch.from_numpy(tensors["features"]) for o, (tensors, _) in stored.items()}
    if computed is not None:
        rows = computed.rows
        assert all(np.array_equal(tensors["rows"], rows.numpy()) for tensors, _ in stored.values())
        return ImageFeatures(rows=rows, features={**features, **computed.features}, unreadable=computed.unreadable)
    tensors, metadata = next(iter(stored.values()))
    unreadable = tuple((int(row), str(error)) for row, error in json.loads(metadata["unreadable"]))
    return ImageFeatures(rows=torch.from_numpy(tensors["rows"]), features=features, unreadable=unreadable)
