from __future__ import annotations

import io
import json
import logging
import re

import pytest

from distilclip import cli
from distilclip.errors import InputError
from distilclip.messages import say, set_up_messages, warn


def test_json_lines_have_time_level_message_and_the_numbers(capfd: pytest.CaptureFixture[str]) -> None:
    set_up_messages(style="json")
    say("embed: 3 of 4", done=3, total=4)
    warn('a "quoted" word, in two\nlines')
    first, second = map(json.loads, capfd.readouterr().err.splitlines())
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4}", first.pop("time"))
    assert first == {"level": "info", "message": "embed: 3 of 4", "done": 3, "total": 4}
    assert second["level"] == "warning"
    assert second["message"] == 'a "quoted" word, in two\nlines'


def test_quiet_leaves_warnings(capfd: pytest.CaptureFixture[str]) -> None:
    set_up_messages(level="warning")
    say("a word")
    warn("take care")
    assert re.fullmatch(r"\d\d:\d\d:\d\d warning: take care\n", capfd.readouterr().err)


def test_only_the_first_process_speaks(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "1")
    say("a word")
    warn("take care")
    assert cli.main(["balance", "--lr-typo", "--log-level", "loud"]) == 2
    assert capfd.readouterr().err == ""


def test_from_python_the_messages_can_go_elsewhere(capfd: pytest.CaptureFixture[str]) -> None:
    heard = io.StringIO()
    logger = logging.getLogger("distilclip")
    logger.addHandler(logging.StreamHandler(heard))
    logger.setLevel(logging.INFO)
    say("a word")
    assert heard.getvalue() == "a word\n"
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(("values", "message"), [({"level": "loud"}, "'loud'.*Known"), ({"style": "jsn"}, "'json'")])
def test_unknown_levels_and_formats_are_refused(values: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        set_up_messages(**values)
