"""A request's body: read within its bounds, and read as what its endpoint takes.

In: a request, whose body nobody has read yet. Out: JSON values and the protocol's type of them.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TypeVar, cast

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.requests import ClientDisconnect, Request

from qwen_chat.conversation import Json
from qwen_chat.service.errors import APIError, from_validation, not_json
from qwen_chat.service.settings import ServiceSettings

# Keys of one JSON object: each unknown one costs an error to find and to describe.
MOST_KEYS = 2048
# Lists and objects in one body.
MOST_PARTS = 2**16
# What is read of a body that is too large, so that the client gets to read its answer.
DISCARD_BYTES = 64 * 2**20
DISCARD_SECONDS = 5.0

BodyT = TypeVar("BodyT", bound=BaseModel)


async def read_request(request: Request, kind: type[BodyT], settings: ServiceSettings) -> tuple[Json, BodyT]:
    """The body as it came, and as a valid request; raise APIError 400, 408, 413 or 415.

    Numbers must be finite, text valid UTF-8 without lone surrogates, nesting at most 200 deep.
    """
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media != "application/json":
        text = "Unsupported media type; send 'Content-Type: application/json'."
        raise APIError(415, text, code="unsupported_media_type")
    raw = await read_body(request, most_bytes=settings.max_body_bytes, seconds=settings.body_seconds)
    try:
        # Half a millisecond a megabyte and more: a large body does not hold up the event loop.
        body = await asyncio.to_thread(_parse, raw) if len(raw) > 2**16 else _parse(raw)
    except ValueError as error:
        raise not_json(str(error)) from None
    try:
        return cast(Json, body), kind.model_validate(body)
    except ValidationError as error:
        raise from_validation(error, body) from None


def _parse(body: bytes) -> object:
    """JSON of at most MOST_PARTS lists and objects, none of the latter larger than MOST_KEYS."""
    value = from_json(body, allow_inf_nan=False)
    waiting, parts = [value], 0
    while waiting:
        part = waiting.pop()
        parts += 1
        if isinstance(part, dict) and len(part) > MOST_KEYS:
            raise _too_complex(f"an object has more than {MOST_KEYS} keys")
        if parts > MOST_PARTS:
            raise _too_complex(f"it has over {MOST_PARTS} parts")
        inside = part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
        waiting += [child for child in inside if isinstance(child, dict | list)]
    return value


def _too_complex(bound: str) -> APIError:
    return APIError(400, f"The body of your request is too large: {bound}.", code="body_too_complex")


async def read_body(request: Request, *, most_bytes: int, seconds: float) -> bytes:
    """The raw body, at most `most_bytes` of it and within `seconds`."""
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > most_bytes:
        # A client that expects leave to send waits for it, and gets none.
        if "expect" not in request.headers:
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
    text = f"The request body is larger than {most_bytes} bytes, the most allowed."
    return APIError(413, text, code="request_too_large")


async def _discard(request: Request) -> None:
    """Read what still comes. Closing with unread data resets the connection before the answer is read."""
    size, more = 0, True
    with contextlib.suppress(TimeoutError, ClientDisconnect):
        async with asyncio.timeout(DISCARD_SECONDS):
            while more and size < DISCARD_BYTES:
                piece, more = await _receive(request)
                size += len(piece)
