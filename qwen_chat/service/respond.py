"""From a running generation to bytes on the wire, plain or streamed; the work ends when nobody waits.

In: a `Work` (generations, how their answer is put together). Out: an ASGI response. The client's leaving is
watched all the time: whether its answer is streamed or not, its work stops within one token.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from qwen_chat.inference.events import Generation, TokenEvent
from qwen_chat.service.chunks import usage_of
from qwen_chat.service.errors import APIError, shutting_down
from qwen_chat.service.metrics import Metrics
from qwen_chat.service.prepare import Job
from qwen_chat.service.protocol import Answer, Usage
from qwen_chat.service.request_log import RequestRecord
from qwen_chat.service.settings import ServiceSettings

# Characters that JSON leaves as they are and at which Python's splitlines ends a line (httpx reads streams with it).
_LINE_ENDS = {0x85: "\\u0085", 0x2028: "\\u2028", 0x2029: "\\u2029"}
# Seconds to say why a stream breaks off, where the service ends.
_ENDING_SECONDS = 1.0
_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    # Without it nginx would keep the pieces together.
    (b"x-accel-buffering", b"no"),
]


@dataclass(eq=False, kw_only=True)
class Work:
    """The generations of one request, and what they have come to."""

    job: Job
    generations: Sequence[Generation]
    record: RequestRecord
    metrics: Metrics
    # Gives back the places in the queue; called once.
    release: Callable[[], None]
    log_reply: bool
    # Seconds between two pieces of a reply.
    pace: Callable[[], float]
    is_over: bool = field(default=False, init=False)
    _completion_tokens: int = field(default=0, init=False)
    # When the last token of each choice came.
    _last_token: dict[int, float] = field(default_factory=dict, init=False)
    _closed: bool = field(default=False, init=False)

    async def pieces(self) -> AsyncGenerator[list[Answer], None]:
        """Everything that a stream sends, what can go out together in one piece; `is_over` with the last. Nothing comes
        before the first token: until then all can fail."""
        assembly, opened, running = self.job.assembly, False, len(self.generations)
        async for choice, event in _merged(self.generations, self.pace):
            self._take(choice, event)
            piece = [] if opened else list(assembly.opening())
            opened = True
            piece += assembly.event(choice, event)
            if event.finish_reason is not None:
                running -= 1
            elif assembly.is_done(choice):
                self.generations[choice].cancel()
            self.is_over = running == 0
            if self.is_over and self.job.include_usage:
                piece.append(assembly.usage(self.usage()))
            if piece or self.is_over:
                yield piece

    async def whole(self) -> Answer:
        """The plain answer: the same pieces, folded."""
        async for _ in self.pieces():
            pass
        return self.job.assembly.whole(self.usage())

    def usage(self) -> Usage:
        """Tokens so far."""
        return usage_of(self.job.prompt_tokens, self._cached_tokens(), self._completion_tokens)

    def close(self) -> None:
        """Stop what still runs; give back the places; count."""
        if self._closed:
            return
        self._closed = True
        for generation in self.generations:
            generation.cancel()
        self.release()
        record, model = self.record, self.record.model or ""
        record.prompt_tokens = self.job.prompt_tokens
        record.cached_tokens = self._cached_tokens()
        record.completion_tokens = self._completion_tokens
        if self.log_reply:
            record.reply = self.job.assembly.text()
        self.metrics.prompt_tokens.labels(model).inc(self.job.prompt_tokens)
        self.metrics.cached_tokens.labels(model).inc(record.cached_tokens)
        self.metrics.generation_tokens.labels(model).inc(self._completion_tokens)
        self.metrics.whole.labels(model).observe(time.monotonic() - record.began)

    def _take(self, choice: int, event: TokenEvent) -> None:
        """Count what came; raise where it ends the whole answer with an error."""
        if event.finish_reason == "error":
            if event.fault == "request":
                raise APIError(400, f"Invalid schema: {event.error}.", code="invalid_value")
            raise APIError(500, "The server had an error while processing your request.", code="engine_error")
        if event.finish_reason == "cancelled" and not self.job.assembly.is_done(choice):
            raise shutting_down()
        if event.finish_reason == "deadline" and self._completion_tokens == 0 and not event.token_ids:
            text = "No place in the batch became free in time."
            raise APIError(503, text, code="overloaded", retry_after=10)
        now, model = time.monotonic(), self.record.model or ""
        if event.token_ids:
            if self.record.first_token is None:
                self.record.first_token = now - self.record.began
                self.metrics.first_token.labels(model).observe(self.record.first_token)
            if choice in self._last_token:
                seconds = (now - self._last_token[choice]) / len(event.token_ids)
                observe = self.metrics.per_token.labels(model).observe
                for _ in event.token_ids:
                    observe(seconds)
            self._last_token[choice] = now
            self._completion_tokens += len(event.token_ids)
        if event.finish_reason is not None:
            self.record.finish_reason = event.finish_reason
            self.metrics.finished.labels(model, event.finish_reason).inc()

    def _cached_tokens(self) -> int:
        """Each prompt counts once, as in `prompt_tokens`, however many choices it has."""
        choices = len(self.generations) // self.job.prompts
        cached = [generation.cached_tokens for generation in self.generations]
        return sum(max(cached[k : k + choices]) for k in range(0, len(cached), choices))


class Delivery(Response):
    """Sends a Work's answer while watching whether the client is still there."""

    def __init__(self, work: Work, settings: ServiceSettings) -> None:
        """A client that leaves one piece unread for `settings.write_seconds` counts as gone."""
        super().__init__()
        self._work = work
        self._settings = settings
        self._state: Literal["unsent", "streaming", "ended"] = "unsent"
        # When something was sent last, on the event loop's clock.
        self._sent = 0.0
        self._sending = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def until_left() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        write = self._stream(send) if self._work.job.stream else self._plain(scope, receive, send)
        writer = asyncio.ensure_future(write)
        watcher = asyncio.ensure_future(until_left())
        try:
            await asyncio.wait((writer, watcher), return_when=asyncio.FIRST_COMPLETED)
            if not writer.done():
                raise ClientDisconnect
            await writer
        except (ClientDisconnect, TimeoutError):
            self._work.record.finish_reason = "cancelled"
            raise ClientDisconnect from None
        # The service ends and has waited long enough.
        except asyncio.CancelledError:
            self._work.record.finish_reason = "cancelled"
            await _stop(writer)
            if self._state != "streaming":
                # Still time for a status, or nothing left to say.
                raise
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_ENDING_SECONDS):
                    await self._break_off(send, shutting_down())
        finally:
            self._work.close()
            await _stop(writer, watcher)

    async def _plain(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = await self._work.whole()
        body = Response(answer.json_text(), media_type="application/json")
        async with asyncio.timeout(self._settings.write_seconds):
            await body(scope, receive, send)

    async def _stream(self, send: Send) -> None:
        alive = asyncio.ensure_future(self._keep_alive(send))
        try:
            async with contextlib.aclosing(self._work.pieces()) as pieces:
                async for piece in pieces:
                    events = [_event(chunk.json_text()) for chunk in piece]
                    if self._work.is_over:
                        events.append(_event("[DONE]"))
                    await self._send(send, "".join(events))
        except APIError as error:
            if self._state == "unsent":
                # Still time for a status of its own.
                raise
            await self._break_off(send, error)
            return
        finally:
            await _stop(alive)
        await self._end(send)

    async def _keep_alive(self, send: Send) -> None:
        """A comment whenever nothing was sent for a while."""
        clock, quiet = asyncio.get_running_loop().time, self._settings.quiet_seconds
        self._sent = clock()
        while True:
            await asyncio.sleep(max(self._sent + quiet - clock(), 0))
            if clock() >= self._sent + quiet:
                await self._send(send, ": keep-alive\n\n")

    async def _break_off(self, send: Send, error: APIError) -> None:
        """The status is sent: what went wrong is the last event, and no [DONE] follows."""
        self._work.record.error = error.name
        await self._send(send, _event(json.dumps(error.body())))
        await self._end(send)

    async def _send(self, send: Send, text: str) -> None:
        self._sent = asyncio.get_running_loop().time()
        async with asyncio.timeout(self._settings.write_seconds), self._sending:
            if self._state == "unsent":
                self._state = "streaming"
                await send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
            await send({"type": "http.response.body", "body": text.encode(), "more_body": True})

    async def _end(self, send: Send) -> None:
        self._state = "ended"
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _event(data: str) -> str:
    return f"data: {data.translate(_LINE_ENDS)}\n\n"


async def _stop(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _merged(
    generations: Sequence[Generation], pace: Callable[[], float]
) -> AsyncIterator[tuple[int, TokenEvent]]:
    """The events of several generations in the order they happen; the first error ends all."""
    if len(generations) == 1:
        async for event in generations[0].paced(pace):
            yield 0, event
        return
    events: asyncio.Queue[tuple[int, TokenEvent | BaseException | None]] = asyncio.Queue()

    async def pump(choice: int, generation: Generation) -> None:
        try:
            async for event in generation.paced(pace):
                events.put_nowait((choice, event))
            events.put_nowait((choice, None))
        except Exception as error:
            events.put_nowait((choice, error))

    pumps = [asyncio.ensure_future(pump(k, generation)) for k, generation in enumerate(generations)]
    try:
        running = len(pumps)
        while running:
            choice, found = await events.get()
            if isinstance(found, BaseException):
                raise found
            if found is None:
                running -= 1
            else:
                yield choice, found
    finally:
        await _stop(*pumps)
