"""Made-up image embeddings with what makes real ones hard: a narrow cone, topics of very unequal size, a spectrum that
decays as a power law, and planted copies at known distances."""

from __future__ import annotations

import numpy as np

CHUNK = 50_000  # rows made at a time


def clip_like(num_rows: int, dim: int, *, seed: int = 0, copies: float = 0.35) -> np.ndarray:
    """Unit rows in half precision, in random order.

    Two random rows have a mean cosine of 0.5, two of one concept 0.8; there is a concept for every 60 rows, in 64
    topics. A share of the rows are copies of others: a tenth of these equal to the byte, half of the rest within 0.06
    (another file of the same picture), half within 0.36 (another picture of the same thing).
    """
    random = np.random.default_rng(seed)
    spectrum = np.arange(1, dim + 1, dtype=np.float32) ** -0.5
    spectrum /= np.linalg.norm(spectrum)
    rotation = np.linalg.qr(random.standard_normal((dim, dim)))[0].astype(np.float32)
    cone = random.standard_normal(dim).astype(np.float32)
    cone /= np.linalg.norm(cone)

    def drawn(count: int) -> np.ndarray:
        return random.standard_normal((count, dim), np.float32) * spectrum

    num_concepts = max(8, num_rows // 60)
    topic = drawn(64)[random.integers(0, 64, num_concepts)]
    concept = 0.6**0.5 * topic + 0.4**0.5 * drawn(num_concepts)
    popularity = (np.arange(num_concepts) + 10.0) ** -0.8
    popularity /= popularity.sum()

    num_copies = int(copies * num_rows)
    num_sources = num_rows - num_copies
    x = np.empty((num_rows, dim), np.float16)
    for start in range(0, num_sources, CHUNK):
        count = min(CHUNK, num_sources - start)
        of = random.choice(num_concepts, count, p=popularity)
        x[start : start + count] = unit((0.3**0.5 * concept[of] + 0.2**0.5 * drawn(count)) @ rotation + 0.5**0.5 * cone)
    copied = random.integers(0, num_sources, max(1, num_copies // 4))
    for start in range(num_sources, num_rows, CHUNK):
        count = min(CHUNK, num_rows - start)
        source = x[copied[random.integers(0, len(copied), count)]]
        far = np.where(random.random(count) < 0.5, random.uniform(0.01, 0.06, count), random.uniform(0.06, 0.36, count))
        copy = unit(source + far[:, None].astype(np.float32) * unit(drawn(count) @ rotation)).astype(np.float16)
        x[start : start + count] = np.where(random.random((count, 1)) < 0.1, source, copy)
    return x[random.permutation(num_rows)]


def on_the_sphere(num_rows: int, dim: int, *, seed: int = 0) -> np.ndarray:
    """Unit rows without any structure."""
    return unit(np.random.default_rng(seed).standard_normal((num_rows, dim), np.float32)).astype(np.float16)


def one_group(num_rows: int, dim: int, *, seed: int = 0) -> np.ndarray:
    """Unit rows all of which lie within about 0.05 of each other."""
    center = on_the_sphere(1, dim, seed=seed).astype(np.float32)
    return unit(center + 0.035 * on_the_sphere(num_rows, dim, seed=seed + 1)).astype(np.float16)


def many_equal(num_rows: int, dim: int, *, seed: int = 0) -> np.ndarray:
    """CLIP-like rows, three in ten of them one placeholder."""
    x = clip_like(num_rows, dim, seed=seed)
    x[np.random.default_rng(seed).random(num_rows) < 0.3] = x[0]
    return x


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)
