import numpy as np
import pytest

from distilclip.errors import InputError
from distilclip.grouping.balance import balance
from tests.grouping.test_balance import by_hand, copies_of_scenes


def on_circle(*degrees: float) -> np.ndarray:
    """Unit rows at these angles."""
    angles = np.deg2rad(degrees)
    return np.column_stack([np.cos(angles), np.sin(angles)])


def test_a_chain_by_hand() -> None:
    """Five rows, 8 degrees apart, then 9: the middle one stands for all, and 16 degrees are over the threshold."""
    result = balance(on_circle(0, 8, 16, 25, 34, 180), threshold=0.2, metric="euclidean")
    assert result.representative.tolist() == [2, 2, 2, 2, 2, 5]
    why = result.explain(0)
    chord = [2 * np.sin(np.deg2rad(angle) / 2) for angle in (8, 8, 16)]
    assert [(link.row, link.next_row) for link in why.chain] == [(0, 1), (1, 2)]
    assert [link.distance for link in why.chain] == pytest.approx(chord[:2])
    assert (why.group, why.num_members, why.representative, why.keep, why.chained) == (0, 5, 2, False, True)
    assert why.distance == pytest.approx(chord[2])
    assert why.largest_link == pytest.approx(chord[0])
    assert str(why).splitlines() == [
        "Row 0 is removed: row 2 of its group of 5 rows stands for it, at euclidean distance 0.2783.",
        "That is not below the threshold 0.2; a chain of 2 links joins them, the largest 0.1395: "
        "0 -0.1395- 1 -0.1395- 2",
    ]
    assert "\nThat is below the threshold 0.2; a chain of 1 link joins" in str(result.explain(1))
    assert str(result.explain(2)) == "Row 2 is kept: it stands for its group of 5 rows."
    assert str(result.explain(5)) == "Row 5 is kept: it is alone."
    assert (result.explain(2).chain, result.explain(2).largest_link) == ((), 0.0)


@pytest.mark.parametrize("metric", ["euclidean", "sqeuclidean", "cosine"])
def test_every_row_is_joined_to_its_representative_by_the_lightest_chain(metric: str) -> None:
    """Naive: over the full matrix of distances, the largest link of a minimum spanning tree is the least possible."""
    x = copies_of_scenes(120)
    threshold = {"euclidean": 0.5, "sqeuclidean": 0.25, "cosine": 0.125}[metric]
    result = balance(x, threshold=threshold, metric=metric)
    exact = x.astype(np.float64) if metric != "cosine" else x / np.linalg.norm(x.astype(np.float64), axis=1)[:, None]
    squared = ((exact[:, None] - exact[None]) ** 2).sum(axis=2)
    distance = {"euclidean": np.sqrt(squared), "sqeuclidean": squared, "cosine": squared / 2}[metric]
    lightest = distance.copy()
    for middle in range(len(x)):  # Floyd and Warshall, with the largest link as the length of a path
        lightest = np.minimum(lightest, np.maximum(lightest[:, middle, None], lightest[None, middle]))
    assert (~result.keep).sum() > 20
    for row in range(len(x)):
        why = result.explain(row)
        assert (why.representative, why.keep) == (result.representative[row], result.keep[row])
        path = [row, *(link.next_row for link in why.chain)]
        assert path[:-1] == [link.row for link in why.chain]
        assert path[-1] == why.representative
        assert len(set(path)) == len(path)
        assert all(link.distance < threshold for link in why.chain)
        assert [link.distance for link in why.chain] == pytest.approx(
            [distance[link.row, link.next_row] for link in why.chain], abs=1e-7
        )
        if not why.keep:
            assert why.largest_link == pytest.approx(lightest[row, why.representative], abs=1e-7)
            assert why.distance == pytest.approx(distance[row, why.representative], abs=1e-7)


def test_members_are_the_rows_of_a_group() -> None:
    result = balance(copies_of_scenes(), threshold=0.3, metric="cosine")
    for row in range(len(result.group)):
        members = result.members(row)
        assert row in members
        assert (result.group[members] == result.group[row]).all()
        assert result.explain(row).num_members == len(members)
    sizes = [len(result.members(int(group))) for group in np.unique(result.group)]
    assert sum(sizes) == len(result.group)
    assert max(sizes) == result.largest_group


def test_an_explanation_follows_the_threshold() -> None:
    result = balance(on_circle(0, 8, 16, 25), threshold=0.2, metric="euclidean")
    assert len(result.explain(3).chain) > 0
    assert result.at(0.1).explain(3).keep


@by_hand
def test_a_long_chain_is_whole_in_the_record_and_cut_in_the_text() -> None:
    result = balance(np.arange(61, dtype=np.float64)[:, None], threshold=1.5, metric="euclidean")
    why = result.explain(0)
    assert [link.next_row for link in why.chain] == list(range(1, 31))
    assert str(why).endswith("-1- 12 ... and 18 more")


def test_rows_that_do_not_exist_or_are_not_valid_are_named() -> None:
    result = balance(on_circle(0, 8, 16), threshold=0.2, metric="euclidean", valid=[True, False, True])
    for row, message in ((1, "Row 1 was marked as not valid"), (3, "row=3: there are the rows 0 to 2"), (-1, "row=-1")):
        for question in (result.explain, result.members):
            with pytest.raises(InputError, match=message):
                question(row)
