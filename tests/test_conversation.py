"""Conversations: OpenAI's shape in and out, and one clear line for everything else."""

import json
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_chat.conversation import Conversation, Message, ToolCall
from qwen_chat.errors import FormatError

QUESTION = {"role": "user", "content": "你好 🙂"}
TOOL = {"type": "function", "function": {"name": "now", "parameters": {"b": 1, "a": 2}}}


def call(arguments: Any, name: Any = "now", **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}} | more


def read(*messages: Any, **more: Any) -> Conversation:
    return Conversation.from_openai({"messages": list(messages), **more})


def test_everything_that_a_conversation_holds() -> None:
    record = {
        "messages": [
            {"role": "system", "content": ""},
            QUESTION,
            {
                "role": "assistant",
                "content": "c",
                "reasoning_content": "r",
                "tool_calls": [call('{"z": 1}', id="x"), call("{}")],
                "train": False,
            },
            {"role": "tool", "content": "8", "tool_call_id": "x", "name": "now"},
        ],
        "tools": [TOOL],
        "parallel_tool_calls": False,
    }
    conversation = Conversation.from_openai(record)
    assert conversation.messages == (
        Message("system"),
        Message("user", "你好 🙂"),
        Message(
            "assistant",
            "c",
            reasoning="r",
            tool_calls=(ToolCall("now", '{"z": 1}', "x"), ToolCall("now", "{}")),
            train=False,
        ),
        Message("tool", "8", tool_call_id="x", name="now"),
    )
    assert conversation.tools == (TOOL,)
    assert not conversation.parallel_tool_calls
    assert conversation.to_openai() == record
    assert list(conversation.to_openai()["tools"][0]["function"]["parameters"]) == ["b", "a"]
    with pytest.raises(FrozenInstanceError):
        conversation.messages[0].content = "changed"  # type: ignore[misc]


def test_what_clients_leave_out_or_send_otherwise() -> None:
    conversation = read(
        QUESTION,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [call({"城": [1.5, None]}), call(None), call("")],
        },
        {"role": "tool", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "tool_calls": None, "weight": 1},
        extra="ignored",
        tools=None,
        parallel_tool_calls=None,
    )
    _, called, result, reply = conversation.messages
    assert called.content == reply.content == ""
    assert [c.arguments for c in called.tool_calls] == ['{"城": [1.5, null]}', "{}", "{}"]
    assert result.content == "ab"
    assert reply == Message("assistant", train=True)
    assert read(QUESTION | {"weight": 0}).messages[0].train is False
    assert read(QUESTION | {"weight": 0, "train": True}).messages[0].train is True
    assert conversation.tools == ()
    assert conversation.parallel_tool_calls


BAD_MESSAGES = [
    ("text", "message 1: text; expected an object with 'role' and 'content'"),
    ({"role": "bot"}, "message 1: role 'bot'; expected one of system, user, assistant, tool"),
    ({"role": ["user"]}, "message 1: role ['user']; expected one of system, user, assistant, tool"),
    ({"role": "user", "content": 5}, "message 1: content is a number; expected text"),
    (
        {"role": "user", "content": [{"type": "image_url"}]},
        "message 1: content has a part that is not text; expected only {'type': 'text'} parts",
    ),
    (
        {"role": "user", "tool_calls": [call("{}")]},
        "message 1: tool_calls on role 'user'; expected only on 'assistant'",
    ),
    ({"role": "assistant", "tool_calls": "now()"}, "message 1: tool_calls is text; expected a list"),
    (
        {"role": "assistant", "tool_calls": [{"name": "now"}]},
        "message 1: tool_calls[0]: no function name; expected {'function': {'name': ..., 'arguments': ...}}",
    ),
    (
        {"role": "assistant", "tool_calls": [call("{}"), call("{}", name="")]},
        "message 1: tool_calls[1]: no function name; expected {'function': {'name': ..., 'arguments': ...}}",
    ),
    (
        {"role": "assistant", "tool_calls": [call("[1]")]},
        "message 1: tool_calls[0]: arguments hold a list; expected an object",
    ),
    (
        {"role": "assistant", "tool_calls": [call(7)]},
        "message 1: tool_calls[0]: arguments are a number; expected an object or its JSON text",
    ),
    (
        {"role": "assistant", "tool_calls": [call('{"a": NaN}')]},
        "message 1: tool_calls[0]: arguments are no JSON (NaN is no JSON value); "
        "expected the text of an object",
    ),
    (
        {"role": "assistant", "reasoning_content": 1},
        "message 1: reasoning_content is a number; expected text",
    ),
    ({"role": "tool", "tool_call_id": []}, "message 1: tool_call_id is empty; expected text"),
    ({"role": "assistant", "train": 1}, "message 1: train is a number; expected true or false"),
    ({"role": "assistant", "weight": 0.5}, "message 1: weight is 0.5; expected 0 or 1"),
    ({"role": "assistant", "weight": True}, "message 1: weight is True; expected 0 or 1"),
]


@pytest.mark.parametrize(("message", "expected"), BAD_MESSAGES)
def test_a_bad_message_is_named(message: Any, expected: str) -> None:
    with pytest.raises(FormatError) as caught:
        read(QUESTION, message)
    assert (str(caught.value), caught.value.message) == (expected, 1)


BAD_RECORDS = [
    ({}, "messages: absent; expected a list with at least one message"),
    ({"messages": []}, "messages: empty; expected a list with at least one message"),
    ({"messages": "hi"}, "messages: text; expected a list with at least one message"),
    ({"messages": [QUESTION], "tools": "now"}, "tools: text; expected a list of tools"),
    (
        {"messages": [QUESTION], "tools": [TOOL, {"name": "now"}]},
        "tools[1]: no function name; expected {'type': 'function', 'function': {'name': ...}}",
    ),
]


@pytest.mark.parametrize(("record", "expected"), BAD_RECORDS)
def test_a_bad_record_is_named(record: Any, expected: str) -> None:
    with pytest.raises(FormatError) as caught:
        Conversation.from_openai(record)
    assert (str(caught.value), caught.value.message) == (expected, None)


@pytest.mark.parametrize("arguments", [float("nan"), {1, 2}])
def test_arguments_that_are_no_json_are_refused(arguments: Any) -> None:
    with pytest.raises(FormatError, match=r"message 0: tool_calls\[0\]: arguments cannot be written as JSON"):
        read({"role": "assistant", "tool_calls": [call({"a": arguments})]})


def test_arguments_nested_beyond_reason_are_refused() -> None:
    deep = '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"
    with pytest.raises(FormatError, match="arguments are no JSON"):
        read({"role": "assistant", "tool_calls": [call(deep)]})


objects = st.dictionaries(
    st.text(), st.none() | st.integers() | st.text() | st.lists(st.booleans()), max_size=3
)
calls = st.builds(
    ToolCall,
    st.text(min_size=1),
    objects.map(lambda o: json.dumps(o, ensure_ascii=False)),
    st.none() | st.text(),
)
train = st.none() | st.booleans()
messages = st.one_of(
    st.builds(Message, st.sampled_from(["system", "user"]), st.text()),
    st.builds(
        Message,
        st.just("assistant"),
        st.text(),
        reasoning=st.none() | st.text(),
        tool_calls=st.lists(calls, max_size=2).map(tuple),
        train=train,
    ),
    st.builds(
        Message, st.just("tool"), st.text(), tool_call_id=st.none() | st.text(), name=st.none() | st.text()
    ),
)
conversations = st.builds(
    Conversation,
    st.lists(messages, min_size=1, max_size=5).map(tuple),
    st.lists(st.just(TOOL), max_size=2).map(tuple),
    st.booleans(),
)


@given(conversations)
def test_writing_and_reading_are_inverse(conversation: Conversation) -> None:
    assert Conversation.from_openai(conversation.to_openai()) == conversation
    through_json = json.loads(json.dumps(conversation.to_openai()))
    assert Conversation.from_openai(through_json) == conversation


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
)
keys = st.sampled_from(["role", "content", "tool_calls", "function", "name", "arguments", "train", "weight"])
likely = st.recursive(
    json_values | st.sampled_from(["user", "assistant", "tool", "{}"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=5),
)


@given(st.dictionaries(st.sampled_from(["messages", "tools"]), likely))
def test_any_json_is_read_or_refused(record: dict[str, Any]) -> None:
    try:
        conversation = Conversation.from_openai(record)
    except FormatError as error:
        assert "\n" not in str(error) or any("\n" in str(v) for v in record.values())
    else:
        assert Conversation.from_openai(conversation.to_openai()) == conversation
