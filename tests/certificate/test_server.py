"""Servers that cannot be asked: each is one line, and no request goes elsewhere."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from qwen_chat.certificate import server as module
from qwen_chat.certificate.lock import FormatLock
from qwen_chat.certificate.replay import Replay
from qwen_chat.certificate.server import Server, ServerLost
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
