"""Threads that work beside the event loop, a few for each kind of work, and never hold up the end of the process.

In: functions without arguments. Out: a `Future` for each. `concurrent.futures` joins its threads when the
interpreter ends, so one that hangs keeps the process alive after SIGTERM; these are daemons.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from qwen_chat.service.errors import APIError
from qwen_chat.threads import ResultT


class Workers:
    """`threads` threads that take work in order; started with the first piece."""

    def __init__(self, name: str, threads: int) -> None:
        self.name = name
        self._threads = threads
        self._queue: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = queue.SimpleQueue()
        # When each thread began what it does now.
        self._since: dict[int, float] = {}
        self._lock = threading.Lock()
        self._started = False

    def submit(self, work: Callable[[], ResultT]) -> Future[ResultT]:
        """Queue a piece of work. Cancelling the future before a thread takes it leaves it undone."""
        future: Future[ResultT] = Future()
        with self._lock:
            if not self._started:
                self._started = True
                for k in range(self._threads):
                    threading.Thread(
                        target=self._work, args=(k,), name=f"{self.name}-{k}", daemon=True
                    ).start()
        self._queue.put((future, work))
        return future

    async def run(
        self, work: Callable[[], ResultT], *, seconds: float, undo: Callable[[ResultT], None] | None = None
    ) -> ResultT:
        """What a piece of work comes to, in an event loop; APIError 503 where it takes longer than `seconds`.

        `undo` gets what it comes to when nobody waits for it any more.
        """
        running = self.submit(work)

        def forget(done: Future[ResultT]) -> None:
            if undo is not None and not done.cancelled() and done.exception() is None:
                undo(done.result())

        try:
            return await asyncio.wait_for(asyncio.wrap_future(running), seconds)
        except BaseException as error:
            running.add_done_callback(forget)
            if not isinstance(error, TimeoutError):
                raise
            text = "Preparing the request took too long; try again."
            raise APIError(503, text, code="overloaded", retry_after=10) from None

    def stuck_seconds(self) -> float:
        """For how long no thread could take anything new: 0 where one is free."""
        began = list(self._since.copy().values())
        return time.monotonic() - max(began) if len(began) == self._threads else 0.0

    def _work(self, number: int) -> None:
        while True:
            future, work = self._queue.get()
            if not future.set_running_or_notify_cancel():
                continue
            self._since[number] = time.monotonic()
            result: Any = None
            failure: BaseException | None = None
            try:
                result = work()
            except BaseException as error:
                failure = error
            # Before anybody hears of it.
            del self._since[number]
            if failure is None:
                future.set_result(result)
            else:
                future.set_exception(failure)
            # What is waited for next must not keep them.
            del future, work, result, failure
