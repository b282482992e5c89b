"""Calls that other people wrote, for 2,501 questions: each dialect reads back what it writes."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from qwen_chat.conversation import ToolCall
from qwen_chat.dialects.dialect import Dialect, Tools
from qwen_chat.dialects.hermes import Hermes
from qwen_chat.dialects.known import parse, stream_parser
from qwen_chat.dialects.qwen_agent import QwenAgent
from qwen_chat.dialects.reader import Reply, fold
from qwen_chat.dialects.xml import Xml
from tests.support import reference_calls

DIALECTS: dict[str, Dialect] = {
    "hermes": Hermes(),
    "qwen_agent": QwenAgent(),
    "xml": Xml(),
    "xml, Python's words": Xml(python_words=True),
}


@pytest.fixture(scope="module")
def questions() -> list[reference_calls.Question]:
    return reference_calls.load()


def typed(call: ToolCall, tools: Tools, dialect: Dialect) -> ToolCall:
    """The call as its bare text says it under its schema, found out in another way than the dialect's: a value that
    is no text becomes text where the schema wants one, and the other way round where the text is JSON."""
    if dialect.name != "xml":
        return call
    function = next((tool["function"] for tool in tools if tool["function"]["name"] == call.name), {})
    properties = function.get("parameters", {}).get("properties", {})
    arguments = {}
    for key, value in json.loads(call.arguments).items():
        if properties.get(key, {"type": "string"})["type"] == "string":
            plain = str(value) if dialect == Xml(python_words=True) else json.dumps(value, ensure_ascii=False)
            plain = json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else plain
            arguments[key] = value if isinstance(value, str) else plain
        else:
            arguments[key] = json_or_text(value) if isinstance(value, str) else value
    return ToolCall(call.name, json.dumps(arguments, ensure_ascii=False))


def json_or_text(text: str) -> Any:
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return text if isinstance(value, str) else value


def check(dialect: Dialect, questions: list[reference_calls.Question]) -> tuple[int, int]:
    """How many calls were read back, and how many of them as other JSON than was written."""
    rng = random.Random(0)
    read = changed = 0
    for question in questions:
        text = dialect.write(question.calls)
        expected = Reply("", "", [typed(call, question.tools, dialect) for call in question.calls])
        assert parse(text, question.tools) == expected, question.name
        cuts = [sorted(rng.choices(range(len(text)), k=4)) for _ in range(5)]
        for places in [*cuts, list(range(1, len(text)))]:
            parser = stream_parser(question.tools)
            pieces = [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]
            deltas = [delta for piece in pieces for delta in parser.feed(piece)]
            assert fold([*deltas, *parser.finish()]) == expected, (question.name, places)
        read += len(question.calls)
        pairs = zip(expected.tool_calls, question.calls, strict=True)
        changed += sum(json.loads(one.arguments) != json.loads(other.arguments) for one, other in pairs)
    return read, changed


@pytest.mark.parametrize("name", DIALECTS)
def test_every_twenty_fifth_question(name: str, questions: list[reference_calls.Question]) -> None:
    assert len(questions) == 2501
    assert check(DIALECTS[name], questions[::25]) == (134, 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", DIALECTS)
def test_every_question(name: str, questions: list[reference_calls.Question]) -> None:
    """117 calls have an argument of another type than its schema says, nearly all of them null for a text."""
    assert check(DIALECTS[name], questions) == (3302, 117 if DIALECTS[name].name == "xml" else 0)
