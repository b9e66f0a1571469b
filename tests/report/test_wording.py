from __future__ import annotations

import pytest

from distilclip.report.phrases import DASH, MINUS, count, gain, magnitude, percent, plain, shorten, significant


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (significant(0.00245), "0.00245"),
        (significant(0.0000123), "0.000012"),
        (significant(2000.0), "2000"),
        (significant(0), "0"),
        (significant(1e-15), "0"),
        (magnitude(1_234_567), "1.23 M"),
        (magnitude(711.4), "711"),
        (magnitude(153_600), "154 k"),
        (magnitude(9_999), "9999"),
        (magnitude(0.25), "0.25"),
        (count(1234567), "1,234,567"),
        (count(None), DASH),
        (percent(0.4373), "43.7"),
        (gain(0.0321), "+3.2"),
        (gain(-0.0041), f"{MINUS}0.4"),
        (gain(0.0004), "±0.0"),
        (shorten("x" * 400, 10), "x" * 9 + "…"),
        (plain({"a": [1, None], "b": True}), f"a 1, {DASH}, b true"),
    ],
)
def test_numbers_in_words(text: str, expected: str) -> None:
    assert text == expected
