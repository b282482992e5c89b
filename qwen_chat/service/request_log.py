"""What a service writes down: one JSON line a request.

In: a `RequestRecord` a request, filled in on its way. Out: a line in a file that never outgrows its bound and that one
service writes.
"""

from __future__ import annotations

import json
import logging
import os
import stat
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

from filelock import lock_descriptor

from qwen_chat.errors import OutputError

# Bytes of one file of the service log.
MAX_BYTES = 10_000_000
# The share of each file for requests that did not pass the gate: alone they never fill one.
STRANGERS_SHARE = 0.1
# Rotated files beside the current one: six files, 60 MB in all.
KEPT_FILES = 5
# Characters of one text field; a logged prompt may not fill a file on its own.
LONGEST_TEXT = 64_000


@dataclass(slots=True)
class RequestRecord:
    """What is known of one request; the handler fills it in as it learns."""

    id: str
    path: str
    began: float = field(default_factory=time.monotonic)
    model: str | None = None
    stream: bool | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    # Seconds since `began`.
    first_token: float | None = None
    finish_reason: str | None = None
    error: str | None = None
    user: str | None = None
    prompt: object = None
    reply: str | None = None
    # Hints of the request that change no answer, by name.
    ignored: Sequence[str] = ()
    # It passed the gate, with a key where there are keys.
    admitted: bool = False

    def line(self, status: int) -> dict[str, object]:
        """The log's line. Times in milliseconds; fields that do not apply are left out."""
        now = time.time()
        line: dict[str, object] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1000):03d}Z",
            "id": self.id,
            "path": self.path,
            "status": status,
            "model": self.model,
            "stream": self.stream,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "completion_tokens": self.completion_tokens,
            "first_token_ms": None if self.first_token is None else round(self.first_token * 1000, 1),
            "ms": round((time.monotonic() - self.began) * 1000, 1),
            "finish_reason": self.finish_reason,
            "error": self.error,
            "user": self.user,
            "ignored": list(self.ignored) or None,
            "prompt": self.prompt,
            "reply": self.reply,
        }
        return {key: value for key, value in line.items() if value is not None}


def json_line(record: Mapping[str, object]) -> str:
    """`record` as one line of JSON in which no character can act on a terminal.

    Chinese stays readable. What is not printable (controls, line separators, zero-width and bidirectional marks)
    becomes a JSON escape, so that a parser gives back what came in.
    """
    short = dict(record)
    for key, value in record.items():
        if isinstance(value, str) and len(value) > LONGEST_TEXT:
            short[key] = f"{value[:LONGEST_TEXT]}... ({len(value)} characters)"
    text = json.dumps(short, ensure_ascii=False, default=str)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)


class RequestLog:
    """An append-only file of one JSON line a request, rotated by size. Thread-safe. Only its owner may read it,
    and only one service at a time writes it.

    A full disk loses lines, never requests: `lost` counts them. Lines of strangers take at most STRANGERS_SHARE of
    a file, so that they cannot make it rotate until the others are gone: `withheld` counts those beyond.
    """

    def __init__(self, path: Path, *, max_bytes: int = MAX_BYTES, kept_files: int = KEPT_FILES) -> None:
        """Open `path` for appending; raise OutputError where that is not allowed, or another service writes it."""
        self.path = path
        self.lost = 0
        self.withheld = 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._handler = _OwnFile(
                path, maxBytes=max_bytes, backupCount=kept_files, encoding="utf-8", errors="backslashreplace"
            )
        except OSError as error:
            problem = f"cannot write the service log ({error.strerror})"
            if isinstance(error, BlockingIOError):
                problem = "another service is writing it"
            raise OutputError(f"{path}: {problem}; name another file: --log_file") from None
        self._handler.setFormatter(logging.Formatter("%(message)s"))
        self._lock = threading.Lock()

    def write(self, record: Mapping[str, object], *, stranger: bool = False) -> None:
        """Append `record`; never raises. `stranger`: of a request that did not pass the gate."""
        line = json_line(record)
        entry = logging.LogRecord("qwen_chat.requests", logging.INFO, "", 0, line, None, None)
        with self._lock:
            if stranger:
                strangers = self._handler.strangers + len(line.encode()) + 1
                if strangers > STRANGERS_SHARE * self._handler.maxBytes:
                    self.withheld += 1
                    return
                self._handler.strangers = strangers
            self._handler.handle(entry)
            self.lost = self._handler.failures

    def close(self) -> None:
        """Flush and close the file."""
        self._handler.close()


class _OwnFile(RotatingFileHandler):
    """A file that is ours alone. Counts what could not be written where logging would print a traceback for
    each line."""

    failures = 0
    # Bytes of strangers' lines in the current file.
    strangers = 0

    def _open(self) -> Any:
        self.strangers = 0
        stream = open(  # noqa: SIM115  logging closes it
            self.baseFilename,
            self.mode,
            encoding=self.encoding,
            errors=self.errors,
            # For the owner alone: prompts may stand there.
            opener=lambda path, flags: os.open(path, flags, 0o600),
        )
        # Neither /dev/null nor a pipe is ours alone.
        if stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            try:
                # An older file may have been open to all.
                os.fchmod(stream.fileno(), 0o600)
                # Held until the file is closed.
                ours = lock_descriptor(stream.fileno(), blocking=False)
            except OSError:
                # Somebody else's file, or a file system without locks.
                ours = True
            if not ours:
                stream.close()
                raise BlockingIOError(self.baseFilename)
        return stream

    def handleError(self, record: logging.LogRecord) -> None:
        self.failures += 1
