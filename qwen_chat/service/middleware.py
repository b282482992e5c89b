"""What a request passes before anything is done for it, and the line that it leaves.

In: ASGI messages. Out: a body within its limits, from somebody who may ask; one record a request.
`Journal` is the outermost layer: whatever happens inside, client and log are told, each in its own shape.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import re
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Collection, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic_core import from_json
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qwen_chat.service.errors import APIError, echo, not_json, shutting_down

LEFT = 499  # nginx's status for a client that closed the connection before it was answered
LOOPBACK_HOSTS = frozenset({"localhost", "127.0.0.1", "[::1]"})
OPEN_PATHS = frozenset({"/health", "/ready", "/openapi.json"})  # nothing of anybody's is told there
UNLOGGED_PATHS = frozenset({"/health", "/ready", "/metrics"})  # asked every few seconds by machines
LONGEST_PATH = 200  # characters of a path in the log
MOST_HEADERS = 100
HEADER_BYTES = 32 * 1024  # of all headers together
MOST_KEYS = 2048  # of one JSON object: each unknown one costs an error to find and to describe
MOST_PARTS = 2**16  # lists and objects in one body
DISCARD_BYTES = 64 * 2**20  # of a body that is too large, read so that the client gets to read its answer
DISCARD_SECONDS = 5.0


@dataclass(slots=True)
class Record:
    """What is known of one request; the handler fills it in as it learns."""

    id: str
    path: str
    began: float = field(default_factory=time.monotonic)
    model: str | None = None
    stream: bool | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    first_token: float | None = None  # seconds since `began`
    finish_reason: str | None = None
    error: str | None = None
    user: str | None = None
    prompt: object = None
    reply: str | None = None
    ignored: Sequence[str] = ()  # hints of the request that change no answer, by name
    admitted: bool = False  # it passed the gate, with a key where there are keys

    def line(self, status: int) -> dict[str, object]:
        """The log's line. Times in milliseconds; fields that do not apply are left out."""
        now = time.time()
        line: dict[str, object] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1000):03d}Z",
            "id": self.id,
            "path": self.path,
            "status": status,
            "model": self.model,
            "stream": self.stream,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "completion_tokens": self.completion_tokens,
            "first_token_ms": None if self.first_token is None else round(self.first_token * 1000, 1),
            "ms": round((time.monotonic() - self.began) * 1000, 1),
            "finish_reason": self.finish_reason,
            "error": self.error,
            "user": self.user,
            "ignored": list(self.ignored) or None,
            "prompt": self.prompt,
            "reply": self.reply,
        }
        return {key: value for key, value in line.items() if value is not None}


class Journal:
    """Gives each request an id and a Record, turns what is raised into an answer, and writes the line."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        write: Callable[[dict[str, object], bool], None],
        count: Callable[[str, int], None],
        paths: Collection[str],
    ) -> None:
        """`write` takes the log's line and whether its request was admitted, `count` (endpoint, status);
        `paths` are those counted by name."""
        self.app = app
        self.write = write
        self.count = count
        self.paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"].rstrip("/") or "/"
        record = Record(id=f"req-{uuid.uuid4().hex}", path=path[:LONGEST_PATH])
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
        except asyncio.CancelledError:  # by the server, which waited long enough: it ends here
            await self._fail(shutting_down(), record, answer, scope, receive)
        except Exception as error:
            await self._fail(error, record, answer, scope, receive)
        finally:
            status = answer.status or LEFT
            self.count(record.path if record.path in self.paths else "other", status)
            if record.path not in UNLOGGED_PATHS:
                self.write(record.line(status), record.admitted)

    async def _fail(
        self, error: Exception, record: Record, answer: _Sender, scope: Scope, receive: Receive
    ) -> None:
        """A fault of ours: told in full on standard error, and to the client without any detail."""
        refusal = error if isinstance(error, APIError) else APIError(500, "The server had an error.")
        if not isinstance(error, APIError):
            print(f"{record.id}: {''.join(traceback.format_exception(error))}", file=sys.stderr, flush=True)
        record.error = refusal.code or refusal.type
        if answer.status is None:
            await refusal_response(refusal)(scope, receive, answer)


class _Sender:
    """`send` that remembers the status and adds the request's id, and the names of what did nothing."""

    def __init__(self, send: Send, record: Record) -> None:
        self.send = send
        self.record = record
        self.status: int | None = None

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
        self.digests = tuple(_digest(key) for key in api_keys)
        self.hosts = hosts
        self.origins = origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            self._check(scope)
            scope["state"]["record"].admitted = not self.digests or scope["path"] not in OPEN_PATHS
        await self.app(scope, receive, send)

    def _check(self, scope: MutableMapping[str, Any]) -> None:
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        if (
            len(headers) > MOST_HEADERS
            or sum(len(name) + len(value) for name, value in headers) > HEADER_BYTES
        ):
            text = f"Too many headers: at most {MOST_HEADERS} of {HEADER_BYTES} bytes together."
            raise APIError(431, text, code="headers_too_large")
        named = dict(headers)
        if self.hosts is not None and _host(named.get(b"host", b"")) not in self.hosts:
            # Stops a page in the user's own browser whose name was made to point here (DNS rebinding).
            raise APIError(403, "This service is only for its own machine.", code="host_not_allowed")
        if scope["path"] not in OPEN_PATHS:
            self._check_origin(named)
            if self.digests:
                self._check_key(named.get(b"authorization", b""))

    def _check_origin(self, named: Mapping[bytes, bytes]) -> None:
        """A page elsewhere must not make a user's browser ask: what it sends needs no leave of ours to arrive."""
        origin, site = named.get(b"origin"), named.get(b"sec-fetch-site", b"")
        if origin is None and site != b"cross-site":
            return  # no browser, or a page of our own
        text = (origin or b"").decode("latin-1")
        host = named.get(b"host", b"").decode("latin-1")
        ours = site == b"same-origin" or (host != "" and text.partition("://")[2] == host)
        if not ours and text not in self.origins and "*" not in self.origins:
            raise APIError(
                403,
                f"Web pages of '{echo(text or 'another site')}' may not ask here; start the service with "
                "--cors_origin to let them.",
                code="origin_not_allowed",
            )

    def _check_key(self, header: bytes) -> None:
        scheme, _, key = header.partition(b" ")
        if scheme.lower() != b"bearer" or not key.strip():
            raise APIError(
                401,
                "You didn't provide an API key. Send it as 'Authorization: Bearer YOUR_KEY'.",
                code="missing_api_key",
            )
        given = hashlib.sha256(key.strip()).digest()
        # Every key is compared, each in constant time: how long it takes tells nothing of any of them.
        if sum(hmac.compare_digest(given, digest) for digest in self.digests) == 0:
            raise APIError(401, "Incorrect API key provided.", code="invalid_api_key")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _host(header: bytes) -> str:
    """The name of a Host header, without the port."""
    return re.sub(r":\d*$", "", header.decode("latin-1")).lower()


def refusal_response(refusal: APIError) -> JSONResponse:
    """The answer that tells a refusal."""
    return JSONResponse(refusal.body(), refusal.status, refusal.headers())


async def read_json(request: Request, *, most_bytes: int, seconds: float) -> object:
    """The body as JSON values; raise APIError 400, 408, 413 or 415.

    Numbers must be finite, text valid UTF-8 without lone surrogates, nesting at most 200 deep.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise APIError(
            415,
            "Unsupported media type; send 'Content-Type: application/json'.",
            code="unsupported_media_type",
        )
    body = await read_body(request, most_bytes=most_bytes, seconds=seconds)
    try:
        if len(body) > 2**16:  # half a millisecond a megabyte and more: not on the event loop
            return await asyncio.to_thread(_parse, body)
        return _parse(body)
    except ValueError as error:
        raise not_json(str(error)) from None


def _parse(body: bytes) -> object:
    """JSON of at most MOST_PARTS lists and objects, none of the latter larger than MOST_KEYS."""
    value = from_json(body, allow_inf_nan=False)
    waiting, parts = [value], 0
    while waiting:
        one = waiting.pop()
        parts += 1
        large = isinstance(one, dict) and len(one) > MOST_KEYS
        if large or parts > MOST_PARTS:
            bound = (
                f"an object has more than {MOST_KEYS} keys" if large else f"it has over {MOST_PARTS} parts"
            )
            raise APIError(400, f"The body of your request is too large: {bound}.", code="body_too_complex")
        inside = one.values() if isinstance(one, dict) else one if isinstance(one, list) else ()
        waiting += [child for child in inside if isinstance(child, (dict, list))]
    return value


async def read_body(request: Request, *, most_bytes: int, seconds: float) -> bytes:
    """The raw body, at most `most_bytes` of it and within `seconds`."""
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > most_bytes:
        if "expect" not in request.headers:  # else the client waits for leave to send, and gets none
            await _discard(request)
        raise _too_large(most_bytes)
    body, more = bytearray(), True
    try:
        async with asyncio.timeout(seconds):
            while more and len(body) <= most_bytes:
                piece, more = await _receive(request)
                body += piece
    except TimeoutError:
        raise APIError(408, "The request did not arrive in time.", code="request_timeout") from None
    if len(body) > most_bytes:
        if more:
            await _discard(request)
        raise _too_large(most_bytes)
    return bytes(body)


async def _receive(request: Request) -> tuple[bytes, bool]:
    """The next piece of the body, and whether more comes."""
    message = await request.receive()
    if message["type"] != "http.request":
        raise ClientDisconnect
    return message.get("body", b""), message.get("more_body", False)


def _too_large(most_bytes: int) -> APIError:
    return APIError(
        413,
        f"The request body is larger than {most_bytes} bytes, the most allowed.",
        code="request_too_large",
    )


async def _discard(request: Request) -> None:
    """Read what still comes. Closing with unread data resets the connection before the answer is read."""
    size, more = 0, True
    with contextlib.suppress(TimeoutError, ClientDisconnect):
        async with asyncio.timeout(DISCARD_SECONDS):
            while more and size < DISCARD_BYTES:
                piece, more = await _receive(request)
                size += len(piece)
