"""Connections of strangers: each ends by itself, and none costs an honest client anything."""

from __future__ import annotations

import itertools
import json
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from starlette.testclient import TestClient

from qwen_chat.service.app import create_app
from qwen_chat.service.connections import PatientProtocol
from qwen_chat.service.request_log import RequestLog
from qwen_chat.service.settings import ServiceSettings
from tests.support.chats import CHAT, ask, wait_until
from tests.support.scripted import LiveService, make_engine

pytestmark = pytest.mark.alone

KEY = {"authorization": "Bearer secret"}
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
KEYED = HEAD + b"Authorization: Bearer secret\r\n"


def posted(body: dict[str, Any], head: bytes = KEYED) -> bytes:
    raw = json.dumps(body).encode()
    return head + b"Content-Length: %d\r\n\r\n%s" % (len(raw), raw)


def connections(live: LiveService) -> int:
    return len(live._server.server_state.connections)


@pytest.fixture(scope="module")
def live() -> Iterator[LiveService]:
    with (
        pytest.MonkeyPatch.context() as patch,
        LiveService(create_app(make_engine(), api_keys=["secret"])) as service,
    ):
        patch.setattr(PatientProtocol, "linger_seconds", 0.3)
        yield service


# --- answers given before the request was read ---------------------------------------------------

CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"
EARLY = {
    "no key, chunked": (HEAD + CHUNKED, b"1\r\nx\r\n", 401),
    "no key, a length": (HEAD + b"Content-Length: 1000000000\r\n\r\n", b"x", 401),
    "a body for GET": (b"GET /health HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n", b"x", 200),
    "a body for HEAD": (b"HEAD /health HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n", b"x", 200),
    "no such endpoint": (KEYED.replace(b"/v1/chat", b"/v2/chat") + CHUNKED, b"1\r\nx\r\n", 404),
    "no such method": (KEYED.replace(b"POST", b"DELETE") + CHUNKED, b"1\r\nx\r\n", 405),
    "not JSON": (KEYED.replace(b"json", b"xml") + CHUNKED, b"1\r\nx\r\n", 415),
    "no HTTP": (b"nonsense\r\n\r\n", b"x", 400),
}


@pytest.mark.parametrize(("head", "more", "status"), EARLY.values(), ids=EARLY)
def test_an_answer_before_the_body_was_read_is_the_last(
    live: LiveService, head: bytes, more: bytes, status: int
) -> None:
    with socket.create_connection(("127.0.0.1", live.port), timeout=5) as peer:
        peer.sendall(head + more)
        answer = peer.recv(65536)
        assert answer.startswith(b"HTTP/1.1 %d " % status)
        assert b"\r\nconnection: close\r\n" in answer
        began = time.monotonic()
        with pytest.raises(OSError):  # it goes on sending, and is cut off
            while True:
                peer.sendall(more)
                time.sleep(0.02)
                assert time.monotonic() - began < 5
    wait_until(lambda: connections(live) == 0)


def test_who_sends_a_large_body_without_a_key_gets_to_read_why(live: LiveService) -> None:
    answer = requests.post(live.url + CHAT, data=b"x" * 3_000_000, timeout=5)
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "missing_api_key")


def test_what_was_read_whole_keeps_its_connection(live: LiveService) -> None:
    with requests.Session() as session, socket.create_connection(("127.0.0.1", live.port), timeout=5) as peer:
        for body, status in ((ask("say a"), 200), (ask("say b", temperature=9), 400), (ask("say c"), 200)):
            answer = session.post(live.url + CHAT, json=body, headers=KEY, timeout=5)
            assert (answer.status_code, answer.headers.get("connection")) == (status, None)
        for _ in range(2):  # without a body nothing is unread, whatever the status
            peer.sendall(b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n")
            told = b""
            while not told.endswith(b"}}"):
                told += peer.recv(65536)
            assert told.startswith(b"HTTP/1.1 401 ")


def test_two_lengths_are_the_last_request(live: LiveService) -> None:
    body = json.dumps(ask("say a")).encode()
    raw = KEYED + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (
        len(body),
        body,
    )
    with socket.create_connection(("127.0.0.1", live.port), timeout=5) as peer:
        peer.sendall(raw)
        answer = b""
        while piece := peer.recv(65536):
            answer += piece
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b"\r\nconnection: close\r\n" in answer


def test_many_header_lines_are_refused_before_they_are_parsed(live: LiveService) -> None:
    with socket.create_connection(("127.0.0.1", live.port), timeout=5) as peer:
        peer.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"a:b\r\n" * 3000)  # 15 KB, no end
        assert peer.recv(65536).startswith(b"HTTP/1.1 400 ")


# --- many of them --------------------------------------------------------------------------------


class Tricklers:
    """Connections that send without a key, a chunk at a time, and go on after they were answered."""

    def __init__(self, port: int, count: int) -> None:
        self.open = [socket.create_connection(("127.0.0.1", port), timeout=5) for _ in range(count)]
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Tricklers:
        for peer in self.open:
            peer.sendall(HEAD + CHUNKED)
        self._thread.start()
        return self

    def _run(self) -> None:
        while self.open:
            for peer in list(self.open):
                try:
                    peer.sendall(b"1\r\nx\r\n" * 20)
                except OSError:
                    peer.close()
                    self.open.remove(peer)
            time.sleep(0.02)

    def __exit__(self, *_: object) -> None:
        for peer in self.open:
            peer.close()


def worst_gap(live: LiveService) -> float:
    """Seconds, of an honest stream of most of a second."""
    times = []
    with requests.post(
        live.url + CHAT, json=ask("slow 10 " + "x" * 60, stream=True), headers=KEY, stream=True, timeout=60
    ) as answer:
        times = [time.monotonic() for line in answer.iter_lines(chunk_size=1) if line]
    assert len(times) > 60
    return max(after - before for before, after in itertools.pairwise(times))


@pytest.mark.parametrize("count", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_tricklers_without_a_key_slow_nobody_and_end(
    tmp_path: Path, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PatientProtocol, "linger_seconds", 0.5)  # about as long as the honest stream
    log = RequestLog(tmp_path / "log")
    rounds = 3
    engine, settings = make_engine(drafts=False), ServiceSettings(pace_seconds=0)
    with LiveService(create_app(engine, settings=settings, api_keys=["secret"], log=log)) as live:
        quiet = statistics.median(worst_gap(live) for _ in range(rounds))
        attacked = []
        for _ in range(rounds):
            with Tricklers(live.port, count) as tricklers:
                attacked.append(worst_gap(live))
                wait_until(lambda: not tricklers.open)
        wait_until(lambda: connections(live) == 0)
        assert statistics.median(attacked) <= max(2 * quiet, 0.1)
    refused = [line for line in log.path.read_text().splitlines() if json.loads(line)["status"] == 401]
    assert len(refused) == count * rounds


# --- readers that do not read --------------------------------------------------------------------


def lazy_peer(port: int) -> socket.socket:
    peer = socket.socket()
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    peer.connect(("127.0.0.1", port))
    return peer


def test_answers_that_nobody_reads_do_not_keep_a_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PatientProtocol, "write_seconds", 0.3)
    engine = make_engine()
    app = create_app(engine, api_keys=["secret"], settings=ServiceSettings(write_seconds=0.3))
    with LiveService(app) as live:
        piped, streamed = lazy_peer(live.port), lazy_peer(live.port)
        piped.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 400)  # no key, megabytes of answers
        streamed.sendall(posted(ask("say " + "x" * 3500, stream=True, logprobs=True, top_logprobs=20, n=4)))
        wait_until(lambda: engine.stats().generated_tokens > 50)
        wait_until(lambda: connections(live) == 0, 15)
        wait_until(lambda: engine.stats().running == 0)
        wait_until(lambda: not live._server.server_state.tasks)
        for peer in (piped, streamed):
            with pytest.raises(ConnectionResetError):  # nothing waits in the kernel either
                while peer.recv(65536):
                    pass
            peer.close()


def test_a_slow_reader_gets_its_whole_answer(live: LiveService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PatientProtocol, "write_seconds", 0.2)
    answer = b""
    with lazy_peer(live.port) as peer:
        peer.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        while piece := peer.recv(2048):
            answer += piece
            time.sleep(0.01)  # longer than write_seconds in all
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    assert json.loads(body)["info"]["title"] == "qwen_chat"


# --- too many ------------------------------------------------------------------------------------


def test_connections_have_a_ceiling(
    live: LiveService, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    wait_until(lambda: connections(live) == 0)
    monkeypatch.setattr(PatientProtocol, "most_connections", 6)  # one peer may hold three
    held = [socket.create_connection(("127.0.0.1", live.port), timeout=5) for _ in range(3)]
    wait_until(lambda: connections(live) == 3)
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", live.port), timeout=5) as peer:
            answer = b""
            while piece := peer.recv(65536):
                answer += piece
        assert answer.startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
        assert b"\r\nretry-after: 1\r\n" in answer
    assert len(capfd.readouterr().err.splitlines()) <= 1
    held[0].sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    assert held[0].recv(65536).startswith(b"HTTP/1.1 200 ")
    for peer in held:
        peer.close()
    wait_until(lambda: connections(live) == 0)
    assert requests.get(live.url + "/health", timeout=5).status_code == 200


CROWDED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (24, 24))
sys.path.insert(0, {root!r})
from qwen_chat.service import connections, server

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        for _ in range(2):
            await send({{"type": (await receive())["type"] + ".complete"}})
        return
    await send({{"type": "http.response.start", "status": 204, "headers": []}})
    await send({{"type": "http.response.body", "body": b""}})

connections.connections_allowed = lambda: 1000  # so that the files run out first
listener = server.bind("127.0.0.1", 0)
print(listener.getsockname()[1], flush=True)
server.serve(app, listener)
"""


def test_no_file_descriptors_left_is_told_in_one_line() -> None:
    code = CROWDED.format(root=str(Path(__file__).resolve().parents[2]))
    server = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert server.stdout is not None
    try:
        port = int(server.stdout.readline())
        wait_until(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0)
        held = [socket.create_connection(("127.0.0.1", port), timeout=5) for _ in range(60)]
        time.sleep(1.5)  # asyncio tries again after a second
        for peer in held:
            peer.close()
        wait_until(lambda: requests.get(f"http://127.0.0.1:{port}", timeout=5).status_code == 204)
    finally:
        server.terminate()
    _, told = server.communicate(timeout=20)
    assert server.returncode == 0
    assert told.splitlines() == ["cannot accept connections (Too many open files); more with: ulimit -n"]


# --- their lines in the log ----------------------------------------------------------------------


def test_without_a_key_the_log_cannot_be_emptied(tmp_path: Path) -> None:
    log = RequestLog(tmp_path / "log", max_bytes=20_000, kept_files=2)
    with TestClient(create_app(make_engine(), api_keys=["secret"], log=log)) as client:
        assert client.get("/v1/models", headers=KEY).status_code == 200
        for path in ("/" + "A" * 30_000, "/openapi.json", "/v1/models"):
            for _ in range(30):
                client.get(path)
    kept = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert (kept[0]["path"], kept[0]["status"]) == ("/v1/models", 200)
    assert kept[1]["path"] == "/" + "A" * 199
    assert (tmp_path / "log").stat().st_size <= 0.1 * 20_000 + 300
    assert log.withheld == 91 - len(kept)
