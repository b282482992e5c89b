"""The endpoints that describe and count, and the service's own description."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from qwen_chat.service.app import create_app
from qwen_chat.service.settings import ServiceSettings
from tests.support.chats import CHAT, ask
from tests.support.scripted import END, LiveService, make_engine


def test_tokens_round_trip(client: TestClient) -> None:
    text = "héllo <|im_end|> 你好"
    found = client.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    assert END in found["tokens"]  # a plain prompt may hold control tokens
    assert client.post("/detokenize", json={"tokens": found["tokens"]}).json() == {"prompt": text}
    chat = client.post("/tokenize", json={"messages": [{"role": "user", "content": text}]}).json()
    assert chat["tokens"].count(END) == 1  # in a message they are text


@pytest.mark.alone
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


def test_metrics() -> None:
    with TestClient(
        create_app(make_engine(), settings=ServiceSettings(model_name="m", pace_seconds=0))
    ) as client:
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
