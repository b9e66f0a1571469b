"""Lay a sample of a store's pictures out on a plane, near where they are alike, with what the page says of each.

t-SNE (van der Maaten and Hinton 2008) keeps neighbours together; its distances between far groups mean nothing.
Without scikit-learn, the map shows the two directions of largest variance.
"""

from __future__ import annotations

import base64
import importlib.util
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int, UInt64
from PIL import Image, ImageOps

from distilclip.data.columns import write_columns
from distilclip.data.images import ImageMatrix
from distilclip.data.side_files import kept_images, read_centers, read_labels
from distilclip.data.store import Store, split_id
from distilclip.errors import InputError
from distilclip.report.gallery import Picture, PictureReader
from distilclip.report.phrases import shorten
from distilclip.scoring.parts import list_folders

Method = Literal["auto", "t-sne", "pca"]

FEWEST_FOR_TSNE = 50  # rows; fewer have no neighbourhoods
PERPLEXITY = 30.0
NUM_DIRECTIONS = 50  # of largest variance, in which t-SNE looks for neighbours
CELL = 64  # pixels of a thumbnail's side under the pointer
SHEET = 20  # thumbnails along either side of a sheet
EXTENT = 10_000  # the page's coordinates are whole numbers from 0 to this

MAP_SCHEMA = pa.schema(
    [
        ("x", pa.float64()),
        ("y", pa.float64()),
        ("text", pa.string()),
        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        ("cluster", pa.string()),
        ("data_set", pa.string()),
        ("kept", pa.string()),
        ("shard", pa.string()),
        ("row", pa.uint32()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class MapSize:
    """How many rows a map shows, by which method, and the seed of both the sample and the layout."""

    num_rows: int
    method: Method = "auto"
    thumbnail: int = 112
    """pixels of a picture's longer side in map.parquet"""
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Category:
    """Something to colour the map by: the names of its values, and the place in them of each row's.

    `without` is the place of the name of rows that have no value, -1 where all have one.
    """

    title: str
    names: tuple[str, ...]
    of: Int[np.ndarray, " n"]
    without: int = -1

    @property
    def counts(self) -> list[int]:
        """Return how many rows of the map have each value."""
        return np.bincount(self.of, minlength=len(self.names)).tolist()


@dataclass(frozen=True, kw_only=True)
class EmbeddingMap:
    """Some rows of a store on a plane. `categories` are by their columns in map.parquet; coordinates from 0 to 1."""

    store: str
    method: Method
    num_valid: int
    samples: UInt64[np.ndarray, " n"]
    shards: tuple[str, ...]
    """of every row the file it lies in"""
    place: Float[np.ndarray, "n 2"]
    pictures: tuple[Picture, ...]
    categories: Mapping[str, Category]


def make_map(store: Store, size: MapSize, *, groups: str | None = None, clusters: str | None = None) -> EmbeddingMap:
    """Draw rows of a store that have a picture, lay them out, and read their pictures and captions.

    Args:
        store: whose image embeddings are laid out.
        size: how many rows, and how.
        groups: folder of `balance` or `select`, to tell kept rows from removed ones.
        clusters: folder of `cluster`, to name each row's cluster after a caption.

    Raises:
        InputError: the store or a folder is damaged, or no row has a picture.
    """
    images = ImageMatrix(store)
    valid = np.flatnonzero(images.valid())
    if not len(valid):
        raise InputError(f"{store.path}: no row has a picture, so there is nothing to map.")
    rows = valid
    if len(valid) > size.num_rows:
        rows = np.sort(np.random.default_rng(size.seed).choice(valid, size.num_rows, replace=False))
    samples = images.ids(rows)
    method, place = lay_out(images.take(rows).astype(np.float64), method=size.method, seed=size.seed)
    reader = PictureReader(store, size=size.thumbnail)
    pictures = tuple(reader.picture(int(sample)) for sample in samples)
    reader.close()
    shard = split_id(samples)[0].astype(np.int64)
    return EmbeddingMap(
        store=store.path,
        method=method,
        num_valid=len(valid),
        samples=samples,
        shards=tuple(store.shards[number].uri for number in shard),
        place=place,
        pictures=pictures,
        categories=_categories(store, samples, [p.caption for p in pictures], groups=groups, clusters=clusters),
    )


def lay_out(rows: Float[np.ndarray, "n dim"], *, method: Method, seed: int) -> tuple[Method, Float[np.ndarray, "n 2"]]:
    """Return the places of rows on a plane, each coordinate from 0 to 1, and the method that found them."""
    if method == "auto":
        method = "t-sne" if importlib.util.find_spec("sklearn") is not None else "pca"
    if len(rows) < FEWEST_FOR_TSNE:
        method = "pca"
    rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    found = principal_components(rows, NUM_DIRECTIONS if method == "t-sne" else 2)
    if method == "t-sne":
        found = _neighbour_embedding(found, seed=seed)
    low, high = found.min(axis=0), found.max(axis=0)
    middle, span = (low + high) / 2, max(float((high - low).max()), 1e-12)
    return method, (found - middle) / span + 0.5


def principal_components(rows: Float[np.ndarray, "n dim"], number: int) -> Float[np.ndarray, "n k"]:
    """Return the coordinates of rows along the directions of largest variance, exactly; missing ones are 0.

    A direction points to where its largest entry is positive, so that equal rows give equal coordinates.
    """
    centered = rows - rows.mean(axis=0)
    _, vectors = np.linalg.eigh(centered.T @ centered)
    vectors = vectors[:, ::-1][:, :number]
    largest = np.abs(vectors).argmax(axis=0)
    vectors = vectors * np.where(vectors[largest, np.arange(vectors.shape[1])] < 0, -1.0, 1.0)
    found = np.zeros((len(rows), number))
    found[:, : vectors.shape[1]] = centered @ vectors
    return found


def _neighbour_embedding(rows: Float[np.ndarray, "n k"], *, seed: int) -> Float[np.ndarray, "n 2"]:
    """Run scikit-learn's t-SNE from the first two components; in one thread, so that sums keep their order."""
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    begin = rows[:, :2] / max(float(rows[:, 0].std()), 1e-12) * 1e-4
    with threadpool_limits(1):
        layout = TSNE(perplexity=min(PERPLEXITY, (len(rows) - 1) / 3), init=begin, random_state=seed, n_jobs=1)
        return np.asarray(layout.fit_transform(rows), np.float64)


def _categories(
    store: Store,
    samples: UInt64[np.ndarray, " n"],
    captions: Sequence[str],
    *,
    groups: str | None,
    clusters: str | None,
) -> dict[str, Category]:
    shard, row = (part.astype(np.int64) for part in split_id(samples))
    found = {}
    if clusters is not None:
        found["cluster"] = _name_clusters(store, shard, row, captions, clusters)
    names, number = list_folders(store)
    if len(names) > 1:
        found["data_set"] = Category(title="data set", names=tuple(names), of=number[shard])
    if groups is not None:
        removed = np.ones(len(samples), np.int64)
        for one in np.unique(shard).tolist():
            here = shard == one
            removed[here] = ~kept_images(store, one, groups)[row[here]]
        found["kept"] = Category(title="kept or removed", names=("kept", "removed"), of=removed)
    return found


def _name_clusters(
    store: Store, shard: Int[np.ndarray, " n"], row: Int[np.ndarray, " n"], captions: Sequence[str], clusters: str
) -> Category:
    """Name each cluster after that of its rows whose caption is nearest to its center; the largest cluster is first.

    Captions are compared by the teacher's text embeddings. A cluster without a caption has its number alone.
    """
    centers = read_centers(clusters)
    label = np.full(len(row), -1, np.int64)
    nearness = np.full(len(row), -np.inf)
    for one in np.unique(shard).tolist():
        here = np.flatnonzero(shard == one)
        labels = read_labels(clusters, one)
        at = np.minimum(np.searchsorted(labels.row, row[here]), max(len(labels.row) - 1, 0))
        labelled = labels.row[at] == row[here] if len(labels.row) else np.zeros(len(here), bool)
        label[here[labelled]] = labels.cluster[at[labelled]]
        told = here[labelled & store.rows(one).has("text")[row[here]]]
        texts = store.text(one)[row[told]].astype(np.float64)
        nearness[told] = (texts * centers[label[told]]).sum(axis=1)
    numbers, place, counts = np.unique(label, return_inverse=True, return_counts=True)
    names = []
    for index, number in enumerate(numbers.tolist()):
        members = np.flatnonzero(place == index)
        caption = captions[members[nearness[members].argmax()]]
        named = f"{number}: {shorten(caption, 60)}" if caption else f"Cluster {number}"
        names.append("no cluster" if number < 0 else named)
    order = np.lexsort((numbers, -counts, numbers < 0))
    return Category(
        title="cluster",
        names=tuple(names[i] for i in order),
        of=np.argsort(order)[place],
        without=len(names) - 1 if numbers[0] < 0 else -1,
    )


def map_data(found: EmbeddingMap) -> dict[str, Any]:
    """Return what the page's script needs to draw the map, as JSON values."""
    places = np.round(found.place * EXTENT).astype(int)
    return {
        "extent": EXTENT,
        "x": places[:, 0].tolist(),
        "y": places[:, 1].tolist(),
        "captions": [shorten(p.caption, 160) for p in found.pictures],
        "cell": CELL,
        "side": SHEET,
        "sheets": _sheets(found.pictures),
        "categories": [
            {"title": c.title, "names": list(c.names), "of": c.of.tolist(), "counts": c.counts, "without": c.without}
            for c in found.categories.values()
        ],
    }


def _sheets(pictures: Sequence[Picture]) -> list[str]:
    """Return the thumbnails, cut to squares, on sheets of SHEET x SHEET, as data URIs; none where none was read."""
    if not any(picture.image for picture in pictures):
        return []
    sheets = []
    for start in range(0, len(pictures), SHEET * SHEET):
        some = pictures[start : start + SHEET * SHEET]
        sheet = Image.new("RGB", (SHEET * CELL, -(-len(some) // SHEET) * CELL), "#808080")
        for place, picture in enumerate(some):
            if content := _jpeg(picture):
                with Image.open(io.BytesIO(content)) as image:
                    square = ImageOps.fit(image.convert("RGB"), (CELL, CELL), Image.Resampling.LANCZOS)
                sheet.paste(square, (place % SHEET * CELL, place // SHEET * CELL))
        buffer = io.BytesIO()
        sheet.save(buffer, "JPEG", quality=75, optimize=True)
        sheets.append("data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode())
    return sheets


def _jpeg(picture: Picture) -> bytes:
    return base64.b64decode(picture.image.partition(",")[2])


def write_map(path: str, found: EmbeddingMap) -> None:
    """Write the map as a table: where each row is, its caption, its picture as JPEG, and its categories.

    Embedding Atlas opens it: `embedding-atlas map.parquet --x x --y y --text text --image image`.
    """

    def names(column: str) -> list[str | None]:
        category = found.categories.get(column)
        return [None] * len(found.samples) if category is None else [category.names[i] for i in category.of]

    images = [{"bytes": _jpeg(p), "path": f"{p.key}.jpg"} if p.image else None for p in found.pictures]
    columns = {
        "x": np.round(found.place[:, 0], 4),
        "y": np.round(found.place[:, 1], 4),
        "text": [p.caption for p in found.pictures],
        "image": images,
        "cluster": names("cluster"),
        "data_set": names("data_set"),
        "kept": names("kept"),
        "shard": list(found.shards),
        "row": split_id(found.samples)[1].astype(np.uint32),
    }
    write_columns(path, MAP_SCHEMA, columns)
