"""One request's way through the engine, as the one who asked sees it: events, or the whole completion.

In: `TokenEvent`s from the engine's thread. Out: the same to any thread or event loop; folded, a `Completion`.
A slow reader slows nobody: events wait here, no more of them than the request's tokens.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from qwen_chat.inference.sampling import GenerationRequest

FinishReason = Literal["stop", "length", "cancelled", "deadline", "error"]
# Whose fault an error is: a grammar that leads nowhere is the request's own.
Fault = Literal["request", "engine"]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's text, bytes and log probability; `top` the most likely ones in its place."""

    token: str
    raw: bytes
    logprob: float
    top: tuple[TokenLogprob, ...] = ()
    token_id: int | None = None


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """What one step added. `text` may be empty (held back); `finish_reason` is set on the last event only.

    `logprobs` are those of the tokens whose text begins to be shown by this event: they are held back with it,
    and fall with it where a stop string takes it.
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    # Both with finish_reason "error" only.
    error: str | None = None
    fault: Fault | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole reply: every event of a generation, folded."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompt, found in the prefix cache
    error: str | None = None
    fault: Fault | None = None


class Generation:
    """One request on its way: thread-safe. Iterate (plain or async) for events, or ask for its `result()`."""

    def __init__(self, request: GenerationRequest, wake: Callable[[], None]) -> None:
        self.request = request
        self.prompt_tokens = len(request.prompt_ids)
        self.cached_tokens = 0
        self.first_token_at: float | None = None  # time.monotonic()
        self.is_cancelled = False
        self._wake = wake
        self._events: deque[TokenEvent] = deque()
        self._ready = threading.Condition()
        self._waiter: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None
        self._pausing = False  # the waiter wants to hear of the end alone

    def cancel(self) -> None:
        """Stop before the next token. The events end with finish reason "cancelled"."""
        self.is_cancelled = True
        self._wake()

    def put(self, event: TokenEvent) -> None:
        """The engine's side: hand over an event."""
        put_all([(self, event)])

    def _append(self, event: TokenEvent) -> tuple[asyncio.AbstractEventLoop, asyncio.Event] | None:
        """Keep an event, wake a thread that waits for it; the loop and its event that wait as well."""
        with self._ready:
            self._events.append(event)
            self._ready.notify_all()
            return None if self._pausing and event.finish_reason is None else self._waiter

    def __iter__(self) -> Iterator[TokenEvent]:
        while True:
            with self._ready:
                while not self._events:
                    self._ready.wait()
                event = self._events.popleft()
            yield event
            if event.finish_reason is not None:
                return

    async def __aiter__(self) -> AsyncIterator[TokenEvent]:
        async for event in self.paced(lambda: 0.0):
            yield event

    async def paced(self, seconds: Callable[[], float]) -> AsyncIterator[TokenEvent]:
        """Events; the next at least `seconds()` after the last, with those that came meanwhile as one. The first
        and the end come at once. Whoever reads many rows on few cores so holds up the engine less."""
        arrived = asyncio.Event()
        with self._ready:
            self._waiter = (asyncio.get_running_loop(), arrived)
        try:
            while True:
                pause = seconds()
                with self._ready:
                    arrived.clear()
                    count = len(self._events) if pause else min(1, len(self._events))
                    events = [self._events.popleft() for _ in range(count)]
                    self._pausing = bool(pause and events)
                for event in _in_few(events):
                    yield event
                    if event.finish_reason is not None:
                        return
                if events and pause:
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(arrived.wait(), pause)
                elif not events:
                    await arrived.wait()
        finally:
            self._waiter = None

    def result(self) -> Completion:
        """Wait for the end; the whole reply."""
        return self.fold(list(self))

    async def aresult(self) -> Completion:
        """The same in an event loop."""
        return self.fold([event async for event in self])

    def fold(self, events: Sequence[TokenEvent]) -> Completion:
        """The completion that a complete list of events stands for."""
        whole = _as_one(events)
        return Completion(
            text=whole.text,
            token_ids=whole.token_ids,
            finish_reason=whole.finish_reason or "error",
            logprobs=whole.logprobs,
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
            error=whole.error,
            fault=whole.fault,
        )


def _as_one(events: Sequence[TokenEvent]) -> TokenEvent:
    """Events of one reply, in a row and at least one: what they show together; the end is the last one's."""
    return replace(
        events[-1],
        text="".join(event.text for event in events),
        token_ids=tuple(token for event in events for token in event.token_ids),
        logprobs=tuple(item for event in events for item in event.logprobs),
    )


def _in_few(events: Sequence[TokenEvent]) -> list[TokenEvent]:
    """The same as one event, but for an end that is no part of the reply."""
    kept = [event for event in events if event.finish_reason in (None, "stop", "length")]
    return [_as_one(kept), *events[len(kept) :]] if len(kept) > 1 else list(events)


def put_all(events: Sequence[tuple[Generation, TokenEvent]]) -> None:
    """Hand over the events of a step. Each event loop is woken once: woken for each, it would take turns with the
    engine's thread, which has the next step to compute."""
    waiting: dict[asyncio.AbstractEventLoop, list[tuple[Generation, asyncio.Event]]] = {}
    for generation, event in events:
        waiter = generation._append(event)
        if waiter is not None:
            waiting.setdefault(waiter[0], []).append((generation, waiter[1]))
    for loop, told in waiting.items():
        try:
            loop.call_soon_threadsafe(_set_all, [arrived for _, arrived in told])
        except RuntimeError:  # the readers' event loop is closed: nobody is there to be told
            for generation, _ in told:
                generation.is_cancelled = True


def _set_all(arrived: Sequence[asyncio.Event]) -> None:
    for one in arrived:
        one.set()
