"""A tokenizer's chat template: rendered, completed with tools where it has none, and understood.

In: messages and tools as OpenAI-shaped dicts. Out: text, byte for byte what `apply_chat_template` gives.
What a template does is found out by rendering small conversations (probes), never by a model's name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from qwen_chat.conversation import Conversation, Json
from qwen_chat.dialects.dialect import Dialect, Tools
from qwen_chat.dialects.hermes import Hermes
from qwen_chat.dialects.reader import END_THINK, THINK
from qwen_chat.errors import FormatError

START, END = "<|im_start|>", "<|im_end|>"

_NAME, _ANSWERED, _USER, _REPLY, _THOUGHT = (
    "probe_name",
    "probe result",
    "probe question",
    "probe reply",
    "probe thought",
)
_TOOL: Json = {
    "type": "function",
    "function": {"name": _NAME, "parameters": {"type": "object", "properties": {}}},
}
# Text, words and a list: how each is written tells the dialects apart.
_ARGUMENTS = '{"key": ["值", 1.5, null], "text": "值", "yes": true, "none": null}'
_CALL: Json = {"type": "function", "function": {"name": _NAME, "arguments": _ARGUMENTS}}


_CALLING = Conversation.from_openai(
    {
        "messages": [
            {"role": "user", "content": _USER},
            {"role": "assistant", "content": "", "tool_calls": [_CALL]},
        ]
    }
)


class ChatTemplate:
    """The template of one tokenizer. `source` is the completed one.

    `default_system`: the system text that the template supplies itself, or None. `completed`: Hermes tools
    were added. `writes_reasoning`: it knows `reasoning_content`. `keeps_prefixes`: a conversation's text
    begins with every earlier turn's text. Raises FormatError where there is no template, or none that writes
    ChatML.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.source = _template_of(tokenizer)
        question: Json = {"role": "user", "content": _USER}
        reply: Json = {"role": "assistant", "content": _REPLY}
        asked = self.render([question], generation=True)
        if START not in asked or END not in asked:
            raise FormatError(
                f"the chat template writes no {START} ... {END}; expected a ChatML model's tokenizer"
            )
        opening = f"{START}system\n"
        begins = asked.startswith(opening)
        self.default_system = asked[len(opening) :].split(END, 1)[0] if begins else None
        self.completed = not self._carries_tools()
        if self.completed:
            self.source = Hermes().prelude(self.default_system) + self.source
        thought = [question, reply | {"reasoning_content": _THOUGHT}]
        self.writes_reasoning = _THOUGHT in self.render(thought)
        turns = [question, reply, question, reply | {"reasoning_content": _THOUGHT}, question, reply]
        self.keeps_prefixes = all(
            self.render(turns[: k + 2]).startswith(self.render(turns[:k])) for k in range(2, len(turns), 2)
        )

    def render(self, messages: list[Json], tools: Tools = (), *, generation: bool = False) -> str:
        """Text of the messages; with `generation` up to where the model goes on. FormatError if refused."""
        try:
            text = self._tokenizer.apply_chat_template(
                messages,
                tools=list(tools) or None,
                chat_template=self.source,
                tokenize=False,
                add_generation_prompt=generation,
            )
        except Exception as error:  # a template may raise anything: it is a program that came with the model
            raise FormatError(f"the chat template refuses this conversation: {error}") from None
        return str(text)

    def agrees(self, render: Callable[[Conversation], str]) -> bool:
        """Whether another renderer gives the template's text on every probe (whole conversations)."""
        for probe in _probes():
            conversation = Conversation.from_openai(probe)
            try:
                expected = self.render(Hermes().carry(conversation).messages, conversation.tools)
            except FormatError:
                return False
            if render(conversation) != expected:
                return False
        return True

    def speaks(self, dialect: Dialect) -> bool:
        """Whether the template writes a call as the dialect does."""
        return dialect.write(_CALLING.messages[1].tool_calls) in self._called()

    def _called(self) -> str:
        """A call as the template writes it; empty where it refuses one."""
        try:
            return self.render(Hermes().carry(_CALLING).messages)
        except FormatError:
            return ""

    def _carries_tools(self) -> bool:
        try:
            offered = self.render([{"role": "user", "content": _USER}], [_TOOL])
        except FormatError:
            return False
        return _NAME in offered and _NAME in self._called()


def _template_of(tokenizer: Any) -> str:
    source = getattr(tokenizer, "chat_template", None)
    if isinstance(source, Mapping):  # a few models carry several named ones
        source = source.get("tool_use") or source.get("default")
    if not isinstance(source, str) or not source:
        raise FormatError(
            "the tokenizer has no chat template, so this is no chat model; take an Instruct model, or put "
            "Qwen's template into its folder as chat_template.jinja"
        )
    return source


def _probes() -> list[Json]:
    """Conversations that tell templates apart: roles, orders, white space, thoughts, tools."""
    system: Json = {"role": "system", "content": "S 系统"}
    user: Json = {"role": "user", "content": "  <b>问</b> & 'x' \n"}
    reply: Json = {"role": "assistant", "content": "\n\n答 \n"}
    thinking: Json = {"role": "assistant", "content": f"{THINK}\nwhy\n{END_THINK}\n\nbecause"}
    reasoned: Json = {"role": "assistant", "content": "so", "reasoning_content": _THOUGHT}
    call: Json = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
    calls: Json = {"role": "assistant", "content": " two \n", "tool_calls": [_CALL, _CALL]}
    result: Json = {"role": "tool", "content": _ANSWERED, "tool_call_id": "1", "name": _NAME}
    wrapped: Json = {"role": "user", "content": "x".join(Hermes.RESULT)}
    empty: Json = {"role": "system", "content": ""}
    silent: Json = {"role": "assistant", "content": ""}
    orders: list[list[Json]] = [
        [user],
        [user, reply],
        [empty, user, reply, user],
        [system, user, reply, user, thinking, user, reasoned, user, reply],
        [user, silent, system, user, reply, reply, user, user],
        [reply, user, reply],
        [user, thinking, wrapped, reply],
        [system, user, calls, result, result, reply, user, call, result, call, result],
        [user, call, result, reply, result],
        [empty, user, call],
        [user, reasoned | {"tool_calls": [_CALL]}, result, reasoned],
        [result, result, user, silent],
    ]
    return [
        {"messages": order, "tools": tools} for order in orders for tools in ([], [_TOOL], [_TOOL, _TOOL])
    ]
