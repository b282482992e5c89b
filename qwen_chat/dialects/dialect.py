"""What a dialect is: how one family of models writes tools, calls and results, every byte of it in one module.

In: conversations and tools. Out: what the template is given, the text of calls, how to find calls in a reply, and the
grammars that force one. Pure text: no tokenizer, no torch. Also here is what the dialects share.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from qwen_chat.conversation import Conversation, ToolCall, write_message
from qwen_chat.dialects.grammar import Grammar
from qwen_chat.dialects.shapes import Marks
from qwen_chat.errors import FormatError, ToolError

Tool = Mapping[str, Any]
Tools = Sequence[Tool]


@dataclass(frozen=True, slots=True)
class Carried:
    """A conversation as a template is given it: OpenAI-shaped messages (arguments as objects), the tools that the
    template writes itself, and whether the last message is an assistant's that waits for its answer."""

    messages: list[dict[str, Any]]
    tools: Tools = ()
    is_open: bool = False


class Dialect(Protocol):
    """One dialect. Frozen and hashable, so that it can be part of a key."""

    @property
    def name(self) -> str:
        """As --tool_style has it."""

    @property
    def note(self) -> str:
        """What a saved template begins with, so that the dialect is found again; empty where the template itself
        speaks it."""

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The strings that end a reply, beside the template's end of turn."""

    @property
    def marks(self) -> Marks:
        """How its calls are found in a reply, whole or in pieces (see reader)."""

    def write(self, calls: Iterable[ToolCall]) -> str:
        """The text of calls, without a newline around it. The arguments' text goes in as it is, so that reading
        returns it; through `normalise_arguments` first it is the template's very bytes."""

    def carry(self, conversation: Conversation) -> Carried:
        """What the template is given. Raises FormatError where the dialect cannot write the conversation."""

    def call_grammar(self, tools: Tools, *, name: str | None = None, parallel: bool = False) -> Grammar:
        """One call (or more, where `parallel`) of the tool `name` or any of `tools`, valid arguments. Raises ToolError
        where `name` is not among the tools or a tool's schema cannot be used."""

    def text_grammar(self, tools: Tools) -> Grammar:
        """Free text in which every call that is begun becomes one of `tools` (tool_choice auto): under its schema
        where the tool says `strict`, else with any object as arguments. Raises ToolError as `call_grammar`."""


def function_of(tool: Tool) -> Tool:
    """The function that a tool describes, in OpenAI's wrapping or bare."""
    function = tool.get("function", tool)
    return function if isinstance(function, Mapping) else {}


def chosen(tools: Tools, name: str | None) -> Tools:
    """The tools of which one must be called: all, or the one called `name`. Raises ToolError where there is none."""
    found = [tool for tool in tools if name is None or function_of(tool).get("name") == name]
    if not found:
        known = ", ".join(str(function_of(tool).get("name")) for tool in tools) or "none"
        raise ToolError(f"tool_choice: no tool is called {name!r}; the tools are: {known}")
    return found


def loosened(tools: Tools) -> Tools:
    """The tools as a grammar holds calls to them that nobody forces: any arguments where a tool is not `strict`."""
    return [
        tool
        if function_of(tool).get("strict")
        else {"name": function_of(tool).get("name"), "parameters": {"type": "object"}}
        for tool in tools
    ]


def openai_messages(conversation: Conversation) -> list[dict[str, Any]]:
    """The messages as OpenAI writes them, but with call arguments as objects: the templates would otherwise encode the
    arguments' JSON text a second time."""
    messages = [write_message(message) for message in conversation.messages]
    for message in messages:
        for call in message.get("tool_calls", ()):
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    return messages


def normalise_arguments(arguments: str | Mapping[str, Any] | None) -> str:
    """Arguments as the templates write them, `json.dumps(object, ensure_ascii=False)`; none at all is `{}`.

    Raises FormatError for what is not a JSON object or its text.
    """
    value: object = arguments or {}
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise FormatError(f"arguments are no JSON ({error}); expected the text of an object") from None
    if not isinstance(value, Mapping):
        raise FormatError(f"arguments hold {type(value).__name__}; expected an object")
    return json.dumps(value, ensure_ascii=False)
