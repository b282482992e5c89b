"""Bodies of any bytes and any size."""

from __future__ import annotations

from typing import Any

import pytest
import requests
from starlette.testclient import TestClient

from qwen_chat.service.app import create_app
from qwen_chat.service.protocol import ErrorAnswer
from tests.support.chats import CHAT, ask
from tests.support.scripted import LiveService, make_engine


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


def test_huge_body_is_answered(live: LiveService) -> None:
    answer = requests.post(
        live.url + CHAT, data=b"x" * (10 * 2**20), headers={"content-type": "application/json"}, timeout=20
    )
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")
