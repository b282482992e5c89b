"""What the engine is asked: prompt, grammar and sampling of a request."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import pytest
from starlette.testclient import TestClient

from qwen_chat.chat.format import ChatFormat
from qwen_chat.inference.engine import Engine
from qwen_chat.service.errors import APIError
from qwen_chat.service.prepare import SamplingDefaults, Served, chat_job, template_kwargs
from qwen_chat.service.protocol import ChatRequest
from tests.support.chats import CALL, CHAT, WEATHER, ask


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


# ------------------------------------------------------------------------------------------------------ thinking


@pytest.fixture(scope="module")
def thinking(chat_templates: dict[str, str], qwen3_tokenizer: Any) -> dict[str, ChatFormat]:
    """The formats of some published templates."""
    found = {}
    for name in ("qwen2_5", "qwen3", "qwen3_5_nothink", "qwen3_8"):
        tokenizer = copy.copy(qwen3_tokenizer)
        tokenizer.chat_template = chat_templates[name]
        found[name] = ChatFormat(tokenizer)
    return found


def chat(**fields: Any) -> ChatRequest:
    return ChatRequest.model_validate({**ask("q"), **fields})


OFF, ON = {"enable_thinking": False}, {"enable_thinking": True}


@pytest.mark.parametrize(
    ("name", "fields", "variables"),
    [
        ("qwen2_5", {}, {}),
        ("qwen2_5", {"enable_thinking": None, "reasoning_effort": None, "chat_template_kwargs": None}, {}),
        ("qwen3", OFF, OFF),
        ("qwen3", {"chat_template_kwargs": OFF}, OFF),
        ("qwen3", {"chat_template_kwargs": OFF, **OFF}, OFF),
        ("qwen3", {"reasoning_effort": "none"}, OFF),
        ("qwen3_8", {"reasoning_effort": "none", **OFF}, OFF),
        ("qwen3_8", {"reasoning_effort": "low"}, {"reasoning_effort": "low"}),
        ("qwen3_8", {"reasoning_effort": "low", **ON}, {"reasoning_effort": "low", **ON}),
        ("qwen3_8", {"chat_template_kwargs": {"preserve_thinking": False}}, {"preserve_thinking": False}),
    ],
)
def test_variables_of_a_request(
    thinking: dict[str, ChatFormat], name: str, fields: dict[str, Any], variables: dict[str, Any]
) -> None:
    fmt, request = thinking[name], chat(**fields)
    assert template_kwargs(request, fmt) == variables
    served = Served("m", None, fmt, 999, 200_000, frozenset(), SamplingDefaults())
    job = chat_job(request, ask("q"), served, deadline=0.0)
    assert list(job.requests[0].prompt_ids) == fmt.prompt_ids(ask("q")["messages"], **variables)


@pytest.mark.parametrize(
    ("name", "fields", "param", "code", "message"),
    [
        ("qwen2_5", ON, "enable_thinking", "unsupported_parameter",
         "'enable_thinking' is not supported by this model: its chat template has no variable that turns thinking on"),
        ("qwen2_5", {"reasoning_effort": "low"}, "reasoning_effort", "unsupported_parameter",
         "its chat template has no variable that says how much to think"),
        ("qwen3", {"reasoning_effort": "low"}, "reasoning_effort", "invalid_value",
         "Invalid value for 'reasoning_effort': expected 'none'."),
        ("qwen3_8", {"reasoning_effort": "high"}, "reasoning_effort", "invalid_value",
         "expected 'none' or 'low' or 'medium' or 'xhigh'."),
        ("qwen3_8", {"reasoning_effort": "low", **OFF}, "reasoning_effort", "invalid_value", "thinking is off"),
        ("qwen3_8", {"chat_template_kwargs": {"reasoning_effort": "high"}}, "chat_template_kwargs", "invalid_value",
         "Invalid 'chat_template_kwargs': reasoning_effort is 'high'; expected one of low, medium, xhigh."),
        ("qwen3_8", {"reasoning_effort": "none", **ON}, "reasoning_effort", "invalid_value",
         "another value of 'enable_thinking' stands elsewhere in the request"),
        ("qwen3", {"chat_template_kwargs": OFF, **ON}, "enable_thinking", "invalid_value", "another value of"),
        ("qwen3", {"chat_template_kwargs": {"think": True}}, "chat_template_kwargs", "invalid_value",
         "Invalid 'chat_template_kwargs': this chat template has no variable 'think'; it reads enable_thinking."),
        ("qwen3", {"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs", "invalid_value",
         "no variable 'tools'"),
        ("qwen3", {"chat_template_kwargs": {"enable_thinking": "no"}}, "chat_template_kwargs", "invalid_value",
         "enable_thinking is 'no'; expected true or false."),
    ],
)  # fmt: skip
def test_variables_that_a_template_does_not_have(
    thinking: dict[str, ChatFormat], name: str, fields: dict[str, Any], param: str, code: str, message: str
) -> None:
    with pytest.raises(APIError) as caught:
        template_kwargs(chat(**fields), thinking[name])
    assert (caught.value.status, caught.value.param, caught.value.code) == (400, param, code)
    assert message in caught.value.message


def test_a_template_that_refuses_a_request_is_quoted(thinking: dict[str, ChatFormat]) -> None:
    served = Served("m", None, thinking["qwen3_8"], 999, 200_000, frozenset(), SamplingDefaults())
    body = ask("q")
    body["messages"] = [*body["messages"], {"role": "system", "content": "s"}]
    with pytest.raises(APIError, match="System message must be at the beginning"):
        chat_job(ChatRequest.model_validate(body), body, served, deadline=0.0)
