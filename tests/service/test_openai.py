"""OpenAI's own client against the service; it checks every answer against its own types."""

from __future__ import annotations

import json

import pytest
from openai import OpenAI

from tests.support.chats import CALL, WEATHER
from tests.support.scripted import LiveService


@pytest.fixture(scope="module")
def openai(live: LiveService) -> OpenAI:
    """The official client, which here checks every answer against its own types."""
    return OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0, _strict_response_validation=True)


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
