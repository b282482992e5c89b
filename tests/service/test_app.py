"""The service over a scripted model: what it answers, byte for byte where it matters, and what it refuses."""

# ruff: noqa: E501  a row of a table is one line

from __future__ import annotations

import io
import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from qwen_chat.inference.engine import Engine, _Adapter, load_engine
from qwen_chat.service.admission import Admission
from qwen_chat.service.app import create_app
from qwen_chat.service.connections import PatientProtocol
from qwen_chat.service.errors import APIError
from qwen_chat.service.prepare import chat_job
from qwen_chat.service.protocol import ErrorAnswer
from qwen_chat.service.request_log import RequestLog
from qwen_chat.service.settings import ServiceSettings
from tests.support.scripted import CONTEXT, END, TEMPLATE, VOCABULARY, LiveService, make_engine

CHAT = "/v1/chat/completions"
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
TIME = {"type": "function", "function": {"name": "get_time"}}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "杭州"}}\n</tool_call>'
CALL_TIME = '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>'


def ask(text: str, **more: Any) -> dict[str, Any]:
    return {"model": "default", "messages": [{"role": "user", "content": text}], **more}


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    """A service without keys; for everything that leaves no trace."""
    app = create_app(make_engine(), settings=ServiceSettings(model_name="scripted", max_body_bytes=100_000))
    with TestClient(app) as client:
        yield client


@pytest.fixture(scope="module")
def live() -> Iterator[LiveService]:
    app = create_app(make_engine(), settings=ServiceSettings(model_name="scripted"))
    with LiveService(app) as service:
        yield service


@pytest.fixture(scope="module")
def openai(live: LiveService) -> OpenAI:
    """The official client, which here checks every answer against its own types."""
    return OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0, _strict_response_validation=True)


def events(text: str) -> list[dict[str, Any]]:
    """The chunks of a streamed answer; it must end with [DONE]."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def fold(chunks: list[dict[str, Any]], index: int = 0) -> dict[str, Any]:
    """A client's own folding of one choice, written apart from the service's."""
    message: dict[str, Any] = {"content": "", "calls": {}, "finish": None}
    for chunk in chunks:
        for choice in chunk["choices"]:
            if choice["index"] != index:
                continue
            message["content"] += choice["delta"].get("content") or ""
            for call in choice["delta"].get("tool_calls") or ():
                known = message["calls"].setdefault(call["index"], {"name": "", "arguments": ""})
                for key in known:
                    known[key] += call["function"].get(key) or ""
            message["finish"] = choice["finish_reason"] or message["finish"]
    return message


# --- answers -------------------------------------------------------------------------------------


def test_plain_answer(client: TestClient) -> None:
    answer = client.post(CHAT, json=ask("say 你好 🙂")).json()
    assert answer.pop("id").startswith("chatcmpl-")
    assert abs(answer.pop("created") - time.time()) < 60
    prompt = len("user\nsay 你好 🙂\nassistant\n".encode()) + 3
    assert answer == {
        "object": "chat.completion",
        "model": "scripted",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "你好 🙂", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": len("你好 🙂".encode()) + 1,
            "total_tokens": prompt + len("你好 🙂".encode()) + 1,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }


def test_stream_is_openais(client: TestClient) -> None:
    answer = client.post(CHAT, json=ask("say hé", stream=True))
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    chunks = events(answer.text)
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert all("usage" not in chunk for chunk in chunks)
    assert [chunk["choices"] for chunk in chunks] == [
        [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}]
        for delta, reason in (
            ({"role": "assistant", "content": "", "refusal": None}, None),
            ({"content": "h"}, None),
            ({"content": "é"}, None),  # two bytes, two tokens, one piece
            ({}, "stop"),
        )
    ]


def test_usage_chunk(client: TestClient) -> None:
    answer = client.post(CHAT, json=ask("say hi", stream=True, stream_options={"include_usage": True}))
    *others, last = events(answer.text)
    assert all(chunk["usage"] is None for chunk in others)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 3
    plain = client.post(CHAT, json=ask("say hi")).json()
    assert last["usage"] == plain["usage"]


def test_tool_calls_stream(client: TestClient) -> None:
    script = f"say one moment\n{CALL}\n{CALL_TIME}"
    body = ask(script, tools=[WEATHER, TIME], stream=True)
    deltas = [chunk["choices"][0]["delta"] for chunk in events(client.post(CHAT, json=body).text)]
    first, *rest = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]
    assert first.pop("id").startswith("call_")
    assert first == {"index": 0, "type": "function", "function": {"name": "get_weather", "arguments": ""}}
    second = next(k for k, call in enumerate(rest) if call["index"] == 1)
    assert set(rest[second]) == {"index", "id", "type", "function"}
    assert all(set(call) == {"index", "function"} for k, call in enumerate(rest) if k != second)
    folded = fold(events(client.post(CHAT, json=body).text))
    assert folded == {
        "content": "one moment",
        "calls": {
            0: {"name": "get_weather", "arguments": '{"city": "杭州"}'},
            1: {"name": "get_time", "arguments": "{}"},
        },
        "finish": "tool_calls",
    }


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("choice", "reason"),
    [
        ("required", "tool_calls"),
        ("auto", "tool_calls"),
        ({"type": "function", "function": {"name": "get_weather"}}, "stop"),
    ],
)
def test_finish_reason_of_calls(client: TestClient, stream: bool, choice: Any, reason: str) -> None:
    body = ask(f"say {CALL}", tools=[WEATHER, TIME], tool_choice=choice, stream=stream)
    answer = client.post(CHAT, json=body)
    if stream:
        found = fold(events(answer.text))
        assert found == {
            "content": "",
            "calls": {0: {"name": "get_weather", "arguments": '{"city": "杭州"}'}},
            "finish": reason,
        }
        return
    choice = answer.json()["choices"][0]
    assert choice["finish_reason"] == reason
    assert choice["message"]["content"] is None
    assert [call["function"] for call in choice["message"]["tool_calls"]] == [
        {"name": "get_weather", "arguments": '{"city": "杭州"}'}
    ]


def test_required_call_is_valid_whatever_the_model_wants(client: TestClient) -> None:
    """The model wants to chat; the grammar makes it call, with arguments that the schema allows."""
    body = ask("say I would rather chat", tools=[WEATHER], tool_choice="required", parallel_tool_calls=False)
    choice = client.post(CHAT, json=body).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    (call,) = choice["message"]["tool_calls"]
    arguments = json.loads(call["function"]["arguments"])
    assert list(arguments) == ["city"]
    assert isinstance(arguments["city"], str)


def test_tool_choice_none_is_text(client: TestClient) -> None:
    body = ask(f"say {CALL}", tools=[WEATHER], tool_choice="none")
    message = client.post(CHAT, json=body).json()["choices"][0]["message"]
    assert message == {"role": "assistant", "content": CALL, "refusal": None}


def test_without_tools_a_call_is_text(client: TestClient) -> None:
    assert client.post(CHAT, json=ask(f"say {CALL}")).json()["choices"][0]["message"]["content"] == CALL


@pytest.fixture(scope="module")
def thinker() -> Iterator[TestClient]:
    """A model whose template knows thinking, as Qwen3's does."""
    engine = make_engine()
    engine.tokenizer.chat_template = TEMPLATE + "{# <think> #}"
    with TestClient(create_app(engine, settings=ServiceSettings(model_name="scripted"))) as client:
        yield client


@pytest.mark.parametrize("more", [{}, {"tools": [WEATHER], "tool_choice": "none"}], ids=["no tools", "none"])
@pytest.mark.parametrize("text", [CALL, "✿FUNCTION✿: get_weather\n✿ARGS✿: {}", "a < b, ✿, <tool_call>\n{"])
def test_without_tools_only_thinking_is_told_apart(
    thinker: TestClient, more: dict[str, Any], text: str
) -> None:
    body = ask(f"say <think>\nlet me see\n</think>\n\n{text}", **more)
    choice = thinker.post(CHAT, json=body).json()["choices"][0]
    assert choice["message"]["content"] == text
    assert choice["message"]["reasoning_content"] == "let me see"
    assert (choice["finish_reason"], "tool_calls" in choice["message"]) == ("stop", False)


def test_a_strict_tool_is_called_under_its_schema_or_not_at_all(client: TestClient) -> None:
    strict = {**WEATHER, "function": {**WEATHER["function"], "strict": True}}  # type: ignore[dict-item]
    bare = '{"name": "get_weather", "arguments": {"town": 1}}'
    for text in (bare, f"```json\n{bare}\n```", '✿FUNCTION✿: get_weather\n✿ARGS✿: {"town": 1}'):
        message = client.post(CHAT, json=ask(f"say {text}", tools=[strict])).json()["choices"][0]["message"]
        assert message == {"role": "assistant", "content": text, "refusal": None}
    wrong = f"<tool_call>\n{bare}\n</tool_call>"
    message = client.post(CHAT, json=ask(f"say {wrong}", tools=[strict])).json()["choices"][0]["message"]
    (call,) = message["tool_calls"]
    assert list(json.loads(call["function"]["arguments"])) == ["city"]


@pytest.mark.parametrize("stream", [False, True])
def test_one_call_where_one_is_allowed(client: TestClient, stream: bool) -> None:
    body = ask(f"say {CALL}\n{CALL_TIME}", tools=[WEATHER, TIME], parallel_tool_calls=False, stream=stream)
    answer = client.post(CHAT, json=body)
    if stream:
        found = fold(events(answer.text))
        assert [call["name"] for call in found["calls"].values()] == ["get_weather"]
        assert found["finish"] == "tool_calls"
    else:
        choice = answer.json()["choices"][0]
        assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["get_weather"]
        assert choice["finish_reason"] == "tool_calls"


def test_results_are_put_in_the_order_of_their_calls(client: TestClient) -> None:
    calls = [
        {"id": name, "type": "function", "function": {"name": "get_time", "arguments": "{}"}} for name in "ab"
    ]
    history = [
        {"role": "user", "content": "say ok"},
        {"role": "assistant", "content": None, "tool_calls": calls},
    ]
    results = [{"role": "tool", "tool_call_id": name, "content": name * 3} for name in "ab"]
    ids = [
        client.post("/tokenize", json={"messages": [*history, *order]}).json()["tokens"]
        for order in (results, results[::-1])
    ]
    assert ids[0] == ids[1]


def test_several_choices(client: TestClient) -> None:
    answer = client.post(CHAT, json=ask("say ab", n=3)).json()
    assert [(c["index"], c["message"]["content"]) for c in answer["choices"]] == [(k, "ab") for k in range(3)]
    assert answer["usage"]["completion_tokens"] == 9
    assert answer["usage"]["prompt_tokens"] == len("user\nsay ab\nassistant\n") + 3
    chunks = events(client.post(CHAT, json=ask("say ab", n=3, stream=True)).text)
    assert [fold(chunks, k) for k in range(3)] == [{"content": "ab", "calls": {}, "finish": "stop"}] * 3


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(client: TestClient, stream: bool) -> None:
    answer = client.post(CHAT, json=ask("say é!", logprobs=True, top_logprobs=2, stream=stream))
    if stream:
        parts = [c["choices"][0]["logprobs"] for c in events(answer.text)]
        content = [one for part in parts if part for one in part["content"]]
    else:
        content = answer.json()["choices"][0]["logprobs"]["content"]
    assert [one["bytes"] for one in content] == [[0xC3], [0xA9], [ord("!")]]
    assert [one["token"] for one in content] == ["\ufffd", "\ufffd", "!"]
    assert all(one["logprob"] == pytest.approx(0, abs=1e-5) for one in content)
    assert [len(one["top_logprobs"]) for one in content] == [2, 2, 2]
    assert content[2]["top_logprobs"][0] == {key: content[2][key] for key in ("token", "logprob", "bytes")}


def test_length(client: TestClient) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        choice = client.post(CHAT, json=ask("say abcdef", **{name: 3})).json()["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("abc", "length")


def test_cut_call_is_content(client: TestClient) -> None:
    choice = client.post(CHAT, json=ask(f"say {CALL}", tools=[WEATHER], max_tokens=30)).json()["choices"][0]
    assert choice == {
        "index": 0,
        "message": {"role": "assistant", "content": CALL[:30], "refusal": None},
        "logprobs": None,
        "finish_reason": "length",
    }


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("said", "stop", "shown"),
    [
        ("hello world", ["lo w"], "hel"),
        ("lololo we", ["lo w"], "lolo"),  # held back again and again
        ("hello", ["lo w"], "hello"),  # it never came
        ("aé杭z", ["杭z"], "aé"),  # letters of two and three tokens
        ("stop", ["stop"], ""),
    ],
)
def test_logprobs_are_those_of_the_content(
    client: TestClient, said: str, stop: list[str], shown: str, stream: bool
) -> None:
    body = ask(f"say {said}", stop=stop, logprobs=True, stream=stream)
    answer = client.post(CHAT, json=body)
    if stream:
        choices = [one["choices"][0] for one in events(answer.text)]
        content = "".join(one["delta"].get("content") or "" for one in choices)
        taken = [one for part in choices if part["logprobs"] for one in part["logprobs"]["content"]]
    else:
        choice = answer.json()["choices"][0]
        content, taken = choice["message"]["content"], choice["logprobs"]["content"]
    assert content == shown
    assert bytes(byte for one in taken for byte in one["bytes"]) == shown.encode()


@pytest.mark.parametrize("stop", ["END", ["zz", "END", "ND!"]])
def test_stop_strings_are_never_shown(client: TestClient, stop: Any) -> None:
    body = ask("say a EN b END! c", stop=stop)
    choice = client.post(CHAT, json=body).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("a EN b ", "stop")
    pieces = [
        chunk["choices"][0]["delta"].get("content", "")
        for chunk in events(client.post(CHAT, json={**body, "stream": True}).text)
    ]
    assert "".join(pieces) == "a EN b "
    assert not any(piece.endswith(("E", "EN")) for piece in pieces)


def test_json_schema(client: TestClient) -> None:
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    text = client.post(CHAT, json=ask("say no json", response_format=form)).json()["choices"][0]["message"][
        "content"
    ]
    assert json.loads(text) in ({"ok": True}, {"ok": False})
    form = {"type": "json_object"}
    text = client.post(CHAT, json=ask('say {"a": 1}', response_format=form)).json()["choices"][0]["message"][
        "content"
    ]
    assert json.loads(text) == {"a": 1}


def test_completions(client: TestClient) -> None:
    prompt = "<|im_start|>user\nsay yes<|im_end|>\n<|im_start|>assistant\n"
    tokens = client.post("/tokenize", json={"prompt": prompt}).json()["tokens"]
    for given in (prompt, [prompt], tokens, [tokens]):
        answer = client.post(
            "/v1/completions", json={"model": "default", "prompt": given, "logprobs": 1}
        ).json()
        (choice,) = answer["choices"]
        assert answer["object"] == "text_completion"
        assert (choice["text"], choice["finish_reason"]) == ("yes", "stop")
        assert choice["logprobs"]["tokens"] == ["y", "e", "s"]
        assert choice["logprobs"]["text_offset"] == [0, 1, 2]
    body = {"model": "default", "prompt": [prompt, prompt], "n": 2, "stream": True}
    chunks = events(client.post("/v1/completions", json=body).text)
    texts = ["".join(c["text"] for x in chunks for c in x["choices"] if c["index"] == k) for k in range(4)]
    assert texts == ["yes"] * 4


def test_models(client: TestClient) -> None:
    listed = client.get("/v1/models").json()
    assert listed["object"] == "list"
    (card,) = listed["data"]
    assert {key: card[key] for key in ("id", "object", "owned_by", "max_model_len")} == {
        "id": "scripted",
        "object": "model",
        "owned_by": "qwen_chat",
        "max_model_len": CONTEXT,
    }
    assert client.get("/v1/models/scripted").json() == card


def test_tokens_round_trip(client: TestClient) -> None:
    text = "héllo <|im_end|> 你好"
    found = client.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    assert END in found["tokens"]  # a plain prompt may hold control tokens
    assert client.post("/detokenize", json={"tokens": found["tokens"]}).json() == {"prompt": text}
    chat = client.post("/tokenize", json={"messages": [{"role": "user", "content": text}]}).json()
    assert chat["tokens"].count(END) == 1  # in a message they are text


def test_parameters_reach_the_engine(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    submit = Engine.submit

    def watched(engine: Engine, request: Any) -> Any:
        seen.append(request)
        return submit(engine, replace(request, temperature=0))

    monkeypatch.setattr(Engine, "submit", watched)
    body = ask(
        "say hi", temperature=0.3, top_p=0.9, top_k=7, min_p=0.05, seed=11, stop=["x"], max_tokens=5, n=2,
        presence_penalty=0.5, frequency_penalty=-0.5, repetition_penalty=1.1, logit_bias={"65": -3}, logprobs=True,
        top_logprobs=3, user="somebody",
    )  # fmt: skip
    assert client.post(CHAT, json=body).status_code == 200
    first, second = seen
    expected = {
        "temperature": 0.3, "top_p": 0.9, "top_k": 7, "min_p": 0.05, "seed": 11, "stop": ("x",), "max_tokens": 5,
        "presence_penalty": 0.5, "frequency_penalty": -0.5, "repetition_penalty": 1.1, "logit_bias": {65: -3.0},
        "logprobs": 3, "adapter": None, "grammar": None,
    }  # fmt: skip
    assert {key: getattr(first, key) for key in expected} == expected
    assert second == replace(first, seed=12) or (second.seed, second.top_k) == (12, 7)
    seen.clear()
    client.post(
        CHAT, json=ask("say hi", **dict.fromkeys(("temperature", "top_p", "top_k", "seed", "stop", "n")))
    )
    defaults = {
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "seed": None,
        "stop": (),
        "logprobs": None,
    }
    assert {key: getattr(seen[0], key) for key in defaults} == defaults


@pytest.mark.parametrize(
    "extreme",
    [
        {"temperature": 5e-324},
        {"temperature": 1e-300, "top_p": 0.5},
        {"temperature": 2, "top_p": 0},
        {"repetition_penalty": 0.01},
        {"min_p": 1, "top_p": 0},
        {"top_k": 2**31 - 1},
    ],
)
def test_extreme_sampling_harms_nobody(client: TestClient, extreme: dict[str, float]) -> None:
    answer = client.post(CHAT, json=ask("say hi", max_tokens=5, **extreme))
    assert answer.status_code == 200
    if "repetition_penalty" not in extreme:
        assert answer.json()["choices"][0]["message"]["content"] == "hi"
    assert client.get("/ready").status_code == 200


def test_openai_client(openai: OpenAI) -> None:
    message = [{"role": "user", "content": "say 好 ok"}]
    plain = openai.chat.completions.create(model="scripted", messages=message, logprobs=True, seed=1)  # type: ignore[arg-type]
    assert plain.choices[0].message.content == "好 ok"
    stream = openai.chat.completions.create(model="scripted", messages=message, stream=True)  # type: ignore[arg-type]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "好 ok"
    called = openai.chat.completions.create(
        model="scripted",
        messages=[{"role": "user", "content": f"say {CALL}"}],
        tools=[WEATHER],  # type: ignore[list-item]
        tool_choice="required",
    )
    message = [
        {"role": "user", "content": "say done"},
        called.choices[0].message.model_dump(),
        {"role": "tool", "tool_call_id": called.choices[0].message.tool_calls[0].id, "content": "21"},  # type: ignore[index]
    ]
    after = openai.chat.completions.create(model="scripted", messages=message, tools=[WEATHER])  # type: ignore[arg-type, list-item]
    assert after.choices[0].message.content == "done"
    assert openai.completions.create(model="scripted", prompt="abc").object == "text_completion"
    assert [model.id for model in openai.models.list()] == ["scripted"]
    assert openai.models.retrieve("scripted").id == "scripted"


def test_openai_client_parses_structured_streams(openai: OpenAI) -> None:
    with openai.chat.completions.stream(
        model="scripted",
        messages=[{"role": "user", "content": f"say {CALL}"}],
        tools=[WEATHER],  # type: ignore[list-item]
    ) as stream:
        final = stream.get_final_completion()
    (call,) = final.choices[0].message.tool_calls or ()
    assert json.loads(call.function.arguments) == {"city": "杭州"}


# --- refusals ------------------------------------------------------------------------------------

Message = {"role": "user", "content": "x"}


def tool(**function: Any) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": "f", **function}}]


def schema(value: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "s", "schema": value}}


def history(*messages: Any) -> dict[str, Any]:
    return {"messages": list(messages)}


def called(*ids: str) -> dict[str, Any]:
    calls = [{"id": i, "type": "function", "function": {"name": "f", "arguments": "{}"}} for i in ids]
    return {"role": "assistant", "tool_calls": calls}


def nested(depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        value = {"type": "object", "properties": {"a": value}}
    return value


# What is put into a good chat request (None takes the parameter out), and the param, code and a part of the
# message of the 400 that comes back.
BAD_CHATS: list[tuple[dict[str, Any], str | None, str, str]] = [
    ({"model": None}, "model", "invalid_type", "expected a string, but got null"),
    ({"model": ...}, "model", "missing_required_parameter", "Missing required parameter: 'model'."),
    ({"model": 3}, "model", "invalid_type", "expected a string, but got an integer"),
    ({"model": ""}, "model", "empty_string", "empty string"),
    ({"messages": ...}, "messages", "missing_required_parameter", "Missing required parameter: 'messages'."),
    ({"messages": []}, "messages", "empty_array", "empty array"),
    ({"messages": "hi"}, "messages", "invalid_type", "expected an array, but got a string"),
    ({"messages": ["hi"]}, "messages[0]", "invalid_type", "expected an object, but got a string"),
    ({"messages": [{}]}, "messages[0].role", "missing_required_parameter", "'messages[0].role'"),
    (history({"role": "robot", "content": "x"}), "messages[0].role", "invalid_value", "Supported values are"),
    (history({"role": "function", "content": "x", "name": "f"}), "messages[0].role", "invalid_value", "'function'"),
    (history({"role": "user"}), "messages[0].content", "missing_required_parameter", "messages[0].content"),
    (history({"role": "user", "content": None}), "messages[0].content", "invalid_type", "but got null"),
    (history({"role": "user", "content": 3}), "messages[0].content", "invalid_type", "but got an integer"),
    (history({"role": "user", "content": []}), "messages[0].content", "empty_array", "empty array"),
    (history(Message, {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}),
     "messages[1].content[0].type", "invalid_value", "'image_url'"),
    (history({"role": "user", "content": [{"type": "text"}]}),
     "messages[0].content[0].text", "missing_required_parameter", "content[0].text"),
    (history({**Message, "mood": "good"}), "messages[0].mood", "unknown_parameter", "Unknown parameter"),
    (history({"role": "assistant", "content": "x", "audio": {"id": "1"}}),
     "messages[0].audio", "unsupported_parameter", "not supported"),
    (history({"role": "tool", "content": "x"}), "messages[0].tool_call_id", "missing_required_parameter", "tool_call_id"),
    (history({"role": "tool", "content": "x", "tool_call_id": "1"}),
     "messages[0].tool_call_id", "invalid_value", "must be a response to a preceding message"),
    (history(Message, called("1"), Message), "messages[2]", "invalid_value", "must be followed by tool messages"),
    (history(Message, called("1", "2"), {"role": "tool", "content": "x", "tool_call_id": "1"}),
     "messages[3]", "invalid_value", "1 had no response"),
    (history(Message, {"role": "assistant", "tool_calls": [
        {"id": "1", "type": "function", "function": {"name": "f", "arguments": {}}}]}),
     "messages[1].tool_calls[0].function.arguments", "invalid_type", "expected a string, but got an object"),
    (history(Message, {"role": "assistant", "tool_calls": [
        {"id": "1", "type": "function", "function": {"name": "f", "arguments": "[1]"}}]},
        {"role": "tool", "content": "x", "tool_call_id": "1"}),
     "messages[1]", "invalid_value", "expected an object"),
    ({"temperature": 2.1}, "temperature", "decimal_above_max_value", "Expected a value <= 2"),
    ({"temperature": -0.1}, "temperature", "decimal_below_min_value", "Expected a value >= 0"),
    ({"temperature": "hot"}, "temperature", "invalid_type", "expected a decimal, but got a string"),
    ({"temperature": True}, "temperature", "invalid_type", "but got a boolean"),
    ({"top_p": 1.5}, "top_p", "decimal_above_max_value", "Expected a value <= 1"),
    ({"top_p": -1}, "top_p", "decimal_below_min_value", "Expected a value >= 0"),
    ({"top_k": -2}, "top_k", "integer_below_min_value", "Expected a value >= -1"),
    ({"top_k": 1.5}, "top_k", "invalid_type", "expected an integer, but got a decimal"),
    ({"min_p": 2}, "min_p", "decimal_above_max_value", "Expected a value <= 1"),
    ({"n": 0}, "n", "integer_below_min_value", "Expected a value >= 1"),
    ({"n": 17}, "n", "integer_above_max_value", "Expected a value <= 16"),
    ({"n": "2"}, "n", "invalid_type", "expected an integer, but got a string"),
    ({"stop": list("abcde")}, "stop", "array_above_max_length", "maximum length 4, but got an array with length 5"),
    ({"stop": 5}, "stop", "invalid_type", "but got an integer"),
    ({"stop": [5]}, "stop[0]", "invalid_type", "but got an integer"),
    ({"stop": ""}, "stop", "empty_string", "empty string"),
    ({"max_tokens": 0}, "max_tokens", "integer_below_min_value", "Expected a value >= 1"),
    ({"max_completion_tokens": -1}, "max_completion_tokens", "integer_below_min_value", "Expected a value >= 1"),
    ({"max_tokens": 5, "max_completion_tokens": 5}, "max_tokens", "invalid_value", "at the same time"),
    ({"max_tokens": CONTEXT}, "max_tokens", "context_length_exceeded", f"maximum context length is {CONTEXT} tokens"),
    (history({"role": "user", "content": "x" * CONTEXT}), "messages", "context_length_exceeded", f"{CONTEXT + 19} tokens"),
    ({"seed": 1.5}, "seed", "invalid_type", "expected an integer"),
    ({"seed": 2**63}, "seed", "integer_above_max_value", str(2**63 - 1)),
    ({"logprobs": 3}, "logprobs", "invalid_type", "expected a boolean"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "integer_above_max_value", "Expected a value <= 20"),
    ({"top_logprobs": 2}, "top_logprobs", "invalid_value", "only allowed when 'logprobs' is enabled"),
    ({"presence_penalty": 2.5}, "presence_penalty", "decimal_above_max_value", "Expected a value <= 2"),
    ({"frequency_penalty": -2.5}, "frequency_penalty", "decimal_below_min_value", "Expected a value >= -2"),
    ({"repetition_penalty": 0}, "repetition_penalty", "decimal_below_min_value", "Expected a value >= 0.01"),
    ({"logit_bias": {"x": 1}}, "logit_bias.x", "invalid_value", "does not match pattern"),
    ({"logit_bias": {"5": 101}}, "logit_bias.5", "decimal_above_max_value", "Expected a value <= 100"),
    ({"logit_bias": {str(VOCABULARY): 1}}, "logit_bias", "invalid_value", "beyond the vocabulary"),
    ({"logit_bias": [1]}, "logit_bias", "invalid_type", "expected an object, but got an array"),
    ({"response_format": {"type": "xml"}}, "response_format.type", "invalid_value", "'json_schema'"),
    ({"response_format": "json"}, "response_format", "invalid_type", "expected an object"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "missing_required_parameter", "json_schema"),
    ({"response_format": schema({"type": "nonsense"})}, "response_format.json_schema.schema", "invalid_value", "Invalid schema"),
    ({"response_format": schema(nested(40))}, "response_format.json_schema.schema", "schema_too_large", "deep"),
    ({"response_format": schema({"type": "string", "pattern": "(a{1,999}){1,999}"})},
     "response_format.json_schema.schema", "schema_too_large", "regular expression"),
    ({"response_format": schema({"type": "array", "minItems": 10**6})},
     "response_format.json_schema.schema", "schema_too_large", "minItems"),
    ({"response_format": {"type": "json_object"}, "tools": [TIME]},
     "response_format", "unsupported_parameter", "together with 'tools'"),
    ({"tools": [], "tool_choice": "required"}, "tool_choice", "invalid_value", "only allowed when 'tools' are specified"),
    ({"tools": [{"type": "browser"}]}, "tools[0].type", "invalid_value", "Supported values are: 'function'"),
    ({"tools": tool(name="a b")}, "tools[0].function.name", "invalid_value", "does not match pattern"),
    ({"tools": tool() + tool()}, "tools[1].function.name", "invalid_value", "names must differ"),
    ({"tools": tool(parameters=[])}, "tools[0].function.parameters", "invalid_type", "expected an object"),
    ({"tools": tool(parameters={"type": 3})}, "tools[0].function.parameters", "invalid_value", "Invalid schema"),
    ({"tools": tool() * 129}, "tools", "array_above_max_length", "maximum length 128"),
    ({"tool_choice": "auto"}, "tool_choice", "invalid_value", "only allowed when 'tools' are specified"),
    ({"tools": tool(), "tool_choice": "always"}, "tool_choice", "invalid_value", "'none', 'auto' or 'required'"),
    ({"tools": tool(), "tool_choice": {"type": "function", "function": {"name": "g"}}},
     "tool_choice", "invalid_value", "not among 'tools'"),
    ({"parallel_tool_calls": True}, "parallel_tool_calls", "invalid_value", "only allowed when 'tools' are specified"),
    ({"stream": "yes"}, "stream", "invalid_type", "expected a boolean"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value", "only allowed when 'stream'"),
    ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "unknown_parameter", "Unknown parameter"),
    ({"user": 7}, "user", "invalid_type", "expected a string"),
    ({"audio": {"voice": "x"}}, "audio", "unsupported_parameter", "'audio' is not supported"),
    ({"functions": []}, "functions", "unsupported_parameter", "'functions' is not supported"),
    ({"reasoning_effort": "low"}, "reasoning_effort", "unsupported_parameter", "not supported"),
    ({"store": "yes"}, "store", "invalid_type", "expected a boolean"),
    ({"verbosity": "loud"}, "verbosity", "invalid_value", "'low', 'medium' or 'high'"),
    ({"metadata": {"a": 1}}, "metadata.a", "invalid_type", "expected a string"),
    ({"web_search_options": {}}, "web_search_options", "unsupported_parameter", "not supported"),
    (history(Message, {"role": "assistant", "content": "x", "reasoning": "a", "reasoning_content": "b"}),
     "messages[1]", "invalid_value", "'reasoning' and 'reasoning_content' differ"),
    ({"modalities": ["text", "audio"]}, "modalities", "unsupported_value", "'modalities'"),
    ({"best_of": 2}, "best_of", "unknown_parameter", "Unknown parameter: 'best_of'."),
]  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("change", "param", "code", "message"), BAD_CHATS)
def test_bad_chats(
    client: TestClient, change: dict[str, Any], param: str | None, code: str, message: str, stream: bool
) -> None:
    if stream and set(change) & {"stream", "stream_options"}:
        pytest.skip("the row says itself whether it streams")
    body = {**ask("say hi"), **({"stream": True} if stream else {}), **change}
    body = {key: value for key, value in body.items() if value is not ...}
    answer = client.post(CHAT, json=body)
    error = ErrorAnswer.model_validate(answer.json()).error
    assert (answer.status_code, error.type, error.param, error.code) == (
        400,
        "invalid_request_error",
        param,
        code,
    )
    assert message in error.message
    assert len(error.message) < 600


OTHER_BAD: list[tuple[str, str, Any, int, str | None, str]] = [
    ("POST", CHAT, ask("x") | {"model": "gpt-9"}, 404, "model", "model_not_found"),
    ("POST", "/v1/completions", {"model": "default"}, 400, "prompt", "missing_required_parameter"),
    ("POST", "/v1/completions", {"model": "default", "prompt": ""}, 400, "prompt", "empty_string"),
    ("POST", "/v1/completions", {"model": "default", "prompt": []}, 400, "prompt", "empty_array"),
    ("POST", "/v1/completions", {"model": "default", "prompt": ["a", 1]}, 400, "prompt[1]", "invalid_type"),
    ("POST", "/v1/completions", {"model": "default", "prompt": [VOCABULARY]}, 400, "prompt", "invalid_value"),
    ("POST", "/v1/completions", {"model": "default", "prompt": "a", "echo": True}, 400, "echo", "unsupported_value"),
    ("POST", "/v1/completions", {"model": "default", "prompt": "a", "suffix": "b"}, 400, "suffix", "unsupported_parameter"),
    ("POST", "/v1/completions", {"model": "default", "prompt": "a", "logprobs": 6}, 400, "logprobs", "integer_above_max_value"),
    ("POST", "/v1/completions", {"model": "default", "prompt": "a" * CONTEXT}, 400, "prompt", "context_length_exceeded"),
    ("POST", "/v1/completions", {"model": "default", "prompt": "a", "max_tokens": CONTEXT}, 400, "max_tokens", "context_length_exceeded"),
    ("POST", "/tokenize", {}, 400, "prompt", "invalid_value"),
    ("POST", "/tokenize", {"prompt": "a", "messages": [Message]}, 400, "prompt", "invalid_value"),
    ("POST", "/detokenize", {"tokens": [-1]}, 400, "tokens[0]", "integer_below_min_value"),
    ("POST", "/detokenize", {"tokens": [VOCABULARY]}, 400, "tokens", "invalid_value"),
    ("POST", "/v1/load_lora_adapter", {"lora_name": "a", "lora_path": "/x"}, 403, None, "adapters_not_managed"),
    ("GET", "/v1/models/none", None, 404, "model", "model_not_found"),
    ("GET", "/v1/nothing", None, 404, None, "unknown_url"),
    ("GET", CHAT, None, 405, None, "method_not_supported"),
    ("DELETE", "/v1/models", None, 405, None, "method_not_supported"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path", "body", "status", "param", "code"), OTHER_BAD)
def test_other_refusals(
    client: TestClient, method: str, path: str, body: Any, status: int, param: str | None, code: str
) -> None:
    answer = client.request(method, path, json=body) if body is not None else client.request(method, path)
    error = ErrorAnswer.model_validate(answer.json()).error
    assert (answer.status_code, error.param, error.code) == (status, param, code)
    assert error.type == "invalid_request_error"


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b"", "invalid_json"),
        (b"{", "invalid_json"),
        (b"\xff\xfe{}", "invalid_json"),
        (b'{"model": "\xff"}', "invalid_json"),
        (b'{"model": "\\ud800"}', "invalid_json"),
        (b"[" * 50_000, "invalid_json"),
        (b'{"a":' * 15_000 + b"1" + b"}" * 15_000, "invalid_json"),
        (b'{"temperature": NaN}', "invalid_json"),
        (b'{"temperature": 1' + b"0" * 9000 + b"}", "invalid_json"),
        (b"null", "invalid_type"),
        (b"[]", "invalid_type"),
        (b'"text"', "invalid_type"),
        (b"\x00" * 100, "invalid_json"),
        (b'{"model":"default","messages":[{"role":"user","content":"x"}],"temperature":1e999}', None),
    ],
)
def test_any_bytes(client: TestClient, raw: bytes, code: str | None) -> None:
    answer = client.post(CHAT, content=raw, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    error = ErrorAnswer.model_validate(answer.json()).error
    assert code is None or error.code == code


def test_body_limits(client: TestClient) -> None:
    for body in (b"x" * 100_001, iter([b"x" * 60_000, b"x" * 60_000])):
        answer = client.post(CHAT, content=body, headers={"content-type": "application/json"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")
    answer = client.post(CHAT, data={"model": "default"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_media_type")
    answer = client.get("/health", headers=[(f"x-{k}", "1") for k in range(200)])  # type: ignore[arg-type]
    assert (answer.status_code, answer.json()["error"]["code"]) == (431, "headers_too_large")


# --- who may ask ---------------------------------------------------------------------------------


def test_keys(tmp_path: Path) -> None:
    log = RequestLog(tmp_path / "log")
    with TestClient(create_app(make_engine(), api_keys=("first-key", "second-key"), log=log)) as client:
        for header, code in (
            (None, "missing_api_key"),
            ("Bearer wrong", "invalid_api_key"),
            ("Basic eA==", "missing_api_key"),
        ):
            answer = client.post(
                CHAT, json=ask("say hi"), headers={"authorization": header} if header else {}
            )
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, code)
            assert answer.headers["www-authenticate"] == "Bearer"
            assert "wrong" not in answer.text
        for key in ("first-key", "second-key"):
            assert (
                client.post(CHAT, json=ask("say hi"), headers={"authorization": f"Bearer {key}"}).status_code
                == 200
            )
        assert client.get("/metrics").status_code == 401
        assert client.get("/health").status_code == client.get("/ready").status_code == 200
    text = (tmp_path / "log").read_text()
    assert not any(secret in text for secret in ("first-key", "second-key", "wrong"))
    assert [json.loads(line)["status"] for line in text.splitlines()] == [401, 401, 401, 200, 200]


def test_hosts_and_origins() -> None:
    with TestClient(create_app(make_engine(), hosts={"127.0.0.1", "localhost"})) as client:
        assert client.get("/health", headers={"host": "localhost:8000"}).status_code == 200
        answer = client.get("/v1/models", headers={"host": "evil.example"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "host_not_allowed")
        asked = client.options(
            CHAT, headers={"origin": "https://a.example", "access-control-request-method": "POST"}
        )
        assert "access-control-allow-origin" not in asked.headers
    with TestClient(create_app(make_engine(), cors_origins=["https://a.example"])) as client:
        for origin, allowed in (("https://a.example", True), ("https://b.example", False)):
            asked = client.options(CHAT, headers={"origin": origin, "access-control-request-method": "POST"})
            assert (asked.headers.get("access-control-allow-origin") == origin) is allowed


# --- under pressure ------------------------------------------------------------------------------


def wait_until(condition: Any, seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


def keep_busy(live: LiveService, engine: Engine, tokens: int) -> threading.Thread:
    """Somebody's request of `tokens` slow tokens, which runs when this returns; join it."""
    body = ask("slow 20 " + "x" * tokens)
    first = threading.Thread(target=lambda: requests.post(live.url + CHAT, json=body, timeout=30))
    first.start()
    wait_until(lambda: engine.stats().running == 1)
    return first


def test_queue_is_bounded() -> None:
    engine = make_engine(max_batch=1)
    settings = ServiceSettings(max_queue=1)
    with LiveService(create_app(engine, settings=settings)) as live:
        statuses: list[tuple[int, str | None]] = []

        def call() -> None:
            answer = requests.post(live.url + CHAT, json=ask("slow 30 abcdefghij"), timeout=30)
            statuses.append((answer.status_code, answer.headers.get("retry-after")))

        threads = [threading.Thread(target=call) for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(status for status, _ in statuses) == [200, 200, 429, 429, 429]
    assert all(after is not None and 1 <= int(after) <= 60 for status, after in statuses if status == 429)


def test_retry_after_follows_what_was_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bad requests are over at once; that is no sign that a place becomes free soon."""
    clock = SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr("qwen_chat.service.admission.time", clock)
    admission, now = Admission(1), [0.0]
    for served, seconds in ((True, 100.0), *[(False, 0.0)] * 50):
        give_back = admission.take(1)
        now[0] += seconds
        give_back(served)
    admission.take(1)
    with pytest.raises(APIError) as refused:
        admission.take(1)
    assert refused.value.retry_after == 21  # a fifth of the way from 1 s to 100 s


def test_who_is_turned_away_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = []

    def count(*args: Any) -> Any:
        prepared.append(args)
        return chat_job(*args)

    monkeypatch.setattr("qwen_chat.service.app.chat_job", count)
    engine = make_engine(max_batch=1)
    with LiveService(create_app(engine, settings=ServiceSettings(max_queue=0))) as live:
        first = keep_busy(live, engine, 60)
        assert requests.post(live.url + CHAT, json=ask("hi"), timeout=30).status_code == 429
        first.join()
    assert len(prepared) == 1


def test_what_is_submitted_too_late_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    submit = Engine.submit

    def late(engine: Engine, request: Any) -> Any:
        time.sleep(0.6)
        return submit(engine, request)

    monkeypatch.setattr(Engine, "submit", late)
    engine = make_engine()
    settings = ServiceSettings(prepare_seconds=0.2)
    with LiveService(create_app(engine, settings=settings)) as live:
        answer = requests.post(live.url + CHAT, json=ask("slow 100 " + "x" * 300), timeout=30)
        assert answer.status_code == 503
        wait_until(lambda: engine.stats().requests == 1)
        wait_until(lambda: engine.stats().running + engine.stats().waiting == 0)


@pytest.mark.parametrize(
    "body",
    [
        {**ask("hi"), **{f"a{k}": 0 for k in range(3000)}},
        {"messages": [{"role": "user", "content": "hi", **{f"a{k}": 0 for k in range(3000)}}]},
        {**ask("hi"), "tools": [[] for _ in range(70_000)]},
    ],
    ids=["keys", "keys of a message", "parts"],
)
def test_a_body_of_too_many_pieces_is_refused(body: dict[str, Any]) -> None:
    with TestClient(create_app(make_engine())) as client:
        answer = client.post(CHAT, json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "body_too_complex")


def test_n_beyond_the_queue_is_bad() -> None:
    with TestClient(create_app(make_engine(max_batch=2), settings=ServiceSettings(max_queue=2))) as client:
        answer = client.post(CHAT, json=ask("say hi", n=5))
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "n")
        assert client.post(CHAT, json=ask("say hi", n=4)).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_stops_its_work(stream: bool) -> None:
    engine = make_engine()
    with LiveService(create_app(engine)) as live:
        body = json.dumps(ask(f"slow 20 {'x' * 500}", stream=stream)).encode()
        raw = socket.create_connection(("127.0.0.1", live.port))
        raw.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        wait_until(lambda: engine.stats().generated_tokens >= 3)
        raw.close()
        at_leaving = engine.stats().generated_tokens
        wait_until(lambda: engine.stats().running == 0, 1.0)
        assert (
            engine.stats().generated_tokens <= at_leaving + 2
        )  # the step under way, and one that it raced with
        # The places are free again.
        assert requests.post(live.url + CHAT, json=ask("say hi"), timeout=5).status_code == 200


def test_a_queued_client_that_leaves_is_forgotten() -> None:
    engine = make_engine(max_batch=1)
    with LiveService(create_app(engine)) as live:
        first = keep_busy(live, engine, 60)
        with pytest.raises(requests.Timeout):
            requests.post(live.url + CHAT, json=ask("say never"), timeout=0.2)
        wait_until(lambda: engine.stats().waiting == 0, 1.0)
        first.join()
        assert engine.stats().generated_tokens == 61


def test_deadline() -> None:
    with TestClient(
        create_app(make_engine(max_batch=1), settings=ServiceSettings(request_seconds=0.3))
    ) as client:
        answer = client.post(CHAT, json=ask("slow 30 " + "x" * 100)).json()["choices"][0]
        assert answer["finish_reason"] == "length"
        assert 1 <= len(answer["message"]["content"]) < 30


def test_deadline_while_waiting() -> None:
    engine = make_engine(max_batch=1)
    with LiveService(create_app(engine, settings=ServiceSettings(request_seconds=0.4))) as live:
        first = keep_busy(live, engine, 100)
        answer = requests.post(live.url + CHAT, json=ask("slow 20 " + "y" * 100), timeout=5)
        first.join()
    assert answer.status_code in (
        200,
        503,
    )  # 200 where the first one's deadline came earlier by more than a token
    if answer.status_code == 503:
        assert answer.json()["error"]["code"] == "overloaded"


def test_slow_reader_slows_nobody() -> None:
    engine = make_engine()
    with LiveService(create_app(engine)) as live:
        body = json.dumps(ask("say " + "x" * 3500, stream=True, logprobs=True, top_logprobs=20)).encode()
        lazy = socket.socket()
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        lazy.connect(("127.0.0.1", live.port))
        lazy.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
        )  # and read nothing
        wait_until(lambda: engine.stats().generated_tokens > 50)
        began = time.monotonic()
        assert requests.post(live.url + CHAT, json=ask("say hello"), timeout=5).status_code == 200
        assert time.monotonic() - began < 3
        lazy.close()


def test_reader_that_never_reads_is_dropped() -> None:
    engine = make_engine()
    with LiveService(create_app(engine, settings=ServiceSettings(write_seconds=0.3))) as live:
        body = json.dumps(ask("say " + "x" * 3500, stream=True, logprobs=True, top_logprobs=20)).encode()
        lazy = socket.socket()
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        lazy.connect(("127.0.0.1", live.port))
        lazy.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        wait_until(lambda: engine.stats().generated_tokens > 50)
        wait_until(lambda: engine.stats().running == 0, 10)
        lazy.close()


@pytest.mark.parametrize("stream", [False, True])
def test_engine_failure(stream: bool, capfd: pytest.CaptureFixture[str]) -> None:
    engine = make_engine()
    with LiveService(create_app(engine)) as live:
        slow: list[requests.Response] = []
        other = threading.Thread(
            target=lambda: slow.append(
                requests.post(live.url + CHAT, json=ask("slow 20 " + "x" * 200), timeout=30)
            )
        )
        other.start()
        wait_until(lambda: engine.stats().generated_tokens >= 1)
        answer = requests.post(live.url + CHAT, json=ask("crash", stream=stream), timeout=5)
        other.join()
        for failed in (answer, *slow):
            assert failed.status_code == 500
            assert failed.json() == {
                "error": {
                    "message": "The server had an error while processing your request.",
                    "type": "server_error",
                    "param": None,
                    "code": "engine_error",
                }
            }
        ready = requests.get(live.url + "/ready", timeout=5)
        assert (ready.status_code, ready.json()["error"]["code"]) == (503, "engine_unavailable")
        refused = requests.post(live.url + CHAT, json=ask("say hi"), timeout=5)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert requests.get(live.url + "/health", timeout=5).status_code == 200
        wait_until(lambda: requests.get(live.url + "/ready", timeout=5).status_code == 200)
        assert requests.post(live.url + CHAT, json=ask("say hi"), timeout=5).status_code == 200
    assert "RuntimeError: a secret path" in capfd.readouterr().err


def test_failure_in_the_middle_of_a_stream() -> None:
    engine = make_engine()
    with (
        LiveService(create_app(engine)) as live,
        requests.post(
            live.url + CHAT, json=ask("slow 20 " + "x" * 300, stream=True), stream=True, timeout=9
        ) as answer,
    ):
        lines = answer.iter_lines()
        assert b'"role":"assistant"' in next(lines)
        requests.post(live.url + CHAT, json=ask("crash"), timeout=5)
        rest = [line for line in lines if line]
    assert json.loads(rest[-1].removeprefix(b"data: "))["error"]["code"] == "engine_error"
    assert b"[DONE]" not in b"".join(rest)


def test_fault_of_ours_tells_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any) -> Any:
        raise ZeroDivisionError("/a/secret/path")

    monkeypatch.setattr("qwen_chat.service.app.chat_job", broken)
    with TestClient(create_app(make_engine())) as client:
        answer = client.post(CHAT, json=ask("say hi"))
        assert answer.status_code == 500
        assert answer.json() == {
            "error": {
                "message": "The server had an error.",
                "type": "server_error",
                "param": None,
                "code": None,
            }
        }
    assert "ZeroDivisionError: /a/secret/path" in capsys.readouterr().err


def exchange(port: int, raw: bytes, *, wait: float = 5.0) -> bytes:
    """Send bytes, and give back all that comes until the server closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=wait) as connection:
        connection.sendall(raw)
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
        return answer


def test_broken_http(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PatientProtocol, "header_seconds", 0.3)
    settings = ServiceSettings(body_seconds=0.3)
    with LiveService(create_app(make_engine(), settings=settings)) as live:
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        cases = {
            b"nonsense\r\n\r\n": 400,
            b"GET / HTTP/x\r\n\r\n": 400,
            b"\x16\x03\x01\x02\x00\x01\x00" * 5 + b"\r\n\r\n": 400,
            b"GET /health HTTP/1.1\r\nHost: x\r\nx: " + b"a" * 70_000 + b"\r\n\r\n": 431,
            b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"a: b\r\n" * 120 + b"\r\n": 431,
            b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"a: b\r\n" * 100_000: 400,
            b"": 408,
            b"GET /hea": 408,
            head[:-20]: 408,
            head + b"Content-Length: 100\r\n\r\n{": 408,
            head + b"Content-Length: -5\r\n\r\n{": 400,
            head + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n": 400,
        }
        for raw, status in cases.items():
            answer = exchange(live.port, raw)
            assert answer.startswith(b"HTTP/1.1 %d " % status), (raw[:60], answer[:200])
            assert b"Traceback" not in answer
        # A kept connection that stays silent is let be; one that begins again and stops is not.
        with socket.create_connection(("127.0.0.1", live.port), timeout=5) as kept:
            for _ in range(2):
                kept.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
                answer = b""
                while not answer.endswith(b"}"):
                    answer += kept.recv(65536)
                assert answer.startswith(b"HTTP/1.1 200 ")
                time.sleep(0.5)
            kept.sendall(b"GET /hea")
            assert kept.recv(65536).startswith(b"HTTP/1.1 408 ")
        assert requests.get(live.url + "/health", timeout=5).status_code == 200


def test_huge_body_is_answered(live: LiveService) -> None:
    answer = requests.post(
        live.url + CHAT, data=b"x" * (10 * 2**20), headers={"content-type": "application/json"}, timeout=20
    )
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")


def test_health_while_many_generate(live: LiveService) -> None:
    threads = [
        threading.Thread(
            target=lambda: requests.post(live.url + CHAT, json=ask("slow 5 " + "x" * 300), timeout=60)
        )
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    times = []
    for _ in range(20):
        began = time.monotonic()
        assert requests.get(live.url + "/health", timeout=5).json() == {"status": "ok"}
        times.append(time.monotonic() - began)
        time.sleep(0.02)
    for thread in threads:
        thread.join()
    assert sorted(times)[len(times) // 2] < 0.05
    assert max(times) < 0.5


# --- log, metrics, description -------------------------------------------------------------------


def test_log(tmp_path: Path) -> None:
    log = RequestLog(tmp_path / "log")
    with TestClient(create_app(make_engine(), log=log, settings=ServiceSettings(model_name="m"))) as client:
        client.post(CHAT, json=ask("say secret words", user="some\x1b[31mbody\n{}"))
        client.post(CHAT, json=ask("say hi", stream=True, stream_options={"include_usage": True}))
        client.post(CHAT, json=ask("hi", temperature=9))
        client.get("/v1/%1b[2Jnothing%0a")
        client.get("/health")
    raw = (tmp_path / "log").read_bytes()
    assert b"secret" not in raw
    assert not any(byte < 0x20 and byte != 0x0A for byte in raw)
    plain, streamed, bad, unknown = [json.loads(line) for line in raw.splitlines()]
    assert set(plain) == {
        "time", "id", "path", "status", "model", "stream", "prompt_tokens", "cached_tokens", "completion_tokens",
        "first_token_ms", "ms", "finish_reason", "user",
    }  # fmt: skip
    assert (plain["status"], plain["model"], plain["finish_reason"]) == (200, "m", "stop")
    assert plain["completion_tokens"] == len("secret words") + 1
    assert 0 <= plain["first_token_ms"] <= plain["ms"]
    assert (streamed["stream"], streamed["status"], streamed["completion_tokens"]) == (True, 200, 3)
    assert (bad["status"], bad["error"]) == (400, "decimal_above_max_value")
    assert (unknown["status"], unknown["error"]) == (404, "unknown_url")


def test_log_with_prompts(tmp_path: Path) -> None:
    log = RequestLog(tmp_path / "log")
    with TestClient(create_app(make_engine(), log=log, settings=ServiceSettings(log_prompts=True))) as client:
        client.post(CHAT, json=ask("say 秘密"))
    line = json.loads((tmp_path / "log").read_text(encoding="utf-8"))
    assert line["prompt"] == [{"role": "user", "content": "say 秘密"}]
    assert line["reply"] == "秘密"


def test_metrics() -> None:
    with TestClient(create_app(make_engine(), settings=ServiceSettings(model_name="m"))) as client:
        client.post(CHAT, json=ask("say abc"))
        client.post(CHAT, json=ask("say abc", n=99))
        client.get("/some/thing")
        answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    found = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }
    assert found["qwen_chat_requests_total", "/v1/chat/completions", "200"] == 1
    assert found["qwen_chat_requests_total", "/v1/chat/completions", "400"] == 1
    assert found["qwen_chat_requests_total", "404", "other"] == 1
    assert found["qwen_chat_generation_tokens_total", "m"] == 4
    assert found["qwen_chat_request_success_total", "m", "stop"] == 1
    assert found["qwen_chat_time_to_first_token_seconds_count", "m"] == 1
    assert found["qwen_chat_time_per_output_token_seconds_count", "m"] == 3
    assert found["qwen_chat_engine_ready",] == 1
    for name in ("num_requests_running", "num_requests_waiting", "batch_size", "prefix_cache_hits_total"):
        assert found[f"qwen_chat_{name}",] == 0


def test_description_is_whole(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    known = set(document["components"]["schemas"])

    def references(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            if isinstance(value.get("$ref"), str):
                yield value["$ref"].removeprefix("#/components/schemas/")
            for child in value.values():
                yield from references(child)
        elif isinstance(value, list):
            for child in value:
                yield from references(child)

    assert set(references(document)) <= known
    chat = document["paths"][CHAT]["post"]
    assert chat["requestBody"]["content"]["application/json"]["schema"] == {
        "$ref": "#/components/schemas/ChatRequest"
    }
    assert set(chat["responses"]) == {
        "200",
        "400",
        "401",
        "403",
        "404",
        "405",
        "408",
        "413",
        "415",
        "429",
        "431",
        "500",
        "503",
    }
    assert set(chat["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}


def test_json_text_is_utf8(client: TestClient) -> None:
    answer = client.post(CHAT, json=ask("say 好"))
    assert "好".encode() in answer.content
    assert json.load(io.BytesIO(answer.content))["choices"][0]["message"]["content"] == "好"


# --- adapters ------------------------------------------------------------------------------------

KEY = {"Authorization": "Bearer key"}


def test_a_merged_model_is_listed_once_and_its_base_is_not_there() -> None:
    engine = make_engine()
    engine.name_merged("mine")
    with TestClient(create_app(engine, settings=ServiceSettings(model_name="scripted"))) as client:
        card = client.get("/v1/models").json()["data"]
        assert [(one["id"], one.get("parent")) for one in card] == [("mine", None)]
        for name in ("mine", "default"):
            answer = client.post(CHAT, json=ask("say ab") | {"model": name}).json()
            assert (answer["model"], answer["choices"][0]["message"]["content"]) == ("mine", "ab")
        gone = client.post(CHAT, json=ask("say ab") | {"model": "scripted"})
        error = gone.json()["error"]
        assert (gone.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")
        assert error["message"] == "The model `scripted` does not exist; there are `mine`."
        assert client.get("/v1/models/scripted").status_code == 404


def test_an_adapter_beside_the_base_names_it_as_its_parent() -> None:
    engine = make_engine()
    engine._adapters["mine"] = _Adapter(None)
    with TestClient(create_app(engine, settings=ServiceSettings(model_name="scripted"))) as client:
        card = client.get("/v1/models").json()["data"]
        assert [(one["id"], one.get("parent")) for one in card] == [("scripted", None), ("mine", "scripted")]
        unknown = client.post(CHAT, json=ask("say ab") | {"model": "other"}).json()["error"]
        assert unknown["message"] == "The model `other` does not exist; there are `scripted`, `mine`."


def test_of_several_loads_of_one_name_one_wins_however_long_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()
    begun, go_on = threading.Event(), threading.Event()
    loads: list[str] = []

    def load(name: str, folder: Path) -> None:
        loads.append(name)
        begun.set()
        assert go_on.wait(20)
        engine._adapters[name] = _Adapter(None)

    monkeypatch.setattr(engine, "load_adapter", load)
    settings = ServiceSettings(model_name="scripted", prepare_seconds=0.05)  # which a load may exceed
    body = {"lora_name": "mine", "lora_path": "/x"}
    with LiveService(create_app(engine, settings=settings, api_keys=["key"])) as live:
        url = f"{live.url}/v1/load_lora_adapter"
        first: list[requests.Response] = []
        thread = threading.Thread(
            target=lambda: first.append(requests.post(url, json=body, headers=KEY, timeout=30))
        )
        thread.start()
        assert begun.wait(20)
        for _ in range(3):
            other = requests.post(url, json=body, headers=KEY, timeout=30)
            assert (other.status_code, other.json()["error"]["code"]) == (409, "adapter_loading")
            assert other.headers["Retry-After"] == "1"
        time.sleep(0.1)
        go_on.set()
        thread.join(20)
        assert first[0].json() == {"lora_name": "mine", "status": "loaded"}
        assert (
            requests.post(url, json=body, headers=KEY, timeout=30).status_code == 400
        )  # it is there already
    assert loads == ["mine"]


def test_a_damaged_adapter_is_the_clients_fault(
    tiny_model_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = load_engine(tiny_model_path)
    good = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": "x"}
    texts = [
        "[1]",
        "{",
        "3",
        "[" * 10**5,
        json.dumps(good | {"lora_alpha": None}),
        json.dumps(good | {"r": "four"}),
    ]
    texts += [
        json.dumps(good | {"alpha_pattern": {"(": 3}}),
        json.dumps(good | {"alora_invocation_tokens": [3]}),
    ]
    texts += [json.dumps(good), json.dumps(good | {"use_dora": True})]
    with TestClient(create_app(engine, api_keys=["key"])) as client:
        for text in texts:
            (tmp_path / "adapter_config.json").write_text(text)
            body = {"lora_name": "mine", "lora_path": str(tmp_path)}
            answer = client.post("/v1/load_lora_adapter", json=body, headers=KEY)
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "lora_path"), text[:80]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(texts)
    assert all(str(tmp_path) in line for line in lines)
