"""What is no HTTP is answered in JSON, or in time."""

from __future__ import annotations

import socket
import time

import pytest
import requests

from qwen_chat.service.app import create_app
from qwen_chat.service.connections import PatientProtocol
from qwen_chat.service.settings import ServiceSettings
from tests.support.scripted import LiveService, make_engine

pytestmark = pytest.mark.alone


def exchange(port: int, raw: bytes, *, wait: float = 5.0) -> bytes:
    """Send bytes, and give back all that comes until the server closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=wait) as connection:
        connection.sendall(raw)
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
        return answer


def test_broken_http(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PatientProtocol, "header_seconds", 0.3)
    settings = ServiceSettings(body_seconds=0.3)
    with LiveService(create_app(make_engine(), settings=settings)) as live:
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        cases = {
            b"nonsense\r\n\r\n": 400,
            b"GET / HTTP/x\r\n\r\n": 400,
            b"\x16\x03\x01\x02\x00\x01\x00" * 5 + b"\r\n\r\n": 400,
            b"GET /health HTTP/1.1\r\nHost: x\r\nx: " + b"a" * 70_000 + b"\r\n\r\n": 431,
            b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"a: b\r\n" * 120 + b"\r\n": 431,
            b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"a: b\r\n" * 100_000: 400,
            b"": 408,
            b"GET /hea": 408,
            head[:-20]: 408,
            head + b"Content-Length: 100\r\n\r\n{": 408,
            head + b"Content-Length: -5\r\n\r\n{": 400,
            head + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n": 400,
        }
        for raw, status in cases.items():
            answer = exchange(live.port, raw)
            assert answer.startswith(b"HTTP/1.1 %d " % status), (raw[:60], answer[:200])
            assert b"Traceback" not in answer
        # A kept connection that stays silent is let be; one that begins again and stops is not.
        with socket.create_connection(("127.0.0.1", live.port), timeout=5) as kept:
            for _ in range(2):
                kept.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
                answer = b""
                while not answer.endswith(b"}"):
                    answer += kept.recv(65536)
                assert answer.startswith(b"HTTP/1.1 200 ")
                time.sleep(0.5)
            kept.sendall(b"GET /hea")
            assert kept.recv(65536).startswith(b"HTTP/1.1 408 ")
        assert requests.get(live.url + "/health", timeout=5).status_code == 200
