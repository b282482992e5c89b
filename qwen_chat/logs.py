"""What a run says and what a service writes down.

In: short lines for the console; one flat record a request for the service log.
Out: lines on standard error (rank 0 alone); one JSON line a request in a file that never outgrows its bound.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
from collections.abc import Mapping
from logging.handlers import RotatingFileHandler
from pathlib import Path

from qwen_chat.errors import OutputError

MAX_BYTES = 10_000_000  # of one file of the service log
KEPT_FILES = 5  # rotated files beside the current one: six files, 60 MB in all
LONGEST_TEXT = 64_000  # characters of one text field; a logged prompt may not fill a file on its own


def is_rank_zero() -> bool:
    """True in the only process, and in the first of several (torchrun and deepspeed set RANK)."""
    return os.environ.get("RANK", "0") == "0"


def rank_zero(*parts: object) -> None:
    """Print one line on standard error, once a run however many ranks it has."""
    if is_rank_zero():
        print(*parts, file=sys.stderr, flush=True)


def json_line(record: Mapping[str, object]) -> str:
    """`record` as one line of JSON in which no character can act on a terminal.

    Chinese stays readable. What is not printable (controls, line separators, zero-width and bidirectional marks)
    becomes a JSON escape, so that a parser gives back what came in.
    """
    plain = {key: _shortened(value) for key, value in record.items()}
    text = json.dumps(plain, ensure_ascii=False, default=str)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)


class RequestLog:
    """An append-only file of one JSON line a request, rotated by size. Thread-safe.

    A full disk loses lines, never requests: `lost` counts them.
    """

    def __init__(self, path: Path, *, max_bytes: int = MAX_BYTES, kept_files: int = KEPT_FILES) -> None:
        """Open `path` for appending; raise OutputError where that is not allowed."""
        self.path = path
        self.lost = 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._handler = _CountingHandler(
                path, maxBytes=max_bytes, backupCount=kept_files, encoding="utf-8", errors="backslashreplace"
            )
        except OSError as error:
            raise OutputError(
                f"{path}: cannot write the service log ({error.strerror}); name another file: --log_file"
            ) from None
        self._handler.setFormatter(logging.Formatter("%(message)s"))
        self._lock = threading.Lock()

    def write(self, record: Mapping[str, object]) -> None:
        """Append `record`; never raises."""
        line = json_line(record)
        entry = logging.LogRecord("qwen_chat.requests", logging.INFO, "", 0, line, None, None)
        with self._lock:
            self._handler.handle(entry)
            self.lost = self._handler.failures

    def close(self) -> None:
        """Flush and close the file."""
        self._handler.close()


class _CountingHandler(RotatingFileHandler):
    """Counts what could not be written where logging would print a traceback for each line."""

    failures = 0

    def handleError(self, record: logging.LogRecord) -> None:
        self.failures += 1


def request_log(path: str | os.PathLike[str], *, max_bytes: int = MAX_BYTES) -> RequestLog:
    """The service log at `path` (see RequestLog)."""
    return RequestLog(Path(path), max_bytes=max_bytes)


def _shortened(value: object) -> object:
    if isinstance(value, str) and len(value) > LONGEST_TEXT:
        return f"{value[:LONGEST_TEXT]}... ({len(value)} characters)"
    return value
