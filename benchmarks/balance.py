"""Semantic balance against faiss' exact range search + scipy's connected components, to the same groups.

Notes: how our time grows with the number of rows; the share of true pairs that comparison within clusters, as
SemDeDup does it, would have found; and one search of the peer, at the widest of the three limits, whose groups ours
must equal in each metric where three such searches would take half an hour.
"""

from __future__ import annotations

import time
from pathlib import Path

import faiss
import numpy as np
from _embeddings import clip_like, many_equal, on_the_sphere, one_group
from _harness import Case, compare, given_store, is_quick
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from distilclip.data.images import ImageMatrix
from distilclip.data.store import Store
from distilclip.grouping.balance import Balance, balance
from distilclip.grouping.near_pairs import pairs_within
from distilclip.vectors.tolerance import Tolerance

THRESHOLD = 0.07
METRICS = ("euclidean", "sqeuclidean", "cosine")
QUERIES = 4096  # rows searched at a time by the peer, so that its results are turned into pairs before memory runs out
MARGIN = 1e-5  # of a squared distance: nearer to the threshold, faiss' float32 is decided again


def peer(x: np.ndarray, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Group (its smallest row) and representative of every row."""
    rows = x.astype(np.float32)
    if metric == "cosine":
        faiss.normalize_L2(rows)
    limit = Tolerance(THRESHOLD, metric).squared
    near = pairs_near(rows, limit + MARGIN)
    return groups_and_representatives(rows, *decided(x, *near, metric, margin=MARGIN))


def pairs_near(
    rows: np.ndarray, limit: float, *, incremental: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row numbers (left below right) and squared distances of all pairs that faiss finds below a squared limit.

    With `incremental` rows join the index just before they are searched for, so each pair is met once: half the work.
    """
    index = faiss.IndexFlatL2(rows.shape[1])
    if not incremental:
        index.add(rows)
    lefts, rights, distances = [], [], []
    for start in range(0, len(rows), QUERIES):
        if incremental:
            index.add(rows[start : start + QUERIES])
        bounds, squared, right = index.range_search(rows[start : start + QUERIES], limit)
        left = start + np.repeat(np.arange(len(bounds) - 1), np.diff(bounds).astype(np.int64))
        once = left > right if incremental else left < right
        lefts.append(right[once] if incremental else left[once])
        rights.append(left[once] if incremental else right[once])
        distances.append(squared[once])
    return np.concatenate(lefts), np.concatenate(rights), np.concatenate(distances)


def decided(
    x: np.ndarray, left: np.ndarray, right: np.ndarray, squared: np.ndarray, metric: str, *, margin: float
) -> tuple[np.ndarray, np.ndarray]:
    """Those of the pairs that lie below the threshold; near to it, float64 decides."""
    limit = Tolerance(THRESHOLD, metric).squared
    unsure = np.flatnonzero(np.abs(squared - limit) < margin)
    keep = squared < limit
    for start in range(0, len(unsure), QUERIES):
        some = unsure[start : start + QUERIES]
        keep[some] = exact_squared(x, left[some], right[some], metric) < limit
    return left[keep], right[keep]


def exact_squared(x: np.ndarray, left: np.ndarray, right: np.ndarray, metric: str) -> np.ndarray:
    a, b = x[left].astype(np.float64), x[right].astype(np.float64)
    if metric == "cosine":
        a, b = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (a, b))
    return ((a - b) ** 2).sum(axis=1)


def groups_and_representatives(rows: np.ndarray, left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    graph = coo_array((np.ones(len(left), np.int8), (left, right)), shape=(len(rows), len(rows)))
    _, label = connected_components(graph, directed=False)
    order = np.argsort(label, kind="stable")
    first = np.flatnonzero(np.diff(label[order], prepend=-1))
    group, representative = np.empty(len(label), np.int64), np.arange(len(label))
    for start, stop in zip(first, np.append(first[1:], len(order)), strict=True):
        members = order[start:stop]
        group[members] = members[0]
        if len(members) > 1:
            to_mean = rows[members] - rows[members].mean(axis=0)
            representative[members] = members[np.einsum("nd,nd->n", to_mean, to_mean).argmin()]
    return group, representative


def same_groups(ours: Balance, theirs: tuple[np.ndarray, np.ndarray]) -> bool:
    """Representatives may differ where float32 cannot tell which of two members is nearer to the mean."""
    return np.array_equal(ours.group, theirs[0]) and float((ours.representative == theirs[1]).mean()) > 0.9


def growth(sizes: tuple[int, int]) -> list[str]:
    """How our time grows with the number of rows."""
    rows = [clip_like(size, 512) for size in sizes]
    balance(rows[0], threshold=THRESHOLD, metric="euclidean")  # compiled
    lines = []
    for metric in METRICS:
        seconds = []
        for x in rows:
            start = time.perf_counter()
            balance(x, threshold=THRESHOLD, metric=metric)
            seconds.append(time.perf_counter() - start)
        exponent = np.log(seconds[1] / seconds[0]) / np.log(sizes[1] / sizes[0])
        times = ", ".join(f"{s:.1f} s at {size:,}" for s, size in zip(seconds, sizes, strict=True))
        lines.append(f"growth, {metric}: {times}: n^{exponent:.2f}")
    return lines


def recall_within_clusters(num_rows: int) -> list[str]:
    """Pairs of one k-means cluster of a thousand rows on average, as SemDeDup compares them."""
    x = clip_like(num_rows, 512)
    kmeans = faiss.Kmeans(512, num_rows // 1000, niter=10, spherical=True, seed=0)
    kmeans.train(x.astype(np.float32))
    cluster = kmeans.index.search(x.astype(np.float32), 1)[1][:, 0]
    lines = []
    for metric in METRICS:
        pairs = pairs_within(x, threshold=THRESHOLD, metric=metric)
        found = float((cluster[pairs.left] == cluster[pairs.right]).mean())
        what = f"{len(pairs):,} true pairs among {num_rows:,} rows, {metric}"
        lines.append(f"recall of the {what}: ours 1, within clusters {found:.4f}")
    return lines


def one_search(num_rows: int, dim: int) -> list[str]:
    """The groups of the three metrics from one search of the peer; its half-precision rows have norms of 1 +- 1e-3."""
    x = clip_like(num_rows, dim)
    margin = 0.01 * Tolerance(THRESHOLD, "cosine").squared
    rows = x.astype(np.float32)
    start = time.perf_counter()
    near = pairs_near(rows, Tolerance(THRESHOLD, "cosine").squared + margin, incremental=True)
    searched = time.perf_counter() - start
    balance(x[:10_000], threshold=THRESHOLD, metric="euclidean")  # compiled
    lines = []
    for metric in METRICS:
        start = time.perf_counter()
        ours = balance(x, threshold=THRESHOLD, metric=metric)
        seconds = time.perf_counter() - start
        theirs = groups_and_representatives(rows, *decided(x, *near, metric, margin=margin))
        equal = "identical groups" if same_groups(ours, theirs) else "DIFFERENT GROUPS"
        what = f"{num_rows:,} x {dim}, {metric} {THRESHOLD}"
        lines.append(
            f"{what}: {equal}; our balance {seconds:.1f} s, faiss' range search alone, each pair once, {searched:.0f} s"
        )
    return lines


def case(name: str, make, num_rows: int, dim: int, metric: str, *, with_peer: bool = True) -> Case:  # type: ignore[no-untyped-def]
    return Case(
        name=f"{name} {num_rows // 1000}k x {dim}, {metric} {THRESHOLD}",
        setup=lambda: make(num_rows, dim),
        ours=lambda x: balance(x, threshold=THRESHOLD, metric=metric),
        peer=(lambda x: peer(x, metric)) if with_peer else None,
        equal=same_groups,
        peer_memory=num_rows <= 50_000,
    )


def stored(folder: str, metric: str) -> Case:
    """The valid image embeddings of a store."""
    images = ImageMatrix(Store.open(folder))
    rows = images.take(np.flatnonzero(images.valid()))
    return case(f"{Path(folder).parent.name} (a store)", lambda *_: rows, len(rows), rows.shape[1], metric)


def main() -> None:
    if is_quick(__doc__ or ""):
        cases = [case("clip-like", clip_like, 20_000, 512, metric) for metric in METRICS]
        cases += [
            case("sphere", on_the_sphere, 10_000, 64, "cosine"),
            case("one group", one_group, 5_000, 512, "cosine"),
        ]
        compare("balance", cases)
        return
    sizes = [(20_000, 512), (20_000, 1280), (100_000, 512), (200_000, 512)]
    cases = [case("clip-like", clip_like, *size, metric) for size in sizes for metric in METRICS]
    cases += [case("clip-like", clip_like, 1_000_000, 512, metric, with_peer=False) for metric in METRICS]
    for name, make, num_rows, dim in (
        ("sphere", on_the_sphere, 20_000, 512),
        ("sphere", on_the_sphere, 50_000, 64),
        ("one group", one_group, 10_000, 512),
        ("three in ten equal", many_equal, 20_000, 512),
    ):
        cases.append(case(name, make, num_rows, dim, "cosine"))
    if (store := given_store()) is not None:
        cases += [stored(store, metric) for metric in METRICS]
    notes = {
        "growth": lambda: growth((100_000, 1_000_000)),
        "one search of the peer among 100k": lambda: one_search(100_000, 1280),
        "one search of the peer among 200k": lambda: one_search(200_000, 1280),
        "recall": lambda: recall_within_clusters(200_000),
    }
    compare("balance", cases, notes)


if __name__ == "__main__":
    main()
