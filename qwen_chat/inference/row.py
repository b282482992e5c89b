"""A request that runs: its tokens, the text that they make, and what is said of each.

In: the engine's choices, a token at a time. Out: `TokenEvent`s: text that is complete and no beginning of a stop
string, with the log probabilities that belong to it, and at the end the reason.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field

from qwen_chat.errors import ToolError
from qwen_chat.inference.draft import Drafter
from qwen_chat.inference.events import Fault, FinishReason, Generation, TokenEvent, TokenLogprob
from qwen_chat.inference.kv_cache import KVRow
from qwen_chat.inference.lora import Lora
from qwen_chat.inference.sampling import Choice, GenerationRequest, Sampler
from qwen_chat.inference.text import StopText, TokenText

LOGGER = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Row:
    """A request that runs: its tokens, of which the first `computed` have keys and values."""

    generation: Generation
    sampler: Sampler
    text: StopText
    token_text: TokenText
    tokens: list[int]
    end: int  # length of `tokens` at which max_tokens or the context is reached
    stop_ids: frozenset[int]
    lora: Lora | None
    kv: KVRow
    drafter: Drafter | None  # None: each step computes one token
    computed: int = 0
    started: bool = False  # the prefix cache was asked
    generated: int = 0
    held: list[tuple[int, TokenLogprob]] = field(default_factory=list)  # where its text begins, not shown yet

    @property
    def request(self) -> GenerationRequest:
        return self.generation.request

    @property
    def number(self) -> int:
        return self.lora.number if self.lora else 0

    def advance(self, choice: Choice) -> TokenEvent:
        """Add a token: what it shows, and whether it is the last."""
        self.generated += 1
        if self.generation.first_token_at is None:
            self.generation.first_token_at = time.monotonic()
        reason: FinishReason | None = None
        text, token, stopped = "", choice.token_id, False
        if choice.logprob is not None:
            self.held.append((self.text.length, self._logprob(choice, choice.logprob)))
        if token in self.stop_ids:
            reason = "stop"
        else:
            text, stopped = self.text.feed(self.token_text.bytes_of(token))
            self.tokens.append(token)
            if self.drafter is not None:
                self.drafter.see()
            matcher = self.sampler.matcher
            if stopped or (matcher is not None and matcher.is_complete):
                reason = "stop"
            elif len(self.tokens) >= self.end:
                reason = "length"
            if reason is not None and not stopped:
                text += self.text.finish()
        if reason == "stop" and token in self.stop_ids:
            text = self.text.finish()
        return TokenEvent(text, (token,), self._shown(reason is not None and not stopped), reason)

    def cut_off(self, reason: FinishReason) -> TokenEvent:
        """The end of a row that no token ended, with the text that was held back."""
        text = self.text.finish()
        return TokenEvent(text, logprobs=self._shown(everything=True), finish_reason=reason)

    def _logprob(self, choice: Choice, logprob: float) -> TokenLogprob:
        name = self.token_text.name_of
        top = tuple(TokenLogprob(*name(token), value, token_id=token) for token, value in choice.top)
        return TokenLogprob(*name(choice.token_id), logprob, top, choice.token_id)

    def _shown(self, everything: bool) -> tuple[TokenLogprob, ...]:
        """The log probabilities held back of tokens whose text has begun to be shown; `everything`: of all."""
        shown = self.text.shown
        count = len(self.held) if everything else sum(begin < shown for begin, _ in self.held)
        found, self.held = self.held[:count], self.held[count:]
        return tuple(item for _, item in found)


def failed_choice(error: Exception) -> TokenEvent:
    """The end of a row whose next token could not be chosen; what was not foreseen goes to the log alone."""
    if isinstance(error, ToolError):
        return failure(str(error), "request")
    LOGGER.error("a row's next token could not be chosen", exc_info=error)
    return failure("the engine failed to choose the next token")


def failure(error: str, fault: Fault = "engine") -> TokenEvent:
    """The end of a row that cannot go on."""
    return TokenEvent(finish_reason="error", error=error, fault=fault)
