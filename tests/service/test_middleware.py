"""Who may ask, and what is told of a fault of ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from qwen_chat.service.app import create_app
from qwen_chat.service.request_log import RequestLog
from tests.support.chats import CHAT, ask
from tests.support.scripted import make_engine


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
