from __future__ import annotations

from pathlib import Path

import pytest

from distilclip.errors import InputError
from distilclip.mixture import DataPart, read_parts


def test_a_pattern_ends_in_its_weight() -> None:
    assert read_parts(["cc3m/{0..9}.tar=0.7", "s3://b/cc12m/=3e-1", "a.csv=0"]) == [
        DataPart("cc3m/{0..9}.tar", 0.7),
        DataPart("s3://b/cc12m/", 0.3),
        DataPart("a.csv", 0.0),
    ]


def test_paths_without_a_weight_are_no_parts() -> None:
    assert read_parts([]) == []
    assert read_parts(["cc3m/*.tar", "s3://bucket/year=2020/*.tar", "year=2020/", "set=small", "=1"]) == []


def test_a_path_that_ends_in_a_number_can_have_a_weight_and_is_explained(tmp_path: Path) -> None:
    folder = tmp_path / "year=2020"
    folder.mkdir()
    assert read_parts([f"{folder}/"]) == []
    assert read_parts([f"{folder}=0.5"]) == [DataPart(str(folder), 0.5)]
    with pytest.raises(InputError, match=r"year=2020' exists, and its name ends as .* Write .*year=2020/ where"):
        read_parts([str(folder)])


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (["a", "b=0.5"], r"'a' has no weight, and b=0.5 has one. Give every part its weight \(a=1\), or none"),
        (["a=1", "b=-0.5"], r"'b=-0.5' has the weight -0.5; a weight is at least 0, and finite"),
        (["a=nan", "b=1"], r"'a=nan' has the weight nan"),
        (["a=inf", "b=1"], r"'a=inf' has the weight inf"),
        (["a=0", "b=0.0"], r"the weights of all parts are 0 \(a=0, b=0.0\)"),
    ],
)
def test_weights_that_make_no_sense_are_refused(data: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        read_parts(data)
