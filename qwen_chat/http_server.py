"""uvicorn, with what it leaves open closed: half-sent requests, ports in use, signals.

In: an ASGI app, an address. Out: a listening server that drains on SIGTERM and answers broken HTTP in JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import json
import signal
import socket
import threading
from collections.abc import Generator
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from qwen_chat.errors import OptionError
from qwen_chat.gate import HEADER_BYTES
from qwen_chat.refusal import Refusal

HEADER_SECONDS = 10.0  # from the connection, or the last answer's first new byte, to the end of the headers
KEEP_ALIVE_SECONDS = 30
LINGER_SECONDS = 2.0  # that a refused client may go on sending before the connection is closed
DRAIN_SECONDS = 30  # from SIGTERM until what still runs is cut off
BACKLOG = 512

REQUEST_LINE_HELP = "The request is not valid HTTP/1.1"


class PatientProtocol(H11Protocol):
    """HTTP/1.1 that does not wait for ever for headers, and whose own refusals are JSON."""

    header_seconds = HEADER_SECONDS
    _header_timer: asyncio.TimerHandle | None = None
    _is_refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait_for_headers()

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            return  # read and forgotten: closing with unread data would reset what was answered
        if self._header_timer is None and self.conn.their_state is h11.IDLE:
            self._wait_for_headers()  # the first byte of one more request on a kept connection
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._stop_waiting()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        """There is no websocket here: the request is answered as plain HTTP would be."""
        self._refuse(Refusal(400, f"{REQUEST_LINE_HELP}: it cannot be upgraded.", code="invalid_http"))

    def send_400_response(self, msg: str) -> None:
        self._refuse(Refusal(400, f"{REQUEST_LINE_HELP}, or its headers are too large.", code="invalid_http"))

    def _wait_for_headers(self) -> None:
        self._header_timer = self.loop.call_later(self.header_seconds, self._too_slow)

    def _stop_waiting(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _too_slow(self) -> None:
        self._header_timer = None
        if not self.transport.is_closing() and self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self._refuse(Refusal(408, "The request did not arrive in time.", code="request_timeout"))

    def _refuse(self, refusal: Refusal) -> None:
        """Answer without the app, which never saw the request, and close."""
        self._stop_waiting()
        body = json.dumps(refusal.body()).encode()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            headers = [
                ("content-type", "application/json"),
                ("content-length", str(len(body))),
                ("connection", "close"),
            ]
            parts = (h11.Response(status_code=refusal.status, headers=headers), h11.Data(data=body))
            for part in (*parts, h11.EndOfMessage()):
                self.transport.write(self.conn.send(part) or b"")
        self._is_refused = True
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(LINGER_SECONDS, self.transport.close)


class DrainingServer(uvicorn.Server):
    """A server whose process ends with status 0 after SIGTERM: what ran was answered, as was asked."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        with contextlib.ExitStack() as stack:
            for number in (signal.SIGINT, signal.SIGTERM):
                previous = signal.signal(number, self.handle_exit)
                stack.callback(signal.signal, number, previous)
            yield


def is_loopback(host: str) -> bool:
    """Whether all addresses that `host` stands for are this machine's own. False where it stands for none."""
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    return bool(found) and all(ipaddress.ip_address(address.split("%")[0]).is_loopback for address in found)


def bind(host: str, port: int) -> socket.socket:
    """A bound socket; raise OptionError where the address cannot be had. Port 0 takes a free one."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError:
        raise OptionError(f"--host {host}: no such address; use 127.0.0.1 or one of this machine's") from None
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)  # not listening yet: until the model is loaded, clients are refused, not kept
    except OSError as error:
        listener.close()
        raise OptionError(f"--host {host} --port {port}: {_bind_problem(error)}") from None
    return listener


def _bind_problem(error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return "the port is in use; stop what listens there, or choose another with --port"
    if error.errno == errno.EACCES:
        return "no permission for this port; choose one above 1023 with --port"
    return f"cannot listen there ({error.strerror}); use --host 127.0.0.1"


def make_server(app: Any, *, drain_seconds: int = DRAIN_SECONDS) -> DrainingServer:
    """A server for `app`; `await server.serve(sockets=[listener])` runs it until `server.should_exit`."""
    config = uvicorn.Config(
        app,
        http=PatientProtocol,
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        h11_max_incomplete_event_size=HEADER_BYTES,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=drain_seconds,
        backlog=BACKLOG,
    )
    return DrainingServer(config)


def serve(app: Any, listener: socket.socket, *, drain_seconds: int = DRAIN_SECONDS) -> None:
    """Serve `app` on `listener` until SIGTERM or Ctrl-C, then let what runs end, at most `drain_seconds`."""
    server = make_server(app, drain_seconds=drain_seconds)
    try:
        asyncio.run(server.serve(sockets=[listener]))
    except OSError as error:  # somebody else began to listen while the model was being loaded
        raise OptionError(f"--port {listener.getsockname()[1]}: {_bind_problem(error)}") from None
