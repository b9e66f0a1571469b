"""Spherical k-means against `faiss.Kmeans(spherical=True)`: the same rows, first centers and number of rounds.

Rows are CLIP-like and in half precision, as a store holds them; faiss takes float32, so its side copies them. Our side
also returns every row's label and distance. `equal` says that our objective, the mean of 1 - cos over all rows to their
nearest centers in float64, is at most 0.1 % above that of faiss' centers; the notes give both.
"""

from __future__ import annotations

import faiss
import numpy as np
import torch
from _embeddings import clip_like
from _harness import Case, compare, is_quick

from distilclip.clustering.assignment import assign
from distilclip.clustering.fit_options import FitOptions
from distilclip.clustering.kmeans import KMeans, first_centers, kmeans, sample_rows
from distilclip.vectors.points import Points

NUM_ITERATIONS = 20
WORSE = 1e-3  # share by which our objective may lie above the peer's
Inputs = tuple[np.ndarray, np.ndarray]  # rows, first centers


def make_inputs(num_rows: int, dim: int, num_centers: int) -> Inputs:
    """The first centers are rows drawn at random: what faiss would take itself."""
    x = clip_like(num_rows, dim)
    chosen = np.random.default_rng(0).choice(num_rows, num_centers, replace=False)
    return x, unit(x[np.sort(chosen)])


def ours(inputs: Inputs) -> KMeans:
    x, first = inputs
    return kmeans(x, num_centers=len(first), num_iterations=NUM_ITERATIONS, initial=first)


def peer(inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
    """Its centers, and the rows for `same_objective`."""
    x, first = inputs
    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.Kmeans(
        x.shape[1],
        len(first),
        niter=NUM_ITERATIONS,
        spherical=True,
        min_points_per_centroid=1,
        max_points_per_centroid=len(x),  # all rows, as on our side
    )
    index.train(x.astype(np.float32), init_centroids=first)
    return index.centroids, x


def same_objective(result: KMeans, theirs: tuple[np.ndarray, np.ndarray]) -> bool:
    centers, x = theirs
    print(f"objective with {len(centers):,} centers: ours {result.objective:.6f}, faiss {objective(x, centers):.6f}")
    return result.objective <= (1 + WORSE) * objective(x, centers)


def objective(x: np.ndarray, centers: np.ndarray) -> float:
    """Mean cosine distance of all rows to the nearest of the centers."""
    _, distance = assign(Points.of(x, metric="cosine"), unit(centers))
    return float(distance.astype(np.float64).mean())


def unit(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def seeding_note(num_rows: int, dim: int, num_centers: int) -> list[str]:
    """The objective after all rounds from rows drawn at random and from k-means++ on a sample."""
    x, drawn = make_inputs(num_rows, dim, num_centers)
    points, random = Points.of(x, metric="cosine"), np.random.default_rng(0)
    _, sample = sample_rows(num_rows, FitOptions(num_centers=num_centers), random)
    far = first_centers(points, sample, num_centers=num_centers, random=random)
    found = [ours((x, first)).objective for first in (drawn, far)]
    return [
        f"{num_rows:,} x {dim}, {num_centers:,} centers, {NUM_ITERATIONS} rounds: "
        f"objective {found[0]:.5f} from random rows, {found[1]:.5f} from k-means++ on a sample of {len(sample):,} rows."
    ]


def case(num_rows: int, dim: int, num_centers: int) -> Case:
    return Case(
        name=f"{num_rows // 1000}k x {dim}, {num_centers:,} centers",
        setup=lambda: make_inputs(num_rows, dim, num_centers),
        ours=ours,
        peer=peer,
        equal=same_objective,
        result_mb=lambda inputs: 4 * num_centers * dim / 1e6,
    )


def main() -> None:
    if is_quick(__doc__ or ""):
        cases = [case(20_000, 512, 500)]
        compare("kmeans", cases, {"seeding": lambda: seeding_note(20_000, 512, 500)})
        return
    cases = [case(200_000, 512, 1_000), case(200_000, 512, 10_000)]
    compare("kmeans", cases, {"seeding": lambda: seeding_note(50_000, 512, 2_000)})


if __name__ == "__main__":
    main()
