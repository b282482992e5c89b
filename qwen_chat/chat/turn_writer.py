"""The turns of a template that thinks, written directly by rules that probes found.

In: a conversation of the usual shape (a system text, questions, replies with calls and results, thoughts). Out: its
text, marked (see control_tokens), or None where the template must write it itself. A template is a program that reads
the whole conversation again for every prompt; here only what stands before the first question goes through it, once
for each system text and tools.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from qwen_chat.chat.control_tokens import ControlTokens
from qwen_chat.chat.template import END, START, ChatTemplate
from qwen_chat.conversation import Conversation, Json, Message, ToolCall
from qwen_chat.dialects.dialect import Dialect, normalise_arguments
from qwen_chat.dialects.hermes import Hermes
from qwen_chat.dialects.shapes import END_THINK, THINK
from qwen_chat.errors import FormatError

_QUESTION, _REPLY, _WHY, _FUNCTION_NAME = "probe question", "probe reply", "probe thought", "probe_name"
_PADDED = "\n\n  x  \n\n"
_MOST_REMEMBERED = 16_000_000  # characters of openings and calls
_STRIPPING: dict[str, Callable[[str], str]] = {
    "all": str,
    "from the first line": lambda text: text.lstrip("\n"),
    "between newlines": lambda text: text.strip("\n"),
    "between white space": str.strip,
}
_PROBE_CALL = ToolCall(_FUNCTION_NAME, '{"key": ["值", 1.5, null], "word": "a b"}')

When = Literal["never", "thought", "always"]
# Where a reply stands: the last message, one of the same turn, one of an earlier turn.
Place = Literal["last", "between", "past"]


class Marked(Protocol):
    """A conversation as the template itself writes it, with marks."""

    def __call__(self, conversation: Conversation, *, generation: bool) -> str: ...


class _Unusual(Exception):
    """The template writes something in a way that no rule here describes."""


@dataclass(frozen=True, slots=True)
class _Rules:
    """How a template writes a turn. `kept`, `bare`, `within`, `thought`: what is left of a message, of a reply without
    and with a think block, and of a thought. `when`: in which place a reply has a think block."""

    kept: str
    bare: str
    within: str
    thought: str
    opened: str
    closed: str
    when: dict[Place, When]
    separator: str
    begun: str

    @classmethod
    def of(cls, template: ChatTemplate, given: Json) -> _Rules:
        """Raises _Unusual, or FormatError where the template refuses a probe."""

        def turns(role: str, *messages: Json) -> list[str]:
            text = template.render(list(messages), template_kwargs=given)
            return [part.split(END)[0] for part in text.split(f"{START}{role}\n")[1:]]

        question: Json = {"role": "user", "content": _QUESTION}
        result: Json = {"role": "tool", "content": "probe result", "name": _FUNCTION_NAME}
        opened, _, closed = turns("assistant", question, _plain_reply(_REPLY, _WHY))[0].partition(_WHY)
        if END_THINK not in closed:
            raise _Unusual
        closed = closed.removesuffix(_REPLY)
        (silent,) = turns("assistant", question, _plain_reply("", None, [_PROBE_CALL]))
        calls = silent.removeprefix(f"{opened}{closed}")
        (spoken,) = turns("assistant", question, _plain_reply(_REPLY, None, [_PROBE_CALL]))
        separator = spoken.removesuffix(calls).rpartition(_REPLY)[2]

        def when(*after: Json, calling: bool = False) -> When:
            said = f"{_REPLY}{separator}{calls}" if calling else _REPLY
            blocks = []
            for thought in (_WHY, None):
                message = _plain_reply(_REPLY, thought, [_PROBE_CALL] if calling else [])
                written = turns("assistant", question, message, *after)[0]
                if written not in (said, f"{opened}{thought or ''}{closed}{said}"):
                    raise _Unusual
                blocks.append(written != said)
            return "always" if all(blocks) else "thought" if blocks[0] else "never"

        padded = turns(
            "assistant", question, _plain_reply(_PADDED, _PADDED), question, _plain_reply(_PADDED, _PADDED)
        )
        thought, _, within = padded[1].removeprefix(opened).partition(closed)
        prompt = template.render([question], generation=True, template_kwargs=given)
        places: dict[Place, When] = {
            "last": when(),
            "between": when(result, calling=True),
            "past": when(question),
        }
        past = turns("assistant", question, _plain_reply(_PADDED), question)[0]
        return cls(
            kept=_kept(turns("user", {"role": "user", "content": _PADDED})[0]),
            bare=_kept(past) if places["past"] != "always" else _kept(within),
            within=_kept(within),
            thought=_kept(thought),
            opened=opened,
            closed=closed,
            when=places,
            separator=separator,
            begun=prompt.rpartition(f"{START}assistant\n")[2],
        )


class TurnWriter:
    """Writes conversations as one template does under given values of its variables. `of` makes one that agrees with
    the template on every probe."""

    def __init__(
        self, rules: _Rules, tokens: ControlTokens, dialect: Dialect, marked: Marked, given: Json
    ) -> None:
        self._rules, self._tokens, self._dialect, self._marked = rules, tokens, dialect, marked
        self._given = given
        self._start, self._end = tokens.mark(START), tokens.mark(END)
        self._opened, self._closed = tokens.marked(rules.opened), tokens.marked(rules.closed)
        self._begun = tokens.marked(rules.begun)
        self._result = tuple(map(tokens.marked, Hermes.RESULT))
        self._remembered: dict[object, str] = {}
        self._size = 0
        self._writes_calls = False

    @classmethod
    def of(
        cls, template: ChatTemplate, tokens: ControlTokens, dialect: Dialect, marked: Marked, given: Json
    ) -> TurnWriter | None:
        """None where the template writes otherwise than by such rules, or refuses these values."""
        try:
            writer = cls(_Rules.of(template, given), tokens, dialect, marked, given)
        except (FormatError, _Unusual, ValueError, IndexError):  # other turns than were asked for
            return None
        for writes_calls in (True, False):
            writer._writes_calls = writes_calls
            writer._remembered.clear()
            if all(map(writer.agrees, _usual(given))):
                return writer
        return None

    def agrees(self, conversation: Conversation) -> bool:
        """Whether the template writes every prompt of a conversation, and every text up to a reply, as this does."""
        for k in range(1, len(conversation.messages) + 1):
            until = Conversation(conversation.messages[:k], conversation.tools, template_kwargs=self._given)
            for generation in (False, True):
                found = self.write(until, generation=generation)
                try:
                    if found is not None and found != self._marked(until, generation=generation):
                        return False
                except FormatError:
                    return False
        return True

    def write(self, conversation: Conversation, *, generation: bool) -> str | None:
        """The marked text, with `generation` up to where the model goes on; None where it has no rule for it, or where
        the template shall say what is wrong."""
        try:
            return self._write(conversation, generation=generation)
        except FormatError:
            return None

    def last(self, message: Message) -> str | None:
        """The turn of a reply that ends a conversation; None as of `write`."""
        try:
            return self._turn(message, "last") if is_plain(message) else None
        except FormatError:
            return None

    def _write(self, conversation: Conversation, *, generation: bool) -> str | None:
        messages = conversation.messages
        is_first = int(messages[0].role == "system")
        if not _is_usual(messages[is_first:], generation=generation):
            return None
        query = max(k for k, message in enumerate(messages) if message.role == "user")
        kept = _STRIPPING[self._rules.kept]
        start, end = self._start, self._end
        parts = [self._opening(conversation)]
        for k in range(is_first, len(messages)):
            message = messages[k]
            self._tokens.refuse_marks(message.content)
            if message.role == "assistant":
                last = k + 1 == len(messages)
                parts.append(self._turn(message, "last" if last else "between" if k > query else "past"))
            elif message.role == "user":
                parts.append(f"{start}user\n{kept(message.content)}{end}\n")
            else:
                begins = messages[k - 1].role != "tool"
                ends = k + 1 == len(messages) or messages[k + 1].role != "tool"
                before, after = self._result
                parts.append(f"{start}user" * begins + f"\n{before}{kept(message.content)}{after}")
                parts.append(f"{end}\n" * ends)
        if generation:
            parts.append(f"{start}assistant\n{self._begun}")
        return "".join(parts)

    def _turn(self, message: Message, place: Place) -> str:
        rules, thought = self._rules, message.reasoning or ""
        self._tokens.refuse_marks(message.content)
        self._tokens.refuse_marks(thought)
        when = rules.when[place]
        said = _STRIPPING[rules.bare](message.content)
        separator = rules.separator if said else ""
        if when == "always" or (when == "thought" and thought):
            kept = _STRIPPING[rules.thought](thought)
            said = f"{self._opened}{kept}{self._closed}{_STRIPPING[rules.within](message.content)}"
        if message.tool_calls:
            said += separator + self._calls(message.tool_calls)
        return f"{self._start}assistant\n{said}{self._end}\n"

    def _remember(self, key: object, text: str) -> str:
        """Conversations begin alike, and write the same calls for several prompts."""
        self._size += len(text)
        if self._size > _MOST_REMEMBERED:
            self._remembered, self._size = {}, len(text)
        self._remembered[key] = text
        return text

    def _calls(self, calls: tuple[ToolCall, ...]) -> str:
        """As the dialect writes them, or out of a small conversation that the template writes. Raises FormatError where
        the dialect cannot carry them."""
        if (found := self._remembered.get(calls)) is not None:
            return found
        asked = Conversation(
            (Message("user", _QUESTION), Message("assistant", tool_calls=calls)), template_kwargs=self._given
        )
        self._dialect.carry(asked)
        said = "".join(call.name + call.arguments for call in calls)
        if self._writes_calls and not self._tokens.typed(said):
            self._tokens.refuse_marks(said)
            plain = (ToolCall(call.name, normalise_arguments(call.arguments)) for call in calls)
            return self._remember(calls, self._tokens.marked(self._dialect.write(plain)))
        turn = self._marked(asked, generation=False).rpartition(f"{self._start}assistant\n")[2]
        turn = turn.removesuffix(f"{self._end}\n").removeprefix(f"{self._opened}{self._closed}")
        return self._remember(calls, turn)

    def _opening(self, conversation: Conversation) -> str:
        """What stands before the first question."""
        first = conversation.messages[0]
        system = first.content if first.role == "system" else None
        key = system, json.dumps(conversation.tools) if conversation.tools else ""
        if (found := self._remembered.get(key)) is not None:
            return found
        said = (*(() if system is None else (first,)), Message("user", _QUESTION))
        asked = Conversation(said, conversation.tools, template_kwargs=self._given)
        text = self._marked(asked, generation=False)
        return self._remember(key, text[: text.rindex(self._start)])


def _plain_reply(content: str, thought: str | None = None, calls: Sequence[ToolCall] = ()) -> Json:
    """A reply as a template is given it."""
    asked = Conversation((Message("user", _QUESTION), Message("assistant", content, thought, tuple(calls))))
    return Hermes().carry(asked).messages[1]


def is_plain(message: Message) -> bool:
    """Whether a template has nothing to look for in a message's text."""
    marks = (THINK, END_THINK) if message.role == "assistant" else ("<tool_response>",)
    return not any(mark in message.content for mark in marks)


def _is_usual(messages: Sequence[Message], *, generation: bool) -> bool:
    """Whether these are questions, each with replies whose calls have results, and nothing that a template may take
    for something else."""
    before = ""
    for message in messages:
        role = message.role
        if role == "user":
            usual = before in ("", "assistant", "user") and is_plain(message)
        elif role == "assistant":
            usual = before in ("user", "tool") and is_plain(message)
        else:
            usual = role == "tool" and before in ("assistant", "tool")
        if not usual:
            return False
        before = role
    return before != "" and not (generation and before == "assistant")


def _kept(written: str) -> str:
    """Which rule makes this of the padded probe."""
    for name, rule in _STRIPPING.items():
        if rule(_PADDED) == written:
            return name
    raise _Unusual


def _usual(given: Json) -> list[Conversation]:
    """Conversations of the usual shape, whose prompts tell templates apart."""
    tool: Json = {"type": "function", "function": {"name": _FUNCTION_NAME, "parameters": {"type": "object"}}}
    texts = ("", "x", "\n", " \n两 x\n ", "a\n\nb", "<b>&'\"", "<|im_end|>")
    calls = (
        _PROBE_CALL,
        ToolCall("f", "{}"),
        ToolCall(_FUNCTION_NAME, '{"s": "", "t": true, "n": {"k": [1, {}]}, "l": [2.0]}'),
    )
    found = []
    for k, text in enumerate(texts):
        other, thought = texts[k - 1], (f"\n {text}why\n ", None, "")[k % 3]
        asked, answered = Message("user", text), Message("assistant", other, thought)
        some = calls[: 1 + k % 3]
        use = [Message("assistant", text, thought, some)] + [Message("tool", other)] * len(some)
        system = [Message("system", other)] * (k % 2)
        found.append([*system, asked, answered, asked, *use, *use, answered, asked])
        found.append([*system, asked, *use, Message("assistant", text), asked, answered, asked])
    return [
        Conversation(tuple(messages), tools=(tool,) * (k % 3), template_kwargs=given)
        for k, messages in enumerate(found)
    ]
