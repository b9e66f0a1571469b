"""ARCHITECTURE.md names every file with what it does, and the layout keeps its measures."""

from __future__ import annotations

import pytest

from tests import layout

PAGE = (layout.ROOT / "ARCHITECTURE.md").read_text()


def test_every_file_has_its_line() -> None:
    found = PAGE.split(layout.BEGIN)[1].split(layout.END)[0].strip()
    assert found == layout.listing().strip(), "run `make layout`"


@pytest.mark.parametrize(("module", "path"), layout.modules().items(), ids=layout.modules())
def test_every_file_says_what_it_does_in_one_sentence(module: str, path: object) -> None:
    line = layout.first_line(layout.modules()[module])
    assert line.endswith(".")
    assert line[0].isupper() or line[0] == "`"


def test_at_most_five_levels_of_packages() -> None:
    assert layout.num_levels() <= 5


def test_no_function_takes_more_than_eight_parameters() -> None:
    """What travels together is a record. Two public functions are exceptions: each keyword is a user's choice."""
    found = [name for name, _, parameters in layout.functions() if parameters > 8]
    assert found == ["grouping.balance.balance", "losses.cluster.cluster"]
