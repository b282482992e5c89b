"""What a chat or a completion answers, streamed and plain, byte for byte where it matters."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from qwen_chat.service.app import create_app
from qwen_chat.service.settings import ServiceSettings
from tests.support.chats import CALL, CALL_TIME, CHAT, TIME, WEATHER, ask, events, fold
from tests.support.scripted import TEMPLATE, make_engine


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


@pytest.fixture(scope="module")
def thinker() -> Iterator[TestClient]:
    """A model whose template knows thinking, as Qwen3's does."""
    engine = make_engine()
    engine.tokenizer.chat_template = TEMPLATE + "{# <think> #}"
    with TestClient(
        create_app(engine, settings=ServiceSettings(model_name="scripted", pace_seconds=0))
    ) as client:
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


def test_json_text_is_utf8(client: TestClient) -> None:
    answer = client.post(CHAT, json=ask("say 好"))
    assert "好".encode() in answer.content
    assert json.load(io.BytesIO(answer.content))["choices"][0]["message"]["content"] == "好"
