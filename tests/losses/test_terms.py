from __future__ import annotations

from typing import Any

import pytest

from distilclip.losses.terms import COMPUTE
from distilclip.methods import TERMS, add_term, find_term


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("name", "needs", "message"),
    [
        ("task", (), "already"),
        ("alpha", (), "already"),
        ("toy", ("tutor",), "choose from"),
        ("toy", ("scale",), "only a term that needs a teacher"),
    ],
)
def test_a_term_that_cannot_be_registered_is_named(name: str, needs: Any, message: str) -> None:
    before = dict(TERMS)
    with pytest.raises(ValueError, match=f"{name}.*{message}"):
        add_term(name, "a toy", needs=needs)
    assert before == TERMS


def test_every_term_has_words_and_a_way_to_compute_it() -> None:
    assert COMPUTE.keys() == TERMS.keys()
    assert len(TERMS) == 11
    for name, term in TERMS.items():
        assert find_term(name) is term
        assert term.name == name
        assert term.words
