"""A store's embeddings of any of its rows, in float32, as the training stream asks for them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64, UInt32
from torch import Tensor

from distilclip.data.store import Store
from distilclip.data.unit import not_unit
from distilclip.data.views import ViewEmbeddings
from distilclip.errors import InputError


class Embeddings:
    """Maps rows to a teacher's image and text embeddings. Picklable; opens the file of a shard when it is asked for."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._maps: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._views: dict[int, ViewEmbeddings] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"store": self.store, "_maps": {}, "_views": {}}

    def num_captions(self, shard: int, row: int) -> int:
        """How many captions of a row have an embedding; in a store with views only."""
        first = self._views_of(shard).text_first
        return 1 + int(first[row + 1] - first[row])

    def rows(
        self,
        shard: UInt32[np.ndarray, " n"],
        row: UInt32[np.ndarray, " n"],
        view: Int64[np.ndarray, " n"] | None = None,
        caption: Int64[np.ndarray, " n"] | None = None,
    ) -> tuple[Float[Tensor, "n dim"], Float[Tensor, "n dim"]]:
        """Image and text embeddings of n rows; of their views and captions, if given, else the canonical ones.

        Raises:
            InputError: one is no finite unit vector.
        """
        image = np.empty((len(row), self.store.dim), np.float32)
        text = np.empty_like(image)
        order = np.argsort(shard, kind="stable")
        for part in np.split(order, np.flatnonzero(np.diff(shard[order])) + 1):
            number = int(shard[part[0]])
            if number not in self._maps:
                self._maps[number] = self.store.image(number), self.store.text(number)
            stored_image, stored_text = self._maps[number]
            image[part] = (
                stored_image[row[part]] if view is None else self._views_of(number).image[row[part], view[part]]
            )
            text[part] = stored_text[row[part]]
            if caption is not None:
                later = part[caption[part] > 0]  # a row's first caption is the canonical one
                stored = self._views_of(number)
                text[later] = stored.text[stored.text_first[row[later]] + caption[later] - 1]
        for embeddings in (image, text):
            self._check_unit(embeddings, shard, row)
        return torch.from_numpy(image), torch.from_numpy(text)

    def _views_of(self, shard: int) -> ViewEmbeddings:
        if shard not in self._views:
            self._views[shard] = self.store.view_embeddings(shard)
        return self._views[shard]

    def _check_unit(
        self, embeddings: Float32[np.ndarray, "n dim"], shard: UInt32[np.ndarray, " n"], row: UInt32[np.ndarray, " n"]
    ) -> None:
        wrong = not_unit(embeddings)
        if wrong.any():
            first = int(np.argmax(wrong))
            raise InputError(
                f"{self.store.path}: the embedding of shard {shard[first]}, row {row[first]} is "
                "not a finite unit vector. The store is damaged: embed the data again, into a new folder."
            )
