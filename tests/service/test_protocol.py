"""Requests as strict types: what is taken, what is refused, and by what name."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from qwen_chat.service import protocol
from qwen_chat.service.errors import LONGEST_ECHO, APIError, echo, from_validation, param_name, too_long
from qwen_chat.service.protocol import ChatRequest, CompletionRequest

GOOD = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=12,
)


def test_what_openai_clients_send_is_taken() -> None:
    request = ChatRequest.model_validate(
        {
            "model": "m",
            "messages": [
                {"role": "developer", "content": "Be brief."},
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
                    "name": "x",
                },
                {
                    "role": "assistant",
                    "content": None,
                    "refusal": None,
                    "annotations": [],
                    "audio": None,
                    "function_call": None,
                    "tool_calls": [
                        {
                            "id": "1",
                            "type": "function",
                            "function": {"name": "f", "arguments": "{}"},
                            "index": 0,
                        }
                    ],
                },
                {"role": "tool", "tool_call_id": "1", "content": "x"},
            ],
            "temperature": 1,
            "store": False,
            "service_tier": "auto",
            "modalities": ["text"],
            "metadata": None,
            "stop": None,
        }
    )
    assert (request.choices, request.stops, request.token_limit, request.alternatives) == (1, (), None, None)
    assert not request.include_usage


@pytest.mark.parametrize("name", sorted(set(ChatRequest.model_fields) - {"model", "messages"}))
def test_null_is_the_same_as_absent(name: str) -> None:
    assert ChatRequest.model_validate({**GOOD, name: None}) == ChatRequest.model_validate(GOOD)


@pytest.mark.parametrize(
    ("name", "lowest", "highest"),
    [
        ("temperature", 0, 2),
        ("top_p", 0, 1),
        ("min_p", 0, 1),
        ("presence_penalty", -2, 2),
        ("frequency_penalty", -2.0, 2.0),
        ("n", 1, protocol.MOST_CHOICES),
        ("top_k", -1, 2**31 - 1),
        ("seed", -(2**63), 2**63 - 1),
        ("max_tokens", 1, 2**31 - 1),
    ],
)
def test_limits_are_inclusive(name: str, lowest: float, highest: float) -> None:
    for value in (lowest, highest):
        assert getattr(ChatRequest.model_validate({**GOOD, name: value}), name) == value
    step = 0.001 if isinstance(lowest, float) or highest <= 2 else 1
    for value in (lowest - step, highest + step):
        with pytest.raises(ValidationError):
            ChatRequest.model_validate({**GOOD, name: value})


@settings(max_examples=200, deadline=None)
@given(value=JSON)
def test_any_json_in_any_field(value: Any) -> None:
    """It is taken, or refused with a name that begins with the field's."""
    for name in ChatRequest.model_fields:
        body = {**GOOD, name: value}
        try:
            ChatRequest.model_validate(body)
        except ValidationError as error:
            refusal = from_validation(error, body)
            assert refusal.status == 400
            assert refusal.message and refusal.code
            blamed = refusal.param or ""
            elsewhere = ("max_tokens", "stream_options", "top_logprobs", "tool_choice")
            assert blamed.startswith(name) or blamed in elsewhere, name
            assert len(refusal.message) < 1000, name


@settings(deadline=None)
@given(value=JSON)
def test_any_json_as_body(value: Any) -> None:
    for kind in (ChatRequest, CompletionRequest, protocol.TokenizeRequest, protocol.DetokenizeRequest):
        try:
            kind.model_validate(value)
        except ValidationError as error:
            assert from_validation(error, value).body()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", ("a",)), (["a", "b"], ("a", "b")), ([1, 2], ([1, 2],)), ([[1], [2, 3]], ([1], [2, 3]))],
)
def test_prompts(prompt: Any, prompts: tuple[Any, ...]) -> None:
    assert CompletionRequest.model_validate({"model": "m", "prompt": prompt}).prompts == prompts


def test_param_name() -> None:
    body = {"messages": [{"role": "user", "content": [{"type": "text"}]}], "stop": "x"}
    assert (
        param_name(("messages", 0, "user", "content", "list", 0, "text"), body, absent=True)
        == "messages[0].content[0].text"
    )
    assert (
        param_name(("messages", 0, "user", "content", "list", 0, "type"), body)
        == "messages[0].content[0].type"
    )
    assert param_name(("stop", "text"), body) == "stop"
    assert param_name((), body) is None


def test_refusal_shape() -> None:
    assert too_long(10, 8, 5).body() == {
        "error": {
            "message": "This model's maximum context length is 10 tokens. However, you requested 13 tokens "
            "(8 in the messages, 5 in the completion). Please reduce the length of the messages or of the completion.",
            "type": "invalid_request_error",
            "param": "max_tokens",
            "code": "context_length_exceeded",
        }
    }
    assert APIError(429, "x", retry_after=3).headers() == {"Retry-After": "3"}
    assert [APIError(status, "x").type for status in (400, 401, 429, 500, 503)] == [
        "invalid_request_error",
        "invalid_request_error",
        "rate_limit_error",
        "server_error",
        "server_error",
    ]


@settings(deadline=None)
@given(st.text())
def test_echo_is_short_and_tame(text: str) -> None:
    shown = echo(text)
    assert len(shown) <= LONGEST_ECHO + 3
    assert shown.isprintable()


def test_answers_keep_their_nulls_and_leave_out_the_rest() -> None:
    delta = protocol.ChunkDelta(role="assistant", content="", refusal=None)
    assert delta.json_text() == '{"role":"assistant","content":"","refusal":null}'
    assert protocol.ChunkDelta().json_text() == "{}"
