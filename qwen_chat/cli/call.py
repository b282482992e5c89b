"""Call the service with requests, plain or streamed.

    qwen-chat call --prompt "What is the capital of France?" --stream

In: the service's address and a question. Out: the answer on standard output, token counts on standard error.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from qwen_chat.flags import parser
from qwen_chat.flags.parser import option
from qwen_chat.tools.client import HttpClient


@dataclass(frozen=True)
class CallArguments:
    """Call"""

    url: str = option("http://127.0.0.1:8000", "where the service listens")
    prompt: str = option("What is the capital of France?", "what to ask", "-p")
    system: str | None = option(None, "a system prompt, or a file with it", or_file=True)
    stream: bool = option(False, "show the answer while it is written")
    model: str | None = option(None, "model or adapter; the first that the service has without it", "-m")
    max_tokens: int | None = option(None, "longest answer in tokens")
    temperature: float = option(0.0, "0: always the likeliest word; 1: as varied as the model is")
    api_key: str | None = option(None, "the service's key; also API_KEY")


def main(argv: Sequence[str], about: str = str(__doc__)) -> int:
    call = parser.read(argv, [CallArguments], about=about)[CallArguments]
    client = HttpClient(call.url, api_key=call.api_key or os.environ.get("API_KEY"))
    system = [{"role": "system", "content": call.system}] if call.system else []
    request: dict[str, Any] = {
        "model": call.model or client.first_model(),
        "messages": [*system, {"role": "user", "content": call.prompt}],
        "max_tokens": call.max_tokens,
        "temperature": call.temperature,
    }
    if call.stream:
        options = {"include_usage": True}
        usage = print_answer(client.chat.completions.create(**request, stream=True, stream_options=options))
    else:
        answer = client.chat.completions.create(**request)
        print(answer["choices"][0]["message"]["content"])
        usage = answer.get("usage") or {}
    if usage:  # not every server counts
        print(
            f"{usage.get('prompt_tokens')} tokens in, {usage.get('completion_tokens')} out", file=sys.stderr
        )
    return 0


def print_answer(chunks: Iterable[dict[str, Any]]) -> dict[str, int]:
    """Print the answer as it comes; returns the token counts, which the last chunk brings."""
    usage: dict[str, int] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            print(choice["delta"].get("content") or "", end="", flush=True)
        usage = chunk.get("usage") or usage
    print()
    return usage
