from distilclip.clustering.fit_parts import NUMBERS, Range, center_ranges, choose_num_parts, shard_ranges


def test_the_example_of_the_docstring() -> None:
    assert shard_ranges([40, 40, 50, 10], num_parts=2) == [Range(0, 2), Range(2, 4)]
    assert str(Range(2, 4)) == "000002-000004"


def test_ranges_hold_every_shard_once_and_are_no_more_than_asked_for() -> None:
    for num_rows in ([5], [0, 0, 7], [3, 100, 1, 1, 1], [10] * 13):
        for num_parts in range(1, 8):
            parts = shard_ranges(num_rows, num_parts=num_parts)
            assert len(parts) <= num_parts
            assert [shard for part in parts for shard in range(part.first, part.last)] == list(range(len(num_rows)))
    assert [part.last - part.first for part in shard_ranges([10] * 12, num_parts=4)] == [3] * 4


def test_ranges_hold_every_center_once() -> None:
    assert center_ranges(1_000, 64) == [Range(0, 1_000)]
    assert center_ranges(3, NUMBERS + 1) == [Range(0, 1), Range(1, 2), Range(2, 3)]
    many = center_ranges(1_000_000, 1280)
    assert [center for part in many for center in (part.first, part.last)][1:-1:2] == [part.first for part in many[1:]]
    assert (many[0].first, many[-1].last, len(many)) == (0, 1_000_000, 306)


def test_parts_by_hand() -> None:
    million = 1_000_000
    for num_rows, num_workers, expected in (
        (64 * million, 1, 1),
        (64 * million, 8, 8),
        (225 * million, 8, 28),
        (225 * million, 2, 8),  # four for each worker
        (64 * million, 200, 64),  # at least one row for each center
        (million, 8, 1),
    ):
        assert choose_num_parts(num_rows, num_centers=million, num_workers=num_workers) == expected
