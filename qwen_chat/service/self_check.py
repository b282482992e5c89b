"""A service holds itself to the certificates of what it serves, before it listens.

In: an engine, the folders of its model and adapters. Out: one line for each format.lock that is there: what agrees, or
a warning with the first byte that differs. It never stops a start.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from qwen_chat.certificate.causes import Suspects, first_difference
from qwen_chat.certificate.conversations import TOOLS
from qwen_chat.certificate.lock import LOCK_FILE, FormatLock, LockError
from qwen_chat.certificate.report import difference_lines
from qwen_chat.certificate.server import Seen
from qwen_chat.chat.format import ChatFormat
from qwen_chat.errors import first_line, printable
from qwen_chat.inference.engine import Engine
from qwen_chat.service.errors import APIError
from qwen_chat.service.prepare import chat_prompt_ids
from qwen_chat.training.checkpoints import model_fingerprint

SECONDS_OF_A_START = 1.0  # for all locks together


def check_formats(engine: Engine, model: Path, adapters: Mapping[str, Path]) -> Iterator[str]:
    """A line for the model and each adapter that has a format.lock."""
    end = time.monotonic() + SECONDS_OF_A_START
    served: list[tuple[str | None, Path]] = [(None, model)] if engine.serves_base else []
    for name, folder in (*served, *adapters.items()):
        if not (folder / LOCK_FILE).is_file():
            continue
        began, what = time.monotonic(), f"format.lock of {name or 'the model'}"
        try:
            lock = FormatLock.read(folder)
            wrong, count = _wrong(lock, engine.format_of(name), end)
            if wrong is None and not set(lock.stop_ids) <= {
                *engine.stop_token_ids,
                *engine.format_of(name).stop_token_ids,
            }:
                wrong = "it does not stop at all of the trained end tokens"
            if wrong is None and name is not None and lock.base.get("hash") != model_fingerprint(model):
                wrong = f"the adapter was trained over {lock.base.get('name')}, whose weights are others than {model}'s"
        except LockError as error:
            wrong, count = str(error), 0
        except Exception as error:  # a file that somebody made; whatever it brings about, the service starts
            wrong, count = f"cannot be replayed ({type(error).__name__}: {first_line(error)})", 0
        if wrong is not None:
            yield f"warning: {what}: {printable(wrong, 2000)}"
            continue
        took = time.monotonic() - began
        part = "" if count == len(lock.entries) else f" of {len(lock.entries)} (there was no time for more)"
        yield (
            f"{what}: {count} prompts{part}, {len(lock.answers)} replies with calls and the stop tokens agree"
            f" ({took:.2f} s)"
        )


def _wrong(lock: FormatLock, fmt: ChatFormat, end: float) -> tuple[str | None, int]:
    """The first thing that is not as it was trained, and how many prompts were looked at before `end`."""
    for k, entry in enumerate(lock.entries):
        if k and time.monotonic() > end:
            return None, k
        tools = list(entry.case.tools) or None
        try:
            ids = tuple(chat_prompt_ids(list(entry.case.messages), tools, fmt, entry.case.variables))
        except APIError as error:
            return f"conversation {k} is refused ({error.name})", k
        if ids != entry.ids:
            suspects = Suspects([entry], [Seen(ids=ids, count=len(ids))], fmt)
            shown = first_difference(k, entry.prompt, suspects.text(0) or "")
            found = suspects.findings()
            where = "; ".join(line.strip() for line in difference_lines(shown, colour=False))
            return f"prompts differ; {where}; likely {found[0].cause if found else 'another template'}", k
    for answer in lock.answers:
        reply = fmt.parse(answer.text, list(TOOLS))
        calls = tuple((call.name, call.arguments) for call in reply.tool_calls)
        if (reply.content, calls) != (answer.content, answer.calls):
            return f"calls are read otherwise than they were trained: {answer.text[:80]!r}", len(lock.entries)
    return None, len(lock.entries)
