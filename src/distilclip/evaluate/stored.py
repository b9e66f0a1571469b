"""A teacher's store as a model to evaluate: its embeddings are read, and no network is run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from distilclip import files
from distilclip.data.bad_samples import ErrorPolicy
from distilclip.data.store import Rows, Store
from distilclip.errors import InputError
from distilclip.evaluate.encode import ImageFeatures, Output
from distilclip.evaluate.zero_shot import TextClassifier
from distilclip.sets.dataset import ImageRef, PairSet


class StoreEmbedder:
    """A finished store: the image embeddings of its shards, and of each sample the one caption that was embedded."""

    def __init__(self, path: str, *, name: str) -> None:
        self._name = name
        self._store = Store.open(path)
        self._shards = {files.absolute(shard.uri): shard.index for shard in self._store.shards}
        self._rows: dict[int, tuple[Rows, dict[int, int]]] = {}  # of a shard, its rows, and the row at each offset
        self._payloads: dict[tuple[int, str], np.ndarray] = {}

    @property
    def name(self) -> str:
        """Its name in the table."""
        return self._name

    @property
    def digest(self) -> str:
        """The digest of the weights that made the store."""
        return str(self._store.teacher["digest"])

    @property
    def identity(self) -> str:
        """That same digest: a store's embeddings are given, whatever the settings were that made them."""
        return self.digest

    @property
    def backbone_kind(self) -> None:
        """None: a store holds embeddings only."""
        return

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return torch.device("cpu")

    @property
    def description(self) -> dict[str, Any]:
        """Width, and the teacher that made the store."""
        return {"num_parameters": None, "dim": self._store.dim, "store_of": self._store.teacher["name"]}

    def lacks(self, images: Sequence[ImageRef], outputs: Sequence[Output]) -> str:
        """A store holds embeddings only, and those of its own shards."""
        if "backbone" in outputs:
            return "a store holds no features before the projection: use --probe-features projected"
        uri = next((i.uri for i in images if not i.key or files.absolute(i.uri) not in self._shards), None)
        return "" if uri is None else f"the store was not made from {uri}"

    def images(
        self, images: Sequence[ImageRef], outputs: Sequence[Output], *, policy: ErrorPolicy, name: str
    ) -> ImageFeatures:
        """The embeddings of samples of its shards; rows that are not valid there are unreadable."""
        assert set(outputs) == {"embedding"}, "`lacks` says so"
        kept: list[int] = []
        unreadable: list[tuple[int, str]] = []
        parts: list[np.ndarray] = []
        policy.seen(len(images))
        for number, image in enumerate(images):
            shard, row = self._row(image)
            rows = self._rows[shard][0]
            if not rows.valid[row]:
                policy.bad(rows.error[row], where=image.where)
                unreadable.append((number, rows.error[row]))
                continue
            kept.append(number)
            parts.append(self._payload(shard, "image")[row])
        policy.check(final=True)
        return ImageFeatures(
            rows=torch.tensor(kept), features={"embedding": _unit(parts)}, unreadable=tuple(unreadable)
        )

    def classifier(self, names: Sequence[str], templates: Sequence[str]) -> TextClassifier | None:
        """None: prompts need a text encoder."""
        return None

    def captions(self, dataset: PairSet, chosen: Sequence[int], *, prefix: str) -> Float[Tensor, "m dim"] | None:
        """The captions' embeddings; None for a prefix, or where an image has more captions than the one embedded."""
        owners = dataset.image_of_text[list(chosen)]
        if prefix or len(np.unique(owners)) < len(owners):
            return None
        places = [self._row(dataset.images[owner]) for owner in owners]
        return _unit([self._payload(shard, "text")[row] for shard, row in places])

    def _payload(self, shard: int, kind: str) -> np.ndarray:
        if (shard, kind) not in self._payloads:
            self._payloads[shard, kind] = self._store.image(shard) if kind == "image" else self._store.text(shard)
        return self._payloads[shard, kind]

    def _row(self, image: ImageRef) -> tuple[int, int]:
        """Shard and row of a sample, its key asserted."""
        shard = self._shards[files.absolute(image.uri)]
        if shard not in self._rows:
            rows = self._store.rows(shard)
            self._rows[shard] = rows, {int(offset): row for row, offset in enumerate(rows.offset)}
        rows, at_offset = self._rows[shard]
        row = at_offset.get(image.offset)
        if row is None or rows.key[row] != image.key:
            raise InputError(f"{image.where}: not the sample that the store has in its place. Embed the data again.")
        return shard, row


def _unit(rows: Sequence[np.ndarray]) -> Float[Tensor, "n dim"]:
    return F.normalize(torch.from_numpy(np.stack(rows).astype(np.float32)), dim=1)
