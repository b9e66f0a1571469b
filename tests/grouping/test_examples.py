import doctest
from types import ModuleType

import pytest

from distilclip.grouping import (
    _tiles,
    balance,
    cautions,
    cells,
    complete_linkage,
    cover,
    explanation,
    forecast,
    forest,
    near_pairs,
    reach,
    representatives,
    search_parts,
    sorted_rows,
)
from distilclip.vectors import tolerance

MODULES = (
    _tiles,
    balance,
    cautions,
    cells,
    complete_linkage,
    cover,
    explanation,
    forecast,
    forest,
    near_pairs,
    reach,
    representatives,
    search_parts,
    sorted_rows,
    tolerance,
)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_the_example_of_a_module_is_true(module: ModuleType) -> None:
    found = doctest.testmod(module, raise_on_error=True)
    assert found.attempted > 1
