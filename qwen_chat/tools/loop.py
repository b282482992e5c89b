"""Call -> result -> answer: the loop around any OpenAI-shaped client, and Python functions as tools.

In: a client with `.chat.completions.create(...)` (the openai package's, or tools/client.py's), messages, and
a dict of Python functions. Out: `LoopResult`, the conversation with every call, result and answer in order.

Nothing that a tool or a model does ends the loop with an exception: bad arguments, unknown names, a tool that raises,
hangs or returns a megabyte become tool results which the model reads, and a model that calls for ever is stopped after
`Limits.rounds`. Wrong use by the programmer (a tool without a function, a schema that nothing can satisfy) raises
ToolError before the first request; a service that fails raises the client's own error.

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
    """How long a round's calls may take, how many characters of a result are kept, how many rounds there are."""

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
    if tools is None:
        tools = [tool_schema(function, name) for name, function in functions.items()]
    check_tools(tools, functions)
    conversation = [dict(message) for message in messages]
    for number in range(1, limits.rounds + 2):
        last = number == limits.rounds + 1
        body: Json = {"model": model, "messages": conversation, **request, "stream": stream}
        if tools:
            if last:
                choice: ToolChoice = "none"
            elif callable(tool_choice):
                choice = tool_choice(number)
            else:
                choice = tool_choice if number == 1 else "auto"
            body |= {"tools": list(tools), "tool_choice": choice, "parallel_tool_calls": parallel}
        message = _ask(client, body, number, on_event)
        calls = message.get("tool_calls") or []
        if last and calls:
            break
        conversation.append(_sendable(message))
        on_event(Event("message", number, message["content"], message))
        if not calls:
            return LoopResult(tuple(conversation), message["content"], number)
        for result in _carry_out(calls, functions, tools, limits):
            conversation.append(result)
            on_event(Event("result", number, result["content"], result))
    reason = f"stopped after {limits.rounds} rounds of tool calls"
    on_event(Event("stopped", limits.rounds + 1, reason))
    conversation.append({"role": "assistant", "content": message["content"] or f"({reason})"})
    return LoopResult(tuple(conversation), message["content"], limits.rounds + 1, reason)


# --------------------------------------------------------------------------- the model's turn


def _ask(client: Client, body: Json, number: int, on_event: Callable[[Event], None]) -> Json:
    """One request; the assistant's message with the fields alone that go back to a service, an id on every call."""
    answer = client.chat.completions.create(**body)
    if body["stream"]:
        message = _fold(answer, lambda piece: on_event(Event("text", number, piece)))
    else:
        answer = _plain(answer)
        if not answer.get("choices"):
            found = json.dumps(answer, default=str)[:200]
            raise ServiceError(f"the service's answer has no choices: {found}")
        message = answer["choices"][0].get("message") or {}
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
                fresh = {"id": None, "function": {"name": "", "arguments": ""}}
                call = calls.setdefault(piece.get("index") or 0, fresh)
                call["id"] = piece.get("id") or call["id"]
                for key in call["function"]:
                    call["function"][key] += (piece.get("function") or {}).get(key) or ""
    message: Json = {key: "".join(pieces) for key, pieces in texts.items()}
    message["tool_calls"] = [call for _, call in sorted(calls.items())]
    return message


def _sendable(message: Json) -> Json:
    """The message with {} for arguments that are no JSON object: no service takes them back, and the result
    says what was wrong."""
    calls = []
    for call in message.get("tool_calls") or ():
        try:
            is_object = isinstance(json.loads(call["function"]["arguments"]), dict)
        except ValueError:
            is_object = False
        calls.append(call if is_object else {**call, "function": {**call["function"], "arguments": "{}"}})
    return {**message, "tool_calls": calls} if calls else message


def _plain(answer: Any) -> Json:
    """A pydantic object of the openai package, or a dict already."""
    return cast(Json, answer if isinstance(answer, dict) else answer.model_dump())


# --------------------------------------------------------------------------- the tools' turn


def _carry_out(
    calls: Sequence[Json], functions: Functions, tools: Sequence[Json], limits: Limits
) -> list[Json]:
    """Run a round's calls side by side; their messages in the order of the calls."""
    boxes = []
    for call in calls:
        box: queue.Queue[str] = queue.Queue()
        boxes.append(box)
        wanted = ToolCall(call["function"]["name"], call["function"]["arguments"] or "{}")
        problem = call_problem(wanted, tools)
        if problem is not None:
            box.put(_error(problem))
            continue
        # A thread of its own: one that hangs is left behind, for Python cannot end it.
        work = (functions[wanted.name], json.loads(wanted.arguments), box)
        threading.Thread(target=_call, args=work, daemon=True).start()
    deadline = time.monotonic() + limits.seconds
    messages = []
    for call, box in zip(calls, boxes, strict=True):
        try:
            text = box.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            text = _error(f"{call['function']['name']} did not answer within {limits.seconds:g} seconds")
        text = text.encode("utf-8", "replace").decode()  # half of a character, as file names may hold
        most = limits.characters
        if len(text) > most:
            text = f"{text[:most]}\n[cut: {len(text)} characters came back, the first {most} are shown]"
        messages.append({"role": "tool", "tool_call_id": call["id"], "content": text})
    return messages


def _call(function: Callable[..., Any], arguments: Json, box: queue.Queue[str]) -> None:
    """Put the result as text into the box; whatever the tool raises, even SystemExit, is told to the model."""

    async def awaited(value: Any) -> Any:
        return await value

    try:
        value = function(**arguments)
        if inspect.isawaitable(value):
            value = asyncio.run(awaited(value))
        box.put(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))
    except BaseException as error:
        box.put(_error(f"{type(error).__name__}: {error}"))


def _error(text: str) -> str:
    return json.dumps({"error": text}, ensure_ascii=False)
