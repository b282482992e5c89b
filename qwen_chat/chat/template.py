"""A tokenizer's chat template: rendered, completed with tools where it has none, and understood.

In: messages and tools as OpenAI-shaped dicts. Out: text, byte for byte what `apply_chat_template` gives.
What a template does is found out by rendering small conversations (probes), never by a model's name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from qwen_chat.chat import system_text, variables
from qwen_chat.conversation import Conversation, Json
from qwen_chat.dialects.dialect import Dialect, Tools
from qwen_chat.dialects.hermes import Hermes
from qwen_chat.dialects.qwen_agent import QwenAgent
from qwen_chat.dialects.shapes import END_THINK, THINK
from qwen_chat.errors import FormatError

START, END = "<|im_start|>", "<|im_end|>"
NONE: Mapping[str, Any] = {}  # values of no variables
# Words that a request's reasoning_effort may be: OpenAI's, and those of other servers.
_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
_EFFORT = "reasoning_effort"

_NAME, _ANSWERED, _USER, _REPLY, _THOUGHT = (
    "probe_name",
    "probe result",
    "probe question",
    "probe reply",
    "probe thought",
)
_NO_WORD = "probe_value"
_MOST_CHECKED = 1000  # sets of values that are known to be good
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


@dataclass(frozen=True, slots=True)
class Switch:
    """The variable that turns thinking on and off, and the value that turns it on."""

    name: str
    on: bool

    def json(self, *, thinking: bool) -> str:
        """The variable's value as JSON, for a flag or a record."""
        return json.dumps({self.name: thinking == self.on})


class ChatTemplate:
    """The template of one tokenizer. `source` is the completed one; `template_kwargs` are values of its variables
    where a conversation gives none, `system` the text of a system message where it has none (None: the one that the
    template was saved with, if any).

    `default_system`: the system text that the template supplies itself, or None. `completed`: Hermes tools
    were added. `adds_nothing`: a prompt ends right after `assistant` and its newline. `writes_reasoning`: it knows
    `reasoning_content`; `splits_reasoning`: it also takes a thought out of the content. Raises FormatError where there
    is no template, or none that writes ChatML.
    """

    def __init__(
        self, tokenizer: Any, template_kwargs: Mapping[str, Any] = NONE, system: str | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._checked: set[str] = set()
        self._keeping: dict[str, bool] = {}
        own = _template_of(tokenizer)
        note = QwenAgent.note_of(own)
        defaults, bare = variables.split(variables.with_defaults(own.removeprefix(note), template_kwargs))
        saved, bare = system_text.taken_apart(bare)
        self.system = saved if system is None else system
        self.source = note + defaults + bare
        if template_kwargs:
            self.check(template_kwargs, "--template_kwargs")
        question: Json = {"role": "user", "content": _USER}
        reply: Json = {"role": "assistant", "content": _REPLY}
        asked = self.render([question], generation=True)
        if START not in asked or END not in asked:
            raise FormatError(
                f"the chat template writes no {START} ... {END}; expected a ChatML model's tokenizer"
            )
        self.adds_nothing = asked.endswith(f"{START}assistant\n")
        self.default_system = _opening_of(asked)
        self.completed = not self._carries_tools()
        if self.completed:
            bare = Hermes().prelude(self.default_system) + bare
        self.writes_thoughts = THINK in bare
        self.source = note + defaults + system_text.line(self.system) + bare
        if self.system is not None:
            asked = self.render([question], generation=True)
            self.default_system = _opening_of(asked)
            if self.system.strip() not in asked:
                raise FormatError("--system: this chat template writes no system text; leave it out")
        self.writes_reasoning = _THOUGHT in self.render([question, reply | {"reasoning_content": _THOUGHT}])
        inline = reply | {"content": f"{THINK}\n{_THOUGHT}\n{END_THINK}\n\n{_REPLY}"}
        self.splits_reasoning = self.render([question, inline]).count(THINK) == 1

    def render(
        self,
        messages: list[Json],
        tools: Tools = (),
        *,
        generation: bool = False,
        template_kwargs: Mapping[str, Any] = NONE,
    ) -> str:
        """Text of the messages; with `generation` up to where the model goes on. FormatError if refused."""
        try:
            text = self._tokenizer.apply_chat_template(
                messages,
                tools=list(tools) or None,
                chat_template=self.source,
                tokenize=False,
                add_generation_prompt=generation,
                **template_kwargs,
            )
        except Exception as error:  # a template may raise anything: it is a program that came with the model
            raise FormatError(f"the chat template refuses this conversation: {error}") from None
        return str(text)

    def keeps_prefixes(self, template_kwargs: Mapping[str, Any] = NONE) -> bool:
        """Whether a conversation's text begins with every earlier turn's text, as far as a probe tells."""
        key = key_of(template_kwargs)
        if key not in self._keeping:
            question: Json = {"role": "user", "content": _USER}
            reply: Json = {"role": "assistant", "content": _REPLY}
            turns = [question, reply, question, reply | {"reasoning_content": _THOUGHT}, question, reply]
            texts = [self.render(turns[:k], template_kwargs=template_kwargs) for k in (2, 4, 6)]
            self._keeping[key] = texts[1].startswith(texts[0]) and texts[2].startswith(texts[1])
        return self._keeping[key]

    # ---------------------------------------------------------------------------------------------- variables

    @cached_property
    def variables(self) -> frozenset[str]:
        """The variables that a conversation may give. A name that the template sets itself counts where giving it
        changes a probe."""
        source = variables.split(self.source.removeprefix(QwenAgent.note_of(self.source)))[1]
        found, doubtful = variables.read_by(source)
        return found - {
            name for name in doubtful if len({self._effect(name, v) for v in (False, True, _NO_WORD)}) == 1
        }

    def check(self, template_kwargs: Mapping[str, Any], where: str = "chat_template_kwargs") -> None:
        """Raise FormatError where a variable is none of the template's, or has a value that it would pass over."""
        if not template_kwargs or (key := key_of(template_kwargs)) in self._checked:
            return
        for name, value in template_kwargs.items():
            if name not in self.variables:
                known = f"it reads {', '.join(sorted(self.variables))}" if self.variables else "it reads none"
                raise FormatError(f"{where}: this chat template has no variable {name!r}; {known}")
            if name == _EFFORT and self.efforts and value not in self.efforts:
                expected = ", ".join(self.efforts)
                raise FormatError(f"{where}: {name} is {value!r}; expected one of {expected}")
            # A switch: its two truths differ, and another value is not written out but taken for one of them.
            effects = {v: self._effect(name, v) for v in (False, True, _NO_WORD)}
            is_switch = effects[False] != effects[True] and _NO_WORD not in effects[_NO_WORD]
            if is_switch and not isinstance(value, bool):
                raise FormatError(f"{where}: {name} is {value!r}; expected true or false")
        if len(self._checked) >= _MOST_CHECKED:
            self._checked.clear()
        self._checked.add(key)

    @cached_property
    def switch(self) -> Switch | None:
        """What turns thinking on and off, or None where the template has no such variable."""
        for name in sorted(self.variables):
            off, on = (self._readiness({name: value}) for value in (False, True))
            if off != on and min(off, on) >= 0:
                return Switch(name, on > off)
        return None

    @cached_property
    def efforts(self) -> tuple[str, ...]:
        """The words that the template knows as reasoning_effort: those that it tells from a word that is none."""
        if _EFFORT not in self.variables:
            return ()
        thinking = {self.switch.name: self.switch.on} if self.switch else {}
        unknown = self._effect(_EFFORT, _NO_WORD, thinking)
        words = dict.fromkeys((*_EFFORTS, *variables.words_of(self.source)))
        found = {word: self._effect(_EFFORT, word, thinking) for word in words}
        return tuple(word for word, effect in found.items() if effect not in ("", unknown))

    def empty_think(self, template_kwargs: Mapping[str, Any] = NONE) -> str:
        """What the template writes of an empty think block at the beginning of a reply without a thought."""
        question: Json = {"role": "user", "content": _USER}
        reply: Json = {"role": "assistant", "content": _REPLY}
        prompt = self.render([question], generation=True, template_kwargs=template_kwargs)
        whole = self.render([question, reply], template_kwargs=template_kwargs)
        begun = whole[len(prompt) :].partition(_REPLY)[0] if whole.startswith(prompt) else ""
        return begun if END_THINK in begun else ""

    @cached_property
    def dropped(self) -> frozenset[str]:
        """What of a conversation the template leaves out without a word: "system", "later system", "tool"."""
        question: Json = {"role": "user", "content": _USER}
        system: Json = {"role": "system", "content": _NAME}
        result: Json = {"role": "tool", "content": _ANSWERED, "tool_call_id": "1", "name": _NAME}
        given: dict[str, tuple[str, list[Json]]] = {
            "system": (_NAME, [system, question]),
            "later system": (_NAME, [question, {"role": "assistant", "content": _REPLY}, system, question]),
            "tool": (_ANSWERED, [question, *Hermes().carry(_CALLING).messages[1:], result]),
        }
        found = set()
        for what, (text, messages) in given.items():
            try:
                if text not in self.render(messages):
                    found.add(what)
            except FormatError:
                continue
        return frozenset(found)

    def _effect(self, name: str, value: object, others: Mapping[str, Any] = NONE) -> str:
        """All probes rendered with one variable set; empty where the template refuses the value."""
        question: Json = {"role": "user", "content": _USER}
        thought: Json = {"role": "assistant", "content": _REPLY, "reasoning_content": _THOUGHT}
        turns = [question, thought, question]
        try:
            return "".join(
                self.render(turns, tools, generation=True, template_kwargs={**others, name: value})
                for tools in ((), (_TOOL,))
            )
        except FormatError:
            return ""

    def _readiness(self, template_kwargs: Mapping[str, Any]) -> int:
        """2: a prompt ends inside a thought; 1: a thought may begin; 0: an empty one is over; -1: refused."""
        try:
            prompt = self.render(
                [{"role": "user", "content": _USER}], generation=True, template_kwargs=template_kwargs
            )
        except FormatError:
            return -1
        opened = prompt.rpartition(f"{START}assistant\n")[2]
        return (END_THINK not in opened) * (1 + (THINK in opened))

    # ------------------------------------------------------------------------------------------------- dialect

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


def _opening_of(prompt: str) -> str | None:
    """The system text with which a prompt begins."""
    opening = f"{START}system\n"
    return prompt[len(opening) :].split(END, 1)[0] if prompt.startswith(opening) else None


def key_of(template_kwargs: Mapping[str, Any]) -> str:
    """The same text for the same values of variables."""
    return json.dumps(template_kwargs, sort_keys=True, default=repr) if template_kwargs else ""


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
