"""Chats with the scripted model: what is asked, and what a client makes of the answer."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from typing import Any

import requests

from qwen_chat.inference.engine import Engine
from tests.support.scripted import LiveService

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


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
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
