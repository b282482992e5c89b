"""A conversation: frozen, typed, OpenAI-shaped at its edges.

In: a plain dict as the OpenAI chat API writes it (`messages`, `tools`, `parallel_tool_calls`).
Out: the same dict again, or the values below. No tokenizer, no template, no files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from qwen_chat.errors import FormatError

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant", "tool")
Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call of one tool. `arguments` is the JSON text of an object, as OpenAI sends it."""

    name: str
    arguments: str
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """One message. `train` is None where the data does not say whether this reply is learnt."""

    role: Role
    content: str = ""
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None
    train: bool | None = None


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in order, the tools that were offered, whether several calls at once were allowed, and values of
    variables that the chat template reads (`enable_thinking`). Or a `document`: plain text, and no messages."""

    messages: tuple[Message, ...]
    tools: tuple[Json, ...] = ()
    parallel_tool_calls: bool = True
    template_kwargs: Json = field(default_factory=dict)
    document: str | None = None

    @classmethod
    def from_openai(cls, record: Mapping[str, Any]) -> Conversation:
        """Read `{"messages": [...], "tools": [...], "chat_template_kwargs": {...}}`; raise FormatError naming the
        message that is wrong."""
        messages = record.get("messages")
        if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
            raise FormatError(f"messages: {_kind(messages)}; expected a list with at least one message")
        variables = record.get("chat_template_kwargs")
        if variables is not None and not isinstance(variables, Mapping):
            raise FormatError(
                f"chat_template_kwargs: {_kind(variables)}; expected an object: the template's variables and values"
            )
        return cls(
            messages=tuple(read_message(message, k) for k, message in enumerate(messages)),
            tools=read_tools(record.get("tools")),
            parallel_tool_calls=record.get("parallel_tool_calls") is not False,
            template_kwargs=dict(variables or {}),
        )

    def to_openai(self) -> Json:
        """The plain dict that `from_openai` reads back to an equal value; of a document `{"text": ...}`."""
        if self.document is not None:
            return {"text": self.document}
        record: Json = {"messages": [write_message(message) for message in self.messages]}
        if self.tools:
            record["tools"] = list(self.tools)
        if not self.parallel_tool_calls:
            record["parallel_tool_calls"] = False
        if self.template_kwargs:
            record["chat_template_kwargs"] = dict(self.template_kwargs)
        return record


def read_message(message: object, number: int) -> Message:
    """One OpenAI-shaped message; every FormatError begins with its number, and has it."""
    try:
        return _read_message(message, f"message {number}")
    except FormatError as error:
        error.message = number
        raise


def _read_message(message: object, where: str) -> Message:
    if not isinstance(message, Mapping):
        raise FormatError(f"{where}: {_kind(message)}; expected an object with 'role' and 'content'")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise FormatError(f"{where}: role {role!r}; expected one of {', '.join(ROLES)}")
    if len(message) == 2 and isinstance(content, str):  # nearly every message: nothing else to look at
        return Message(role, content)
    calls = message.get("tool_calls") or ()
    if calls and role != "assistant":
        raise FormatError(f"{where}: tool_calls on role {role!r}; expected only on 'assistant'")
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise FormatError(f"{where}: tool_calls is {_kind(calls)}; expected a list")
    return Message(
        role=role,
        content=_read_content(content, where),
        reasoning=_read_reasoning(message, where),
        tool_calls=tuple(read_call(call, f"{where}: tool_calls[{i}]") for i, call in enumerate(calls)),
        tool_call_id=_optional_text(message, "tool_call_id", where),
        name=_optional_text(message, "name", where),
        train=_read_train(message, where),
    )


def read_call(call: object, where: str) -> ToolCall:
    """One entry of `tool_calls`; the arguments may be JSON text or an object, never anything else."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise FormatError(
            f"{where}: no function name; expected {{'function': {{'name': ..., 'arguments': ...}}}}"
        )
    identity = cast(Mapping[str, Any], call).get("id")
    return ToolCall(
        name=function["name"],
        arguments=_read_arguments(function.get("arguments"), where),
        id=identity if isinstance(identity, str) else None,
    )


def read_tools(tools: object) -> tuple[Json, ...]:
    """The `tools` list: each `{"type": "function", "function": {"name": ...}}`, key order kept."""
    if tools is None:
        return ()
    if not isinstance(tools, Sequence) or isinstance(tools, str):
        raise FormatError(f"tools: {_kind(tools)}; expected a list of tools")
    for i, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if (
            not isinstance(function, Mapping)
            or not isinstance(function.get("name"), str)
            or not function["name"]
        ):
            raise FormatError(
                f"tools[{i}]: no function name; expected {{'type': 'function', 'function': {{'name': ...}}}}"
            )
    return tuple(dict(tool) for tool in tools)


def write_message(message: Message) -> Json:
    """The plain OpenAI-shaped dict of one message; absent fields are left out."""
    plain: Json = {"role": message.role, "content": message.content}
    if message.reasoning is not None:
        plain["reasoning_content"] = message.reasoning
    if message.tool_calls:
        plain["tool_calls"] = [write_call(call) for call in message.tool_calls]
    for key in ("tool_call_id", "name", "train"):
        value = getattr(message, key)
        if value is not None:
            plain[key] = value
    return plain


def write_call(call: ToolCall) -> Json:
    """OpenAI's shape of one call: the arguments stay JSON text."""
    plain: Json = {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
    return plain if call.id is None else {"id": call.id, **plain}


def _read_content(content: object, where: str) -> str:
    """Text as it is; null is empty; OpenAI's list of text parts is joined."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence):
        parts = [
            part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
            for part in content
        ]
        if all(isinstance(part, str) for part in parts):
            return "".join(cast(list[str], parts))
        raise FormatError(
            f"{where}: content has a part that is not text; expected only {{'type': 'text'}} parts"
        )
    raise FormatError(f"{where}: content is {_kind(content)}; expected text")


def _read_arguments(arguments: object, where: str) -> str:
    """JSON text of an object. Absent or empty means no arguments; an object is written as JSON text."""
    if arguments is None or arguments == "":
        return "{}"
    if isinstance(arguments, Mapping):
        try:
            return json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise FormatError(f"{where}: arguments cannot be written as JSON ({error})") from None
    if isinstance(arguments, str):
        try:
            value = json.loads(arguments, parse_constant=refuse_constant)
        except (ValueError, RecursionError) as error:
            raise FormatError(
                f"{where}: arguments are no JSON ({error}); expected the text of an object"
            ) from None
        if isinstance(value, dict):
            return arguments
        raise FormatError(f"{where}: arguments hold {_kind(value)}; expected an object")
    raise FormatError(f"{where}: arguments are {_kind(arguments)}; expected an object or its JSON text")


def refuse_constant(name: str) -> None:
    """For `json.loads(parse_constant=)`: Python reads NaN and Infinity, JSON has neither. Raises ValueError."""
    raise ValueError(f"{name} is no JSON value")


def _optional_text(message: Mapping[str, Any], key: str, where: str) -> str | None:
    value = message.get(key)
    if value is None or isinstance(value, str):
        return value
    raise FormatError(f"{where}: {key} is {_kind(value)}; expected text")


def _read_reasoning(message: Mapping[str, Any], where: str) -> str | None:
    """`reasoning_content`, which newer servers call `reasoning`."""
    found = [_optional_text(message, key, where) for key in ("reasoning_content", "reasoning")]
    if None not in found and found[0] != found[1]:
        raise FormatError(f"{where}: 'reasoning' and 'reasoning_content' differ; give one of them")
    return found[1] if found[0] is None else found[0]


def _read_train(message: Mapping[str, Any], where: str) -> bool | None:
    """`"train": false` is ours, `"weight": 0` is OpenAI's fine-tuning format."""
    train, weight = message.get("train"), message.get("weight")
    if train is None and weight is None:
        return None
    if train is not None and not isinstance(train, bool):
        raise FormatError(f"{where}: train is {_kind(train)}; expected true or false")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise FormatError(f"{where}: weight is {weight!r}; expected 0 or 1")
    return train if train is not None else weight == 1


def _kind(value: object) -> str:
    names: dict[type, str] = {
        type(None): "absent",
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "text",
        list: "a list",
        dict: "an object",
    }
    if isinstance(value, (list, str, dict)) and not value:
        return "empty"
    return names.get(type(value), type(value).__name__)
