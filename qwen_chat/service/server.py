"""uvicorn, with what it leaves open closed: connections that never end, ports in use, signals.

In: an ASGI app, an address. Out: a listening server that drains on SIGTERM and answers broken HTTP in JSON.

Every state of a connection ends by itself: headers, silence between requests, an answer that is not read, the
rest of a request that was answered before it was read. Bodies have their limit in gate.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import http
import ipaddress
import json
import resource
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Generator
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from qwen_chat.errors import OptionError
from qwen_chat.service.errors import APIError

# Seconds from the connection, or the last answer's first new byte, to the end of the headers.
HEADER_SECONDS = 10.0
KEEP_ALIVE_SECONDS = 30
# Seconds that a peer may go on sending after the last answer.
LINGER_SECONDS = 2.0
# Bytes of it that are read (and forgotten), so that the peer gets to read its answer.
LINGER_BYTES = 16 * 2**20
# Seconds in which a peer must read LEAST_READ bytes of what waits for it, or all of it.
WRITE_SECONDS = 60.0
LEAST_READ = 16 * 1024
# What the kernel keeps for a peer; left alone it keeps megabytes, and we see no lag.
UNREAD_BYTES = 256 * 1024
# Seconds from SIGTERM until what still runs is cut off.
DRAIN_SECONDS = 30
# Connections that the kernel keeps until they are accepted.
BACKLOG = 512
# How many of them one turn of the event loop takes; asyncio would take BACKLOG.
ACCEPTED_AT_ONCE = 16
# Beyond middleware.py's limit, which has a status of its own.
READ_HEADER_BYTES = 72 * 1024
# Each line costs 10 us and more to parse.
READ_HEADER_LINES = 1000
# Read at once; 256 KB (asyncio's choice) of one-byte chunks hold up the event loop for half a second.
READ_BYTES = 4096
# Open at once; one peer may hold half of them.
MOST_CONNECTIONS = 1000
# Seconds between two lines about what goes on all the time.
SAID_EVERY = 60.0

REQUEST_LINE_HELP = "The request is not valid HTTP/1.1"


class PatientProtocol(H11Protocol):
    """HTTP/1.1 that waits for nobody for ever, and whose own refusals are JSON."""

    header_seconds = HEADER_SECONDS
    linger_seconds = LINGER_SECONDS
    write_seconds = WRITE_SECONDS
    most_connections = MOST_CONNECTIONS
    transport: Line
    _header_timer: asyncio.TimerHandle | None = None
    # Lines so far of headers that are not whole yet.
    _header_lines = 0
    # Bytes that came after the last answer.
    _forgotten = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        line = Line(transport, self.loop, write_seconds=self.write_seconds, close=self._close)
        super().connection_made(line)
        if self._is_one_too_many():
            say_rarely(
                "too many connections", f"over {len(self.connections) - 1} connections: more are refused"
            )
            line.write(
                _refusal_bytes(APIError(503, "Too many connections.", code="overloaded", retry_after=1))
            )
            line.inner.close()
            return
        self._wait_for_headers()

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
        self._refuse(
            APIError(400, f"{REQUEST_LINE_HELP}, or its headers are too large.", code="invalid_http")
        )

    def _is_one_too_many(self) -> bool:
        most = min(self.most_connections, connections_allowed())
        if len(self.connections) > most:
            return True
        peer = self.client[0] if self.client else ""
        if len(self.connections) * 2 <= most:
            return False
        theirs = [one for one in self.connections if (getattr(one, "client", None) or "")[:1] == (peer,)]
        return len(theirs) * 2 > most

    def _wait_for_headers(self) -> None:
        self._header_timer = self.loop.call_later(self.header_seconds, self._too_slow)

    def _stop_waiting(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _too_slow(self) -> None:
        self._header_timer = None
        if not self.transport.is_closing() and self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self._refuse(APIError(408, "The request did not arrive in time.", code="request_timeout"))

    def _refuse(self, refusal: APIError) -> None:
        """Answer without the app, which never saw the request, and close."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.write(_refusal_bytes(refusal))
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


class Line(asyncio.Transport):
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
        # What the peer had read when the write timer was started.
        self._read_before = 0
        self._write_timer: asyncio.TimerHandle | None = None
        self._end_timer: asyncio.TimerHandle | None = None
        if hasattr(inner, "max_size"):
            inner.max_size = READ_BYTES

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self.inner.get_extra_info(name, default)

    def is_closing(self) -> bool:
        return self._lingers or self.inner.is_closing()

    def pause_reading(self) -> None:
        self.inner.pause_reading()

    def resume_reading(self) -> None:
        self.inner.resume_reading()

    def write(self, data: Any) -> None:
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
        self._read_before = self._written - self.inner.get_write_buffer_size()
        self._write_timer = self._loop.call_later(self._write_seconds, self._check_reader)

    def _check_reader(self) -> None:
        self._write_timer = None
        waiting = self.inner.get_write_buffer_size()
        if not waiting:
            return
        if self._written - waiting - self._read_before < LEAST_READ:
            self.reset()
        else:
            self._watch()


class Early:
    """Says `Connection: close` in an answer that is given before its request was read to the end.

    Nobody would read the rest, and the connection must not stay open for it. A request that gives its length in
    two ways is the last on its connection too (RFC 9112, 6.1).
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        named = dict(scope["headers"])
        chunked, length = b"transfer-encoding" in named, named.get(b"content-length", b"0")
        unread = chunked or int(length) > 0

        async def receive_watched() -> Message:
            nonlocal unread
            message = await receive()
            if message["type"] == "http.request" and not message.get("more_body", False):
                unread = False
            return message

        async def send_closing(message: Message) -> None:
            two_lengths = chunked and b"content-length" in named
            if message["type"] == "http.response.start" and (unread or two_lengths):
                headers = [pair for pair in message.get("headers", ()) if pair[0].lower() != b"connection"]
                message = {**message, "headers": [*headers, (b"connection", b"close")]}
            await send(message)

        await self.app(scope, receive_watched, send_closing)


class DrainingServer(uvicorn.Server):
    """A server whose process ends with status 0 after SIGTERM: what ran was answered, as was asked."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().set_exception_handler(_on_loop_error)
        await super().startup(sockets)
        for listener in sockets or ():
            # asyncio has one number for this and for ACCEPTED_AT_ONCE.
            listener.listen(BACKLOG)

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


def _refusal_bytes(refusal: APIError) -> bytes:
    """A whole answer, after which the connection ends."""
    body = json.dumps(refusal.body()).encode()
    lines = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        "connection": "close",
        **{name.lower(): value for name, value in refusal.headers().items()},
    }
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    reason = http.HTTPStatus(refusal.status).phrase
    return f"HTTP/1.1 {refusal.status} {reason}\r\n{head}\r\n".encode() + body


def connections_allowed() -> int:
    """How many connections the limit on open files leaves room for, beside the files and what is being accepted."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST_CONNECTIONS if soft == resource.RLIM_INFINITY else max(8, soft * 3 // 4 - 64)


def _on_loop_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """asyncio tells of every connection that it cannot accept; here one line a minute does."""
    error = context.get("exception")
    if isinstance(error, OSError) and error.errno in (
        errno.EMFILE,
        errno.ENFILE,
        errno.ENOBUFS,
        errno.ENOMEM,
    ):
        say_rarely("accept", f"cannot accept connections ({error.strerror}); more with: ulimit -n")
    else:
        loop.default_exception_handler(context)


_said: dict[str, float] = {}


def say_rarely(subject: str, line: str) -> None:
    """Print `line` on standard error unless something was said of `subject` in the last minute."""
    now = time.monotonic()
    if now - _said.get(subject, -SAID_EVERY) >= SAID_EVERY:
        _said[subject] = now
        print(line, file=sys.stderr, flush=True)


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
    # The listener's connections inherit it.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, UNREAD_BYTES)
    try:
        # Not listening yet: until the model is loaded, clients are refused, not kept.
        listener.bind(address)
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
        Early(app),
        http=PatientProtocol,
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_level="error",
        access_log=False,
        server_header=False,
        h11_max_incomplete_event_size=READ_HEADER_BYTES,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=drain_seconds,
        backlog=ACCEPTED_AT_ONCE,
    )
    return DrainingServer(config)


def serve(app: Any, listener: socket.socket, *, drain_seconds: int = DRAIN_SECONDS) -> None:
    """Serve `app` on `listener` until SIGTERM or Ctrl-C, then let what runs end, at most `drain_seconds`."""
    server = make_server(app, drain_seconds=drain_seconds)
    try:
        asyncio.run(server.serve(sockets=[listener]))
    # Somebody else began to listen while the model was being loaded.
    except OSError as error:
        raise OptionError(f"--port {listener.getsockname()[1]}: {_bind_problem(error)}") from None
