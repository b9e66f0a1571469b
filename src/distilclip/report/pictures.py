"""Samples as thumbnails inside the page: JPEG data URIs, read from the shards through the store's offsets."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

from PIL import Image

from distilclip.data.samples import BadSample, decode_image
from distilclip.data.shards import Shard, open_shard
from distilclip.data.store import Rows, Store, split_id
from distilclip.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One sample as the page shows it. `image` is a data URI, empty where the picture cannot be had: see `problem`."""

    key: str
    place: str
    caption: str
    image: str = ""
    width: int = 0
    height: int = 0
    problem: str = ""


class PictureReader:
    """Thumbnails by sample id; shards and row tables stay open between reads."""

    def __init__(self, store: Store, *, size: int) -> None:
        self.store = store
        self.size = size
        self._shards: dict[int, Shard] = {}
        self._rows: dict[int, Rows] = {}

    def picture(self, sample: int) -> Picture:
        """The thumbnail of a sample id (`shard << 32 | row`), at most `size` pixels on its longer side.

        A picture that cannot be read any more (the tar was moved, say) is a `Picture` with a `problem`, no error: the
        page is worth having without it.
        """
        shard, row = (int(part) for part in split_id(sample))
        rows = self._row_table(shard)
        key, place = rows.key[row], f"{self.store.shards[shard].uri}, row {row}"
        try:
            stored = self._open(shard).read(int(rows.offset[row]), int(rows.size[row]))
            if stored.image is None:
                raise BadSample("no image", where=place)
            image = decode_image(stored.image, draft=(self.size, self.size), where=place)
        except (BadSample, InputError, OSError) as error:
            return Picture(key=key, place=place, caption="", problem=str(error))
        uri, (width, height) = thumbnail(image, self.size)
        return Picture(key=key, place=place, caption=stored.caption or "", image=uri, width=width, height=height)

    def close(self) -> None:
        """Close the shards."""
        for shard in self._shards.values():
            shard.close()

    def _row_table(self, shard: int) -> Rows:
        if shard not in self._rows:
            self._rows[shard] = self.store.rows(shard)
        return self._rows[shard]

    def _open(self, shard: int) -> Shard:
        if shard not in self._shards:
            self._shards[shard] = open_shard(self.store.shards[shard].uri)
        return self._shards[shard]


def thumbnail(image: Image.Image, size: int) -> tuple[str, tuple[int, int]]:
    """A JPEG data URI of `image` reduced to `size` pixels on its longer side, never enlarged, and its width, height."""
    small = image.copy()
    small.thumbnail((size, size), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=82, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode(), small.size
