"""Say what a stage does, on stderr: as plain lines, or as JSON lines for a program. Warnings stand out.

All goes through the logger `distilclip`, so another program can add handlers of its own and hears the same. Of several
processes of `torchrun`, only the first speaks.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from typing import Any, Literal, get_args

from distilclip.errors import InputError, did_you_mean

Format = Literal["text", "json"]
LEVELS = ("debug", "info", "warning", "error")

_logger = logging.getLogger("distilclip")


class _Handler(logging.Handler):
    """Writes to what `sys.stderr` is now: a progress bar puts its own stream there, above which lines appear."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)


class _Lines(logging.Formatter):
    """The message, in a file after the time; a warning says that it is one."""

    def format(self, record: logging.LogRecord) -> str:
        moment = "" if sys.stderr.isatty() else time.strftime("%H:%M:%S ", time.localtime(record.created))
        mark = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        return moment + mark + record.getMessage()


class _JsonLines(logging.Formatter):
    """One JSON object a line: time, level, message, and the numbers of a line of progress by their names."""

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(record.created))
        values = {"time": moment, "level": record.levelname.lower(), "message": record.getMessage()}
        return json.dumps({**values, **getattr(record, "values", {})}, ensure_ascii=False)


def set_up_messages(*, level: str | None = None, style: str = "text") -> None:
    """Choose what is said and how; called by the command line before a stage starts.

    Args:
        level: debug, info, warning or error (default: `$DISTILCLIP_LOG_LEVEL`, else info). From warning on, there is no
            progress either.
        style: text, or json for one JSON object a line.

    Raises:
        InputError: another level or style.
    """
    level = level or os.environ.get("DISTILCLIP_LOG_LEVEL") or "info"
    if level not in LEVELS:
        raise InputError(f"The log level {level!r} is unknown. {did_you_mean(level, LEVELS)}")
    if style not in get_args(Format):
        raise InputError(f"The log format {style!r} is unknown. {did_you_mean(style, get_args(Format))}")
    handler = _Handler()
    handler.setFormatter(_JsonLines() if style == "json" else _Lines())
    _logger.handlers[:] = [handler]
    _logger.setLevel(level.upper())
    _logger.propagate = False


def say(text: str, **values: Any) -> None:
    """Say a line; `values` are its numbers for whoever reads JSON. An empty text says nothing."""
    if text and progress_is_heard():
        _logger.info("%s", text, extra={"values": values})


def warn(text: str) -> None:
    """Say a line that the user should not miss."""
    if _is_first_process():
        _set_up_once()
        _logger.warning("%s", text)


def progress_is_heard() -> bool:
    """Whether this process is to say how far it is."""
    _set_up_once()
    return _is_first_process() and _logger.isEnabledFor(logging.INFO)


def speaks_json() -> bool:
    """Whether lines are for a program, so that no bar may stand between them."""
    return any(isinstance(handler.formatter, _JsonLines) for handler in _logger.handlers)


def shows_details() -> bool:
    """Whether the user asked for debug messages, so that an error shows its traceback, too."""
    return _logger.isEnabledFor(logging.DEBUG)


def _set_up_once() -> None:
    """From Python, without the command line, a stage speaks as it does there, unless somebody listens already."""
    if not _logger.handlers:
        set_up_messages()


def _is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"
