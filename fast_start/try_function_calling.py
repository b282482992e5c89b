"""Function calling against a running service: a question, three real tools, every message shown in order.

    python fast_start/simple_try_create_service.py &
    python fast_start/try_function_calling.py "How is the weather in Beijing?"
    python fast_start/try_function_calling.py --stream --parallel "杭州现在几点？天气怎么样？"

In: a question, in English or Chinese. Out: the model's calls, what the tools gave back, its answer. The first
round is sent with tool_choice "required": the service lets the model write nothing but valid calls, so even a
small model that was never tuned for tools makes one. From the second round on the model is free, and what it
says is shown as it is (`--first auto`: free at once). `--parallel` allows several calls at once; a
model that was not tuned for that repeats itself.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout

from qwen_chat import errors
from qwen_chat.errors import OptionError
from qwen_chat.tools.client import HttpClient
from qwen_chat.tools.example_tools import EXAMPLE_TOOLS
from qwen_chat.tools.functions import tool_schema
from qwen_chat.tools.loop import Event, Limits, LoopResult, run_tools


def ask(options: argparse.Namespace, on_event: Callable[[Event], None]) -> LoopResult:
    """The loop: calls, results, answer."""
    client = HttpClient(options.url, api_key=options.api_key or os.environ.get("API_KEY"))
    messages = [{"role": "user", "content": options.question}]
    if options.system:
        messages.insert(0, {"role": "system", "content": options.system})
    return run_tools(
        client,
        messages,
        EXAMPLE_TOOLS,
        model=options.model or client.first_model(),
        tool_choice=options.first,
        parallel=options.parallel,
        stream=options.stream,
        limits=Limits(seconds=10, rounds=options.rounds),
        on_event=on_event,
        temperature=0,
        max_tokens=options.max_tokens,
    )


class Display:
    """Every message in order, one line a call and a result; streamed text as it comes."""

    def __init__(self) -> None:
        self._open = False  # a line of streamed text is not ended yet

    def __call__(self, event: Event) -> None:
        if event.kind == "text":
            print("" if self._open else "assistant: ", event.text, sep="", end="", flush=True)
            self._open = True
            return
        if event.kind == "result":
            print(f"tool      <- {event.text}")
        elif event.kind == "stopped":
            print(f"({event.text})")
        else:
            self._message(event.message or {})

    def _message(self, message: dict[str, Any]) -> None:
        calls = message.get("tool_calls", ())
        if self._open:
            print()
        elif message["content"] or not calls:
            print(f"assistant: {message['content'] or '(an empty answer)'}")
        self._open = False
        for call in calls:
            print(f"assistant -> {call['function']['name']}({call['function']['arguments']})")


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    default = "How is the weather in Beijing?"
    parser.add_argument("question", nargs="?", default=default, help=f"default: {default}")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="where the service listens")
    parser.add_argument("-m", "--model", help="model or adapter; the first that the service has without it")
    parser.add_argument("--stream", action="store_true", help="show the answer while it is written")
    parser.add_argument("--parallel", action="store_true", help="allow several calls at once")
    parser.add_argument("--first", choices=("required", "auto"), default="required", help="the first round")
    parser.add_argument("--system", help="a system prompt")
    parser.add_argument("--rounds", type=int, default=4, help="rounds of calls before an answer is asked for")
    parser.add_argument("--max_tokens", type=int, default=200, help="longest message in tokens")
    parser.add_argument("--api_key", help="the service's key; also API_KEY")
    parser.add_argument("--json", action="store_true", help="print the conversation as one JSON object")
    options = parser.parse_args()
    if not options.question.strip():
        raise OptionError("the question is empty; write one after the command")
    if options.rounds < 1 or options.max_tokens < 1:
        raise OptionError("--rounds and --max_tokens: expected a number above 0")
    return options


def main() -> int:
    options = read_options()
    if options.json:
        done = ask(options, lambda event: None)
        print(
            json.dumps(
                {**asdict(done), "tools": [tool_schema(f) for f in EXAMPLE_TOOLS.values()]},
                ensure_ascii=False,
            )
        )
        return 0
    print(f"user: {options.question}")
    ask(options, Display())
    return 0


if __name__ == "__main__":
    sys.exit(errors.run(main))
