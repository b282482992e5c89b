"""The two layers around the endpoints: who may ask, and the line that each request leaves.

In: ASGI messages. Out: only the requests of those who may ask go on; one record a request.
`Journal` is the outer layer: whatever happens inside, client and log are told, each in its own shape.
"""

from __future__ import annotations

import asyncio
import hashlib
import sys
import traceback
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qwen_chat.service.errors import APIError, echo, shutting_down
from qwen_chat.service.queue_bound import host_of, key_problem
from qwen_chat.service.request_log import RequestRecord

# What nginx logs for a client that closed the connection before it was answered.
LEFT = 499
LOOPBACK_HOSTS = frozenset({"localhost", "127.0.0.1", "[::1]"})
# Nothing of anybody's is told there.
OPEN_PATHS = frozenset({"/health", "/ready", "/openapi.json"})
# Asked every few seconds by machines.
UNLOGGED_PATHS = frozenset({"/health", "/ready", "/metrics"})
# Characters of a path in the log.
LONGEST_PATH = 200
MOST_HEADERS = 100
# Bytes of all headers together.
HEADER_BYTES = 32 * 1024


@dataclass(eq=False)
class Journal:
    """Gives each request an id and a RequestRecord, turns what is raised into an answer, and writes the line."""

    app: ASGIApp
    # The log's line, and whether its request was admitted.
    write: Callable[[dict[str, object], bool], None]
    # The endpoint and the status.
    count: Callable[[str, int], None]
    # Those that are counted by name.
    paths: Collection[str]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"].rstrip("/") or "/"
        record = RequestRecord(id=f"req-{uuid.uuid4().hex}", path=path[:LONGEST_PATH])
        # A client's HEAD is a GET whose body the server leaves out (RFC 9110, 9.3.2).
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        scope = {
            **scope,
            "path": path,
            "method": method,
            "state": {**scope.get("state", {}), "record": record},
        }
        answer = _Sender(send, record)
        try:
            await self.app(scope, receive, answer)
        except ClientDisconnect:
            answer.status = LEFT
        # By the server, which waited long enough: it ends here.
        except asyncio.CancelledError:
            await self._fail(shutting_down(), record, answer, scope, receive)
        except Exception as error:
            await self._fail(error, record, answer, scope, receive)
        finally:
            status = answer.status or LEFT
            self.count(record.path if record.path in self.paths else "other", status)
            if record.path not in UNLOGGED_PATHS:
                self.write(record.line(status), record.admitted)

    async def _fail(
        self, error: Exception, record: RequestRecord, answer: _Sender, scope: Scope, receive: Receive
    ) -> None:
        """A fault of ours: told in full on standard error, and to the client without any detail."""
        if not isinstance(error, APIError):
            print(f"{record.id}: {''.join(traceback.format_exception(error))}", file=sys.stderr, flush=True)
            error = APIError(500, "The server had an error.")
        record.error = error.name
        if answer.status is None:
            await error.response()(scope, receive, answer)


@dataclass(eq=False)
class _Sender:
    """`send` that remembers the status and adds the request's id, and the names of what did nothing."""

    send: Send
    record: RequestRecord
    status: int | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = [*message.get("headers", ()), (b"x-request-id", self.record.id.encode())]
            if self.record.ignored:
                headers.append((b"x-ignored", ", ".join(self.record.ignored).encode()))
            message = {**message, "headers": headers}
        await self.send(message)


class Gate:
    """Lets in whoever may ask: the right host and origin, one of the keys, no flood of headers."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        api_keys: Sequence[str],
        hosts: Collection[str] | None,
        origins: Collection[str] = (),
    ) -> None:
        """Without keys everybody may ask. `hosts`: names that the Host header may give; None allows all.
        `origins`: of web pages that may ask, beside the service's own; "*" allows all."""
        self.app = app
        self.digests = tuple(hashlib.sha256(key.encode()).digest() for key in api_keys)
        self.hosts = hosts
        self.origins = origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        size = sum(len(name) + len(value) for name, value in headers)
        if len(headers) > MOST_HEADERS or size > HEADER_BYTES:
            text = f"Too many headers: at most {MOST_HEADERS} of {HEADER_BYTES} bytes together."
            raise APIError(431, text, code="headers_too_large")
        named = dict(headers)
        if self.hosts is not None and host_of(named) not in self.hosts:
            # Stops a page in the user's own browser whose name was made to point here (DNS rebinding).
            raise APIError(403, "This service is only for its own machine.", code="host_not_allowed")
        if scope["path"] not in OPEN_PATHS:
            self._check_origin(named)
            problem = key_problem(named, self.digests) if self.digests else None
            if problem is not None:
                code, text = problem
                raise APIError(401, text, code=code)
        scope["state"]["record"].admitted = not self.digests or scope["path"] not in OPEN_PATHS
        await self.app(scope, receive, send)

    def _check_origin(self, named: Mapping[bytes, bytes]) -> None:
        """A page elsewhere must not make a user's browser ask: what it sends needs no leave of ours to arrive."""
        origin, site = named.get(b"origin"), named.get(b"sec-fetch-site", b"")
        if origin is None and site != b"cross-site":
            # No browser, or a page of our own.
            return
        text = (origin or b"").decode("latin-1")
        host = named.get(b"host", b"").decode("latin-1")
        ours = site == b"same-origin" or (host != "" and text.partition("://")[2] == host)
        if not ours and text not in self.origins and "*" not in self.origins:
            problem = (
                f"Web pages of '{echo(text or 'another site')}' may not ask here; start the service with "
                "--cors_origin to let them."
            )
            raise APIError(403, problem, code="origin_not_allowed")
