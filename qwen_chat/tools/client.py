"""A small client of a chat service, with the shape of the openai package's.

In: a service's address and request bodies. Out: plain dicts, streamed chunks, or a ServiceError that names the address.
"""

from __future__ import annotations

import ipaddress
import json
import os
import types
from collections.abc import Iterator
from typing import Any, cast
from urllib.parse import urlsplit

import requests
from requests.auth import AuthBase

from qwen_chat import place
from qwen_chat.conversation import Json
from qwen_chat.errors import OptionError, ServiceError


def check_key(key: str) -> None:
    """OptionError where no header can carry it."""
    if not key.isascii() or not key.isprintable() or " " in key:
        raise OptionError(
            "--api_key: a key may hold printable ASCII without spaces; a header carries nothing else"
        )


class _Bearer(AuthBase):
    """A key. As a mere header it would give way to a password that .netrc has for the same host."""

    def __init__(self, key: str) -> None:
        self._key = key

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"Bearer {self._key}"
        return request


def new_session(url: str, key: str | None) -> requests.Session:
    """What asks the server at `url`, with its key. Raises OptionError for a key that cannot be sent."""
    session = requests.Session()
    if key:
        check_key(key)
        session.auth = _Bearer(key)
    if _is_here(url):  # the environment's proxy would look for it on its own machine
        session.trust_env = False
        session.verify = os.environ.get("REQUESTS_CA_BUNDLE") or True
    return session


def _is_here(url: str) -> bool:
    try:
        host = urlsplit(url).hostname or ""
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class HttpClient:
    """`.chat.completions.create(...)` over requests: plain dicts instead of the openai package's objects.

    url: with or without a trailing /v1.
    Raises ServiceError: the service cannot be reached, answered with an error, or broke off.
    """

    def __init__(self, url: str, *, api_key: str | None = None, timeout: float = 600.0) -> None:
        self._base = url.rstrip("/").removesuffix("/v1") + "/v1"
        self._timeout = timeout
        self._session = new_session(url, api_key)
        self.chat = types.SimpleNamespace(completions=self)

    def models(self) -> list[str]:
        """The models and adapters that the service lists; at least one."""
        listed = _json(self._send("GET", "/models")).get("data")
        if not listed:
            raise ServiceError(f"{self._base}/models lists no model")
        return [str(model["id"]) for model in listed]

    def first_model(self) -> str:
        """The first model that the service lists."""
        return self.models()[0]

    def create(self, *, stream: bool = False, **body: Any) -> Json | Iterator[Json]:
        """POST /chat/completions: the answer, or with stream=True its chunks."""
        answer = self._send("POST", "/chat/completions", {**body, "stream": stream})
        return self._chunks(answer) if stream else _json(answer)

    def _send(self, method: str, path: str, body: Json | None = None) -> requests.Response:
        url = self._base + path
        streams = bool(body and body["stream"])
        try:
            answer = self._session.request(method, url, json=body, stream=streams, timeout=self._timeout)
            if answer.status_code != 200:
                raise ServiceError(f"{url} answered {answer.status_code}: {_told(answer.text)}")
        except (requests.RequestException, ValueError) as error:  # requests lets some bad addresses through
            raise ServiceError(
                f"{url} cannot be reached ({type(error).__name__}); start the service with "
                f"{place.invocation('serve')}"
            ) from None
        return answer

    def _chunks(self, answer: requests.Response) -> Iterator[Json]:
        """Server-sent events -> chunks, until [DONE]; an error or a broken connection is a ServiceError."""
        try:
            with answer:
                for raw in answer.iter_lines():  # bytes: decoded text is also cut at U+2028 and U+0085
                    line = raw.decode("utf-8")
                    if not line.startswith("data:"):
                        continue
                    data = line.removeprefix("data:").strip()
                    if data == "[DONE]":
                        return
                    chunk = json.loads(data)
                    if "error" in chunk:
                        raise ServiceError(f"{answer.url} broke off: {_told(data)}")
                    yield chunk
        except (requests.RequestException, ValueError) as error:
            raise ServiceError(f"{answer.url} broke off ({type(error).__name__})") from None
        raise ServiceError(f"{answer.url} ended the stream without [DONE]; the answer may be incomplete")


def _json(answer: requests.Response) -> Json:
    try:
        return cast(Json, answer.json())
    except requests.exceptions.JSONDecodeError:
        raise ServiceError(f"{answer.url} did not answer with JSON; is it a chat service?") from None


def _told(text: str) -> str:
    """The message inside OpenAI's error object, or the text."""
    try:
        error = json.loads(text).get("error")
        return str(error.get("message") if isinstance(error, dict) else error or text)[:500]
    except (ValueError, AttributeError):
        return text[:200]
