"""Hermes: `<tool_call>` tags around JSON, the tools in the system text (Qwen2.5, Qwen3).

Every byte of it stands here: the wording about tools, calls and results, the same in Jinja for templates that know no
tools, the shapes in which a model's calls are found, and the grammar that forces one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import ClassVar

from qwen_chat.conversation import Conversation, ToolCall
from qwen_chat.dialects.dialect import Carried, Tools, chosen, function_of, loosened, openai_messages
from qwen_chat.dialects.grammar import Grammar, arguments_rule
from qwen_chat.dialects.loose_json import ObjectScanner, object_text
from qwen_chat.dialects.shapes import OBJECT, SPACE, Form, Left, Marks, Offer, beginning, letters

OPEN, CLOSE = "<tool_call>", "</tool_call>"
# Put before a template that ignores tools: it turns tools, calls and results into the plain messages that
# carry them, then the template goes on as before. Without tools it changes nothing.
_PRELUDE = """\
{%- set hermes = namespace(messages=[], results='', block='', content='') %}
{%- if tools %}
    {%- set hermes.block = @HEAD@ %}
    {%- for tool in tools %}{% set hermes.block = hermes.block + '\\n' + (tool | tojson) %}{% endfor %}
    {%- set hermes.block = hermes.block + @TAIL@ %}
    {%- if messages[0].role != 'system' %}
        {%- set hermes.messages = [{'role': 'system', 'content': @SYSTEM@ + hermes.block}] %}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- set hermes.content = message.content if message.content else '' %}
    {%- if message.role == 'tool' %}
        {%- set hermes.results = hermes.results + ('\\n' if hermes.results else '') %}
        {%- set hermes.results = hermes.results + @RESULT@ + hermes.content %}
        {%- set hermes.results = hermes.results + @END_RESULT@ %}
        {%- if loop.last or loop.nextitem.role != 'tool' %}
            {%- set hermes.messages = hermes.messages + [{'role': 'user', 'content': hermes.results}] %}
            {%- set hermes.results = '' %}
        {%- endif %}
    {%- elif message.role == 'system' and loop.first and tools %}
        {%- set hermes.content = hermes.content + '\\n\\n' + hermes.block %}
        {%- set hermes.messages = hermes.messages + [{'role': 'system', 'content': hermes.content}] %}
    {%- elif message.tool_calls %}
        {%- for tool_call in message.tool_calls %}
            {%- set call = tool_call.function if tool_call.function else tool_call %}
            {%- set arguments = call.arguments if call.arguments is string else (call.arguments | tojson) %}
            {%- set hermes.content = hermes.content + ('\\n' if hermes.content else '') %}
            {%- set hermes.content = hermes.content + @NAME@ + call.name %}
            {%- set hermes.content = hermes.content + @ARGUMENTS@ + arguments + @END_CALL@ %}
        {%- endfor %}
        {%- set hermes.messages = hermes.messages + [{'role': 'assistant', 'content': hermes.content}] %}
    {%- elif message.content is string %}
        {%- set hermes.messages = hermes.messages + [message] %}
    {%- else %}
        {%- set hermes.messages = hermes.messages + [{'role': message.role, 'content': ''}] %}
    {%- endif %}
{%- endfor %}
{%- set messages = hermes.messages %}
{%- set tools = none %}
"""

_SURROGATE = re.compile(r"[\ud800-\udfff]")
_SLOTS = {"name": "name", "arguments": "arguments", "parameters": "arguments", "id": "id", "type": "type"}


class CallScanner(ObjectScanner):
    """Reads `{"name": ..., "arguments": ...}` and refuses, as early as it can, an object that is no call.

    With `names` (JSON that no tag announces) the name must be among them and the arguments must be there. A
    key that a call does not have would be lost in one, so it refuses the object; only the labels `id` and
    `type` are passed over.
    """

    def __init__(self, names: Collection[str] | None) -> None:
        super().__init__()
        self.name = ""
        self.arguments = "{}"
        self._names = names
        self._slot = ""
        self._seen: set[str] = set()
        # Where in _parts the arguments began, and ended.
        self._arguments_at = 0
        self._arguments_end: int | None = None
        # How many of the parts `more` gave out.
        self._told = 0

    @property
    def begun(self) -> bool:
        """Whether the name is known, and an object of arguments has begun."""
        is_inside = self._slot == "arguments" and self._kind == "{" and len(self._closers) > 1
        return self.name != "" and (self._arguments_end is not None or is_inside)

    def more(self, *, ended: bool) -> str:
        """The arguments since it was last asked. What may still be repaired comes later, unless the text has
        `ended`."""
        if self._arguments_end is not None:
            start, end, rest = self._arguments_at, self._arguments_end, ""
        elif ended:
            start, end, rest = self._value_at, len(self._parts), self._unread()
        else:
            start, end, rest = self._value_at, len(self._parts) if self._comma < 0 else self._comma, ""
        start = max(start, self._told)
        self._told = max(end, self._told)
        return "".join(self._parts[start:end]) + rest

    def top_key(self, key: str) -> bool:
        self._slot = _SLOTS.get(key, "")
        fresh = self._slot != "" and self._slot not in self._seen
        self._seen.add(self._slot)
        return fresh

    def top_value(self, kind: str, text: str) -> bool:
        if self._slot == "name":
            return kind in "\"'" and self._read_name(json.loads(text))
        if self._slot == "arguments":
            if kind == "{":
                self._arguments_at, self._arguments_end = self._value_at, len(self._parts)
            return self._read_arguments(kind, text)
        return kind not in "{["

    def complete(self) -> bool:
        return self.name != "" and (self._names is None or "arguments" in self._seen)

    def _read_name(self, name: str) -> bool:
        encodable = name.isascii() or not _SURROGATE.search(name)
        fits = name.strip() != "" and encodable and (self._names is None or name in self._names)
        self.name = name if fits else ""
        return fits

    def _read_arguments(self, kind: str, text: str) -> bool:
        if kind == "{":
            self.arguments = text.strip()
        elif kind in "\"'":
            inner = json.loads(text)
            strict = object_text(inner) if inner.strip() else "{}"
            if strict is None or _SURROGATE.search(strict):
                return False
            self.arguments = strict
        else:
            return text.strip() == "null"
        return True


def _leaves(shape: str) -> Left:
    return Left(
        closing=CLOSE,
        brackets=True,
        fence="`" in shape,
        items=shape.rstrip().endswith("["),
        more=OPEN in shape,
    )


# A fence's word; any other word would be lost with the fence. (Their beginnings match too: see shapes.)
_INFO = f"(?:j{beginning(letters('son'))}|t{beginning(letters('ool_calls'))})?"
_TICKS = rf"(?:`{{1,3}}{_INFO}{SPACE})?"
_LIST = rf"(?:\[{SPACE})?"


def _tagged_scanner(shape: str, offer: Offer) -> CallScanner:
    return CallScanner(None)


def _named_scanner(shape: str, offer: Offer) -> CallScanner:
    return CallScanner(offer.functions)


_TAGGED = Form(
    "tag", OPEN, (*letters(OPEN), SPACE, _TICKS, _LIST, OBJECT), _tagged_scanner, _leaves, bound=True
)
_FENCED = Form(
    "fence",
    "```",
    (*letters("```"), _INFO, r"[ \t]{0,8}", r"\r?", r"\n", SPACE, _LIST, OBJECT),
    _named_scanner,
    _leaves,
    loose=True,
)
_BARE = Form("bare", "", (_LIST, OBJECT), _named_scanner, _leaves, loose=True)


@dataclass(frozen=True, slots=True)
class Hermes:
    """The dialect. A template writes the tools itself, or `prelude` is put before it."""

    name: ClassVar[str] = "hermes"
    note: ClassVar[str] = ""
    stop_strings: ClassVar[tuple[str, ...]] = ()
    # Before and after a result, and around name and arguments of a call.
    RESULT: ClassVar[tuple[str, str]] = ("<tool_response>\n", "\n</tool_response>")
    CALL: ClassVar[tuple[str, str, str]] = (f'{OPEN}\n{{"name": "', '", "arguments": ', f"}}\n{CLOSE}")
    # The wording around the tools, which stand between the two as one line of JSON each.
    TOOLS: ClassVar[tuple[str, str]] = (
        "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
        "You are provided with function signatures within <tools></tools> XML tags:\n<tools>",
        "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
        f"{OPEN}{CLOSE} XML tags:\n"
        f'{OPEN}\n{{"name": <function-name>, "arguments": <args-json-object>}}\n{CLOSE}',
    )
    marks: ClassVar[Marks] = Marks((_TAGGED, _FENCED, _BARE))

    def describe(self, tools: Tools) -> str:
        """The text about tools, as Qwen2.5's template writes it."""
        lines = (f"\n{json.dumps(tool, ensure_ascii=False)}" for tool in tools)
        return "".join((self.TOOLS[0], *lines, self.TOOLS[1]))

    def write(self, calls: Iterable[ToolCall]) -> str:
        """The text of calls. (The templates escape nothing in a name; here a name is JSON.)"""
        return "\n".join(f"{self._begin(call.name)}{call.arguments}{self.CALL[2]}" for call in calls)

    def carry(self, conversation: Conversation) -> Carried:
        """As `openai_messages`."""
        return Carried(openai_messages(conversation), conversation.tools)

    def prelude(self, default_system: str | None) -> str:
        """Jinja source that, put before a ChatML template without tools, gives it this dialect."""
        system = "" if default_system is None else f"{default_system}\n\n"
        source = _PRELUDE
        for word, text in zip(("HEAD", "TAIL", "SYSTEM"), (*self.TOOLS, system), strict=True):
            # A Jinja literal: JSON's escapes (without those for non-ASCII) are among Python's, which Jinja reads.
            source = source.replace(f"@{word}@", json.dumps(text, ensure_ascii=False))
        fragments = zip(
            ("RESULT", "END_RESULT", "NAME", "ARGUMENTS", "END_CALL"), (*self.RESULT, *self.CALL), strict=True
        )
        for word, text in fragments:
            source = source.replace(f"@{word}@", "'" + text.replace("\n", "\\n") + "'")
        return source

    def call_grammar(self, tools: Tools, *, name: str | None = None, parallel: bool = False) -> Grammar:
        """One call or more, under the tools' schemas."""
        more = ' ("\\n" call)*' if parallel else ""
        return self._grammar(f"start: call{more}\ncall: open body\n", chosen(tools, name))

    def text_grammar(self, tools: Tools) -> Grammar:
        """Free text in which every opened tag becomes a call."""
        return self._grammar("start: (until_open body)* rest\nrest: TEXT\n", loosened(tools))

    def _grammar(self, start: str, tools: Tools) -> Grammar:
        """The rules of `start`, and `body`: a call of any of the tools, after its opening tag."""
        heads = [json.dumps(self._begin(function_of(tool)["name"]).removeprefix(OPEN)) for tool in tools]
        rules = [
            f"tool_{i}: {head} {arguments_rule(function_of(tool))}\n"
            for i, (head, tool) in enumerate(zip(heads, tools, strict=True))
        ]
        names = " | ".join(f"tool_{i}" for i in range(len(tools)))
        end = json.dumps(self.CALL[2].removesuffix(CLOSE))
        return Grammar(
            f"{start}body: ({names}) {end} close\n{''.join(rules)}", (("open", OPEN), ("close", CLOSE))
        )

    def _begin(self, name: str) -> str:
        """A call up to its arguments."""
        return f"{self.CALL[0]}{json.dumps(name, ensure_ascii=False)[1:-1]}{self.CALL[1]}"
