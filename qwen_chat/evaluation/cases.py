"""The assistant turns to be written, and the calls that are right there.

In: conversations with the calls that were right. Out: one `Case` a turn. Needs no torch.

An assistant message may carry `"accepted"`: one entry a call, `{"name": ..., "arguments": {"city": ["Paris",
"Paris, France"]}, "optional": ["unit"]}`, every argument with the values that count as right.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qwen_chat.conversation import Conversation, Json, Message
from qwen_chat.errors import FormatError


@dataclass(frozen=True, slots=True)
class Wanted:
    """One call that is right: for each argument the values that count; `optional` may be left out."""

    name: str
    arguments: Mapping[str, Sequence[Any]]
    optional: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Case:
    """One assistant turn to be written: what comes before it, and the calls that are right (none: words)."""

    key: str  # "file:line#message"
    before: tuple[Message, ...]
    tools: tuple[Json, ...]
    parallel_tool_calls: bool
    reference: Message
    wanted: tuple[Wanted, ...]
    template_kwargs: Json = field(default_factory=dict)

    @property
    def language(self) -> str:
        """zh where the last question has Chinese characters, else en."""
        question = next((m.content for m in reversed(self.before) if m.role == "user"), "")
        return "zh" if any("\u4e00" <= letter <= "\u9fff" for letter in question) else "en"


def cases_of(conversation: Conversation, key: str, accepted: Mapping[int, Any] | None = None) -> list[Case]:
    """The turns of a conversation that offers tools; none where it offers none.

    accepted: message number -> its `"accepted"` list. Raises FormatError where that does not fit the calls.
    """
    if not conversation.tools:
        return []
    return [
        Case(
            key=f"{key}#{k}",
            before=conversation.messages[:k],
            tools=conversation.tools,
            parallel_tool_calls=conversation.parallel_tool_calls,
            reference=message,
            wanted=_wanted(message, (accepted or {}).get(k), f"{key}: message {k}"),
            template_kwargs=conversation.template_kwargs,
        )
        for k, message in enumerate(conversation.messages)
        if message.role == "assistant" and message.train is not False
    ]


def _wanted(message: Message, accepted: Any, where: str) -> tuple[Wanted, ...]:
    if accepted is None:
        return tuple(
            Wanted(call.name, {name: [value] for name, value in json.loads(call.arguments).items()})
            for call in message.tool_calls
        )
    if not isinstance(accepted, list) or len(accepted) != len(message.tool_calls):
        raise FormatError(f"{where}: accepted; expected a list with one entry for each tool call")
    shape = '{"name": ..., "arguments": {name: [values]}, "optional": [names]}'
    wanted = []
    for i, entry in enumerate(accepted):
        here = f"{where}: accepted[{i}]"
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            raise FormatError(f"{here}: expected {shape}")
        arguments, optional = entry.get("arguments", {}), entry.get("optional", [])
        if not isinstance(arguments, dict) or not all(isinstance(v, list) and v for v in arguments.values()):
            text = f"{here}: arguments; expected a list of accepted values for each, as in {shape}"
            raise FormatError(text)
        if not isinstance(optional, list) or not set(optional) <= set(arguments):
            raise FormatError(f"{here}: optional; expected names among the arguments, as in {shape}")
        wanted.append(Wanted(entry["name"], arguments, frozenset(optional)))
    return tuple(wanted)
