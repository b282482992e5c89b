"""Requests under pressure: clients that leave, deadlines, an engine that fails."""

from __future__ import annotations

import json
import socket
import threading
import time
from typing import Any

import pytest
import requests
from starlette.testclient import TestClient

from qwen_chat.inference.engine import Engine
from qwen_chat.service.app import create_app
from qwen_chat.service.settings import ServiceSettings
from tests.support.chats import CHAT, ask, keep_busy, wait_until
from tests.support.scripted import LiveService, make_engine

pytestmark = pytest.mark.alone


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
        create_app(make_engine(max_batch=1, drafts=False), settings=ServiceSettings(request_seconds=0.6))
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
