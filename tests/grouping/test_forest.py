import numpy as np
import pytest
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components, minimum_spanning_tree

from distilclip.errors import InputError
from distilclip.grouping.forest import (
    Forest,
    ForestBuilder,
    joining_distance,
    spanning_forest,
    threshold_curve,
    threshold_for,
)


def random_edges(seed: int, *, num_rows: int = 60, num_edges: int = 150) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    pairs = random.choice(num_rows * num_rows, num_edges, replace=False)
    left, right = pairs // num_rows, pairs % num_rows
    apart = left != right
    left, right = np.minimum(left, right)[apart], np.maximum(left, right)[apart]
    # Few distinct distances, so that ties are everywhere.
    return left, right, random.integers(1, 9, len(left)).astype(np.float32) / 8


def groups_of_graph(left: np.ndarray, right: np.ndarray, num_rows: int) -> np.ndarray:
    """Connected components by scipy, each named by its smallest row."""
    graph = coo_array((np.ones(len(left)), (left, right)), shape=(num_rows, num_rows))
    _, labels = connected_components(graph, directed=False)
    smallest = np.full(num_rows, num_rows)
    np.minimum.at(smallest, labels, np.arange(num_rows))
    return smallest[labels]


def edges_of(forest: Forest) -> list[tuple[int, int, float]]:
    return list(zip(forest.left.tolist(), forest.right.tolist(), forest.distance.tolist(), strict=True))


@pytest.mark.parametrize("seed", range(5))
def test_forest_has_the_weight_of_scipys_and_the_groups_of_the_graph_at_every_threshold(seed: int) -> None:
    left, right, distance = random_edges(seed)
    forest = spanning_forest(left, right, distance, num_rows=60)
    keep = np.unique(left * 60 + right, return_index=True)[1]  # scipy would add parallel edges up
    order = np.lexsort((distance,))
    keep = order[np.unique((left * 60 + right)[order], return_index=True)[1]]
    ends = (left[keep].astype(np.int32), right[keep].astype(np.int32))  # scipy 1.14 takes no others
    graph = coo_array((distance[keep], ends), shape=(60, 60))
    assert forest.distance.sum() == pytest.approx(minimum_spanning_tree(graph).sum())
    for threshold in np.linspace(0, 1.2, 13):
        near = distance < np.float32(threshold)
        np.testing.assert_array_equal(
            forest.below(threshold).groups(), groups_of_graph(left[near], right[near], 60), err_msg=str(threshold)
        )


def test_chain_by_hand() -> None:
    # 0 -1- 1 -2- 2 -3- 3, and 0-3 at 9 closes the ring; 4 stands alone.
    forest = spanning_forest(
        np.array([0, 1, 2, 0]), np.array([1, 2, 3, 3]), np.array([1, 2, 3, 9], np.float32), num_rows=5
    )
    assert edges_of(forest) == [(0, 1, 1.0), (1, 2, 2.0), (2, 3, 3.0)]
    assert forest.below(3.0).groups().tolist() == [0, 0, 0, 3, 4]
    assert forest.groups().tolist() == [0, 0, 0, 0, 4]
    line = threshold_curve(forest, thresholds=np.array([1.0, 1.5, 2.5, 3.5]), num_valid=5)
    assert line.num_groups.tolist() == [5, 4, 3, 2]
    assert line.removed_ratio.tolist() == [0.0, 0.2, 0.4, 0.6]
    assert line.largest_group.tolist() == [1, 2, 3, 4]


def test_forest_survives_any_chunking_order_and_merging() -> None:
    left, right, distance = random_edges(7)
    whole = edges_of(spanning_forest(left, right, distance, num_rows=60))
    shuffled = np.random.default_rng(0).permutation(len(left))
    chunks = [(left[c], right[c], distance[c]) for c in np.array_split(shuffled, 9)]
    for batch in (1, 20, 1000):
        builder = ForestBuilder(60, batch=batch)
        for chunk in chunks:
            builder.add(*chunk)
        assert edges_of(builder.forest()) == whole
    parts = [spanning_forest(*chunk, num_rows=60) for chunk in chunks]
    for order in (parts, parts[::-1]):
        builder = ForestBuilder(60)
        for part in order:
            builder.add(part.left, part.right, part.distance)
        assert edges_of(builder.forest()) == whole


def smallest_largest_step(left: np.ndarray, right: np.ndarray, distance: np.ndarray, num_rows: int) -> np.ndarray:
    """Between all rows, the smallest possible largest distance on a way (Floyd and Warshall's rounds)."""
    way = np.full((num_rows, num_rows), np.inf)
    np.minimum.at(way, (left, right), distance)
    way = np.minimum(way, way.T)
    for middle in range(num_rows):
        way = np.minimum(way, np.maximum(way[:, middle, None], way[None, middle]))
    return way


@pytest.mark.parametrize("seed", range(3))
def test_links_tell_the_threshold_that_joins_two_rows(seed: int) -> None:
    left, right, distance = random_edges(seed, num_edges=90)
    builder = ForestBuilder(60)
    builder.add(left, right, distance)
    builder.reduce()
    links = builder.links
    expected = smallest_largest_step(left, right, distance, 60)
    for i in range(60):
        for j in range(60):
            if i != j:
                assert joining_distance(links, i, j) == expected[i, j]
                if links.root[i] == links.root[j]:
                    assert max(links.top[i], links.top[j]) >= expected[i, j]
                else:
                    assert np.isinf(expected[i, j])


def test_threshold_for_removes_the_share_asked_for() -> None:
    distance = np.array([0.1, 0.2, 0.2, 0.4], np.float32)
    forest = spanning_forest(np.array([0, 1, 2, 3]), np.array([1, 2, 3, 4]), distance, num_rows=10)
    for wanted, edges in ((0.1, 1), (0.15, 1), (0.29, 3), (0.4, 4)):
        threshold = threshold_for(forest, removed_ratio=wanted, num_valid=10)
        assert len(forest.below(threshold)) == edges
    with pytest.raises(InputError, match=r"only 0\.4000 would be removed.*max_threshold"):
        threshold_for(forest, removed_ratio=0.41, num_valid=10)


def test_curve_counts_what_cutting_the_forest_gives() -> None:
    left, right, distance = random_edges(3)
    forest = spanning_forest(left, right, distance, num_rows=60)
    thresholds = np.linspace(0.05, 1.1, 22)
    line = threshold_curve(forest, thresholds=thresholds, num_valid=60)
    for t, threshold in enumerate(thresholds):
        sizes = np.unique(forest.below(threshold).groups(), return_counts=True)[1]
        assert (line.num_groups[t], line.largest_group[t]) == (len(sizes), sizes.max())
        assert line.removed_ratio[t] == pytest.approx(1 - len(sizes) / 60)
