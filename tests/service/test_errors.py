"""What is refused, and how it is told."""

# ruff: noqa: E501  a row of a table is one line

from __future__ import annotations

from typing import Any

import pytest
from starlette.testclient import TestClient

from qwen_chat.service.protocol import ErrorAnswer
from tests.support.chats import CHAT, TIME, ask
from tests.support.scripted import CONTEXT, VOCABULARY

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
    ({"reasoning_effort": 1}, "reasoning_effort", "invalid_type", "expected a string"),
    ({"enable_thinking": True}, "enable_thinking", "unsupported_parameter", "has no variable that turns thinking on"),
    ({"enable_thinking": "yes"}, "enable_thinking", "invalid_type", "expected a boolean"),
    ({"chat_template_kwargs": {"enable_thinking": True}}, "chat_template_kwargs", "invalid_value",
     "this chat template has no variable 'enable_thinking'; it reads none"),
    ({"chat_template_kwargs": []}, "chat_template_kwargs", "invalid_type", "expected"),
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
