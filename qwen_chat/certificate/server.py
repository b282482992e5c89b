"""What a chat server lets be seen of the prompts that it makes: asked through whatever it offers.

In: an address, a key, conversations. Out: of each what was seen: the prompt's text (llama-server's /apply-template),
its tokens (/tokenize of a chat: ours, vLLM; of a text: llama-server), or their number alone (`usage`, every server).
Nothing is followed elsewhere, no answer is read beyond a bound, and every failure is one line.
"""

from __future__ import annotations

import json
import math
import threading
import time
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal
from urllib.parse import urlsplit

import requests

from qwen_chat.certificate.conversations import Example
from qwen_chat.conversation import Json, refuse_constant
from qwen_chat.errors import ChatError, printable
from qwen_chat.tools.client import new_session

MOST_ANSWER = 32 * 2**20  # bytes of an answer
CONNECT = 10.0  # seconds
Channel = Literal["template", "tokens", "usage"]
# What tells servers apart: a path, a key of its answer, a name. For the report alone.
SIGNS = (
    ("/props", "chat_template", "llama-server"),
    ("/api/version", "version", "Ollama"),
    ("/get_server_info", "model_path", "SGLang"),
    ("/api/v0/models", "data", "LM Studio"),
    ("/version", "version", "vLLM"),
)


class ServerLost(ChatError):
    """A server that cannot be asked: not there, no chat service, a wrong key, or gone in the middle. Status 2."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What was seen of one prompt: its text, its tokens, their number; or why the server refused it."""

    text: str | None = None
    ids: tuple[int, ...] | None = None
    count: int | None = None
    refused: str | None = None


@dataclass(frozen=True, slots=True)
class ChatReply:
    """One answer of a chat: the message, why it ended, tokens with log-probabilities (None: not told), tokens of the
    prompt and of the reply (None: not told)."""

    message: Json
    finish: str | None
    tokens: tuple[str, ...] | None
    logprobs: tuple[float, ...] | None
    prompt_tokens: int | None
    completion_tokens: int | None


class Server:
    """One server and one of its models.

    url: with or without a trailing /v1. `channel`: how prompts are seen; known once `open` has been called. timeout:
    seconds that one answer may take, from the first byte asked to the last one answered.
    """

    def __init__(self, url: str, *, model: str | None = None, key: str | None = None, timeout: float = 300.0):
        self.url = url.rstrip("/").removesuffix("/v1")
        if not _is_address(self.url):
            raise ServerLost(f"--url {printable(url)}: expected an address such as http://127.0.0.1:8000")
        self.model, self.software = model or "", ""
        self.channel: Channel = "usage"
        self._timeout = timeout
        self._session = new_session(self.url, key)

    def open(self, example: Example) -> None:
        """Find the model, what serves it, and how prompts are seen. Raises ServerLost."""
        status, listed = self._ask("GET", "/v1/models")
        known = listed.get("data") if status == 200 else None
        if status in (401, 403):
            why = "it wants another key" if self._session.auth else "it wants a key"
            raise ServerLost(f"{self.url} answered {status}: {why}; give it with --api_key or API_KEY")
        if not isinstance(known, list) and self.model:
            known = []  # transformers serve cannot list what it loads from a folder
        if not isinstance(known, list):
            if 300 <= status < 400:
                raise ServerLost(
                    f"{self.url}/v1/models {listed['error']}; give the server's own address with --url"
                )
            raise ServerLost(
                f"{self.url}/v1/models answered {status} and no list of models; is it a chat service?"
            )
        cards = [card for card in known if isinstance(card, dict) and "id" in card]
        if not self.model and not cards:
            raise ServerLost(f"{self.url} lists no model; give its name with --model")
        self.model = self.model or str(cards[0]["id"])
        owners = {str(card.get("owned_by")) for card in cards}
        self.software = "qwen_chat" if "qwen_chat" in owners else "a chat service"
        for path, sign, name in SIGNS if self.software != "qwen_chat" else ():
            status, answer = self._ask("GET", path)
            if status == 200 and sign in answer:
                self.software = name
                break
        channels: tuple[Channel, ...] = ("template", "tokens")
        for self.channel in channels:
            found = self.prompt(example)
            if found.ids:
                return
        self.channel = "usage"
        found = self.prompt(example)
        if found.count is None and found.refused is not None:
            raise ServerLost(
                f"{self.url} answers no chat of the model {self.model!r}: {found.refused}; name another with --model"
            )

    def prompt(self, example: Example) -> Seen:
        """What is seen of one conversation's prompt. Raises ServerLost."""
        if self.channel == "usage":
            return self.counted(example)
        body = self._body(example)
        if self.channel == "tokens":
            status, answer = self._ask("POST", "/tokenize", body)
            ids = _ids(answer.get("tokens"))
            return (
                Seen(ids=ids, count=len(ids))
                if status == 200 and ids
                else Seen(refused=refusal_text(status, answer))
            )
        status, answer = self._ask("POST", "/apply-template", body)
        text = answer.get("prompt")
        if status != 200 or not isinstance(text, str):
            return Seen(refused=refusal_text(status, answer))
        status, answer = self._ask(
            "POST", "/tokenize", {"content": text, "add_special": True, "parse_special": True}
        )
        ids = _ids(answer.get("tokens"))
        return Seen(text, ids or None, len(ids) or None)

    def counted(self, example: Example) -> Seen:
        """How many tokens the prompt of a chat had that was answered. Raises ServerLost."""
        found = self.chat(example, max_tokens=1)
        return Seen(refused=found) if isinstance(found, str) else Seen(count=found.prompt_tokens)

    def chat(self, example: Example, **more: Any) -> ChatReply | str:
        """The likeliest answer; or why the server refused to give one. Raises ServerLost."""
        status, answer = self._ask(
            "POST", "/v1/chat/completions", {**self._body(example), "temperature": 0, **more}
        )
        try:
            choice, usage = answer["choices"][0], answer.get("usage") or {}
            told = (choice.get("logprobs") or {}).get("content") or None
            return ChatReply(
                message=dict(choice["message"]),
                finish=choice.get("finish_reason"),
                tokens=None if told is None else tuple(str(one["token"]) for one in told),
                logprobs=None if told is None else tuple(_logprob(one["logprob"]) for one in told),
                prompt_tokens=_count(usage.get("prompt_tokens")),
                completion_tokens=_count(usage.get("completion_tokens")),
            )
        except (KeyError, IndexError, TypeError, ValueError, AttributeError):
            return refusal_text(status, answer)

    def _body(self, example: Example) -> Json:
        body: Json = {"model": self.model, "messages": list(example.messages)}
        body |= {"tools": list(example.tools)} if example.tools else {}
        return body | ({"chat_template_kwargs": example.variables} if example.variables else {})

    def _send(self, method: str, url: str, body: Json | None) -> requests.Response:
        """A connection that the server has closed since its last answer is opened once again."""
        asking = partial(self._session.request, method, url, json=body, stream=True, allow_redirects=False)
        timeout = (CONNECT, self._timeout)
        try:
            return asking(timeout=timeout)
        except requests.ConnectionError:
            return asking(timeout=timeout)

    def _ask(self, method: str, path: str, body: Json | None = None) -> tuple[int, Json]:
        """(status, the answer's JSON object; empty where it is none). Raises ServerLost.

        In a thread of its own: a socket's timeout begins anew with every byte, and so a server that sends one now and
        then would never be given up.
        """
        url, done = self.url + path, list[tuple[int, bytes] | Exception]()

        def ask() -> None:
            try:
                done.append(self._answer(method, url, body))
            except Exception as error:
                done.append(error)

        thread = threading.Thread(target=ask, name="ask", daemon=True)
        thread.start()
        thread.join(self._timeout)
        found = done[0] if done else requests.Timeout()
        # Some bad addresses requests lets through, and fails at with a ValueError.
        if isinstance(found, requests.RequestException | ValueError):
            why, cure = _why(found)
            raise ServerLost(f"{url} cannot be asked ({why}); {cure}") from None
        if isinstance(found, Exception):
            raise found
        status, data = found
        return status, _json_object(data)

    def _answer(self, method: str, url: str, body: Json | None) -> tuple[int, bytes]:
        """The status and all bytes of an answer; a redirect is told in them, and not followed."""
        began = time.monotonic()
        with self._send(method, url, body) as answer:
            if answer.is_redirect:
                target = printable(answer.headers.get("Location", ""), 200)
                return answer.status_code, json.dumps({"error": f"redirects to {target}"}).encode()
            parts, size = [], 0
            for part in answer.iter_content(65536):
                parts.append(part)
                size += len(part)
                if size > MOST_ANSWER:
                    raise ServerLost(
                        f"{url} answers with more than {MOST_ANSWER >> 20} MiB; it was not read on: is --url a chat"
                        " service's address?"
                    )
                if time.monotonic() - began > self._timeout:
                    raise requests.Timeout
            return answer.status_code, b"".join(parts)


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises for one that is no number
    except ValueError:
        return False
    bare = not parts.query and not parts.fragment and url.isprintable() and " " not in url
    return parts.scheme in ("http", "https") and bool(parts.hostname) and bare


def _why(error: Exception) -> tuple[str, str]:
    """Why a server could not be asked, and what to do about it."""
    if isinstance(error, requests.Timeout):
        return "no answer in time", "is the server running, and --url its address?"
    if isinstance(error, requests.exceptions.ProxyError):
        return "the proxy does not let it through", "see HTTP_PROXY, or name the server's host in NO_PROXY"
    if isinstance(error, requests.exceptions.SSLError):
        return "no trusted https", "give an http address, or the certificate's file in REQUESTS_CA_BUNDLE"
    return type(error).__name__, "is the server running, and --url its address?"


def _json_object(data: bytes) -> Json:
    """The JSON object in an answer, of texts that can be printed; empty where it is none."""
    try:
        text = data.decode("utf-8-sig", "replace")
        value = json.loads(text, parse_constant=refuse_constant)
        if "\\ud" in text.lower():  # half of a pair of surrogates can be written in JSON, and nowhere else
            value = json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _logprob(value: object) -> float:
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no finite number")
    return float(value)


def _count(value: object) -> int | None:
    return value if type(value) is int and value >= 0 else None


def _ids(value: object) -> tuple[int, ...]:
    given = value if isinstance(value, list) else []
    return tuple(given) if all(type(one) is int and one >= 0 for one in given) else ()


def refusal_text(status: int, answer: Json) -> str:
    error: object = (
        answer.get("error") or answer.get("message") or answer.get("detail") or "no answer of that kind"
    )
    text = error.get("message") if isinstance(error, dict) else error
    return f"status {status}: {printable(' '.join(str(text).split()), 200)}"
