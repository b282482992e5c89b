"""From the engine's token events to OpenAI's chunks, and from chunks to the whole answer.

In: `(choice, TokenEvent)` in the order they happen. Out: chunks; their fold is the plain answer, so that
a streamed and a plain answer cannot differ.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from qwen_chat.dialects.reader import Delta, StreamParser
from qwen_chat.inference.events import TokenEvent, TokenLogprob
from qwen_chat.service.protocol import (
    Answer,
    Call,
    CallDelta,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChunkChoice,
    ChunkDelta,
    CompletionChoice,
    CompletionLogprobs,
    Function,
    Logprobs,
    PromptDetails,
    ReplyMessage,
    TextCompletion,
    TopLogprob,
    Usage,
    WireFinish,
    WireLogprob,
)

# The engine's reasons for an answer that might have gone on.
CUT_OFF = ("length", "deadline")


class Assembly(Protocol):
    """One answer in the making, of one or several choices."""

    def opening(self) -> Sequence[Answer]:
        """Chunks before the first token."""

    def event(self, choice: int, event: TokenEvent) -> Sequence[Answer]:
        """Chunks that an event brings."""

    def usage(self, usage: Usage) -> Answer:
        """The chunk without choices that counts the tokens."""

    def whole(self, usage: Usage) -> Answer:
        """All chunks so far, folded."""

    def is_done(self, choice: int) -> bool:
        """Whether the choice needs no more tokens."""

    def text(self) -> str:
        """What was answered so far, for the log."""


# --- chat ----------------------------------------------------------------------------------------


@dataclass(slots=True)
class _ChoiceState:
    parser: StreamParser | None
    calls: int = 0
    # A second call began where one is allowed.
    one_too_many: bool = False
    finished: bool = False
    # Those of tokens whose text is still held back.
    logprobs: list[WireLogprob] = field(default_factory=list)


class ChatAssembly:
    """Chat chunks: role first, pieces of text, thinking and calls, one finish reason a choice."""

    def __init__(
        self,
        *,
        model: str,
        choices: int,
        parser: Callable[[], StreamParser | None],
        calls_finish: WireFinish = "tool_calls",
        parallel: bool = True,
        with_logprobs: bool = False,
        end_tokens: Collection[int] = (),
        counts_usage: bool = False,
    ) -> None:
        """`parser` makes one for each choice, or None where the text is the answer as it is.

        `calls_finish`: the finish reason of a reply with calls. `end_tokens`: not part of the answer, nor are their
        log probabilities. `counts_usage`: every chunk has a `usage`, null until the last.
        """
        self._head: dict[str, Any] = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }
        self._chunk_head = {**self._head, "object": "chat.completion.chunk"}
        if counts_usage:
            self._chunk_head["usage"] = None
        self._choices = [_ChoiceState(parser()) for _ in range(choices)]
        self._calls_finish = calls_finish
        self._parallel = parallel
        self._with_logprobs = with_logprobs
        self._end_tokens = end_tokens
        self._folds = [_ChatFold() for _ in range(choices)]

    def opening(self) -> list[Answer]:
        return [
            self._chunk(k, ChunkDelta(role="assistant", content="", refusal=None))
            for k in range(len(self._choices))
        ]

    def event(self, choice: int, event: TokenEvent) -> list[Answer]:
        state = self._choices[choice]
        if state.finished:
            return []
        if self._with_logprobs:
            state.logprobs += token_logprobs(event, self._end_tokens)
        if state.parser is not None:
            deltas = self._deltas(state, state.parser.feed(event.text))
        else:
            deltas = [ChunkDelta(content=event.text)] if event.text else []
        chunks = [self._piece(choice, delta) for delta in deltas]
        if state.one_too_many:
            state.finished = True
            chunks.append(self._chunk(choice, ChunkDelta(), self._finish_reason(state, "stop")))
        elif event.finish_reason is not None:
            chunks += self._finish(choice, event.finish_reason)
        return chunks

    def is_done(self, choice: int) -> bool:
        return self._choices[choice].finished

    def usage(self, usage: Usage) -> Answer:
        return ChatChunk(**{**self._chunk_head, "choices": [], "usage": usage})

    def whole(self, usage: Usage) -> Answer:
        choices = [fold.choice(k, self._with_logprobs) for k, fold in enumerate(self._folds)]
        return ChatCompletion(**self._head, object="chat.completion", choices=choices, usage=usage)

    def text(self) -> str:
        """What was answered, for the log."""
        return "\n".join(fold.content for fold in self._folds)

    def _deltas(self, state: _ChoiceState, parsed: Sequence[Delta]) -> list[ChunkDelta]:
        deltas = []
        for piece in parsed:
            if piece.content:
                deltas.append(ChunkDelta(content=piece.content))
            if piece.reasoning:
                deltas.append(ChunkDelta(reasoning_content=piece.reasoning))
            if piece.name is not None and not self._parallel and state.calls == 1:
                # One call was allowed, and it is whole.
                state.one_too_many = True
                break
            deltas += self._call_deltas(state, piece)
        return deltas

    def _call_deltas(self, state: _ChoiceState, piece: Delta) -> list[ChunkDelta]:
        index = piece.index if piece.index is not None else state.calls - 1
        deltas = []
        if piece.name is not None:
            state.calls += 1
            begun = CallDelta(
                index=index,
                id=f"call_{uuid.uuid4().hex[:24]}",
                type="function",
                function=Function(name=piece.name, arguments=""),
            )
            deltas.append(ChunkDelta(tool_calls=[begun]))
        if piece.arguments:
            more = CallDelta(index=index, function=Function(arguments=piece.arguments))
            deltas.append(ChunkDelta(tool_calls=[more]))
        return deltas

    def _finish(self, choice: int, reason: str) -> list[Answer]:
        state = self._choices[choice]
        held_back = self._deltas(state, state.parser.finish()) if state.parser is not None else []
        chunks = [self._piece(choice, delta) for delta in held_back]
        if state.logprobs:
            chunks.append(self._piece(choice, ChunkDelta(content="")))
        state.finished = True
        return [*chunks, self._chunk(choice, ChunkDelta(), self._finish_reason(state, reason))]

    def _finish_reason(self, state: _ChoiceState, reason: str) -> WireFinish:
        if reason in CUT_OFF:
            return "length"
        # A stop string of the client's cut it.
        cut = state.parser is not None and state.parser.cut
        return self._calls_finish if state.calls and not cut else "stop"

    def _piece(self, choice: int, delta: ChunkDelta) -> Answer:
        """A chunk with the log probabilities of all tokens since the last one."""
        state = self._choices[choice]
        taken, state.logprobs = state.logprobs, []
        return self._chunk(choice, delta, logprobs=Logprobs(content=taken, refusal=None) if taken else None)

    def _chunk(
        self,
        choice: int,
        delta: ChunkDelta,
        reason: WireFinish | None = None,
        logprobs: Logprobs | None = None,
    ) -> Answer:
        part = ChunkChoice(index=choice, delta=delta, logprobs=logprobs, finish_reason=reason)
        self._folds[choice].add(part)
        return ChatChunk(**self._chunk_head, choices=[part])


class _ChatFold:
    """The sum of one choice's chunks."""

    def __init__(self) -> None:
        self.content = ""
        self.reasoning = ""
        self.calls: list[Call] = []
        self.logprobs: list[WireLogprob] = []
        self.reason: WireFinish | None = None

    def add(self, chunk: ChunkChoice) -> None:
        self.content += chunk.delta.content or ""
        self.reasoning += chunk.delta.reasoning_content or ""
        for piece in chunk.delta.tool_calls or ():
            if piece.id is not None:
                function = Function(name=piece.function.name, arguments=piece.function.arguments or "")
                self.calls.append(Call(id=piece.id, type="function", function=function))
            else:
                function = self.calls[-1].function
                arguments = (function.arguments or "") + (piece.function.arguments or "")
                function = Function(name=function.name, arguments=arguments)
                self.calls[-1] = self.calls[-1].model_copy(update={"function": function})
        if chunk.logprobs is not None:
            self.logprobs += chunk.logprobs.content or ()
        self.reason = chunk.finish_reason or self.reason

    def choice(self, index: int, with_logprobs: bool) -> ChatChoice:
        message: dict[str, Any] = {"role": "assistant", "content": self.content, "refusal": None}
        if self.calls:
            message |= {"content": self.content or None, "tool_calls": self.calls}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        return ChatChoice(
            index=index,
            message=ReplyMessage(**message),
            logprobs=Logprobs(content=self.logprobs, refusal=None) if with_logprobs else None,
            finish_reason=self.reason or "stop",
        )


# --- plain completions ---------------------------------------------------------------------------


class TextAssembly:
    """Chunks of plain completions: text as it comes."""

    def __init__(
        self,
        *,
        model: str,
        choices: int,
        with_logprobs: bool = False,
        end_tokens: Collection[int] = (),
        counts_usage: bool = False,
    ) -> None:
        """The arguments are those of ChatAssembly."""
        self._head: dict[str, Any] = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        self._nulls: dict[str, Any] = {"usage": None} if counts_usage else {}
        self._with_logprobs = with_logprobs
        self._end_tokens = end_tokens
        self._parts: list[list[CompletionChoice]] = [[] for _ in range(choices)]
        self._offsets = [0] * choices
        self._finished = [False] * choices

    def opening(self) -> list[Answer]:
        return []

    def event(self, choice: int, event: TokenEvent) -> list[Answer]:
        logprobs = self._logprobs(choice, event)
        reason: WireFinish | None = None
        if event.finish_reason is not None:
            reason = "length" if event.finish_reason in CUT_OFF else "stop"
        if self._finished[choice] or not (event.text or reason or logprobs):
            return []
        self._finished[choice] = reason is not None
        part = CompletionChoice(index=choice, text=event.text, logprobs=logprobs, finish_reason=reason)
        self._parts[choice].append(part)
        return [TextCompletion(**self._head, choices=[part], **self._nulls)]

    def is_done(self, choice: int) -> bool:
        return self._finished[choice]

    def usage(self, usage: Usage) -> Answer:
        return TextCompletion(**self._head, choices=[], usage=usage)

    def whole(self, usage: Usage) -> Answer:
        choices = [
            CompletionChoice(
                index=k,
                text="".join(part.text for part in parts),
                logprobs=_all_logprobs([part.logprobs for part in parts]),
                finish_reason=parts[-1].finish_reason if parts else "stop",
            )
            for k, parts in enumerate(self._parts)
        ]
        return TextCompletion(**self._head, choices=choices, usage=usage)

    def text(self) -> str:
        """What was answered, for the log."""
        return "\n".join("".join(part.text for part in parts) for parts in self._parts)

    def _logprobs(self, choice: int, event: TokenEvent) -> CompletionLogprobs | None:
        found = token_logprobs(event, self._end_tokens) if self._with_logprobs else []
        if not found:
            return None
        offsets = []
        for one in found:
            offsets.append(self._offsets[choice])
            self._offsets[choice] += len(one.token)
        return CompletionLogprobs(
            tokens=[one.token for one in found],
            token_logprobs=[one.logprob for one in found],
            top_logprobs=[{top.token: top.logprob for top in one.top_logprobs} for one in found],
            text_offset=offsets,
        )


def _all_logprobs(parts: Sequence[CompletionLogprobs | None]) -> CompletionLogprobs | None:
    found = [part for part in parts if part is not None]
    if not found:
        return None
    return CompletionLogprobs(
        tokens=[token for part in found for token in part.tokens],
        token_logprobs=[value for part in found for value in part.token_logprobs],
        top_logprobs=[value for part in found for value in part.top_logprobs or ()],
        text_offset=[value for part in found for value in part.text_offset],
    )


# --- both ----------------------------------------------------------------------------------------


def token_logprobs(event: TokenEvent, end_tokens: Collection[int]) -> list[WireLogprob]:
    """The log probabilities of an event's tokens in OpenAI's shape."""
    return [
        WireLogprob(**_wire_token(taken), top_logprobs=[TopLogprob(**_wire_token(top)) for top in taken.top])
        for taken in event.logprobs
        if taken.token_id not in end_tokens
    ]


def usage_of(prompt: int, cached: int, completion: int) -> Usage:
    """Token counts in OpenAI's shape."""
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        prompt_tokens_details=PromptDetails(cached_tokens=cached),
    )


def _wire_token(taken: TokenLogprob) -> dict[str, Any]:
    """JSON has no infinity: OpenAI writes -9999.0 for a token that cannot be."""
    return {"token": taken.token, "logprob": max(taken.logprob, -9999.0), "bytes": list(taken.raw)}
