"""Call the service with nothing but requests, plain or streamed.

    python fast_start/try_call_service.py --prompt "What is the capital of France?" --stream

In: the service's address and a question. Out: the answer on standard output, token counts on standard error.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout

from qwen_chat import arguments, errors
from qwen_chat.arguments import option
from qwen_chat.errors import ServiceError

SECONDS = (5.0, 600.0)  # to connect, and between two pieces of an answer


@dataclass(frozen=True)
class CallArguments:
    """Call"""

    url: str = option("http://127.0.0.1:8000", "where the service listens")
    prompt: str = option("What is the capital of France?", "what to ask", "-p")
    system: str | None = option(None, "a system prompt")
    stream: bool = option(False, "show the answer while it is written")
    model: str | None = option(None, "model or adapter; the first that the service has without it", "-m")
    max_tokens: int | None = option(None, "longest answer in tokens")
    temperature: float = option(0.0, "0: always the likeliest word; 1: as varied as the model is")
    api_key: str | None = option(None, "the service's key; also API_KEY")


def main() -> int:
    call = arguments.read(sys.argv[1:], [CallArguments], about=str(__doc__))[CallArguments]
    service = Service(call.url, call.api_key or os.environ.get("API_KEY"))
    body = {
        "model": call.model or service.first_model(),
        "messages": messages(call),
        "max_tokens": call.max_tokens,
        "temperature": call.temperature,
    }
    usage = stream(service, body) if call.stream else plain(service, body)
    print(f"{usage['prompt_tokens']} tokens in, {usage['completion_tokens']} out", file=sys.stderr)
    return 0


def messages(call: CallArguments) -> list[dict[str, str]]:
    system = [{"role": "system", "content": call.system}] if call.system else []
    return [*system, {"role": "user", "content": call.prompt}]


def plain(service: Service, body: dict[str, Any]) -> dict[str, int]:
    """Print the whole answer at once; returns the token counts."""
    answer = service.post("/v1/chat/completions", body).json()
    print(answer["choices"][0]["message"]["content"])
    return dict(answer["usage"])


def stream(service: Service, body: dict[str, Any]) -> dict[str, int]:
    """Print the answer as it comes; returns the token counts, which the last chunk brings."""
    usage: dict[str, int] = {}
    for chunk in service.events({**body, "stream": True, "stream_options": {"include_usage": True}}):
        for choice in chunk["choices"]:
            print(choice["delta"].get("content") or "", end="", flush=True)
        usage = chunk.get("usage") or usage
    print()
    return usage


class Service:
    """A service at an address. Whatever goes wrong is a ServiceError of one line."""

    def __init__(self, url: str, api_key: str | None) -> None:
        import requests

        self._url = url.rstrip("/").removesuffix("/v1")
        self._session = requests.Session()
        if api_key:
            self._session.headers["Authorization"] = f"Bearer {api_key}"

    def first_model(self) -> str:
        return str(self._ask("GET", "/v1/models").json()["data"][0]["id"])

    def post(self, path: str, body: dict[str, Any], *, stream: bool = False) -> Any:
        return self._ask("POST", path, json=body, stream=stream)

    def events(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The chunks of a streamed answer."""
        with self.post("/v1/chat/completions", body, stream=True) as answer:
            answer.encoding = "utf-8"
            for line in answer.iter_lines(decode_unicode=True):
                if line == "data: [DONE]":
                    return
                if line.startswith("data: "):
                    chunk = json.loads(line.removeprefix("data: "))
                    if "error" in chunk:
                        raise ServiceError(f"{self._url}: {chunk['error']['message']}")
                    yield chunk
        raise ServiceError(f"{self._url}: the answer broke off; look at the service's own output")

    def _ask(self, method: str, path: str, **options: Any) -> Any:
        import requests

        try:
            answer = self._session.request(method, self._url + path, timeout=SECONDS, **options)
        except requests.exceptions.InvalidURL:
            raise ServiceError(f"--url {self._url}: no address; expected http://HOST:PORT") from None
        except (requests.exceptions.MissingSchema, requests.exceptions.InvalidSchema):
            raise ServiceError(f"--url {self._url}: expected http://HOST:PORT") from None
        except requests.ConnectionError:
            raise ServiceError(
                f"{self._url}: no service answers there; "
                "start one: python fast_start/simple_try_create_service.py"
            ) from None
        except requests.Timeout:
            raise ServiceError(f"{self._url}: no answer in time; the service may be overloaded") from None
        if answer.status_code != 200:
            raise ServiceError(f"{self._url}: {answer.status_code}: {told(answer)}")
        return answer


def told(answer: Any) -> str:
    """What the service says went wrong."""
    try:
        return str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return "not an answer of an OpenAI-compatible service; check --url"


if __name__ == "__main__":
    sys.exit(errors.run(main))
