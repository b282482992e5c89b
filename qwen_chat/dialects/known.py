"""The dialects that there are, and reading that knows them all.

In: a reply. Out: what the reader makes of it. Every dialect's calls are read, whatever the prompt asked for: models
fall back into what their base was taught.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

from qwen_chat.dialects.dialect import Dialect, Tools
from qwen_chat.dialects.hermes import Hermes
from qwen_chat.dialects.qwen_agent import QwenAgent
from qwen_chat.dialects.reader import Reply, StreamParser, fold
from qwen_chat.dialects.shapes import Marks
from qwen_chat.dialects.xml import Xml

KNOWN: tuple[Dialect, ...] = (Hermes(), QwenAgent(), Xml(), Xml(python_words=True))
# What counts as a call: anything that any dialect knows; only what a grammar forces, read as it is written; nothing.
Calls = Literal["any", "bound", "none"]


@cache
def marks_of(calls: Calls) -> Marks:
    """What is looked for. Stop marks and thoughts are told apart whatever counts as a call."""
    every = sum(dict.fromkeys(dialect.marks for dialect in KNOWN), Marks())
    forms = {"any": every.forms, "bound": tuple(form for form in every.forms if form.bound), "none": ()}
    return Marks(forms[calls], every.stops, every.answers)


def parse(text: str, tools: Tools | None = None, *, in_reasoning: bool = False) -> Reply:
    """Read a whole reply: what a stream parser says about it, added up. Never raises on any text.

    `in_reasoning`: the prompt ended inside a thought.
    """
    parser = stream_parser(tools, in_reasoning=in_reasoning)
    return fold([*parser.feed(text), *parser.finish()])


def stream_parser(
    tools: Tools | None = None, *, in_reasoning: bool = False, calls: Calls = "any"
) -> StreamParser:
    """Read a reply piece by piece. `calls`: what counts as one."""
    return StreamParser(tools, marks=marks_of(calls), in_reasoning=in_reasoning, bound=calls == "bound")


def begins_call(text: str) -> bool:
    """Whether a text holds the mark that begins a call: in content, of a call that could not be read."""
    return any(form.mark in text for form in marks_of("any").forms if not form.loose)
