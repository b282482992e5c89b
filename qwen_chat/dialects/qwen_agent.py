"""Qwen-Agent's function-calling prompt (the flower marks, Qwen2), as plain messages that any ChatML template writes.

Every byte of it stands here. A conversation with tools, calls and results becomes system, user and assistant messages
without any: the tools stand in the system text, and one assistant message holds a call, its results and the answer.

So a result stands among the model's own words, and marks in it would be read as them: the end of the result and
a new call. Each is broken by a space after its flower, here, where training and serving both come by.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, cast

from qwen_chat.conversation import Conversation, Message, ToolCall
from qwen_chat.dialects.dialect import Carried, Tools, function_of, normalise_arguments
from qwen_chat.dialects.grammar import Grammar
from qwen_chat.dialects.hermes import Hermes
from qwen_chat.dialects.loose_json import ObjectScanner
from qwen_chat.dialects.shapes import BLANKS, COLON, OBJECT, SPACE, Form, Left, Marks, Offer, letters
from qwen_chat.errors import FormatError

Language = Literal["auto", "en", "zh"]

FUNCTION, ARGS, RESULT, RETURN = "✿FUNCTION✿", "✿ARGS✿", "✿RESULT✿", "✿RETURN✿"
_ANSWER = f"\n{RETURN}: "  # after the last result; the model goes on from here
_FLOWER = FUNCTION[0]
_MARK = re.compile("|".join(f"{_FLOWER}(?={mark[1:]})" for mark in (FUNCTION, ARGS, RESULT, RETURN)))
_CHINESE = re.compile(r"[\u4e00-\u9fff]")

# A tokenizer tuned in this dialect says so in its template, where "auto" finds it again.
_NOTE = "{{#- qwen_chat: tool_style=qwen_agent language={} parallel={} #}}"
_NOTED = re.compile(r"\{#- qwen_chat: tool_style=qwen_agent language=(\w+) parallel=(\w+) #\}")

_WORDING_EN = {
    "title": "# Tools\n\n## You have access to the following tools:",
    "tool": "### {name}\n\n{name}: {description} Parameters: {parameters} "
    "Format the arguments as a JSON object.",
    "single": "## When you need to call a tool, please insert the following command in your reply, "
    "which can be called zero or multiple times according to your needs:\n\n"
    "✿FUNCTION✿: The tool to use, should be one of [{names}]\n✿ARGS✿: The input of the tool\n"
    "✿RESULT✿: Tool results\n",
    "parallel": "## Insert the following command in your reply when you need to call N tools in parallel:\n\n"
    "✿FUNCTION✿: The name of tool 1, should be one of [{names}]\n✿ARGS✿: The input of tool 1\n"
    "✿FUNCTION✿: The name of tool 2\n✿ARGS✿: The input of tool 2\n...\n"
    "✿FUNCTION✿: The name of tool N\n✿ARGS✿: The input of tool N\n"
    "✿RESULT✿: The result of tool 1\n✿RESULT✿: The result of tool 2\n...\n✿RESULT✿: The result of tool N\n",
    "return": "✿RETURN✿: Reply based on tool results. Images need to be rendered as ![](url)",
}
_WORDING_ZH = {
    "title": "# 工具\n\n## 你拥有如下工具：",
    "tool": "### {name}\n\n{name}: {description} 输入参数：{parameters} 此工具的输入应为JSON对象。",
    "single": "## 你可以在回复中插入零次、一次或多次以下命令以调用工具：\n\n"
    "✿FUNCTION✿: 工具名称，必须是[{names}]之一。\n✿ARGS✿: 工具输入\n✿RESULT✿: 工具结果\n",
    "parallel": "## 你可以在回复中插入以下命令以并行调用N个工具：\n\n"
    "✿FUNCTION✿: 工具1的名称，必须是[{names}]之一\n✿ARGS✿: 工具1的输入\n"
    "✿FUNCTION✿: 工具2的名称\n✿ARGS✿: 工具2的输入\n...\n✿FUNCTION✿: 工具N的名称\n✿ARGS✿: 工具N的输入\n"
    "✿RESULT✿: 工具1的结果\n✿RESULT✿: 工具2的结果\n...\n✿RESULT✿: 工具N的结果\n",
    "return": "✿RETURN✿: 根据工具结果进行回复，需将图片用![](url)渲染出来",
}


class _ArgumentsScanner(ObjectScanner):
    """Reads the object after the mark of the arguments; the name came before it."""

    begun = False  # no grammar forces this form, so its arguments come whole

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    @property
    def arguments(self) -> str:
        return self.text

    def more(self, *, ended: bool) -> str:
        return ""


def _flower_scanner(shape: str, offer: Offer) -> _ArgumentsScanner:
    name = shape[shape.index(FUNCTION) + len(FUNCTION) : shape.index(ARGS)]
    return _ArgumentsScanner(name.strip(" \t\r\n:："))


_FLOWERS = Form(
    "flower",
    FUNCTION,
    (
        *(*letters(FUNCTION), BLANKS, COLON, BLANKS, r"[^\s✿:：]", r"[^\n✿]{0,127}"),
        *(rf"(?:\n{SPACE})?", *letters(ARGS), BLANKS, COLON, SPACE, OBJECT),
    ),
    _flower_scanner,
    leaves=lambda shape: Left(brackets=True),
)


@dataclass(frozen=True, slots=True)
class QwenAgent:
    """The dialect in one of its four wordings. `language` "auto": Chinese where the system text or the first question
    has Chinese characters. `parallel`: several calls at once are offered. `system`: the text before the tools where a
    conversation has no system message."""

    language: Language = "auto"
    parallel: bool = True
    system: str | None = None

    name: ClassVar[str] = "qwen_agent"
    # A call ends where its result would begin.
    stop_strings: ClassVar[tuple[str, ...]] = (RESULT, RETURN)
    marks: ClassVar[Marks] = Marks((_FLOWERS,), stops=(RESULT, RETURN), answers=(RETURN,))

    @property
    def note(self) -> str:
        return _NOTE.format(self.language, str(self.parallel).lower())

    @classmethod
    def noted(cls, template: str) -> QwenAgent | None:
        """The dialect that a template was saved with, or None."""
        found = _NOTED.search(template)
        return cls(cast(Language, found[1]), found[2] == "true") if found else None

    @staticmethod
    def note_of(template: str) -> str:
        """The note that a template begins with; empty without one."""
        found = _NOTED.match(template)
        return found[0] if found else ""

    @staticmethod
    def without_note(template: str) -> str:
        """The template without it."""
        return _NOTED.sub("", template)

    def describe(self, tools: Tools) -> str:
        """The text about tools; English under "auto"."""
        wording = _WORDING_ZH if self.language == "zh" else _WORDING_EN
        functions = [function_of(tool) for tool in tools]
        described = [
            wording["tool"].format(
                name=function["name"],
                description=function.get("description", ""),
                parameters=json.dumps(function.get("parameters", {}), ensure_ascii=False),
            )
            for function in functions
        ]
        command = wording["parallel" if self.parallel else "single"]
        names = ",".join(function["name"] for function in functions)
        return "\n\n".join([wording["title"], *described, command.format(names=names) + wording["return"]])

    def write(self, calls: Iterable[ToolCall]) -> str:
        """The text of calls. A name is one line without a flower: this dialect has no escapes for it."""
        return "\n".join(f"{FUNCTION}: {call.name}\n{ARGS}: {call.arguments}" for call in calls)

    def carry(self, conversation: Conversation) -> Carried:
        """Plain messages, the tools in the system text; FormatError where a tool result follows no call."""
        plain: list[dict[str, Any]] = []
        for k, message in enumerate(conversation.messages):
            if message.role == "tool":
                _add_result(plain, message, k)
            elif message.role == "assistant":
                self._add_reply(plain, message)
            else:
                plain.append({"role": message.role, "content": message.content})
        if conversation.tools:
            block = self._worded(conversation).describe(conversation.tools)
            if plain[0]["role"] == "system":
                plain[0]["content"] += f"\n\n{block}"
            else:
                text = block if self.system is None else f"{self.system}\n\n{block}"
                plain.insert(0, {"role": "system", "content": text})
        return Carried(plain, is_open=_is_open(plain))

    def call_grammar(self, tools: Tools, *, name: str | None = None, parallel: bool = False) -> Grammar:
        """A call that is forced is Hermes': its end is marked, and every reader knows it."""
        return Hermes().call_grammar(tools, name=name, parallel=parallel)

    def text_grammar(self, tools: Tools) -> Grammar:
        """As `call_grammar`."""
        return Hermes().text_grammar(tools)

    def _worded(self, conversation: Conversation) -> QwenAgent:
        """The wording for a conversation. Only the system text and the first question are looked at, so that the
        tools do not change their language in the middle of a conversation."""
        language, messages = self.language, conversation.messages
        if language == "auto":
            first = [
                next((m.content for m in messages if m.role == role), other)
                for role, other in (("system", self.system or ""), ("user", ""))
            ]
            language = "zh" if any(map(_CHINESE.search, first)) else "en"
        return replace(self, language=language, parallel=self.parallel and conversation.parallel_tool_calls)

    def _add_reply(self, plain: list[dict[str, Any]], message: Message) -> None:
        goes_on = _is_open(plain)
        text = message.content
        if message.tool_calls:
            calls = self.write(
                replace(c, arguments=normalise_arguments(c.arguments)) for c in message.tool_calls
            )
            text += ("\n" if text or goes_on else "") + calls
        if goes_on:
            plain[-1]["content"] += text
        else:
            plain.append({"role": "assistant", "content": text})


def _is_open(plain: Sequence[dict[str, Any]]) -> bool:
    """Whether the last message is an assistant's that waits for its answer."""
    return bool(plain) and plain[-1]["role"] == "assistant" and plain[-1]["content"].endswith(_ANSWER)


def _add_result(plain: list[dict[str, Any]], message: Message, k: int) -> None:
    if not plain or plain[-1]["role"] != "assistant":
        raise FormatError(
            f"message {k} is a tool result with no call before it; expected an assistant's call first", k
        )
    before = plain[-1]["content"].removesuffix(_ANSWER)
    result = _MARK.sub(f"{_FLOWER} ", message.content)
    plain[-1]["content"] = f"{before}\n{RESULT}: {result}{_ANSWER}"
