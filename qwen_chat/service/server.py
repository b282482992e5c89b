"""uvicorn, with what it leaves open closed: ports in use, signals, connections that never end (connections.py).

In: an ASGI app, an address. Out: a listening server that drains on SIGTERM.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import signal
import socket
import threading
from collections.abc import Generator
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qwen_chat.errors import OptionError
from qwen_chat.service.connections import PatientProtocol, say_rarely

KEEP_ALIVE_SECONDS = 30
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
_OUT_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


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


def _on_loop_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """asyncio tells of every connection that it cannot accept; here one line a minute does."""
    error = context.get("exception")
    if isinstance(error, OSError) and error.errno in _OUT_OF_RESOURCES:
        say_rarely("accept", f"cannot accept connections ({error.strerror}); more with: ulimit -n")
    else:
        loop.default_exception_handler(context)


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


def make_server(app: ASGIApp, *, drain_seconds: int = DRAIN_SECONDS) -> DrainingServer:
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


def serve(app: ASGIApp, listener: socket.socket, *, drain_seconds: int = DRAIN_SECONDS) -> None:
    """Serve `app` on `listener` until SIGTERM or Ctrl-C, then let what runs end, at most `drain_seconds`."""
    server = make_server(app, drain_seconds=drain_seconds)
    try:
        asyncio.run(server.serve(sockets=[listener]))
    # Somebody else began to listen while the model was being loaded.
    except OSError as error:
        raise OptionError(f"--port {listener.getsockname()[1]}: {_bind_problem(error)}") from None
