"""The system text that a tuned model's template gives a conversation without one.

In: the source of a template. Out: the same with one line in front, so that whatever renders the template, here and on
any other server, begins such a conversation as it was trained. No tokenizer; nothing is rendered here.
"""

from __future__ import annotations

import json
import re

_LINE = (
    "{{%- if not messages or messages[0]['role'] != 'system' %}}"
    "{{% set messages = [{{'role': 'system', 'content': {}}}] + messages %}}{{% endif %}}\n"
)
_WRITTEN = re.compile(re.escape(_LINE.format("TEXT")).replace("TEXT", r'("(?:[^"\\]|\\.)*")'))
_SHOWN = 60  # characters


def line(text: str | None) -> str:
    """What stands in front of a template; nothing without a text. (A Jinja literal: JSON's escapes are among Python's,
    which Jinja reads.)"""
    return "" if text is None else _LINE.format(json.dumps(text, ensure_ascii=False))


def taken_apart(source: str) -> tuple[str | None, str]:
    """The text of the line that a template begins with, None without one, and the rest."""
    found = _WRITTEN.match(source)
    return (None, source) if found is None else (json.loads(found[1]), source[found.end() :])


def told(text: str | None) -> str:
    """A line for a person; empty without a text."""
    if text is None:
        return ""
    short = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
    return f"without a system message a conversation gets: {short!r}"
