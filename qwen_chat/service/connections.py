"""Connections that end by themselves: uvicorn's HTTP/1.1 with a deadline for every state.

In: bytes of a peer who may be slow, silent or hostile. Out: requests for the app, and answers in JSON to what is no
request. Headers, an answer that is not read and the rest of a request that was answered before it was read have their
deadlines here; silence between requests has uvicorn's, and a body has body.py's.
"""

from __future__ import annotations

import asyncio
import contextlib
import http
import json
import resource
import socket
import struct
import sys
import time
from collections.abc import Callable
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from qwen_chat.service.errors import APIError

# Bytes after the last answer that are read (and forgotten), so that the peer gets to read its answer.
LINGER_BYTES = 16 * 2**20
LEAST_READ = 16 * 1024
# Each line costs 10 us and more to parse.
READ_HEADER_LINES = 1000
# Read at once; 256 KB (asyncio's choice) of one-byte chunks hold up the event loop for half a second.
READ_BYTES = 4096
# Open at once; one peer may hold half of them.
MOST_CONNECTIONS = 1000
# Seconds between two lines about what goes on all the time.
SAID_EVERY = 60.0


class PatientProtocol(H11Protocol):
    """HTTP/1.1 that waits for nobody for ever, and whose own refusals are JSON."""

    # Seconds from the connection, or the last answer's first new byte, to the end of the headers.
    header_seconds = 10.0
    # Seconds that a peer may go on sending after the last answer.
    linger_seconds = 2.0
    # Seconds in which a peer must read LEAST_READ bytes of what waits for it, or all of it.
    write_seconds = 60.0
    most_connections = MOST_CONNECTIONS
    transport: PatientTransport
    _header_timer: asyncio.TimerHandle | None = None
    # Lines so far of headers that are not whole yet.
    _header_lines = 0
    # Bytes that came after the last answer.
    _forgotten = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        patient = PatientTransport(transport, self.loop, write_seconds=self.write_seconds, close=self._close)
        super().connection_made(patient)
        most = min(self.most_connections, connections_allowed())
        peer = self.client[0] if self.client else ""
        clients = [getattr(other, "client", None) for other in self.connections]
        theirs = sum(client is not None and client[0] == peer for client in clients)
        if len(self.connections) <= most and theirs * 2 <= most:
            self._wait_for_headers()
            return
        say_rarely("too many connections", f"over {len(self.connections) - 1} connections: more are refused")
        error = APIError(503, "Too many connections.", code="overloaded", retry_after=1)
        patient.write(_whole_answer(error))
        patient.inner.close()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            self._forgotten += len(data)
            if self._forgotten > LINGER_BYTES:
                self.transport.inner.pause_reading()
            return
        if self._header_timer is None and self.conn.their_state is h11.IDLE:
            # The first byte of one more request on a kept connection.
            self._wait_for_headers()
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._stop_waiting()
            self._header_lines = 0
            return
        self._header_lines += data.count(b"\n")
        if self._header_lines > READ_HEADER_LINES and not self.transport.is_closing():
            self.send_400_response("")

    def shutdown(self) -> None:
        if not self.transport.is_closing():
            super().shutdown()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        self.transport.lost()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        text = "The request is not valid HTTP/1.1, or its headers are too large."
        self._refuse(APIError(400, text, code="invalid_http"))

    def _wait_for_headers(self) -> None:
        def too_slow() -> None:
            self._header_timer = None
            if not self.transport.is_closing() and self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                self._refuse(APIError(408, "The request did not arrive in time.", code="request_timeout"))

        self._header_timer = self.loop.call_later(self.header_seconds, too_slow)

    def _stop_waiting(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _refuse(self, error: APIError) -> None:
        """Answer without the app, which never saw the request, and close."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.write(_whole_answer(error))
        self._end(linger=True)

    def _close(self) -> None:
        """uvicorn has done with the connection: an answer is whole, broken off, or none was asked for."""
        if self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete:
            self._stop_waiting()
            # There is no whole answer to wait for.
            self.transport.reset()
            return
        unread = self.conn.their_state in (h11.SEND_BODY, h11.ERROR) or bool(self.conn.trailing_data[0])
        self._end(linger=unread)

    def _end(self, *, linger: bool) -> None:
        """Close after what was written. `linger`: the peer may still be sending. Closing with unread data would
        reset the connection, and with it the answer."""
        self._stop_waiting()
        self._unset_keepalive_if_required()
        if linger:
            self.transport.linger(self.linger_seconds)
        else:
            self.transport.inner.close()


class PatientTransport(asyncio.Transport):
    """A connection's transport that does not wait for a peer who neither reads nor ends.

    Its `close` is what the protocol makes of it; whatever waits to be sent is dropped, with the connection, where
    the peer does not read it in time.
    """

    def __init__(
        self,
        inner: asyncio.Transport,
        loop: asyncio.AbstractEventLoop,
        *,
        write_seconds: float,
        close: Callable[[], None],
    ) -> None:
        super().__init__()
        self.inner = inner
        self._loop = loop
        self._write_seconds = write_seconds
        self._on_close = close
        self._lingers = False
        self._written = 0
        self._write_timer: asyncio.TimerHandle | None = None
        self._end_timer: asyncio.TimerHandle | None = None
        if hasattr(inner, "max_size"):
            inner.max_size = READ_BYTES

    def get_extra_info(self, name: str, default: object = None) -> Any:
        return self.inner.get_extra_info(name, default)

    def is_closing(self) -> bool:
        return self._lingers or self.inner.is_closing()

    def pause_reading(self) -> None:
        self.inner.pause_reading()

    def resume_reading(self) -> None:
        self.inner.resume_reading()

    def write(self, data: bytes | bytearray | memoryview[Any]) -> None:
        if self._lingers:
            return
        self._written += len(data)
        self.inner.write(data)
        if self._write_timer is None and self.inner.get_write_buffer_size():
            self._watch()

    def close(self) -> None:
        if not self.is_closing():
            self._on_close()

    def abort(self) -> None:
        self.inner.abort()

    def reset(self) -> None:
        """End at once: the peer sees a reset, and the kernel keeps nothing of what was not read."""
        with contextlib.suppress(OSError):
            self.get_extra_info("socket").setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
            )
        self.inner.abort()

    def linger(self, seconds: float) -> None:
        """Say that nothing more comes, and give the peer `seconds` to read what was sent and to end."""
        self._lingers = True
        if self.inner.can_write_eof():
            self.inner.write_eof()
        self.inner.resume_reading()
        self._end_timer = self._loop.call_later(seconds, self._end, seconds)

    def lost(self) -> None:
        """The connection is no more."""
        for timer in (self._write_timer, self._end_timer):
            if timer is not None:
                timer.cancel()

    def _end(self, seconds: float) -> None:
        # The peer still reads: the write timer says for how long.
        if self.inner.get_write_buffer_size():
            self._end_timer = self._loop.call_later(seconds, self._end, seconds)
        else:
            self.inner.abort()

    def _watch(self) -> None:
        read_before = self._written - self.inner.get_write_buffer_size()

        def check() -> None:
            self._write_timer = None
            waiting = self.inner.get_write_buffer_size()
            if waiting and self._written - waiting - read_before < LEAST_READ:
                self.reset()
            elif waiting:
                self._watch()

        self._write_timer = self._loop.call_later(self._write_seconds, check)


def _whole_answer(error: APIError) -> bytes:
    """A whole answer, after which the connection ends."""
    body = json.dumps(error.body()).encode()
    lines = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        "connection": "close",
        **{name.lower(): value for name, value in error.headers().items()},
    }
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    reason = http.HTTPStatus(error.status).phrase
    return f"HTTP/1.1 {error.status} {reason}\r\n{head}\r\n".encode() + body


def connections_allowed() -> int:
    """How many connections the limit on open files leaves room for, beside the files and what is being accepted."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST_CONNECTIONS if soft == resource.RLIM_INFINITY else max(8, soft * 3 // 4 - 64)


_last_said: dict[str, float] = {}


def say_rarely(subject: str, line: str) -> None:
    """Print `line` on standard error unless something was said of `subject` in the last minute."""
    now = time.monotonic()
    if now - _last_said.get(subject, -SAID_EVERY) >= SAID_EVERY:
        _last_said[subject] = now
        print(line, file=sys.stderr, flush=True)
