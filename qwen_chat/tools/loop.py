"""Call -> result -> answer: the loop around any OpenAI-shaped client, and Python functions as tools.

In: a client with `.chat.completions.create(...)` (the openai package's, or `HttpClient` below), messages, and
a dict of Python functions. Out: `LoopResult`, the conversation with every call, result and answer in order.

Nothing that a tool or a model does ends the loop with an exception: bad arguments, unknown names, a tool that
raises, hangs or returns a megabyte become tool results which the model reads, and a model that calls for ever
is stopped after `Limits.rounds`. Wrong use by the programmer (a tool without a function, a schema that
nothing can satisfy) raises ToolError before the first request; a service that fails raises the client's own
error.

    from qwen_chat.tools.loop import HttpClient, run_tools

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
import re
import threading
import time
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

import jsonschema
import referencing
import requests

from qwen_chat.conversation import Json, ToolCall, read_tools
from qwen_chat.errors import FormatError, ServiceError, ToolError
from qwen_chat.tools.validate import call_problem, check_tool

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
                pieces.append(delta.get(key) or "")
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
    if message.get("reasoning_content"):
        plain["reasoning_content"] = message["reasoning_content"]
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


# --------------------------------------------------------------------------- schemas


def check_tools(tools: Sequence[Json], functions: Functions | None = None) -> None:
    """Raise ToolError, naming the tool, the place and the cure, where no call of a tool could ever succeed.

    functions: given, each tool must have one of its name.
    """
    try:
        read_tools(tools)
    except FormatError as error:
        raise ToolError(str(error)) from None
    names: set[str] = set()
    for tool in tools:
        name, schema = tool["function"]["name"], tool["function"].get("parameters") or {}
        if name in names:
            raise ToolError(f"tool '{name}' is offered twice; give each tool a name of its own")
        if functions is not None and name not in functions:
            known = ", ".join(functions) or "none"
            raise ToolError(f"tool '{name}' has no function; the functions are: {known}")
        check_tool(tool)
        if schema.get("type", "object") != "object":
            raise ToolError(f"tool '{name}': the parameters' type is {schema['type']!r}; expected 'object'")
        reason = unsatisfiable(schema)
        if reason is not None:
            raise ToolError(f"tool '{name}': {reason}; no arguments can satisfy this schema")
        names.add(name)


def unsatisfiable(schema: Any, path: str = "parameters") -> str | None:
    """Why no value can satisfy the schema (None: nothing plain stands in the way).

    Finds the contradictions that people write: crossed bounds, empty or mistyped enums, a required property
    that is false or impossible or that `additionalProperties: false` forbids. (Deciding it for every schema
    is not feasible.)
    """
    if schema is False:
        return f"{path} is false"
    if not isinstance(schema, dict):
        return None
    for low, high in (
        ("minimum", "maximum"),
        ("minLength", "maxLength"),
        ("minItems", "maxItems"),
        ("minProperties", "maxProperties"),
    ):
        if low in schema and high in schema and schema[low] > schema[high]:
            return f"{path} has {low} {schema[low]} above {high} {schema[high]}"
    if "enum" in schema or "const" in schema:
        return _no_choice(schema, path)
    if schema.get("minItems", 0) > 0 and (reason := unsatisfiable(schema.get("items"), f"{path}.items")):
        return reason
    for key in ("anyOf", "oneOf"):
        branches = schema.get(key) or []
        reasons = [unsatisfiable(branch, f"{path}.{key}[{i}]") for i, branch in enumerate(branches)]
        if reasons and all(reasons):
            return reasons[0]
    for i, branch in enumerate(schema.get("allOf") or ()):
        if reason := unsatisfiable(branch, f"{path}.allOf[{i}]"):
            return reason
    return _missing_property(schema, path)


def _no_choice(schema: Json, path: str) -> str | None:
    """An enum or const must leave a value that the rest of the schema takes."""
    values = schema["enum"] if "enum" in schema else [schema["const"]]
    try:
        # An empty registry of our own: a reference to another place is never downloaded.
        validator = jsonschema.Draft202012Validator(schema, registry=referencing.Registry())
        if any(validator.is_valid(value) for value in values):
            return None
    except Exception:  # a $ref that does not resolve: not decided here
        return None
    return f"{path} allows none of its own values {json.dumps(values, ensure_ascii=False)[:100]}"


def _missing_property(schema: Json, path: str) -> str | None:
    properties = schema.get("properties") or {}
    for name in schema.get("required") or ():
        if name in properties:
            if reason := unsatisfiable(properties[name], f"{path}.{name}"):
                return reason
        elif schema.get("additionalProperties") is False and not schema.get("patternProperties"):
            return f"{path} requires '{name}' and forbids it (additionalProperties is false)"
    return None


PLAIN_TYPES: dict[Any, Json] = {
    str: {"type": "string"},
    bool: {"type": "boolean"},
    int: {"type": "integer"},
    float: {"type": "number"},
    list: {"type": "array"},
    dict: {"type": "object"},
    type(None): {"type": "null"},
    Any: {},
}


def tool_schema(function: Callable[..., Any], name: str | None = None) -> Json:
    """An OpenAI tool from a function's type hints and docstring.

    The first paragraph of the docstring describes the tool; lines under `Args:` ("city: the city's name") or
    `:param city: ...` describe its parameters, and so does `Annotated[str, "the city"]`; a dict in there
    is taken as JSON Schema (`{"maxLength": 40}`). A parameter without a default is required. Hints: str, int,
    float, bool, Any, None, list[...], tuple[...], dict[str, ...], Literal, unions, TypedDict.
    Raises ToolError for a parameter without a hint, with one that JSON cannot carry, or *args and **kwargs.
    """
    label = name or getattr(function, "__name__", "tool")
    try:
        signature = inspect.signature(function)
        hints = typing.get_type_hints(function, include_extras=True)
    except (TypeError, ValueError, NameError) as error:
        raise ToolError(
            f"function '{label}' has no readable signature ({error}); write the schema by hand"
        ) from None
    summary, described = _docstring(inspect.getdoc(function) or "")
    properties: Json = {}
    required = []
    for parameter in signature.parameters.values():
        where = f"function '{label}', parameter '{parameter.name}'"
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise ToolError(
                f"{where}: {parameter.kind.description}; a tool is called with named arguments only"
            )
        if parameter.name not in hints:
            raise ToolError(f"{where}: no type hint; write one (city: str)")
        schema = _hint_schema(hints[parameter.name], where)
        if parameter.name in described:
            schema["description"] = described[parameter.name]
        if parameter.default is parameter.empty:
            required.append(parameter.name)
        elif parameter.default is not None and isinstance(parameter.default, (str, int, float, bool)):
            schema["default"] = parameter.default
        properties[parameter.name] = schema
    parameters = {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }
    return {
        "type": "function",
        "function": {"name": label, "description": summary, "parameters": parameters},
    }


def _hint_schema(hint: Any, where: str) -> Json:
    """JSON Schema of one type hint."""
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin is None and hint in PLAIN_TYPES:
        return dict(PLAIN_TYPES[hint])
    if origin is typing.Annotated:
        schema = _hint_schema(inside[0], where)
        for extra in inside[1:]:
            schema |= (
                {"description": extra} if isinstance(extra, str) else extra if isinstance(extra, dict) else {}
            )
        return schema
    if origin is Literal:
        return _literal_schema(inside)
    if origin in (typing.Union, types.UnionType):
        branches = [_hint_schema(branch, where) for branch in inside]
        plain = all(set(branch) == {"type"} for branch in branches)
        return {"type": [branch["type"] for branch in branches]} if plain else {"anyOf": branches}
    if origin in (list, Sequence, set, Iterable):
        return {"type": "array", "items": _hint_schema(inside[0], where)}
    if origin is tuple:
        return _tuple_schema(inside, where)
    if origin in (dict, Mapping) and inside[0] is str:
        return {"type": "object", "additionalProperties": _hint_schema(inside[1], where)}
    if typing.is_typeddict(hint):
        fields = typing.get_type_hints(hint)
        properties = {key: _hint_schema(value, where) for key, value in fields.items()}
        required = sorted(hint.__required_keys__, key=list(fields).index)
        return {
            "type": "object",
            "properties": properties,
            "required": required,
            "additionalProperties": False,
        }
    raise ToolError(
        f"{where}: JSON has no {hint!r}; use str, int, float, bool, list, dict, Literal or a TypedDict"
    )


def _literal_schema(values: Sequence[Any]) -> Json:
    kinds = {json.dumps(PLAIN_TYPES.get(type(value), {})) for value in values}
    return {**(json.loads(kinds.pop()) if len(kinds) == 1 else {}), "enum": list(values)}


def _tuple_schema(inside: Sequence[Any], where: str) -> Json:
    if len(inside) == 2 and inside[1] is ...:
        return {"type": "array", "items": _hint_schema(inside[0], where)}
    items = [_hint_schema(part, where) for part in inside]
    return {"type": "array", "prefixItems": items, "minItems": len(items), "maxItems": len(items)}


def _docstring(text: str) -> tuple[str, dict[str, str]]:
    """The first paragraph on one line, and parameter -> description (Google's `Args:` or `:param name:`)."""
    summary = " ".join(re.split(r"\n\s*\n|\n\s*(?:Args:|:param )", text, maxsplit=1)[0].split())
    described = {match[1]: match[2].strip() for match in re.finditer(r":param (?:\w+ )?(\w+):\s*(.+)", text)}
    described |= _argument_lines(text.partition("\nArgs:\n")[2])
    return summary, described


def _argument_lines(section: str) -> dict[str, str]:
    """The indented lines under `Args:`; a line indented further continues the one above."""
    described: dict[str, str] = {}
    indent, name = 0, None
    for line in section.splitlines():
        width = len(line) - len(line.lstrip())
        if line.strip() and width == 0:
            break
        entry = re.match(r"\s+(\w+)(?: \([^)]*\))?:\s*(.*)", line)
        if entry and width <= (indent or width):
            indent, name = width, entry[1]
            described[name] = entry[2].strip()
        elif name and line.strip():
            described[name] = f"{described[name]} {line.strip()}".strip()
    return described


# --------------------------------------------------------------------------- a client of our own


class HttpClient:
    """`.chat.completions.create(...)` over requests: plain dicts instead of the openai package's objects.

    url: with or without a trailing /v1. With stream=True, create() gives an iterator of chunks.
    Raises ServiceError: the service cannot be reached, answered with an error, or broke off.
    """

    def __init__(self, url: str, *, api_key: str | None = None, timeout: float = 600.0) -> None:
        self._base = url.rstrip("/").removesuffix("/v1") + "/v1"
        self._timeout = timeout
        self._session = requests.Session()
        if api_key:
            self._session.headers["Authorization"] = f"Bearer {api_key}"
        self.chat = types.SimpleNamespace(completions=types.SimpleNamespace(create=self._create))

    def models(self) -> list[str]:
        """The models and adapters that the service lists; at least one."""
        listed = _json(self._send("GET", "/models")).get("data")
        if not listed:
            raise ServiceError(f"{self._base}/models lists no model")
        return [str(model["id"]) for model in listed]

    def first_model(self) -> str:
        """The first model that the service lists."""
        return self.models()[0]

    def _create(self, *, stream: bool = False, **body: Any) -> Json | Iterator[Json]:
        answer = self._send("POST", "/chat/completions", {**body, "stream": stream})
        return self._chunks(answer) if stream else _json(answer)

    def _send(self, method: str, path: str, body: Json | None = None) -> requests.Response:
        url = self._base + path
        streams = bool(body and body["stream"])
        try:
            answer = self._session.request(method, url, json=body, stream=streams, timeout=self._timeout)
            if answer.status_code != 200:
                raise ServiceError(f"{url} answered {answer.status_code}: {_told(answer.text)}")
        except requests.RequestException as error:
            raise ServiceError(
                f"{url} cannot be reached ({type(error).__name__}); start the service with "
                "python fast_start/simple_try_create_service.py"
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
