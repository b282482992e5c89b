"""Servers that cannot be asked: each is one line, and no request goes elsewhere."""

from __future__ import annotations

import contextlib
import http.server
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from qwen_chat.certificate import server as module
from qwen_chat.certificate.lock import FormatLock
from qwen_chat.certificate.replay import Replay
from qwen_chat.certificate.server import ChatReply, Server, ServerLost
from qwen_chat.chat.format import ChatFormat
from tests.support.faulty_server import FaultyServer


@contextmanager
def answering(status: int, headers: dict[str, str], body: bytes) -> Iterator[str]:
    """A server that gives one answer to everything."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=served.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{served.server_address[1]}"
    finally:
        served.shutdown()
        served.server_close()


def refusal(url: str, lock: FormatLock, key: str | None = None) -> str:
    with pytest.raises(ServerLost) as raised:
        Server(url, key=key, timeout=5).open(lock.entries[0].case)
    assert raised.value.exit_status == 2 and "\n" not in str(raised.value)
    return str(raised.value)


def test_what_is_no_chat_service_is_told(lock: FormatLock, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "expected an address" in refusal("ftp://x", lock)
    assert "cannot be asked" in refusal("http://127.0.0.1:9", lock)
    with answering(200, {}, b"<html>") as url:
        assert "is it a chat service?" in refusal(url, lock)
    with answering(302, {"Location": "/v1/models"}, b"") as url:
        assert "redirects to /v1/models" in refusal(url, lock)
    with answering(200, {}, b'{"data": []}') as url:
        assert "give its name with --model" in refusal(url, lock)
    monkeypatch.setattr(module, "MOST_ANSWER", 1000)
    with answering(200, {}, b"x" * 5000) as url:
        assert "more than" in refusal(url, lock)


def test_a_key_is_asked_for(lock: FormatLock, qwen3_format: ChatFormat) -> None:
    with FaultyServer(qwen3_format, lock, key="secret") as server:
        assert "wants a key" in refusal(server.url, lock)
        assert "wants another key" in refusal(server.url, lock, key="wrong")
        Server(server.url, key="secret", timeout=5).open(lock.entries[0].case)


def test_a_server_that_dies_midway_is_told(lock: FormatLock, qwen3_format: ChatFormat) -> None:
    with FaultyServer(qwen3_format, lock, dies_after=20) as server:
        asked = Server(server.url, timeout=5)
        asked.open(lock.entries[0].case)
        with pytest.raises(ServerLost, match="cannot be asked"):
            Replay(lock, asked, qwen3_format).run()


@pytest.mark.parametrize(
    "url",
    [
        "",
        "x",
        "http://",
        "http://a b",
        "http://h:x",
        "http://[::1",
        "http://h?a=b",
        "http://h/#a",
        "file:///x",
    ],
)
def test_what_is_no_address_is_told(url: str) -> None:
    with pytest.raises(ServerLost, match="expected an address such as"):
        Server(url)


def test_a_server_on_this_machine_is_asked_without_a_proxy(
    lock: FormatLock, qwen3_format: ChatFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with FaultyServer(qwen3_format, lock) as server:
        Server(server.url, timeout=5).open(lock.entries[0].case)
    with pytest.raises(ServerLost, match=r"the proxy does not let it through.*NO_PROXY"):
        Server("http://192.0.2.1", timeout=5).open(lock.entries[0].case)


def test_a_server_that_sends_a_byte_now_and_then_is_given_up(lock: FormatLock) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def drip() -> None:
            with contextlib.suppress(OSError):
                peer, _ = listener.accept()
                while True:
                    peer.sendall(b"H")
                    time.sleep(0.05)

        threading.Thread(target=drip, daemon=True).start()
        began = time.monotonic()
        with pytest.raises(ServerLost, match="no answer in time"):
            Server(f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=0.4).open(lock.entries[0].case)
        assert time.monotonic() - began < 3


def test_a_redirect_of_what_need_not_be_there_is_passed_over(
    lock: FormatLock, qwen3_format: ChatFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a front does that sends every path that it does not know to its page."""
    honest = Server._answer

    def answer(self: Server, method: str, url: str, body: Any) -> tuple[int, bytes]:
        known = url.endswith(("/v1/models", "/v1/chat/completions"))
        return honest(self, method, url, body) if known else (302, b'{"error": "redirects to /"}')

    monkeypatch.setattr(Server, "_answer", answer)
    with FaultyServer(qwen3_format, lock) as server:
        asked = Server(server.url, timeout=5)
        asked.open(lock.entries[0].case)
        assert asked.channel == "usage"


CHOICE: dict[str, Any] = {"message": {"content": "x"}, "finish_reason": "stop"}
USAGE = {"prompt_tokens": 5, "completion_tokens": 1}
ODD = (
    {},
    {"choices": {}},
    {"choices": ["x"], "usage": USAGE},
    {"choices": [CHOICE], "usage": [1]},
    {"choices": [{"message": "x"}], "usage": USAGE},
    {"choices": [CHOICE | {"logprobs": "x"}], "usage": USAGE},
    {"choices": [CHOICE | {"logprobs": {"content": [{"token": "a", "logprob": "nan"}]}}]},
    {"choices": [CHOICE | {"logprobs": {"content": [{"token": "a", "logprob": float("nan")}]}}]},
    {"error": {"message": "a\x1b[2Jb\nc\u202e"}},
)


@pytest.mark.parametrize("answer", ODD)
def test_an_answer_of_another_shape_is_a_refusal(answer: Any, lock: FormatLock) -> None:
    with answering(200, {}, json.dumps(answer).encode()) as url:
        found = Server(url, model="m", timeout=5).chat(lock.entries[0].case)
    assert isinstance(found, str) and found.startswith("status 200: ") and found.isprintable()


def test_a_number_of_tokens_that_is_none_is_not_told(lock: FormatLock) -> None:
    for count in ("5", -1, True, 1.5, None):
        body = json.dumps({"choices": [CHOICE], "usage": {"prompt_tokens": count}}).encode()
        with answering(200, {}, body) as url:
            assert Server(url, model="m", timeout=5).counted(lock.entries[0].case).count is None


def test_half_a_pair_of_surrogates_does_not_come_in(lock: FormatLock) -> None:
    body = rb'{"choices": [{"message": {"content": "\ud83d\ude42 \udfff"}, "finish_reason": "stop"}]}'
    with answering(200, {}, body) as url:
        found = Server(url, model="m", timeout=5).chat(lock.entries[0].case)
    assert isinstance(found, ChatReply) and found.message["content"] == "🙂 ?"
