"""Calls under a grammar cannot break, so their arguments are told while they are written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai import BadRequestError, OpenAI

from qwen_chat.conversation import ToolCall
from qwen_chat.dialects.hermes import Hermes
from qwen_chat.dialects.known import parse, stream_parser
from qwen_chat.dialects.reader import Delta, fold
from qwen_chat.dialects.xml import Xml
from qwen_chat.service.app import create_app
from qwen_chat.service.settings import ServiceSettings
from qwen_chat.tools.client import HttpClient
from qwen_chat.tools.loop import run_tools
from tests.support.scripted import LiveService, make_engine

# --- the parser ----------------------------------------------------------------------------------


def read(text: str, cuts: list[int] = []) -> tuple[list[Delta], bool]:  # noqa: B006
    """The deltas of a text in pieces, and whether its last call was cut."""
    parser = stream_parser(calls="bound")
    places = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    deltas = [d for a, b in zip(places, places[1:], strict=False) for d in parser.feed(text[a:b])]  # noqa: RUF007
    return [*deltas, *parser.finish()], parser.cut


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
arguments = st.dictionaries(st.text(), values, max_size=2).map(lambda v: json.dumps(v, ensure_ascii=False))
calls = st.lists(
    st.builds(ToolCall, st.sampled_from(["get_weather", "查 天气"]), arguments), min_size=1, max_size=3
)
cuts = st.lists(st.integers(0, 1000), max_size=20)


@settings(deadline=None)
@given(calls, cuts)
def test_whole_calls_are_what_they_are_without_a_grammar(written: list[ToolCall], cuts: list[int]) -> None:
    text = Hermes().write(written)
    if any(0xD800 <= ord(character) < 0xE000 for character in text):
        return
    deltas, cut = read(text, cuts)
    assert fold(deltas) == parse(text)
    assert not cut


@settings(deadline=None)
@given(calls, cuts, st.integers(1, 400))
def test_a_cut_call_does_not_depend_on_the_pieces(written: list[ToolCall], cuts: list[int], end: int) -> None:
    text = Hermes().write(written)[:end]
    assert (fold(read(text, cuts)[0]), read(text, cuts)[1]) == (fold(read(text)[0]), read(text)[1])


@settings(deadline=None)
@given(st.text(alphabet='<tool_call>{}[]",:\\u12e.-"nametrgs\n ', max_size=60), cuts)
def test_what_no_grammar_wrote_does_not_depend_on_the_pieces_either(text: str, cuts: list[int]) -> None:
    text = '<tool_call>\n{"name": "f", "arguments": {' + text
    assert fold(read(text, cuts)[0]) == fold(read(text)[0])


def test_arguments_come_as_they_are_written() -> None:
    inside = '{"city": "杭州 and a long \\"text\\" \\u00e9", "days": [1, 22, true]}'
    text = Hermes().write([ToolCall("get_weather", inside)])
    parser = stream_parser(calls="bound")
    begin, told = text.index(inside), ""
    for k, character in enumerate(text):
        for delta in parser.feed(character):
            if delta.name is not None:
                assert (delta, k) == (Delta(name="get_weather", index=0), begin)
            told += delta.arguments or ""
        written = max(0, min(k - begin + 1, len(inside)))
        assert len(told) >= written - 6  # half an escape, or a number that may go on
        assert inside.startswith(told)
    assert told == inside


@pytest.mark.parametrize(
    ("cut", "told"),
    [
        ('{"a": "x\\', '{"a": "x\\'),
        ('{"a": "x\\u00', '{"a": "x\\u00'),
        ('{"a": 12', '{"a": 12'),
        ('{"a": 1, ', '{"a": 1, '),
        ("{", "{"),
    ],
)
def test_a_cut_call_keeps_every_character(cut: str, told: str) -> None:
    deltas, was_cut = read(f'<tool_call>\n{{"name": "f", "arguments": {cut}')
    assert fold(deltas).tool_calls == [ToolCall("f", told)]
    assert was_cut


def test_before_its_arguments_a_cut_call_is_content() -> None:
    text = '<tool_call>\n{"name": "f", "arguments": '
    deltas, was_cut = read(text)
    assert (fold(deltas).content, fold(deltas).tool_calls, was_cut) == (text, [], False)


# --- the service ---------------------------------------------------------------------------------

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 200}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
STRICT = {**WEATHER, "function": {**WEATHER["function"], "strict": True}}
NAMED = {"type": "function", "function": {"name": "get_weather"}}
CITY = "杭州 " + "x" * 60
CALL = Hermes().write([ToolCall("get_weather", json.dumps({"city": CITY}, ensure_ascii=False))])


@pytest.fixture(scope="module")
def live() -> Iterator[LiveService]:
    with LiveService(
        create_app(make_engine(), settings=ServiceSettings(model_name="scripted", pace_seconds=0))
    ) as service:
        yield service


@pytest.fixture(scope="module")
def client(live: LiveService) -> OpenAI:
    return OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0, _strict_response_validation=True)


FORCED = [
    ({"tools": [WEATHER], "tool_choice": "required"}, "tool_calls"),
    ({"tools": [WEATHER], "tool_choice": NAMED}, "stop"),
    ({"tools": [STRICT]}, "tool_calls"),
]


def plain_and_streamed(client: OpenAI, **request: Any) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """What a plain and a streamed answer say, and the pieces of the latter's arguments."""
    choice = client.chat.completions.create(model="scripted", **request).choices[0]
    plain = {
        "content": choice.message.content or "",
        "calls": [(c.function.name, c.function.arguments) for c in choice.message.tool_calls or ()],  # type: ignore[union-attr]
        "reason": choice.finish_reason,
    }
    streamed: dict[str, Any] = {"content": "", "calls": [], "reason": None}
    pieces = []
    for chunk in client.chat.completions.create(model="scripted", stream=True, **request):
        one = chunk.choices[0]
        streamed["content"] += one.delta.content or ""
        for call in one.delta.tool_calls or ():
            assert call.function is not None
            if call.function.name:
                streamed["calls"].append((call.function.name, ""))
            name, arguments = streamed["calls"][call.index]
            streamed["calls"][call.index] = (name, arguments + (call.function.arguments or ""))
            pieces.append(call.function.arguments or "")
        streamed["reason"] = one.finish_reason or streamed["reason"]
    return plain, streamed, pieces


@pytest.mark.parametrize(("more", "reason"), FORCED, ids=["required", "named", "strict"])
def test_a_forced_call_is_streamed_as_it_is_written(
    client: OpenAI, more: dict[str, Any], reason: str
) -> None:
    messages = [{"role": "user", "content": f"say {CALL}"}]
    plain, streamed, pieces = plain_and_streamed(client, messages=messages, **more)
    expected = ("get_weather", json.dumps({"city": CITY}, ensure_ascii=False))
    assert plain == streamed == {"content": "", "calls": [expected], "reason": reason}
    assert pieces[0] == ""  # the name comes alone and first
    assert len(pieces) > 60
    assert max(len(piece) for piece in pieces) < 12


def test_a_call_that_the_model_was_free_to_write_still_comes_whole(client: OpenAI) -> None:
    messages = [{"role": "user", "content": f"say {CALL}"}]
    _, _, pieces = plain_and_streamed(client, messages=messages, tools=[WEATHER])
    assert len(pieces) == 2


@pytest.mark.parametrize(("more", "_"), FORCED, ids=["required", "named", "strict"])
@pytest.mark.parametrize(("limit", "reason"), [({"max_tokens": 80}, "length"), ({"stop": "xxx"}, "stop")])
def test_a_forced_call_that_is_cut(
    client: OpenAI, more: dict[str, Any], _: str, limit: dict[str, Any], reason: str
) -> None:
    messages = [{"role": "user", "content": f"say {CALL}"}]
    plain, streamed, _pieces = plain_and_streamed(client, messages=messages, **more, **limit)
    assert plain == streamed
    ((name, arguments),) = plain["calls"]
    assert (name, plain["content"], plain["reason"]) == ("get_weather", "", reason)
    assert json.dumps({"city": CITY}, ensure_ascii=False).startswith(arguments)
    assert len(arguments) > 8


def get_weather(city: str) -> str:
    """The weather of a city.

    Args:
        city: its name
    """
    return f"sunny in {city}"


def test_the_tool_loop_reads_them(live: LiveService) -> None:
    script = Hermes().write([ToolCall("get_weather", '{"city": "杭州"}')])
    done = run_tools(
        HttpClient(live.url),
        [{"role": "user", "content": f"say {script}"}],
        {"get_weather": get_weather},
        model="scripted",
        stream=True,
        tool_choice="required",
    )
    results = [message["content"] for message in done.messages if message["role"] == "tool"]
    assert results[0] == "sunny in 杭州"


# --- a model tuned under a template that writes XML --------------------------------------------------


@pytest.fixture(scope="module")
def xml_client(chat_templates: dict[str, str]) -> Iterator[OpenAI]:
    engine = make_engine(template=chat_templates["qwen3_5_nothink"])
    with LiveService(
        create_app(engine, settings=ServiceSettings(model_name="scripted", pace_seconds=0))
    ) as live:
        yield OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0)


@pytest.mark.parametrize(
    ("more", "reason"),
    [*FORCED, ({"tools": [WEATHER]}, "tool_calls")],
    ids=["required", "named", "strict", "free"],
)
def test_xml_calls_are_forced_read_and_streamed(
    xml_client: OpenAI, more: dict[str, Any], reason: str
) -> None:
    call = ToolCall("get_weather", json.dumps({"city": CITY}, ensure_ascii=False))
    # The prompt ends with an empty thought, where the scripted model believes to have begun its answer.
    script = f"say <think>\n\n</think>\n\n{Xml().write([call])}"
    messages = [{"role": "user", "content": script}]
    plain, streamed, pieces = plain_and_streamed(xml_client, messages=messages, **more)
    expected = {"content": "", "calls": [(call.name, call.arguments)], "reason": reason}
    assert plain == streamed == expected
    assert len(pieces) == 2 if more.keys() == {"tools"} and more["tools"] == [WEATHER] else len(pieces) > 60


def test_json_is_a_call_only_where_nothing_forces_xml(xml_client: OpenAI) -> None:
    """Under the grammar what the model wants to say ends up inside the form."""
    messages = [{"role": "user", "content": f"say <think>\n\n</think>\n\n{CALL}"}]
    free, _, _ = plain_and_streamed(xml_client, messages=messages, tools=[WEATHER])
    assert free["calls"] == [("get_weather", json.dumps({"city": CITY}, ensure_ascii=False))]
    more = {"tools": [WEATHER], "tool_choice": "required", "max_tokens": 60}
    held, _, _ = plain_and_streamed(xml_client, messages=messages, **more)
    assert [name for name, _ in held["calls"]] == ["get_weather"]
    assert held["calls"] != free["calls"]


def test_a_call_that_cannot_be_written_is_a_400(xml_client: OpenAI) -> None:
    function = {"name": "get_weather", "arguments": '{"city": "</parameter>"}'}
    messages: Any = [
        {"role": "user", "content": "say x"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "1", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "1", "content": "sunny"},
    ]
    with pytest.raises(
        BadRequestError, match=r"argument 'city' holds </parameter>, which this model's calls"
    ):
        xml_client.chat.completions.create(model="scripted", messages=messages, tools=[WEATHER])  # type: ignore[list-item]


# --- a prompt that ends inside a thought -------------------------------------------------------------


@pytest.fixture(scope="module")
def thinking_client(chat_templates: dict[str, str]) -> Iterator[OpenAI]:
    engine = make_engine(template=chat_templates["qwen3_5_think"])
    with LiveService(
        create_app(engine, settings=ServiceSettings(model_name="scripted", pace_seconds=0))
    ) as live:
        yield OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0)


XML_CALL = Xml().write([ToolCall("get_weather", json.dumps({"city": CITY}, ensure_ascii=False))])
OBJECT = {
    "type": "json_schema",
    "json_schema": {"name": "n", "schema": {"type": "object", "required": ["a"]}},
}


@pytest.mark.parametrize(
    ("answer", "more"),
    [(XML_CALL, more) for more, _ in FORCED[:2]] + [('{"a": 1}', {"response_format": OBJECT})],
    ids=["required", "named", "response_format"],
)
def test_a_thought_is_ended_before_what_is_forced(
    thinking_client: OpenAI, answer: str, more: dict[str, Any]
) -> None:
    """As thinking models are taught: the thought, its end, an empty line, and only then what the grammar holds."""
    script = f"say <think>\nI look <b>outside</b>.\n</think>\n\n{answer}"
    messages: Any = [{"role": "user", "content": script}]
    completion = thinking_client.chat.completions.create(model="default", messages=messages, **more)
    said = completion.choices[0].message
    assert said.reasoning_content == "I look <b>outside</b>."  # type: ignore[attr-defined]
    calls = [(call.function.name, call.function.arguments) for call in said.tool_calls or ()]
    if "response_format" in more:
        assert (said.content, calls) == (answer, [])
    else:
        expected = json.dumps({"city": CITY}, ensure_ascii=False)
        assert (said.content or "", calls) == ("", [("get_weather", expected)])


def test_a_forced_call_without_an_end_of_the_thought_is_cut(thinking_client: OpenAI) -> None:
    """What is said inside the thought is never taken for the call."""
    messages: Any = [{"role": "user", "content": f"say <think>\n{XML_CALL}"}]
    more: dict[str, Any] = {"tools": [WEATHER], "tool_choice": "required", "max_tokens": 60}
    choice = thinking_client.chat.completions.create(model="default", messages=messages, **more).choices[0]
    assert (choice.finish_reason, choice.message.tool_calls) == ("length", None)
    assert choice.message.reasoning_content == XML_CALL.encode()[:60].decode()  # type: ignore[attr-defined]
