"""Conversations in a model's own token format: what the server feeds, and what training supervises.

In: OpenAI-shaped messages and tools, or a `Conversation`; a tokenizer with a ChatML chat template. Out: text,
a prompt, or token ids with labels. One renderer serves both halves of the toolkit, so a model is served
exactly as it was trained: a training sequence is tokens(prompt), then, tokenised apart, what the model must
answer, up to and with `<|im_end|>`.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from qwen_chat.chat.control_tokens import ControlTokens
from qwen_chat.chat.encoded import Encoded, TrainOn
from qwen_chat.chat.quick_renderer import Piece, QuickRenderer
from qwen_chat.chat.template import END, NONE, START, ChatTemplate, Switch, key_of
from qwen_chat.chat.turn_writer import TurnWriter
from qwen_chat.conversation import Conversation, Json, Message
from qwen_chat.dialects import known
from qwen_chat.dialects.dialect import Carried, Dialect, Tools
from qwen_chat.dialects.grammar import Grammar
from qwen_chat.dialects.hermes import Hermes
from qwen_chat.dialects.known import Calls
from qwen_chat.dialects.qwen_agent import Language, QwenAgent
from qwen_chat.dialects.reader import Reply, StreamParser
from qwen_chat.dialects.shapes import END_THINK, THINK
from qwen_chat.errors import FormatError, OptionError

ToolStyle = Literal["auto", "hermes", "qwen_agent", "xml"]

Messages = Sequence[Mapping[str, Any]]
END_OF_TEXT = "<|endoftext|>"  # of a document; it also pads
# Sets of values of a template's variables that have a writer of their own.
_WRITERS = 16


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the model is given, as text and as token ids; `in_reasoning`: it ends inside a thought, so the reply
    begins with one."""

    text: str
    ids: list[int]
    in_reasoning: bool


class ChatFormat:
    """How the conversations of one model are written.

    `tool_style`: "hermes" (JSON in `<tool_call>` tags), "xml" (`<function=...>` in them), "qwen_agent" (Qwen2's flower
    marks), "auto": what the template was saved with, else what it is found to write. A template that writes calls in
    one of the first two cannot be asked for the other. `language` and `parallel`: the wording of qwen_agent;
    "auto" is Chinese where the system text or the first question has Chinese characters. A template without tools is
    completed (see `template`). `template_kwargs`: values of the template's variables where a conversation gives none;
    `system`: the text of a system message where it has none. The saved template keeps both.

    Raises FormatError where the tokenizer has no ChatML template, or cannot be used (see control_tokens), where the
    template has no such variable, or writes no system text.
    """

    def __init__(
        self,
        tokenizer: Any,
        tool_style: ToolStyle = "auto",
        language: Language = "auto",
        parallel: bool = True,
        template_kwargs: Mapping[str, Any] | None = None,
        system: str | None = None,
    ) -> None:
        _check_option("tool_style", tool_style, ("auto", "hermes", "qwen_agent", "xml"))
        _check_option("language", language, ("auto", "en", "zh"))
        self.tokenizer = tokenizer
        self._template = ChatTemplate(tokenizer, template_kwargs or NONE, system)
        self._tokens = ControlTokens(tokenizer)
        if system is not None:
            self._tokens.refuse_marks(system)
            if typed := self._tokens.typed(system):
                raise FormatError(f"--system: the text spells out {typed[0]}, a control token; reword it")
        if not {START, END} <= self._tokens.ids.keys():
            raise FormatError(
                f"the vocabulary has no tokens {START} and {END}; expected a ChatML model's tokenizer"
            )
        self.dialect = self._found(tool_style, language, parallel)
        self._quick = QuickRenderer(self._template.default_system, self._tokens)
        self._is_quick = (
            self.dialect == Hermes()
            and self._template.adds_nothing
            and self._template.keeps_prefixes()
            and not self._tokens.swallow
            and self._template.agrees(self._quick.text)
        )
        self._newline_separates = self._probe_newline()
        self._writers: dict[str, TurnWriter | None] = {}

    def _found(self, style: ToolStyle, language: Language, parallel: bool) -> Dialect:
        """The dialect that was asked for; else the one a tuned template names, or the one its own words are in."""
        system = self._template.system
        if style == "qwen_agent":
            return QwenAgent(language, parallel, system)
        spoken = next(filter(self._template.speaks, known.KNOWN), Hermes())
        if style == "auto":
            noted = QwenAgent.noted(self._template.source)
            return spoken if noted is None else replace(noted, system=system)
        if style != spoken.name:
            raise OptionError(
                f"tool_style is {style!r}, but the chat template writes calls as {spoken.name}; expected auto or "
                f"{spoken.name}, so that the model is served as its template writes"
            )
        return spoken

    # --------------------------------------------------------------------------------------------------- text

    def text(self, messages: Messages, tools: Tools | None = None, **template_kwargs: Any) -> str:
        """The whole conversation as the model's template writes it, byte for byte; no generation prompt.

        `template_kwargs` (here and below): values of variables that the template reads, `enable_thinking` for one.
        """
        return self._render(_conversation(messages, tools, template_kwargs), generation=False)

    def prompt(self, messages: Messages, tools: Tools | None = None, **template_kwargs: Any) -> str:
        """What the server feeds: ends where the model goes on."""
        return self._render(_conversation(messages, tools, template_kwargs), generation=True)

    def prompt_ids(self, messages: Messages, tools: Tools | None = None, **template_kwargs: Any) -> list[int]:
        """The tokens of `prompt`. A control token that is spelled out in a message stays text."""
        conversation = _conversation(messages, tools, template_kwargs)
        return self._tokens.encode([self._marked(conversation, generation=True)])[0]

    def render(
        self,
        messages: Messages,
        tools: Tools | None = None,
        *,
        most: int | None = None,
        **template_kwargs: Any,
    ) -> Prompt:
        """`prompt`, its tokens, and where the reply begins, rendered once. Raises TooManyTokens where a long prompt
        has more than `most` tokens; a short one is tokenised whatever it has."""
        marked = self._marked(_conversation(messages, tools, template_kwargs), generation=True)
        opened = self._tokens.text(marked[max(marked.rfind(self._tokens.mark(START)), 0) :])
        ids = self._tokens.encode_within(marked, most)
        return Prompt(self._tokens.text(marked), ids, self.in_reasoning(opened))

    def text_ids(self, text: str, *, most: int | None = None) -> list[int]:
        """The tokens of a text as it is, control tokens in it included. TooManyTokens as in `render`."""
        return self._tokens.raw_ids(self.tokenizer, text, most)

    def in_reasoning(self, prompt: str) -> bool:
        """Whether a prompt ends inside a thought, so that the reply begins with one."""
        opened = prompt.rpartition(f"{START}assistant\n")[2]
        return opened.rfind(THINK) > opened.rfind(END_THINK)

    @property
    def knows_reasoning(self) -> bool:
        """Whether the template writes thoughts."""
        return self._template.writes_thoughts

    @property
    def system(self) -> str | None:
        """The text that the saved template gives a conversation without a system message, if it was tuned with one."""
        return self._template.system

    @property
    def variables(self) -> frozenset[str]:
        """The variables that the template reads and a conversation may give."""
        return self._template.variables

    @property
    def thinking_switch(self) -> Switch | None:
        """The variable that turns thinking on and off, or None where the template has none."""
        return self._template.switch

    @property
    def efforts(self) -> tuple[str, ...]:
        """The words that the template takes as `reasoning_effort`; none where it has no such variable."""
        return self._template.efforts

    def check_variables(self, template_kwargs: Mapping[str, Any], where: str) -> None:
        """Raise FormatError where a variable is none of the template's, or has a value that it would pass over.
        `where` they stand begins its text."""
        self._template.check(template_kwargs, where)

    @cached_property
    def thinks(self) -> bool:
        """Whether replies begin with a thought, if only an empty one, where nobody says otherwise."""
        return self._template.empty_think() != ""

    @cached_property
    def empty_thinks(self) -> tuple[tuple[int, ...], ...]:
        """The tokens with which a reply without a thought may begin: what is written of an empty think block after
        the prompt, under each value of the switch."""
        switch = self._template.switch
        values = [{}, *({switch.name: value} for value in (True, False))] if switch else [{}]
        blocks = dict.fromkeys(map(self._template.empty_think, values))
        encoded = self._tokens.encode([self._tokens.marked(block) for block in blocks if block])
        return tuple(map(tuple, encoded))

    # ---------------------------------------------------------------------------------------------- replies

    def parse(self, text: str, tools: Tools | None = None, *, in_reasoning: bool = False) -> Reply:
        """Read a whole reply. Never raises on any text. `in_reasoning`: the prompt ended inside a thought."""
        return known.parse(text, tools, in_reasoning=in_reasoning)

    def stream_parser(
        self, tools: Tools | None = None, *, in_reasoning: bool = False, calls: Calls = "any"
    ) -> StreamParser:
        """Read a reply piece by piece; the deltas, folded, are what `parse` gives. `calls`: what counts as one."""
        return known.stream_parser(tools, in_reasoning=in_reasoning, calls=calls)

    def call_grammar(self, tools: Tools, *, name: str | None = None, parallel: bool = False) -> Grammar:
        """The grammar of a reply that is one call (or more, where `parallel`) of the tool `name`, or of any of
        `tools`, with valid arguments. Raises ToolError where there is no such tool or a schema cannot be used."""
        return self.dialect.call_grammar(tools, name=name, parallel=parallel)

    def text_grammar(self, tools: Tools) -> Grammar:
        """The grammar of a reply in which a call may be begun: under the schema of its tool where that says
        `strict`, else with any object as arguments. Raises ToolError as `call_grammar`."""
        return self.dialect.text_grammar(tools)

    # ------------------------------------------------------------------------------------------------- tokens

    def encode(self, messages: Messages, tools: Tools | None = None, **template_kwargs: Any) -> list[Encoded]:
        """Training sequences: one, or one a turn where an earlier turn's tokens do not stay as they were."""
        return self.encode_conversation(_conversation(messages, tools, template_kwargs))

    def encode_conversation(self, conversation: Conversation, train_on: TrainOn = "all") -> list[Encoded]:
        """`encode` of a Conversation. `train_on`: "all" replies, the "last", or "everything" (prompts too).

        A message with `train=False` is context. A conversation with nothing to learn gives one sequence
        without labels. A document is one sequence, its text and `<|endoftext|>`, supervised whole.
        """
        return self.encode_many([conversation], train_on)[0]

    def encode_many(
        self, conversations: Sequence[Conversation], train_on: TrainOn = "all"
    ) -> list[list[Encoded]]:
        """`encode_conversation` of each, faster: one call of the tokenizer. FormatError as soon as one is
        refused.
        """
        _check_option("train_on", train_on, ("last", "all", "everything"))
        try:
            sequences = [self._sequences(conversation, train_on) for conversation in conversations]
        except RecursionError:
            raise FormatError("arguments or tools are nested too deeply to be written as JSON") from None
        texts = [piece.text for several in sequences for pieces in several for piece in pieces]
        ids = iter(self._tokens.encode(texts))
        return [
            [_assemble(pieces, ids, _supervised(conversation, train_on)) for pieces in several]
            for conversation, several in zip(conversations, sequences, strict=True)
        ]

    def audit(self, conversations: Iterable[Conversation]) -> None:
        """Compare what writes quickly with the template on some of the real data, before any of it is encoded. Where
        they differ, or one refuses, the template alone is used from here on. (On the probes they agree.)"""
        conversations = [one for one in conversations if one.document is None]
        try:
            self._is_quick = self._is_quick and all(
                self._quick.text(conversation) == self._render(conversation, generation=False)
                for conversation in conversations
            )
        except (FormatError, RecursionError):
            self._is_quick = False
        for conversation in conversations:
            try:
                writer = self._writer(conversation.template_kwargs)
                same = writer is None or writer.agrees(conversation)
            except (FormatError, RecursionError):
                continue  # encoding it says what is wrong
            if not same:
                self._writers[key_of(conversation.template_kwargs)] = None

    @cached_property
    def stop_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a reply."""
        ends = [self._tokens.ids.get(END), self._tokens.ids.get(END_OF_TEXT), self.tokenizer.eos_token_id]
        return tuple(dict.fromkeys(token for token in ends if token is not None))

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The strings that end a reply, beside the end of turn."""
        return self.dialect.stop_strings

    @property
    def tool_style(self) -> str:
        """The dialect's name, as --tool_style has it."""
        return self.dialect.name

    # -------------------------------------------------------------------------------------------- to be saved

    @property
    def template(self) -> str:
        """The chat template that a tuned model is saved with: the model's own, with tools if it had none."""
        return self.dialect.note + QwenAgent.without_note(self._template.source)

    def complete_tokenizer(self) -> None:
        """Give the tokenizer `template`, so that saving it saves the format."""
        self.tokenizer.chat_template = self.template

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all that decides ids and labels: template, style, vocabulary. 64 hex digits."""
        parts = [self.template, repr(self.dialect)]
        digest = hashlib.sha256(json.dumps(parts).encode())
        digest.update(self.tokenizer.backend_tokenizer.to_str().encode())
        return digest.hexdigest()

    # ---------------------------------------------------------------------------------------------- rendering

    def _render(self, conversation: Conversation, *, generation: bool) -> str:
        self._check(conversation)
        return self._written(self.dialect.carry(conversation), generation, conversation.template_kwargs)

    def _check(self, conversation: Conversation) -> None:
        """Raise FormatError where the template would pass over something that the conversation says."""
        self._template.check(conversation.template_kwargs)
        dropped = self._template.dropped
        for k, message in enumerate(conversation.messages if dropped else ()):
            role = "later system" if k and message.role == "system" else message.role
            in_turn = role == "tool" and self.dialect.name == "qwen_agent"
            if role in dropped and message.content and not in_turn:
                raise FormatError(
                    f"message {k}: the chat template leaves out a message of the role '{message.role}' in this "
                    "place; move its text into another message, or correct the template",
                    k,
                )

    def _written(self, carried: Carried, generation: bool, template_kwargs: Mapping[str, Any]) -> str:
        messages, tools = carried.messages, carried.tools
        if generation and carried.is_open:  # the model goes on inside the last message
            text = self._template.render(messages, tools, template_kwargs=template_kwargs)
            return text[: text.rindex(END)]
        return self._template.render(messages, tools, generation=generation, template_kwargs=template_kwargs)

    def _marked(self, conversation: Conversation, *, generation: bool) -> str:
        """`_render` with marks for control tokens."""
        if self._is_quick and not conversation.template_kwargs:
            return "".join(piece.text for piece in self._quick.pieces(conversation, generation=generation))
        self._check(conversation)
        writer = self._writer(conversation.template_kwargs)
        written = None if writer is None else writer.write(conversation, generation=generation)
        return self._templated(conversation, generation=generation) if written is None else written

    def _writer(self, template_kwargs: Json) -> TurnWriter | None:
        """What writes conversations with these variables without the template; None where nothing may."""
        key = key_of(template_kwargs)
        if key in self._writers:
            return self._writers[key]
        by_rule = self._template.writes_reasoning and not self._tokens.swallow
        if (
            self._is_quick
            or not by_rule
            or self.dialect.name == "qwen_agent"
            or len(self._writers) >= _WRITERS
        ):
            return None
        writer = TurnWriter.of(self._template, self._tokens, self.dialect, self._templated, template_kwargs)
        self._writers[key] = writer
        return writer

    def _templated(self, conversation: Conversation, *, generation: bool) -> str:
        """`_marked` by the template itself."""
        carried, variables = self.dialect.carry(conversation), conversation.template_kwargs
        rendered = self._written(carried, generation, variables)
        self._tokens.refuse_marks(rendered)
        if not any(map(self._tokens.typed, _strings([carried.messages, carried.tools, variables]))):
            return self._tokens.marked(rendered)
        for thoughts_apart in (True, False) if self._template.splits_reasoning else (False,):
            told = [_thought_apart(m) for m in carried.messages] if thoughts_apart else carried.messages
            messages, tools, values = (
                _shielded(part, self._tokens) for part in (told, carried.tools, variables)
            )
            shielded = self._written(replace(carried, messages=messages, tools=tools), generation, values)
            if self._tokens.unshield(shielded) == rendered:
                return self._tokens.marked(shielded)
        raise FormatError(
            f"the text spells out {self._tokens.typed(rendered)[0]}, which the chat template takes for its "
            "own there; reword that message"
        )

    # ---------------------------------------------------------------------------------------------- sequences

    def _sequences(self, conversation: Conversation, train_on: TrainOn) -> list[list[Piece]]:
        """The training sequences of a conversation, in pieces."""
        if conversation.document is not None:
            self._tokens.refuse_marks(conversation.document)
            if END_OF_TEXT not in self._tokens.ids:
                raise FormatError(f"a document ends with {END_OF_TEXT}, which the vocabulary has not")
            return [[Piece(conversation.document + self._tokens.mark(END_OF_TEXT), reply=0)]]
        if train_on == "everything":
            return [[Piece(self._marked(conversation, generation=False), reply=0)]]
        replies = _replies(conversation.messages)
        supervised = _supervised(conversation, train_on)
        quick = self._is_quick and not conversation.template_kwargs
        if quick or not replies or self._template.keeps_prefixes(conversation.template_kwargs):
            pieces = self._one_sequence(conversation, [k for k in replies if k in supervised], quick)
            if pieces is not None:
                return [pieces]
        kept = [k for k in replies if k in supervised] or replies[-1:]
        return [self._turn(conversation, k) for k in kept]

    def _one_sequence(
        self, conversation: Conversation, replies: list[int], quick: bool
    ) -> list[Piece] | None:
        """The whole conversation, or None where some earlier turn's tokens do not stay as they were."""
        if quick:
            pieces = self._quick.pieces(conversation)
        else:
            whole = self._marked(conversation, generation=False)
            pieces, position = [], 0
            for k in replies:
                before, answer, _ = (piece.text for piece in self._turn(conversation, k))
                if len(before) < position or not whole.startswith(before + answer):
                    return None
                pieces += [Piece(whole[position : len(before)]), Piece(answer, k)]
                position = len(before) + len(answer)
            pieces.append(Piece(whole[position:]))
        for context, reply in zip(pieces[:-3:2], pieces[1:-2:2], strict=False):
            if not self._separate(context.text, reply.text):
                return None
        return pieces

    def _turn(self, conversation: Conversation, k: int) -> list[Piece]:
        """Prompt, reply k, and what the template writes after it."""
        start, end = self._tokens.mark(START), self._tokens.mark(END)
        before, message = replace(conversation, messages=conversation.messages[:k]), conversation.messages[k]
        self._check(conversation)
        writer = None if self._is_quick else self._writer(conversation.template_kwargs)
        prompt = writer.write(before, generation=True) if writer is not None else None
        text = writer.last(message) if writer is not None else None
        if prompt is None or text is None:
            until = replace(conversation, messages=conversation.messages[: k + 1])
            prompt, text = self._marked(before, generation=True), self._marked(until, generation=False)
        begun = prompt[prompt.rfind(start) :]  # the assistant's turn, as far as the prompt has it
        turn = text[text.rfind(start) :]
        after = turn.rfind(end) + 1
        if not turn.startswith(begun) or after <= len(begun):
            raise FormatError(self._differs(conversation, k, begun, turn), k)
        inline = message.reasoning is None and message.content.lstrip().startswith(THINK)
        if inline and self._template.writes_reasoning and not self._template.splits_reasoning:
            raise FormatError(
                f"message {k}: a thought stands in the content, where this chat template takes it for text; "
                "move it into reasoning_content",
                k,
            )
        return [Piece(prompt), Piece(turn[len(begun) : after], k), Piece(turn[after:])]

    def _differs(self, conversation: Conversation, k: int, begun: str, turn: str) -> str:
        """Why a reply does not go on where its prompt ends, and the cure."""
        message, switch = conversation.messages[k], self._template.switch
        begun, turn = self._tokens.text(begun), self._tokens.text(turn)
        if END_THINK in begun and (message.reasoning or THINK in message.content):
            cure = "remove the thought, or take a model that thinks"
            if switch is not None:
                value = switch.json(thinking=True)
                cure = (
                    f"set chat_template_kwargs {value} in the record, --template_kwargs '{value}' for all of them, "
                    "or remove the thought"
                )
            return (
                f"message {k} has a thought, but its prompt ends with an empty one: this chat template does not think "
                f"here; {cure}"
            )
        same = next((i for i, (a, b) in enumerate(zip(begun, turn, strict=False)) if a != b), len(turn))
        return (
            f"message {k}: the chat template writes this reply otherwise than its prompt begins it: "
            f"{turn[same : same + 40]!r} instead of {begun[same : same + 40]!r}; change that message"
        )

    def _separate(self, context: str, reply: str) -> bool:
        """Whether a prompt that holds context and reply in one has the tokens of the two apart."""
        before, after = self._tokens.around(context, reply)
        if (
            not before
            or not after
            or (self._newline_separates and before[-1] == "\n" and not after[0].isspace())
        ):
            return True
        together, first, second = self._tokens.encode([before + after, before, after])
        return together == first + second

    def _probe_newline(self) -> bool:
        """Whether a newline never merges with what follows, unless that is white space: of each kind of
        character.
        """
        kinds: dict[str, list[str]] = {}
        for code in range(0x20, 0x20000):
            kinds.setdefault(unicodedata.category(chr(code)), []).append(chr(code))
        starts = [
            c for kind, some in kinds.items() if kind not in ("Cs", "Cn") for c in some[:: len(some) // 9 + 1]
        ]
        texts = [start + more for start in starts if not start.isspace() for more in ("", "a", " b", "\n")]
        return all(self._tokens.splits("assistant\n", text) for text in texts)


def _conversation(
    messages: Messages, tools: Tools | None, template_kwargs: Mapping[str, Any]
) -> Conversation:
    return Conversation.from_openai(
        {"messages": messages, "tools": tools, "chat_template_kwargs": template_kwargs}
    )


def _replies(messages: Sequence[Message]) -> list[int]:
    """The messages that some prompt could have asked for."""
    return [k for k, message in enumerate(messages) if k and message.role == "assistant"]


def _supervised(conversation: Conversation, train_on: TrainOn) -> set[int]:
    messages = conversation.messages
    if train_on == "everything" or conversation.document is not None:
        return {0}
    replies = _replies(messages)
    return {k for k in (replies[-1:] if train_on == "last" else replies) if messages[k].train is not False}


def _assemble(pieces: list[Piece], ids: Iterator[list[int]], supervised: set[int]) -> Encoded:
    input_ids: list[int] = []
    spans: list[tuple[int, int]] = []
    for piece in pieces:
        start = len(input_ids)
        input_ids += next(ids)
        if piece.reply in supervised and len(input_ids) > start:
            if spans and spans[-1][1] == start:
                start = spans.pop()[0]
            spans.append((start, len(input_ids)))
    return Encoded(input_ids, spans)


def _strings(value: object) -> Iterator[str]:
    """Every string in a JSON value, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, Mapping)):  # dict first: asking whether something is a Mapping is slow
        for key, item in value.items():
            yield str(key)
            yield from _strings(item)
    elif isinstance(value, (list, tuple, Sequence)):
        for item in value:
            yield from _strings(item)


def _shielded(value: Any, tokens: ControlTokens) -> Any:
    """The same JSON value with every string shielded."""
    if isinstance(value, str):
        return tokens.shield(value)
    if isinstance(value, Mapping):
        return {tokens.shield(key): _shielded(item, tokens) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_shielded(item, tokens) for item in value]
    return value


def _thought_apart(message: Json) -> Json:
    """An assistant message whose inline `<think>` block became `reasoning_content`, cut as Qwen3's template
    cuts it.
    """
    content = message["content"]
    if message["role"] != "assistant" or "reasoning_content" in message or END_THINK not in content:
        return message
    thought = content.split(END_THINK)[0].rstrip("\n").split(THINK)[-1].lstrip("\n")
    return message | {"reasoning_content": thought, "content": content.split(END_THINK)[-1].lstrip("\n")}


def _check_option(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise OptionError(f"{name} is {value!r}; expected one of {', '.join(allowed)}")
