"""A bound on the requests in flight, for a server that has none. Loaded into vLLM by `--middleware`.

In: the environment variable QWEN_CHAT_MAX_REQUESTS. Out: 429 with Retry-After, in OpenAI's shape, beyond it.
Imports nothing but the standard library: it runs in vLLM's environment, not in ours.
"""

from __future__ import annotations

import json
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

BOUNDED = frozenset({"/v1/chat/completions", "/v1/completions"})
RETRY_AFTER = 2  # seconds


class QueueBound:
    """Counts what runs and waits; turns away what comes on top."""

    def __init__(self, app: App) -> None:
        self.app = app
        self.most = int(os.environ.get("QWEN_CHAT_MAX_REQUESTS", "96"))
        self.inside = 0

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] not in BOUNDED:
            await self.app(scope, receive, send)
            return
        if self.inside >= self.most:
            await _refuse(send, self.most)
            return
        self.inside += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self.inside -= 1


async def _refuse(send: Send, most: int) -> None:
    message = f"Too many requests: {most} of {most} places are taken. Try again later."
    error = {"message": message, "type": "rate_limit_error", "param": None, "code": "rate_limit_exceeded"}
    headers = [(b"content-type", b"application/json"), (b"retry-after", str(RETRY_AFTER).encode())]
    await send({"type": "http.response.start", "status": 429, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps({"error": error}).encode()})
