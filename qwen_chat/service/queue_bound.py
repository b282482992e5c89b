"""The gate before a vLLM server, which leaves most of its endpoints open. Loaded into it by `--middleware`.

In: the environment (names below). Out: what our own service would answer, in OpenAI's shape: 403 for a foreign
host, 401 without a key, 404 for a path that is not served, 429 with Retry-After beyond the bound.
Imports nothing but the standard library: it runs in vLLM's environment, not in ours. Our own service checks a
host and a key by the same functions (middleware.py).

    QWEN_CHAT_MAX_REQUESTS  how many requests may be in flight
    QWEN_CHAT_KEYS          SHA-256 (hex) of each key, separated by spaces; without any, nobody is asked for one
    QWEN_CHAT_HOSTS         names that the Host header may give, separated by spaces; empty allows all
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from typing import Any

ASGIMessage = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[ASGIMessage]]
Send = Callable[[ASGIMessage], Awaitable[None]]
App = Callable[[ASGIMessage, Receive, Send], Awaitable[None]]

# What a load balancer asks, which has no key.
KEYLESS = frozenset({"/health"})
# vLLM's own key guards only what begins with /v1, and beside inference it serves paths that stop the engine,
# change its weights or load files. What is not named here is not there.
SERVED = KEYLESS | {
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/models",
    "/tokenize",
    "/detokenize",
    "/metrics",
    "/version",
}
# Seconds until a client that was turned away may try again.
RETRY_AFTER = 2


class QueueBound:
    """Lets in who may ask for what is served; counts what runs and waits, and turns away what comes on top."""

    def __init__(self, app: App) -> None:
        self.app = app
        self.most = int(os.environ.get("QWEN_CHAT_MAX_REQUESTS", "96"))
        self.keys = [bytes.fromhex(key) for key in os.environ.get("QWEN_CHAT_KEYS", "").split()]
        self.hosts = frozenset(os.environ.get("QWEN_CHAT_HOSTS", "").lower().split())
        self.inside = 0

    async def __call__(self, scope: ASGIMessage, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        # A WebSocket: nothing of ours, and no key was ever asked there.
        if scope["type"] != "http":
            await receive()
            await send({"type": "websocket.close", "code": 1008})
            return
        problem = self._problem(scope)
        if problem is not None:
            status, code, message = problem
            kind = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
            sort = kind.get(status, "invalid_request_error")
            error = {"message": message, "type": sort, "param": None, "code": code}
            # The body was not read, so the connection ends with the answer.
            headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
            if status == 429:
                headers.append((b"retry-after", str(RETRY_AFTER).encode()))
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": json.dumps({"error": error}).encode()})
        elif scope["method"] != "POST":
            await self.app(scope, receive, send)
        else:
            self.inside += 1
            try:
                await self.app(scope, receive, send)
            finally:
                self.inside -= 1

    def _problem(self, scope: ASGIMessage) -> tuple[int, str, str] | None:
        """Status, code and message of what stands against a request, or None."""
        headers = dict(scope["headers"])
        path = scope["path"]
        root = scope.get("root_path", "")
        if root and path.startswith(f"{root}/"):
            path = path[len(root) :]
        if self.hosts and host_of(headers) not in self.hosts:
            return 403, "host_not_allowed", "This service is only for its own machine."
        # A browser asks beforehand (OPTIONS) without a key; nothing but its CORS answer comes of that.
        if self.keys and path not in KEYLESS and scope["method"] != "OPTIONS":
            wrong = key_problem(headers, self.keys)
            if wrong is not None:
                return 401, *wrong
        if path not in SERVED:
            return 404, "not_found", f"Nothing is served under {path[:100]!r}."
        if scope["method"] == "POST" and self.inside >= self.most:
            text = f"Too many requests: {self.most} of {self.most} places are taken. Try again later."
            return 429, "rate_limit_exceeded", text
        return None


def host_of(headers: Mapping[bytes, bytes]) -> str:
    """The name that the Host header gives, without its port."""
    return re.sub(r":\d*$", "", headers.get(b"host", b"").decode("latin-1")).lower()


def key_problem(headers: Mapping[bytes, bytes], digests: Sequence[bytes]) -> tuple[str, str] | None:
    """Code and message of what is wrong with a request's key; None where it is one of those with these SHA-256."""
    scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
    if scheme.lower() != b"bearer" or not key.strip():
        text = "You didn't provide an API key. Send it as 'Authorization: Bearer YOUR_KEY'."
        return "missing_api_key", text
    given = hashlib.sha256(key.strip()).digest()
    # Every key is compared, each in constant time: how long it takes tells nothing of any of them.
    if sum(hmac.compare_digest(given, digest) for digest in digests) == 0:
        return "invalid_api_key", "Incorrect API key provided."
    return None
