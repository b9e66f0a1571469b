from __future__ import annotations

import dataclasses

import pytest

from distilclip.data.bad_samples import EARLY, ErrorPolicy
from distilclip.errors import InputError
from distilclip.stages import embed, train

CONFIGS = {"embed": dataclasses.fields(embed.Config), "train": dataclasses.fields(train.Config)}


def test_raise_stops_at_the_first_and_names_file_member_reason_and_remedy() -> None:
    with pytest.raises(InputError, match=r"a\.tar: 7: too many pixels: 9 x 9\..*raise --max-pixels.*--on-error skip"):
        ErrorPolicy("raise").bad("too many pixels: 9 x 9", where="a.tar: 7")


def test_the_remedy_names_flags_that_the_stage_at_hand_has() -> None:
    with pytest.raises(InputError) as raised:
        ErrorPolicy("raise").bad("too many pixels", where="a.tar: 7")
    for stage, flag in (("embed", "--max-pixels"), ("embed", "--on-error"), ("train", "--max-bad-ratio")):
        assert flag in str(raised.value)
        assert f"{flag.removeprefix('--').replace('-', '_')}" in {field.name for field in CONFIGS[stage]}
        assert f"`{stage}`" in str(raised.value)
    assert {"max_pixels", "on_error"}.isdisjoint(field.name for field in CONFIGS["train"])


def test_skip_counts_by_reason_without_detail() -> None:
    policy = ErrorPolicy("skip", max_bad_ratio=0.5)
    policy.seen(4)
    policy.bad("too many pixels: 9 x 9", where="a.tar: 1")
    policy.bad("too many pixels: 8 x 8", where="a.tar: 2")
    policy.check(final=True)
    assert policy.reasons == {"too many pixels": 2}
    assert policy.num_bad == 2


def test_over_the_budget_the_message_lists_the_counts_and_the_first() -> None:
    policy = ErrorPolicy("skip", max_bad_ratio=0.01)
    policy.seen(100)
    policy.bad("duplicate key", where="a.tar: 1")
    policy.check(final=True)
    policy.bad("duplicate key", where="a.tar: 2")
    policy.bad("no caption", where="a.tar: 3")
    with pytest.raises(
        InputError,
        match=r"3 of 100 samples.*1\.0%: duplicate key \(2\), no caption \(1\)\. The first is a\.tar: 1: .*by side",
    ):
        policy.check(final=True)


def test_a_few_samples_are_no_ground_for_a_verdict() -> None:
    policy = ErrorPolicy("skip", max_bad_ratio=0.01)
    policy.seen(10)
    policy.bad("no caption", where="a.tar: 1")
    policy.check()
    policy.seen(EARLY)
    for _ in range(20):
        policy.bad("no caption", where="a.tar: 2")
    with pytest.raises(InputError, match="21 of 1010"):
        policy.check()


def test_a_budget_is_a_share() -> None:
    with pytest.raises(InputError, match=r"max_bad_ratio is a share between 0 and 1, not 5\.0"):
        ErrorPolicy("skip", max_bad_ratio=5.0)
