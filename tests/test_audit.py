from packaging.version import Version

from tests.audit import lower_bounds, pinned, safe_versions, unsafe


def test_neither_our_lower_bounds_nor_our_constraints_allow_a_version_known_to_be_unsafe() -> None:
    assert len(safe_versions()) > 15
    assert unsafe(lower_bounds()) == []
    assert unsafe(pinned()) == []
    assert set(safe_versions()) <= set(pinned())  # no name that nothing installs


def test_an_older_version_is_named_with_the_reason() -> None:
    assert unsafe({"torch": Version("2.5.1"), "numpy": Version("1.26")}) == [
        "torch 2.5.1 is older than 2.6.0: CVE-2025-32434: torch.load runs code in spite of weights_only"
    ]
