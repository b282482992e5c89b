"""Conversations in a model's own token format: what the server feeds, and what training supervises.

In: OpenAI-shaped messages and tools, or a `Conversation`; a tokenizer with a ChatML chat template. Out: text,
a prompt, or token ids with labels. One renderer serves both halves of the toolkit, so a model is served
exactly as it was trained: a training sequence is tokens(prompt), then, tokenised apart, what the model must
answer, up to and with `<|im_end|>`.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, cast

from qwen_chat.chat.control_tokens import ControlTokens
from qwen_chat.chat.encoded import Encoded
from qwen_chat.chat.template import END, START, TOOLS_HEAD, TOOLS_TAIL, ChatTemplate, plain_messages
from qwen_chat.conversation import Conversation, Json, Message
from qwen_chat.dialects import qwen_agent
from qwen_chat.dialects.reader import FLOWER_STOPS, normalise_arguments
from qwen_chat.errors import FormatError, OptionError

ToolStyle = Literal["auto", "hermes", "qwen_agent"]
Language = Literal["auto", "en", "zh"]
TrainOn = Literal["last", "all", "everything"]
_AUDIT = 64  # every so many conversations the quick renderer is compared with the template, on the real data

Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]] | None

# A tokenizer tuned under qwen_agent says so in its template, where "auto" finds it again.
_STYLE_NOTE = "{{#- qwen_chat: tool_style=qwen_agent language={} parallel={} #}}"
_NOTE_PATTERN = re.compile(r"\{#- qwen_chat: tool_style=qwen_agent language=(\w+) parallel=(\w+) #\}")


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the model is given, as token ids; `in_reasoning`: it ends inside `<think>`, so the reply begins with
    a thought."""

    ids: list[int]
    in_reasoning: bool


@dataclass(frozen=True, slots=True)
class _Piece:
    """A part of a sequence, tokenised by itself. `reply`: the index of the message it is; None: context."""

    text: str  # marked: see control_tokens
    reply: int | None = None


class ChatFormat:
    """How the conversations of one model are written.

    `tool_style`: "hermes" (`<tool_call>` tags), "qwen_agent" (Qwen2's flower marks), "auto": what the
    template was saved with, else hermes. `language` and `parallel`: the wording of qwen_agent; "auto" is
    Chinese where the system text or the first question has Chinese characters. A template without tools is
    completed (see `template`).

    Raises FormatError where the tokenizer has no ChatML template, or cannot be used (see control_tokens).
    """

    def __init__(
        self,
        tokenizer: Any,
        tool_style: ToolStyle = "auto",
        language: Language = "auto",
        parallel: bool = True,
    ) -> None:
        _check_option("tool_style", tool_style, ("auto", "hermes", "qwen_agent"))
        _check_option("language", language, ("auto", "en", "zh"))
        self.tokenizer = tokenizer
        self._template = ChatTemplate(tokenizer)
        self._tokens = ControlTokens(tokenizer)
        if not {START, END} <= self._tokens.ids.keys():
            raise FormatError(
                f"the vocabulary has no tokens {START} and {END}; expected a ChatML model's tokenizer"
            )
        note = _NOTE_PATTERN.search(self._template.source)
        if tool_style == "auto" and note:
            tool_style, language, parallel = "qwen_agent", cast(Language, note[1]), note[2] == "true"
        self.tool_style: ToolStyle = "hermes" if tool_style == "auto" else tool_style
        self.language, self.parallel = language, parallel
        self._quick = _QuickRenderer(self._template.default_system, self._tokens)
        self._is_quick = (
            self.tool_style == "hermes"
            and self._template.keeps_prefixes
            and not self._tokens.swallow
            and self._template.agrees(self._quick.text)
        )
        self._newline_separates = self._probe_newline()
        self._encoded = 0  # conversations so far

    # --------------------------------------------------------------------------------------------------- text

    def text(self, messages: Messages, tools: Tools = None) -> str:
        """The whole conversation as the model's template writes it, byte for byte; no generation prompt."""
        return self._render(_read(messages, tools), generation=False)

    def prompt(self, messages: Messages, tools: Tools = None) -> str:
        """What the server feeds: ends where the model goes on."""
        return self._render(_read(messages, tools), generation=True)

    def prompt_ids(self, messages: Messages, tools: Tools = None) -> list[int]:
        """The tokens of `prompt`. A control token that is spelled out in a message stays text."""
        return self._tokens.encode([self._marked(_read(messages, tools), generation=True)])[0]

    def prompt_within(self, messages: Messages, tools: Tools = None, *, most: int | None = None) -> Prompt:
        """`prompt_ids`, rendered once, and where the reply begins. Raises TooManyTokens where a long prompt has
        more than `most` tokens; a short one is tokenised whatever it has."""
        marked = self._marked(_read(messages, tools), generation=True)
        opened = self._tokens.text(marked[max(marked.rfind(self._tokens.mark(START)), 0) :])
        return Prompt(self._tokens.encode_within(marked, most), self.in_reasoning(opened))

    def text_ids(self, text: str, *, most: int | None = None) -> list[int]:
        """The tokens of a text as it is, control tokens in it included. TooManyTokens as in `prompt_within`."""
        return self._tokens.raw_ids(self.tokenizer, text, most)

    def rendered(self, messages: Messages, tools: Tools = None) -> list[Json]:
        """The messages that the template is given: under qwen_agent plain ones, with everything about tools
        in them.
        """
        return self._plain(_read(messages, tools))

    def in_reasoning(self, prompt: str) -> bool:
        """Whether a prompt ends inside `<think>`, so that the reply begins with a thought."""
        opened = prompt.rpartition(f"{START}assistant\n")[2]
        return opened.rfind("<think>") > opened.rfind("</think>")

    # ------------------------------------------------------------------------------------------------- tokens

    def encode(self, messages: Messages, tools: Tools = None) -> list[Encoded]:
        """Training sequences: one, or one a turn where an earlier turn's tokens do not stay as they were."""
        return self.encode_conversation(_read(messages, tools))

    def encode_conversation(self, conversation: Conversation, train_on: TrainOn = "all") -> list[Encoded]:
        """`encode` of a Conversation. `train_on`: "all" replies, the "last", or "everything" (prompts too).

        A message with `train=False` is context. A conversation with nothing to learn gives one sequence
        without labels.
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
            [_assemble(pieces, ids, _supervised(conversation.messages, train_on)) for pieces in several]
            for conversation, several in zip(conversations, sequences, strict=True)
        ]

    def typed_control_tokens(self, conversation: Conversation) -> list[str]:
        """The control tokens that messages and tools spell out; in prompts and labels they are text."""
        return [token for text in _strings(conversation.to_openai()) for token in self._tokens.typed(text)]

    @cached_property
    def stop_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a reply."""
        ends = [self._tokens.ids.get(END), self._tokens.ids.get("<|endoftext|>"), self.tokenizer.eos_token_id]
        return tuple(dict.fromkeys(token for token in ends if token is not None))

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The strings that end a reply: a call in the Qwen-Agent style ends where its result would begin."""
        return FLOWER_STOPS if self.tool_style == "qwen_agent" else ()

    # -------------------------------------------------------------------------------------------- to be saved

    @property
    def template(self) -> str:
        """The chat template that a tuned model is saved with: the model's own, with tools if it had none."""
        source = _NOTE_PATTERN.sub("", self._template.source)
        if self.tool_style == "qwen_agent":
            return _STYLE_NOTE.format(self.language, str(self.parallel).lower()) + source
        return source

    def complete_tokenizer(self) -> None:
        """Give the tokenizer `template`, so that saving it saves the format."""
        self.tokenizer.chat_template = self.template

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all that decides ids and labels: template, style, vocabulary. 64 hex digits."""
        parts = [self.template, self.tool_style, self.language, self.parallel]
        digest = hashlib.sha256(json.dumps(parts).encode())
        digest.update(self.tokenizer.backend_tokenizer.to_str().encode())
        return digest.hexdigest()

    # ---------------------------------------------------------------------------------------------- rendering

    def _plain(self, conversation: Conversation) -> list[Json]:
        if self.tool_style == "hermes":
            return plain_messages(conversation.messages)
        language = self.language
        if language == "auto":
            language = qwen_agent.language_of(conversation.messages)
        parallel = self.parallel and conversation.parallel_tool_calls
        return qwen_agent.plain_messages(conversation, language, parallel)

    def _render(self, conversation: Conversation, *, generation: bool) -> str:
        return self._template_text(self._plain(conversation), conversation.tools, generation)

    def _template_text(self, plain: list[Json], tools: Sequence[Json], generation: bool) -> str:
        if self.tool_style == "hermes":
            return self._template.render(plain, tools, generation=generation)
        if generation and qwen_agent.is_open(plain):  # the model goes on inside the last message
            text = self._template.render(plain)
            return text[: text.rindex(END)]
        return self._template.render(plain, generation=generation)

    def _marked(self, conversation: Conversation, *, generation: bool) -> str:
        """`_render` with marks for control tokens."""
        if self._is_quick:
            return "".join(piece.text for piece in self._quick.pieces(conversation, generation=generation))
        plain, tools = self._plain(conversation), conversation.tools
        rendered = self._template_text(plain, tools, generation)
        self._tokens.refuse_marks(rendered)
        if not any(map(self._tokens.typed, _strings([plain, *tools]))):
            return self._tokens.marked(rendered)
        for thoughts_apart in (True, False) if self._template.writes_reasoning else (False,):
            told = [_thought_apart(message) for message in plain] if thoughts_apart else plain
            shielded = self._template_text(
                _shielded(told, self._tokens), _shielded(list(tools), self._tokens), generation
            )
            if self._tokens.unshield(shielded) == rendered:
                return self._tokens.marked(shielded)
        raise FormatError(
            f"the text spells out {self._tokens.typed(rendered)[0]}, which the chat template takes for its "
            "own there; reword that message"
        )

    # ---------------------------------------------------------------------------------------------- sequences

    def _sequences(self, conversation: Conversation, train_on: TrainOn) -> list[list[_Piece]]:
        """The training sequences of a conversation, in pieces."""
        if self._is_quick and self._encoded % _AUDIT == 0:
            self._is_quick = self._quick.text(conversation) == self._render(conversation, generation=False)
        self._encoded += 1
        if train_on == "everything":
            return [[_Piece(self._marked(conversation, generation=False), reply=0)]]
        replies = _replies(conversation.messages)
        if self._is_quick or self._template.keeps_prefixes or not replies:
            pieces = self._one_sequence(conversation, replies)
            if pieces is not None:
                return [pieces]
        supervised = _supervised(conversation.messages, train_on)
        kept = [k for k in replies if k in supervised] or replies[-1:]
        return [self._turn(conversation, k) for k in kept]

    def _one_sequence(self, conversation: Conversation, replies: list[int]) -> list[_Piece] | None:
        """The whole conversation, or None where some earlier turn's tokens do not stay as they were."""
        if self._is_quick:
            pieces = self._quick.pieces(conversation)
        else:
            whole = self._marked(conversation, generation=False)
            pieces, position = [], 0
            for k in replies:
                before, answer, _ = (piece.text for piece in self._turn(conversation, k))
                if len(before) < position or not whole.startswith(before + answer):
                    return None
                pieces += [_Piece(whole[position : len(before)]), _Piece(answer, k)]
                position = len(before) + len(answer)
            pieces.append(_Piece(whole[position:]))
        for context, reply in zip(pieces[:-3:2], pieces[1:-2:2], strict=False):
            if not self._separate(context.text, reply.text):
                return None
        return pieces

    def _turn(self, conversation: Conversation, k: int) -> list[_Piece]:
        """Prompt, reply k, and what the template writes after it."""
        before = replace(conversation, messages=conversation.messages[:k])
        until = replace(conversation, messages=conversation.messages[: k + 1])
        prompt, text = self._marked(before, generation=True), self._marked(until, generation=False)
        start, end = self._tokens.mark(START), self._tokens.mark(END)
        begun = prompt[prompt.rfind(start) :]  # the assistant's turn, as far as the prompt has it
        turn = text[text.rfind(start) :]
        after = turn.rfind(end) + 1
        if not turn.startswith(begun) or after <= len(begun):
            raise FormatError(
                f"message {k}: the chat template writes this reply otherwise than its prompt begins it", k
            )
        return [_Piece(prompt), _Piece(turn[len(begun) : after], k), _Piece(turn[after:])]

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


class _QuickRenderer:
    """Hermes-style ChatML written directly, for templates that were found to write exactly this.

    A chat template is rendered in about 20 microseconds, twice for each turn; this takes a few for the
    conversation.
    """

    def __init__(self, default_system: str | None, tokens: ControlTokens) -> None:
        self._tokens = tokens
        mark = tokens.mark
        self._start, self._end = mark(START), mark(END)
        self._call = f'{mark("<tool_call>")}\n{{"name": "', '", "arguments": ', f"}}\n{mark('</tool_call>')}"
        self._result = f"\n{mark('<tool_response>')}\n", f"\n{mark('</tool_response>')}"
        self._head, self._tail = tokens.marked(TOOLS_HEAD), tokens.marked(TOOLS_TAIL)
        self._default = default_system

    def text(self, conversation: Conversation) -> str:
        """The conversation as a template would write it."""
        return self._tokens.text("".join(piece.text for piece in self.pieces(conversation)))

    def pieces(self, conversation: Conversation, *, generation: bool = False) -> list[_Piece]:
        """Context, reply, context, ..., reply, context: an odd number of pieces."""
        messages = conversation.messages
        start, end = self._start, self._end
        pieces: list[_Piece] = []
        context = self._opening(conversation)
        for k, message in enumerate(messages):
            self._tokens.refuse_marks(message.content)
            role = message.role
            if role == "assistant":
                context += f"{start}assistant\n"
                reply = self._reply(message) + end
                if k:
                    pieces += [_Piece(context), _Piece(reply, k)]
                    context = "\n"
                else:
                    context += f"{reply}\n"  # nobody asked: a greeting is context
            elif role == "tool":
                first = k == 0 or messages[k - 1].role != "tool"
                last = k + 1 == len(messages) or messages[k + 1].role != "tool"
                context += f"{start}user" * first + message.content.join(self._result) + f"{end}\n" * last
            elif k or role != "system":
                context += f"{start}{role}\n{message.content}{end}\n"
        pieces.append(_Piece(f"{context}{start}assistant\n" if generation else context))
        return pieces

    def _opening(self, conversation: Conversation) -> str:
        first = conversation.messages[0]
        system = first.content if first.role == "system" else self._default
        if conversation.tools:
            lines = "".join(f"\n{json.dumps(tool, ensure_ascii=False)}" for tool in conversation.tools)
            self._tokens.refuse_marks(lines)
            block = f"{self._head}{lines}{self._tail}"
            system = block if system is None else f"{system}\n\n{block}"
        return "" if system is None else f"{self._start}system\n{system}{self._end}\n"

    def _reply(self, message: Message) -> str:
        if not message.tool_calls:
            return message.content
        name, arguments, close = self._call
        calls = []
        for call in message.tool_calls:
            self._tokens.refuse_marks(call.name + call.arguments)
            calls.append(f"{name}{call.name}{arguments}{normalise_arguments(call.arguments)}{close}")
        return "\n".join([message.content, *calls] if message.content else calls)


def _read(messages: Messages, tools: Tools) -> Conversation:
    return Conversation.from_openai({"messages": messages, "tools": tools})


def _replies(messages: Sequence[Message]) -> list[int]:
    """The messages that some prompt could have asked for."""
    return [k for k, message in enumerate(messages) if k and message.role == "assistant"]


def _supervised(messages: Sequence[Message], train_on: TrainOn) -> set[int]:
    if train_on == "everything":
        return {0}
    replies = _replies(messages)
    return {k for k in (replies[-1:] if train_on == "last" else replies) if messages[k].train is not False}


def _assemble(pieces: list[_Piece], ids: Iterator[list[int]], supervised: set[int]) -> Encoded:
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
    if message["role"] != "assistant" or "reasoning_content" in message or "</think>" not in content:
        return message
    thought = content.split("</think>")[0].rstrip("\n").split("<think>")[-1].lstrip("\n")
    return message | {"reasoning_content": thought, "content": content.split("</think>")[-1].lstrip("\n")}


def _check_option(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise OptionError(f"{name} is {value!r}; expected one of {', '.join(allowed)}")
