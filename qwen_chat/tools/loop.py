"""Call -> result -> answer: the loop around any OpenAI-shaped client, and Python functions as tools.

In: a client with `.chat.completions.create(...)` (the openai package's, or tools/client.py's), messages, and
a dict of Python functions. Out: `LoopResult`, the conversation with every call, result and answer in order.

Nothing that a tool or a model does ends the loop with an exception: bad arguments, unknown names, a tool that
raises, hangs or returns a megabyte become tool results which the model reads, and a model that calls for ever
is stopped after `Limits.rounds`. Wrong use by the programmer (a tool without a function, a schema that
nothing can satisfy) raises ToolError before the first request; a service that fails raises the client's own
error.

    from qwen_chat.tools.client import HttpClient
    from qwen_chat.tools.loop import run_tools

    def add(a: int, b: int) -> int:
        "Add two whole numbers."
        return a + b

    question = {"role": "user", "content": "2 + 3?"}
    print(run_tools(HttpClient("http://127.0.0.1:8000"), [question], {"add": add}).answer)
"""

from __future__ import annotations

import asyncio
import inspect
import json
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

from qwen_chat.conversation import Json, ToolCall
from qwen_chat.errors import ServiceError
from qwen_chat.tools.functions import tool_schema
from qwen_chat.tools.validate import call_problem, check_tools

ToolChoice = str | Json
Functions = Mapping[str, Callable[..., Any]]


class Client(Protocol):
    """What the loop needs of a client: `openai.OpenAI` has it, `HttpClient` too."""

    @property
    def chat(self) -> Any: ...


@dataclass(frozen=True, slots=True)
class Event:
    """What just happened, for display. `text` comes only when streaming; the whole message follows it."""

    kind: Literal["text", "message", "result", "stopped"]
    round: int  # from 1: the requests sent so far
    text: str = ""  # the piece, the result, or why it was stopped
    message: Json | None = None  # the assistant's or the tool's message


@dataclass(frozen=True, slots=True)
class LoopResult:
    """The whole conversation, the last answer, and how the loop ended."""

    messages: tuple[Json, ...]
    answer: str
    rounds: int  # requests that were sent
    stopped: str | None = None  # None, or why the loop had to end it

    @property
    def results(self) -> tuple[Json, ...]:
        """The tool messages, in order."""
        return tuple(message for message in self.messages if message["role"] == "tool")


@dataclass(frozen=True, slots=True)
class Limits:
    """How long a round's calls may take, how many characters of a result are kept, how many rounds of
    calls."""

    seconds: float = 30.0
    characters: int = 4000
    rounds: int = 8


def run_tools(
    client: Client,
    messages: Sequence[Json],
    functions: Functions,
    *,
    model: str = "default",
    tools: Sequence[Json] | None = None,
    tool_choice: ToolChoice | Callable[[int], ToolChoice] = "auto",
    parallel: bool = True,
    stream: bool = False,
    limits: Limits | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
    **request: Any,
) -> LoopResult:
    """Ask, run the calls, hand back the results, until the model answers in words.

    tools: schemas by hand (each needs a function of its name); default `tool_schema` of each function.
    tool_choice: one value for the first round and "auto" afterwards, or a function of the round (from 1).
    request: further fields of the request (temperature=0, max_tokens=200, ...).
    Raises ToolError for a schema that is invalid or cannot be satisfied, or that no function carries out.
    """
    limits = limits or Limits()
    offered = (
        [tool_schema(function, name) for name, function in functions.items()] if tools is None else tools
    )
    check_tools(offered, functions)
    conversation = [dict(message) for message in messages]
    for number in range(1, limits.rounds + 2):
        last = number == limits.rounds + 1
        body: Json = {"model": model, "messages": conversation, **request, "stream": stream}
        if offered:
            choice = "none" if last else _choice(tool_choice, number)
            body |= {"tools": list(offered), "tool_choice": choice, "parallel_tool_calls": parallel}
        message = _ask(client, body, number, on_event)
        calls = message.get("tool_calls") or []
        if last and calls:
            break
        conversation.append(_sendable(message))
        on_event(Event("message", number, message["content"], message))
        if not calls:
            return LoopResult(tuple(conversation), message["content"], number)
        for result in _carry_out(calls, functions, offered, limits):
            conversation.append(result)
            on_event(Event("result", number, result["content"], result))
    reason = f"stopped after {limits.rounds} rounds of tool calls"
    on_event(Event("stopped", limits.rounds + 1, reason))
    conversation.append({"role": "assistant", "content": message["content"] or f"({reason})"})
    return LoopResult(tuple(conversation), message["content"], limits.rounds + 1, reason)


def _choice(tool_choice: ToolChoice | Callable[[int], ToolChoice], number: int) -> ToolChoice:
    if callable(tool_choice):
        return tool_choice(number)
    return tool_choice if number == 1 else "auto"


# --------------------------------------------------------------------------- the model's turn


def _ask(client: Client, body: Json, number: int, on_event: Callable[[Event], None]) -> Json:
    """One request; the assistant's message as a plain dict with text content and an id on every call."""
    answer = client.chat.completions.create(**body)
    if not body["stream"]:
        return _tidy(_first_choice(_plain(answer)).get("message") or {}, number)
    return _tidy(_fold(answer, lambda piece: on_event(Event("text", number, piece))), number)


def _first_choice(answer: Json) -> Json:
    choices = answer.get("choices")
    if not choices:
        raise ServiceError(f"the service's answer has no choices: {json.dumps(answer, default=str)[:200]}")
    return cast(Json, choices[0])


def _fold(chunks: Iterable[Any], on_text: Callable[[str], None]) -> Json:
    """Streamed deltas -> one message."""
    texts: dict[str, list[str]] = {"content": [], "reasoning_content": []}
    calls: dict[int, Json] = {}
    for chunk in chunks:
        for choice in _plain(chunk).get("choices") or ():  # the last chunk may carry usage alone
            delta = choice.get("delta") or {}
            for key, pieces in texts.items():
                pieces.append(delta.get(key) or (key != "content" and delta.get("reasoning")) or "")
            if delta.get("content"):
                on_text(delta["content"])
            for piece in delta.get("tool_calls") or ():
                _fold_call(calls.setdefault(piece.get("index") or 0, {"name": "", "arguments": ""}), piece)
    message: Json = {key: "".join(pieces) for key, pieces in texts.items()}
    message["tool_calls"] = [
        {"id": call.get("id"), "function": {"name": call["name"], "arguments": call["arguments"]}}
        for _, call in sorted(calls.items())
    ]
    return message


def _fold_call(call: Json, piece: Json) -> None:
    function = piece.get("function") or {}
    call["id"] = piece.get("id") or call.get("id")
    call["name"] += function.get("name") or ""
    call["arguments"] += function.get("arguments") or ""


def _tidy(message: Json, number: int) -> Json:
    """Only the fields that go back to a service; a missing id is made up, since results name it."""
    plain: Json = {"role": "assistant", "content": message.get("content") or ""}
    if thought := message.get("reasoning_content") or message.get("reasoning"):  # vLLM's name
        plain["reasoning_content"] = thought
    calls = []
    for i, call in enumerate(message.get("tool_calls") or ()):
        function = call.get("function") or {}
        name, arguments = function.get("name") or "", function.get("arguments")
        text = arguments if isinstance(arguments, str) else json.dumps(arguments or {}, ensure_ascii=False)
        identity = call.get("id") or f"call_{number}_{i}"
        calls.append({"id": identity, "type": "function", "function": {"name": name, "arguments": text}})
    if calls:
        plain["tool_calls"] = calls
    return plain


def _sendable(message: Json) -> Json:
    """The message with {} for arguments that are no JSON object: no service takes them back, and the result
    says what was wrong."""
    if not message.get("tool_calls"):
        return message
    calls = [
        {
            **call,
            "function": {**call["function"], "arguments": _object_or_empty(call["function"]["arguments"])},
        }
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


def _object_or_empty(arguments: str) -> str:
    try:
        return arguments if isinstance(json.loads(arguments), dict) else "{}"
    except ValueError:
        return "{}"


def _plain(answer: Any) -> Json:
    """A pydantic object of the openai package, or a dict already."""
    return cast(Json, answer if isinstance(answer, dict) else answer.model_dump())


# --------------------------------------------------------------------------- the tools' turn


def _carry_out(
    calls: Sequence[Json], functions: Functions, tools: Sequence[Json], limits: Limits
) -> list[Json]:
    """Run a round's calls side by side; their messages in the order of the calls."""
    waiting = [_start(call["function"], functions, tools) for call in calls]
    deadline = time.monotonic() + limits.seconds
    messages = []
    for call, box in zip(calls, waiting, strict=True):
        try:
            text = box.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            text = _error(f"{call['function']['name']} did not answer within {limits.seconds:g} seconds")
        messages.append(
            {"role": "tool", "tool_call_id": call["id"], "content": _cut(text, limits.characters)}
        )
    return messages


def _start(function: Json, functions: Functions, tools: Sequence[Json]) -> queue.Queue[str]:
    """Begin one call in a thread of its own (a thread that hangs is left behind: Python cannot end it)."""
    box: queue.Queue[str] = queue.Queue()
    call = ToolCall(function["name"], function["arguments"] or "{}")
    problem = call_problem(call, tools)
    if problem is not None:
        box.put(_error(problem))
        return box
    target, arguments = functions[call.name], json.loads(call.arguments)
    threading.Thread(target=lambda: box.put(_call(target, arguments)), daemon=True).start()
    return box


def _call(function: Callable[..., Any], arguments: Json) -> str:
    """The result as text; whatever the tool raises, even SystemExit, is told to the model."""
    try:
        value = function(**arguments)
        if inspect.isawaitable(value):
            value = asyncio.run(_finish(value))
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    except BaseException as error:
        return _error(f"{type(error).__name__}: {error}")


async def _finish(value: Any) -> Any:
    return await value


def _error(text: str) -> str:
    return json.dumps({"error": text}, ensure_ascii=False)


def _cut(text: str, characters: int) -> str:
    text = text.encode("utf-8", "replace").decode()  # half of a character, as file names may hold
    if len(text) <= characters:
        return text
    return f"{text[:characters]}\n[cut: {len(text)} characters came back, the first {characters} are shown]"
