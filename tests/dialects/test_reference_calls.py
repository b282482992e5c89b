"""Calls that other people wrote, for 2,501 questions: each dialect reads back what it writes."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from llguidance import LLTokenizer, TokenizerWrapper

from qwen_chat.conversation import ToolCall
from qwen_chat.dialects.dialect import Dialect, Tools
from qwen_chat.dialects.hermes import Hermes
from qwen_chat.dialects.known import parse, stream_parser
from qwen_chat.dialects.qwen_agent import QwenAgent
from qwen_chat.dialects.reader import Reply, fold
from qwen_chat.dialects.xml import Xml
from qwen_chat.tools.validate import check_call
from tests.support import reference_calls
from tests.support.byte_grammars import Bytes, accepts

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


@pytest.mark.parametrize("name", DIALECTS)
def test_a_grammar_lets_every_valid_call_be_written(
    name: str, questions: list[reference_calls.Question]
) -> None:
    """Those of every twenty-fifth question, with the arguments in the order of the schema."""
    dialect, written = DIALECTS[name], 0
    vocabulary = LLTokenizer(TokenizerWrapper(Bytes()), eos_token=256)  # type: ignore[arg-type]
    for question in questions[::25]:
        for call in question.calls:
            if check_call(call, question.tools) is not None:
                continue
            function = next(one["function"] for one in question.tools if one["function"]["name"] == call.name)
            arguments, order = json.loads(call.arguments), list(function["parameters"].get("properties", ()))
            sorted_arguments = {key: arguments[key] for key in sorted(arguments, key=order.index)}
            text = Hermes().write if dialect == QwenAgent() else dialect.write
            one = ToolCall(call.name, json.dumps(sorted_arguments, ensure_ascii=False))
            assert accepts(vocabulary, dialect.call_grammar(question.tools), text([one])), question.name
            written += 1
    assert written == 133


@pytest.mark.slow
@pytest.mark.parametrize("name", DIALECTS)
def test_every_question(name: str, questions: list[reference_calls.Question]) -> None:
    """117 calls have an argument of another type than its schema says, nearly all of them null for a text."""
    assert check(DIALECTS[name], questions) == (3302, 117 if DIALECTS[name].name == "xml" else 0)
